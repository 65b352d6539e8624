//! Which tests begin first, how many at once, and how long each took.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use libtest_mimic::{Failed, Trial};

/// So many are told of at the end.
const TOLD: usize = 10;

/// Those that take longest, where guests are emulated: they begin first, so that nobody waits for one of them at
/// the end.
const LONGEST: &[&str] = &[
    "the_vendors_sdks_and_an_agent_run_as_they_are",
    "the_vendors_sdks_for_node_and_codex_run_as_they_are",
    // These boot for themselves, while others wait for the suite's warm generation.
    "the_users_warm_up_is_in_every_later_run",
    "a_booted_machine_gives_freed_memory_back",
    "a_machine_is_forked_again_and_again_and_its_layers_stay_few",
    "whenever_in_a_merge_a_machine_is_killed_its_relatives_and_snapshots_are_whole",
    "a_child_of_a_child_of_a_child_has_what_each_of_them_wrote",
    "a_machine_goes_on_and_older_snapshots_are_whole_whenever_a_snapshot_is_killed",
    "children_and_clones_differ_in_all_that_is_a_machines_own",
    "every_byte_and_the_program_are_as_they_were",
    "a_flipped_bit_anywhere_is_refused_or_ends_the_machine_or_makes_no_difference",
    "children_go_on_from_one_memory_and_nobody_sees_anothers_writes",
    "connections_to_elsewhere_are_reset_and_the_parents_go_on_as_root",
    "a_fork_during_another_fork_or_a_snapshot_or_a_command_disturbs_nobody",
    "a_fork_on_a_full_disk_is_told_as_root",
    "memory_and_disks_of_a_tree_are_freed_in_whatever_order_its_processes_are_killed",
    "a_machine_whose_pager_is_killed_or_stopped_ends_and_says_so",
    "a_machine_over_a_generation_gives_freed_memory_back",
    "a_fork_without_processes_is_told_as_root",
];

static TIMES: Mutex<Vec<(Duration, &str)>> = Mutex::new(Vec::new());

/// Runs a test.
pub fn of(name: &'static str, test: fn()) -> Result<(), Failed> {
    /// Notes the time of one that panics, too.
    struct Timer(&'static str, Instant);
    impl Drop for Timer {
        fn drop(&mut self) {
            let mut times = TIMES.lock().unwrap_or_else(PoisonError::into_inner);
            times.push((self.1.elapsed(), self.0));
        }
    }
    let _timer = Timer(name, Instant::now());
    test();
    Ok(())
}

/// One more than there are processors: tests wait now and then.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from) + 1
}

/// Puts those first that take longest, and spreads each file's others over the whole: many of a file wait for one
/// machine.
pub fn sort(trials: &mut Vec<Trial>) {
    let file = |trial: &Trial| -> String {
        let name = trial.name().rsplit_once("::");
        name.map(|(file, _)| file.to_owned()).unwrap_or_default()
    };
    let mut counts = BTreeMap::<String, usize>::new();
    for trial in &*trials {
        *counts.entry(file(trial)).or_default() += 1;
    }
    let mut seen = BTreeMap::<String, usize>::new();
    let mut placed: Vec<_> = std::mem::take(trials)
        .into_iter()
        .map(|trial| {
            let name = trial.name().rsplit("::").next().unwrap_or_default();
            let longest = LONGEST.iter().position(|it| *it == name);
            let place = seen.entry(file(&trial)).or_default();
            let part = (2 * *place + 1) * 1000 / counts[&file(&trial)];
            *place += 1;
            ((longest.unwrap_or(LONGEST.len()), part), trial)
        })
        .collect();
    let found = placed
        .iter()
        .filter(|((longest, _), _)| *longest < LONGEST.len());
    assert_eq!(
        found.count(),
        LONGEST.len(),
        "a name in LONGEST is no test's"
    );
    placed.sort_by_key(|(place, _)| *place);
    trials.extend(placed.into_iter().map(|(_, trial)| trial));
}

/// Says which have taken longest.
pub fn tell() {
    let mut times = TIMES.lock().unwrap_or_else(PoisonError::into_inner);
    times.sort_unstable_by(|a, b| b.cmp(a));
    let all: Duration = times.iter().map(|(time, _)| *time).sum();
    if times.is_empty() {
        return;
    }
    eprintln!("the longest tests (all together {} s):", all.as_secs());
    for (time, name) in times.iter().take(TOLD) {
        eprintln!("{:7.1} s  {name}", time.as_secs_f64());
    }
}
