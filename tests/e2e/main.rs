//! End-to-end tests: real guests on the real /dev/kvm. Each file is a promise to the user.
//!
//! `cargo test -p ratoon-tests` runs them; a word after `--` selects. Without a usable /dev/kvm they
//! are counted as ignored, and a line on stderr says why.

mod a_chain_of_forks_may_be_of_any_length;
mod a_child_is_not_its_parent;
mod a_command_runs_in_a_real_guest;
mod a_damaged_snapshot_is_never_a_wrong_byte;
mod a_dead_machine_gives_back_what_only_it_had;
mod a_fork_ends_in_a_clear_result_for_each_child;
mod a_fork_is_many_machines;
mod a_guests_end_is_told;
mod a_killed_snapshot_harms_nobody;
mod a_machine_can_be_left_running;
mod a_machine_killed_in_a_merge_harms_nobody;
mod a_measurement_can_be_checked;
mod a_measurement_says_what_went_wrong;
mod a_program_cannot_harm_its_machine;
mod a_restored_machine_gets_the_hosts_runtime;
mod a_restored_machine_is_the_same_machine;
mod a_snapshot_goes_on_where_it_was;
mod a_snapshot_holds_only_what_is_new;
mod a_snapshot_travels_as_one_file;
mod a_warm_image_starts_where_its_warm_up_ended;
mod an_agent_fixes_a_bug_without_a_key;
mod an_agent_works_in_a_machine;
mod an_image_is_never_written;
mod any_program_calls_a_model;
mod bad_input_is_refused_by_name;
mod commands_run_in_a_running_machine;
mod memory_is_fetched_when_it_is_touched;
mod memory_that_a_guest_frees_goes_back;
mod nothing_is_left_behind;
mod programs_from_npm_call_a_model;
mod scene;
mod shared;
mod soak;
mod times;
mod warm_shells_cost_a_child_no_process;

use libtest_mimic::{Arguments, Trial};

/// The trials of a file: each function is one, by its own name.
#[macro_export]
macro_rules! promises {
    ($($name:ident),+ $(,)?) => {
        pub fn trials() -> Vec<libtest_mimic::Trial> {
            vec![$(libtest_mimic::Trial::test(
                concat!(module_path!(), "::", stringify!($name)),
                || $crate::times::of(stringify!($name), $name),
            )),+]
        }
    };
}

fn main() {
    if soak::is_wanted() {
        return soak::run();
    }
    if warm_shells_cost_a_child_no_process::is_wanted() {
        return warm_shells_cost_a_child_no_process::run();
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert_with(times::threads);
    let need_a_guest = [
        a_chain_of_forks_may_be_of_any_length::trials(),
        a_child_is_not_its_parent::trials(),
        a_command_runs_in_a_real_guest::trials(),
        a_damaged_snapshot_is_never_a_wrong_byte::trials(),
        a_dead_machine_gives_back_what_only_it_had::trials(),
        a_fork_ends_in_a_clear_result_for_each_child::trials(),
        a_fork_is_many_machines::trials(),
        a_guests_end_is_told::trials(),
        a_killed_snapshot_harms_nobody::trials(),
        a_machine_can_be_left_running::trials(),
        a_machine_killed_in_a_merge_harms_nobody::trials(),
        a_measurement_can_be_checked::trials(),
        a_measurement_says_what_went_wrong::trials(),
        a_program_cannot_harm_its_machine::trials(),
        a_restored_machine_gets_the_hosts_runtime::trials(),
        a_restored_machine_is_the_same_machine::trials(),
        a_snapshot_goes_on_where_it_was::trials(),
        a_snapshot_holds_only_what_is_new::trials(),
        a_snapshot_travels_as_one_file::trials(),
        a_warm_image_starts_where_its_warm_up_ended::trials(),
        an_agent_fixes_a_bug_without_a_key::trials(),
        an_agent_works_in_a_machine::trials(),
        an_image_is_never_written::trials(),
        any_program_calls_a_model::trials(),
        commands_run_in_a_running_machine::trials(),
        memory_is_fetched_when_it_is_touched::trials(),
        memory_that_a_guest_frees_goes_back::trials(),
        programs_from_npm_call_a_model::trials(),
        nothing_is_left_behind::trials(),
        warm_shells_cost_a_child_no_process::trials(),
    ];
    let kvm = ratoon_tests::kvm();
    if let Err(error) = &kvm {
        eprintln!("\nSKIPPED: /dev/kvm cannot be used ({error}): tests with guests are ignored\n");
    }
    let ignore = |trial: Trial| trial.with_ignored_flag(kvm.is_err());
    let mut trials: Vec<Trial> = need_a_guest.into_iter().flatten().map(ignore).collect();
    trials.extend(bad_input_is_refused_by_name::trials());
    trials.extend(a_measurement_says_what_went_wrong::without_guests::trials());
    times::sort(&mut trials);
    let soaks = soak::is_asked_for();
    if !soaks {
        eprintln!(
            "\nNOT RUN: the soak: RATOON_SOAK_SECONDS=600 runs it for ten minutes beside the others\n"
        );
    }
    // It takes as long as it is told to: the first, so that the others go on beside it.
    let soak = |trial: Trial| trial.with_ignored_flag(kvm.is_err() || !soaks);
    trials.splice(..0, soak::trials().into_iter().map(soak));
    let conclusion = libtest_mimic::run(&arguments, trials);
    // It may find that something is left, and says so; the rest is cleaned up all the same.
    let ended = std::panic::catch_unwind(shared::end);
    ratoon_tests::cache::end();
    times::tell();
    if let Err(panic) = ended {
        std::panic::resume_unwind(panic);
    }
    conclusion.exit();
}
