//! Whatever is done to machines, and whoever is killed in the middle of it: each holds every byte that it
//! should, and nothing is left behind.
//!
//! The soak runs in a process of its own (this program, started once more), because it counts its own
//! descriptors. From a seed it forks, snapshots, restores, rolls back, commits, suspends, pauses and removes
//! machines, kills commands, machines and pagers, and asks witnesses in the machines what they hold; a model
//! knows what they should say. When they do not, it says its seed and what was done last.
//!
//! It runs when `RATOON_SOAK_SECONDS` says how long; `RATOON_SOAK_SEED` is what it begins from (the time). So
//! `RATOON_SOAK_SECONDS=3600 cargo test -p ratoon-tests -- soak` is an hour, and 0 the least. Kills come when
//! the clock says, so a seed gives the same plan and not always the same outcome.

mod acts;
mod left;
mod model;
mod population;

use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use self::population::Population;

crate::promises![machines_hold_every_byte_and_nothing_is_left_whoever_is_killed];

/// There when this program is the soak.
const PROCESS: &str = "RATOON_SOAK_PROCESS";
const SECONDS: &str = "RATOON_SOAK_SECONDS";
const SEED: &str = "RATOON_SOAK_SEED";
/// What it does at least, however slow the host is.
const LEAST_ACTS: u64 = 20;
/// How often it looks for what has been left, in acts.
const LOOK_EVERY: u64 = 10;

fn machines_hold_every_byte_and_nothing_is_left_whoever_is_killed() {
    let program = std::env::current_exe().expect("a test has an executable");
    let mut soak = Command::new(program);
    let soak = ratoon_tests::cache::share(soak.env(PROCESS, "1")).status();
    let soak = soak.expect("it can be started once more");
    assert!(soak.success(), "the soak has failed: {soak}; see above");
}

/// Whether this process is to be the soak and not the tests.
pub fn is_wanted() -> bool {
    std::env::var_os(PROCESS).is_some()
}

/// Whether somebody says how long it is to take.
pub fn is_asked_for() -> bool {
    std::env::var_os(SECONDS).is_some()
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{variable}={text}: not a number")))
}

/// The soak.
pub fn run() {
    let time = || SystemTime::now().duration_since(UNIX_EPOCH);
    let by_time = || time().map_or(0, |since| since.as_secs());
    let seed = number(SEED).unwrap_or_else(by_time);
    let length = Duration::from_secs(number(SECONDS).unwrap_or_default());
    eprintln!("soak: {SEED}={seed}, for {} s", length.as_secs());
    let begun = Instant::now();
    let mut population = Population::begin(seed);
    while begun.elapsed() < length || population.acts < LEAST_ACTS {
        population.act();
        if population.acts.is_multiple_of(LOOK_EVERY) {
            population.nothing_is_left_over();
        }
    }
    let done = population.end();
    eprintln!("soak: {} s, {done}", begun.elapsed().as_secs());
}
