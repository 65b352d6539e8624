//! `ratoon snapshot` that is killed, whenever it is: the machine goes on, older snapshots are whole, and
//! nothing is left behind.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ratoon_engine::vm::control::Control;
use ratoon_engine::vm::store::Store;
use ratoon_tests::{Random, Ratoon};

crate::promises![
    a_machine_goes_on_and_older_snapshots_are_whole_whenever_a_snapshot_is_killed,
    a_full_disk_ends_a_snapshot_and_nothing_else_as_root,
];

/// Kills spread over the whole run of a command, and kills while the machine stands still.
const SPREAD: u32 = 8;
const FROZEN: u32 = 4;

fn exec(ratoon: &Ratoon, vm: &str, line: &str) -> String {
    ratoon.run(["exec", vm, "--", "sh", "-c", line]).ok().stdout
}

/// The machine's programs run: one of them is asked, and answers. (Without a process more than that takes: where
/// the guest's kernel is emulated each costs a second.)
const GOES_ON: &str = "echo kept > /run/asks; read word < /run/answers; echo $word";

fn begin(ratoon: &Ratoon, vm: &str) {
    ratoon
        .run(["run", "-d", "--name", vm, "--memory", "256M"])
        .ok();
    let line = "mkfifo /run/asks /run/answers; while read word < /run/asks; do \
                echo $word > /run/answers; done >/dev/null 2>&1 &";
    exec(ratoon, vm, line);
    assert_eq!(exec(ratoon, vm, GOES_ON), "kept\n");
}

/// Where a machine's disk goes on, as its record has it and as its VMM says.
fn layer(ratoon: &Ratoon, vm: &str) -> (Option<PathBuf>, Option<PathBuf>) {
    let entry = Store::new(ratoon.vms_dir()).find(vm).expect("it is there");
    let record = entry.record.expect("its record");
    let control = Control::new(entry.dir.control_socket(), Duration::from_secs(60));
    let status = control.status().expect("its VMM answers");
    (
        record.config.disks[0].layer.clone(),
        status.disks.first().map(|disk| disk.layer.clone()),
    )
}

/// What is half written in the store.
fn half_written(store: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(store).expect("the store is there");
    let names = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with(".tmp-")).collect()
}

fn a_machine_goes_on_and_older_snapshots_are_whole_whenever_a_snapshot_is_killed() {
    let ratoon = Ratoon::warm();
    begin(&ratoon, "first");
    let from = Instant::now();
    ratoon.run(["snapshot", "first", "old"]).ok();
    let whole = from.elapsed();
    let record = std::fs::read_dir(ratoon.vms_dir()).expect("records");
    let record = record.flatten().find(|entry| entry.path().is_dir());
    let note = record.expect("its record").path().join("standstill");
    let store = ratoon.state_dir().join("ratoon/snapshots");

    let mut random = Random::new(0x5eed_0004);
    let mut left_frozen = 0;
    for round in 0..SPREAD + FROZEN {
        let name = format!("new-{round}");
        let mut args = vec!["snapshot", "first", &name];
        if round % 2 == 1 {
            args.push("--compress");
        }
        let mut child = ratoon
            .command(args)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("it can be started");
        if round < SPREAD {
            // Somewhere in the round's share of the time that the whole takes.
            let share = (f64::from(round) + random.fraction()) / f64::from(SPREAD);
            std::thread::sleep(whole.mul_f64(share));
        } else {
            while !note.exists() && child.try_wait().expect("it is our child").is_none() {
                std::thread::yield_now();
            }
            // The last but one of them at once; a stop of all programs takes longer than no time at all.
            if round != SPREAD + FROZEN - 1 {
                std::thread::sleep(Duration::from_micros(random.below(100_000)));
            }
        }
        child.kill().expect("it is our child");
        child.wait().expect("it is our child");
        left_frozen += usize::from(note.exists());

        let shown = match round % 6 {
            // `ps` is enough for it to go on.
            5 => {
                ratoon.run(["ps"]).ok();
                assert!(!note.exists(), "round {round}");
                exec(&ratoon, "first", GOES_ON)
            }
            _ => exec(&ratoon, "first", GOES_ON),
        };
        assert_eq!(shown, "kept\n", "round {round}");
        assert!(!note.exists(), "round {round}");
        let (noted, true_one) = layer(&ratoon, "first");
        assert_eq!(noted, true_one, "round {round}");
        ratoon.run(["snapshots", "verify", "old"]).ok();
        assert_eq!(half_written(&store), [""; 0], "round {round}");
        if round % 8 == 7 {
            let run = ["run", "--snapshot", "old", "--", "sh", "-c", GOES_ON];
            assert_eq!(ratoon.run(run).ok().stdout, "kept\n", "round {round}");
        }
    }
    assert!(
        left_frozen > 0,
        "no kill came while the machine stood still"
    );

    // As if nothing had been.
    ratoon.run(["snapshot", "first", "last"]).ok();
    ratoon.run(["snapshots", "verify", "last"]).ok();
    let run = ["run", "--snapshot", "last", "--", "sh", "-c", GOES_ON];
    assert_eq!(ratoon.run(run).ok().stdout, "kept\n");
    ratoon.run(["rm", "-f", "first"]).ok();
    ratoon.nothing_is_left();
}

/// The store of snapshots on a disk of 4 MiB, mounted for this thread and its children alone.
fn a_full_disk_ends_a_snapshot_and_nothing_else_as_root() {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    let ratoon = crate::shared::machine();
    let checks = std::thread::spawn(move || {
        // SAFETY: only the mount namespace, and only of this thread, which ends with the test.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
            .expect("root has a mount namespace of its own");
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).expect("mounts of its own");
        let store = ratoon.state_dir().join("ratoon/snapshots");
        std::fs::create_dir_all(&store).expect("a folder for snapshots");
        let small = Some(c"size=4m,mode=0700");
        mount("tmpfs", &store, "tmpfs", MountFlags::empty(), small).expect("a small disk");

        let name = crate::shared::NAME;
        for flags in [&[][..], &["--compress"]] {
            let args = ["snapshot", name, "large"];
            let refused = ratoon.run(args.iter().chain(flags));
            assert_eq!(refused.code(), 125, "{refused:?}");
            let said = refused.stderr;
            assert!(said.contains("is full"), "{said}");
            assert!(said.contains("ratoon/snapshots"), "{said}");
            assert_eq!(half_written(&store), [""; 0]);
            assert_eq!(exec(ratoon, name, "echo on"), "on\n");
        }
        let listed = ratoon.run(["snapshots", "--json"]).ok().stdout;
        assert!(!listed.contains("large"), "{listed}");
    });
    checks.join().expect("the checks hold");
}
