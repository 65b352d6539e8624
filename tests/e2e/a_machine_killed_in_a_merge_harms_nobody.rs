//! A machine merges the layers of its memory and disk while it runs. Killed over that, at whatever moment, it
//! takes nothing from its relatives: those from before the merge, those from its middle, and snapshots.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use ratoon_engine::fork::ForkSpec;
use ratoon_tests::{PATIENCE, Ratoon};
use rustix::process::{Pid, Signal, kill_process};

use crate::a_chain_of_forks_may_be_of_any_length::{check, mark, start};

crate::promises![whenever_in_a_merge_a_machine_is_killed_its_relatives_and_snapshots_are_whole];

/// Freezes of the first machine: those to be killed have as many layers from it.
const INHERITED: usize = 5;
/// Freezes of a machine's own after which it merges: `OFTEN` in vmm/src/merge.rs.
const OWN: usize = 4;

/// When it is killed.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// Its thread is there: it merges memory.
    Begun,
    /// Some milliseconds later.
    Amid,
    /// The file of the disk's merged layer is there, and has not all of it.
    Joining,
    /// Old layers are in its folder still, because somebody makes links to them.
    Linked,
    /// Old layers have gone.
    Over,
}

const MOMENTS: [Moment; 5] = [
    Moment::Begun,
    Moment::Amid,
    Moment::Joining,
    Moment::Linked,
    Moment::Over,
];

/// Waits for the moment, and kills the machine then.
fn kill_at(moment: Moment, pid: i32, folder: &Path) {
    let is_begun = || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
        let mut tasks = tasks.into_iter().flatten().flatten();
        tasks.any(|task| {
            std::fs::read(task.path().join("comm")).is_ok_and(|name| name == b"merge\n")
        })
    };
    let is_joined = || folder.join("joined-0.qcow2").exists();
    let end = Instant::now() + PATIENCE;
    let until = |is_there: &dyn Fn() -> bool| {
        while !is_there() {
            assert!(Instant::now() < end, "it does not come to {moment:?}");
            std::thread::yield_now();
        }
    };
    match moment {
        Moment::Begun => until(&is_begun),
        Moment::Amid => {
            until(&is_begun);
            std::thread::sleep(Duration::from_millis(5));
        }
        Moment::Joining => until(&is_joined),
        Moment::Linked => {
            until(&is_joined);
            std::thread::sleep(Duration::from_secs(1));
        }
        Moment::Over => until(&|| is_joined() && !is_begun()),
    }
    let pid = Pid::from_raw(pid).expect("a pid");
    kill_process(pid, Signal::KILL).expect("it lives");
}

fn whenever_in_a_merge_a_machine_is_killed_its_relatives_and_snapshots_are_whole() {
    let ratoon = Ratoon::warm();
    let engine = ratoon.engine();
    let fork = |vm: &str, spec: &ForkSpec| {
        let entry = engine.store().find(vm).expect("its record");
        engine.fork(&entry.dir, spec, None)
    };
    start(&ratoon);
    for step in 0..INHERITED {
        mark(&ratoon, "box", step);
        drop(fork("box", &ForkSpec::new(1)).expect("it can be forked"));
    }
    let last = INHERITED - 1;
    ratoon.run(["snapshot", "box", "point"]).ok();
    let count = (MOMENTS.len() + 1).to_string();
    ratoon
        .run(["fork", "box", "-n", &count, "--name", "kid"])
        .ok();
    let sibling = format!("kid-{}", MOMENTS.len());
    for (number, moment) in MOMENTS.into_iter().enumerate() {
        let vm = format!("kid-{number}");
        for step in 0..OWN {
            mark(&ratoon, &vm, INHERITED + step);
            if step + 1 < OWN {
                drop(fork(&vm, &ForkSpec::new(1)).expect("it can be forked"));
            }
        }
        let entry = engine.store().find(&vm).expect("its record");
        let (folder, record) = (entry.dir.path(), entry.record.expect("it is whole"));
        let pid = record.vmm.expect("it runs").pid;
        let links = matches!(moment, Moment::Linked).then(|| {
            let links = File::create(folder.join("layers.lock")).expect("its folder is there");
            links.lock_shared().expect("nobody removes layers");
            links
        });
        let amid = format!("amid-{number}");
        let spec = ForkSpec {
            names: vec![amid.clone()],
            detached: true,
            ..ForkSpec::new(1)
        };
        let forked = std::thread::scope(|scope| {
            let killer = scope.spawn(|| kill_at(moment, pid, folder));
            let forked = fork(&vm, &spec);
            killer.join().expect("it is killed");
            forked
        });
        drop(links);
        // The fork may have needed the machine when it was killed; if not, the child is as good as any.
        let mut children = forked.into_iter().flat_map(|forked| forked.children);
        if let Some(Ok(child)) = children.next() {
            child.detach();
            check(&ratoon, &amid, last + OWN);
            ratoon.run(["rm", "-f", &amid]).ok();
        }
        ratoon.run(["rm", "-f", &vm]).ok();
        let left = folder.exists();
        assert!(!left, "{moment:?}: its folder is left");
        check(&ratoon, "box", last);
        check(&ratoon, &sibling, last);
    }
    // Their layers are as good as ever for what comes next.
    mark(&ratoon, &sibling, INHERITED);
    ratoon.run(["fork", &sibling, "--name", "late"]).ok();
    check(&ratoon, "late-0", INHERITED);
    ratoon.run(["rm", "-f", "box", "late-0", &sibling]).ok();
    ratoon.run(["snapshots", "verify", "point"]).ok();
    ratoon.run(["restore", "point", "--name", "again"]).ok();
    check(&ratoon, "again", last);
    ratoon.run(["rm", "-f", "again"]).ok();
    drop(engine);
    ratoon.nothing_is_left();
}
