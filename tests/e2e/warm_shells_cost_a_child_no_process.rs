//! An engine with warm shells: children take processes that are there already, and none of them stays when
//! the engine has gone.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ratoon_engine::fork::ForkSpec;
use ratoon_engine::runtime::{ExecIo, RuntimeError};
use ratoon_engine::vm::Vm;
use ratoon_engine::{Engine, RunSpec};
use ratoon_protocol::ExecParams;
use ratoon_tests::{PATIENCE, Ratoon, cache};
use rustix::process::{Pid, Signal, kill_process};

crate::promises![
    children_take_the_processes_that_are_ready_and_others_are_made,
    shells_end_with_their_engine_however_that_ends,
];

/// There when this program is an engine with shells and nothing else.
const PROCESS: &str = "RATOON_SHELLS_PROCESS";
const CLASS: (u32, u64) = (1, 256);

/// Whether this process is to be the engine and not the tests.
pub fn is_wanted() -> bool {
    std::env::var_os(PROCESS).is_some()
}

/// The engine: says whom it has made, and waits for its end.
pub fn run() {
    let ratoon = Ratoon::new();
    let _engine = engine(&ratoon, 3);
    // A process is a shell when it has become the program.
    wait_for("there are not as many shells", || {
        shells(std::process::id()).len() == 3
    });
    let shells = shells(std::process::id());
    println!("{shells:?} {}", ratoon.state_dir().display());
    let _ = std::io::stdin().read_line(&mut String::new());
}

fn engine(ratoon: &Ratoon, shells: usize) -> Engine {
    let engine = ratoon.engine().with_shells([(CLASS, shells)].into());
    engine.expect("an engine with shells")
}

fn read(path: String) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Children of a process that were started as shells and live: other tests' engines have none of this one's.
fn shells(parent: u32) -> BTreeSet<i32> {
    let pids = std::fs::read_dir("/proc")
        .expect("/proc is there")
        .flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let stat = read(format!("/proc/{pid}/stat"));
        let mut tail = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace();
        let lives = tail.next().is_some_and(|state| state != "Z");
        let is_its = tail.next() == Some(parent.to_string().as_str());
        lives && is_its && read(format!("/proc/{pid}/cmdline")).contains("--shell")
    })
    .collect()
}

/// Of one engine in this process, which has no other with shells.
fn own_shells() -> BTreeSet<i32> {
    shells(std::process::id())
}

fn kill(pid: i32) {
    let pid = Pid::from_raw(pid).expect("a pid");
    kill_process(pid, Signal::KILL).expect("it lives");
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn says(vm: &mut Vm, line: &str) -> Result<String, RuntimeError> {
    let params = ExecParams {
        shell: Some(line.into()),
        ..ExecParams::default()
    };
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let io = ExecIo {
        stdin: None,
        stdout: &mut out,
        stderr: &mut err,
    };
    vm.runtime()?.exec(&params, io)?;
    Ok(String::from_utf8_lossy(&out).into_owned())
}

fn children_take_the_processes_that_are_ready_and_others_are_made() {
    let ratoon = Ratoon::warm();
    let engine = engine(&ratoon, 2);
    // A process's command line is not there yet at the moment in which who has started it goes on.
    wait_for("no shells are there", || own_shells().len() == 2);
    let spec = RunSpec {
        memory_mib: CLASS.1,
        ..RunSpec::new("debian")
    };
    let mut parent = engine.start(&spec, None).expect("it starts").vm;
    says(&mut parent, "echo of the parent > /run/word").expect("it is written");
    // The start may have taken one of them, and made another.
    wait_for("no shells are made", || {
        own_shells().len() == 2 + taken(&parent)
    });
    let ready: BTreeSet<_> = own_shells()
        .difference(&pids(&[&parent]))
        .copied()
        .collect();

    // More children than shells: whoever finds none starts a process, as without.
    let forked = engine.fork(parent.dir(), &ForkSpec::new(3), None);
    let children = forked.expect("it is forked").children;
    let mut children: Vec<Vm> = children
        .into_iter()
        .map(|it| it.expect("a child"))
        .collect();
    let pids = pids(&children.iter().collect::<Vec<_>>());
    assert!(
        ready.is_subset(&pids),
        "{ready:?} are ready, {pids:?} are children"
    );
    for child in &mut children {
        let word = says(child, "cat /run/word").expect("it runs");
        assert_eq!(word, "of the parent\n");
    }
    let unused = || {
        own_shells()
            .difference(&pids)
            .copied()
            .collect::<BTreeSet<_>>()
    };
    let others = || unused().len() - taken(&parent);
    wait_for("no others are made", || others() == 2);
    assert_eq!(engine.shells().expect("its shells").count(CLASS), 2);

    // One that has died meanwhile is passed over.
    let own = pids_of(&parent);
    let victim = unused().into_iter().find(|pid| *pid != own);
    kill(victim.expect("one is ready"));
    let forked = engine.fork(parent.dir(), &ForkSpec::new(2), None);
    for child in forked.expect("it is forked").children {
        let word = says(&mut child.expect("a child"), "cat /run/word").expect("it runs");
        assert_eq!(word, "of the parent\n");
    }
    drop(children);
    drop(parent);
    drop(engine);
    wait_for("shells are left", || own_shells().is_empty());
    ratoon.nothing_is_left();
}

fn pids_of(vm: &Vm) -> i32 {
    let vmm = vm.record().vmm.as_ref();
    vmm.expect("it has a process").pid
}

fn pids(vms: &[&Vm]) -> BTreeSet<i32> {
    vms.iter().map(|vm| pids_of(vm)).collect()
}

/// Whether it was a shell: 1 or 0.
fn taken(vm: &Vm) -> usize {
    usize::from(own_shells().contains(&pids_of(vm)))
}

fn shells_end_with_their_engine_however_that_ends() {
    let program = std::env::current_exe().expect("a test has an executable");
    let mut engine = Command::new(program);
    let mut engine = cache::share(engine.env(PROCESS, "1"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it can be started once more");
    let mut line = String::new();
    let stdout = engine.stdout.take().expect("it is piped");
    let read = BufReader::new(stdout).read_line(&mut line);
    read.expect("it says whom it has made");
    let (made, state) = line.trim().rsplit_once(' ').expect("and where");
    let made = made.trim_matches(['{', '}']).split(", ");
    let made: Vec<i32> = made.map(|pid| pid.parse().expect("a pid")).collect();
    assert_eq!(made.len(), 3, "{line}");
    engine.kill().expect("it lives");
    engine.wait().expect("it is ours");
    let lives = |pid: &i32| read_is_shell(*pid);
    wait_for("shells outlive their engine", || !made.iter().any(lives));
    std::fs::remove_dir_all(state).expect("its directory can be removed");
}

fn read_is_shell(pid: i32) -> bool {
    read(format!("/proc/{pid}/cmdline")).contains("--shell")
}
