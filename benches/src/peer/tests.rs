//! Peers that crash, hang, refuse and lie: shell scripts in their place.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use ratoon_engine::Programs;

use super::*;
use crate::host::Host;
use crate::record::Record;

/// No machine: files that are there, and empty.
fn parts(dir: &Path) -> Parts {
    let file = |name: &str| {
        let path = dir.join(name);
        std::fs::write(&path, "").unwrap();
        path
    };
    let program = file("program");
    Parts {
        vmm: program.clone(),
        kernel: file("kernel"),
        initramfs: file("initramfs"),
        disk: file("disk"),
        peers: BTreeMap::new(),
        programs: Programs {
            vmm: program.clone(),
            runtime: program.clone(),
            pager: program.clone(),
            bridge: program.clone(),
            agent: program,
        },
        cache: dir.to_owned(),
        image: "none".into(),
        warm: std::sync::Arc::default(),
        saved: std::sync::Arc::default(),
    }
}

/// Written by another process: while one of ours that is being started has it open, it cannot be executed.
fn script(dir: &Path, text: &str) -> PathBuf {
    let path = dir.join("peer");
    let written = Command::new("sh")
        .args([
            "-c",
            r#"printf '#!/bin/sh\n%s\n' "$1" > "$0" && chmod 755 "$0""#,
        ])
        .arg(&path)
        .arg(text)
        .status();
    assert!(written.unwrap().success());
    path
}

/// What comes of booting `text` as a Firecracker, to its HELLO.
fn boot(text: &str, patience: Duration) -> (Result<()>, Duration) {
    let dir = tempfile::tempdir().unwrap();
    let parts = parts(dir.path());
    let peer = firecracker::adapter(script(dir.path(), text), patience);
    let place = Place::new(patience).unwrap();
    let from = Instant::now();
    let booted = (|| {
        let guest = Guest::of(peer.as_ref(), &parts, 64, &place)?;
        place.boot(peer.as_ref(), &guest)?.hello().map(drop)
    })();
    (booted, from.elapsed())
}

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(400);

#[test]
fn a_peer_that_crashes_is_told_with_its_last_words_at_once() {
    let (booted, took) = boot("echo no such ioctl >&2; echo half a line; exit 7", LONG);
    let error = format!("{:#}", booted.unwrap_err());
    assert!(error.contains("exit status: 7"), "{error}");
    assert!(error.contains("vmm.log: no such ioctl"), "{error}");
    assert!(error.contains("serial.log: half a line"), "{error}");
    assert!(took < LONG);
}

#[test]
fn a_peer_that_hangs_is_given_up_and_its_process_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let told = dir.path().join("pid");
    let (booted, _) = boot(
        &format!("echo $$ > {}; exec sleep 1000", told.display()),
        SHORT,
    );
    let error = format!("{:#}", booted.unwrap_err());
    assert!(error.contains("did not call"), "{error}");
    let pid = std::fs::read_to_string(told).unwrap();
    assert!(!Path::new("/proc").join(pid.trim()).exists());
}

#[test]
fn a_peer_whose_console_alone_says_ready_has_not_answered() {
    let (booted, _) = boot("echo ratoon-runtime: ready; exec sleep 1000", SHORT);
    assert!(booted.is_err());
}

#[test]
fn a_peer_that_never_opens_its_api_is_no_restore() {
    let dir = tempfile::tempdir().unwrap();
    for (text, why) in [
        ("exec sleep 1000", "no API within"),
        ("exit 3", "exit status: 3"),
    ] {
        let peer = firecracker::adapter(script(dir.path(), text), SHORT);
        let place = Place::new(SHORT).unwrap();
        let error = format!("{:#}", place.restore(peer.as_ref()).unwrap_err());
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn a_program_that_cannot_be_started_is_named() {
    let peer = firecracker::adapter("/no/such/peer".into(), SHORT);
    let place = Place::new(SHORT).unwrap();
    let error = format!("{:#}", place.restore(peer.as_ref()).unwrap_err());
    assert!(error.contains("/no/such/peer"), "{error}");
}

#[test]
fn a_peer_that_failed_is_missing_with_its_words_and_is_not_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    let programs = ["firecracker", "qemu", "something else"]
        .map(|name| (name.to_owned(), dir.path().join("none")));
    let all = adapters(&programs.into(), SHORT);
    let file = dir.path().join("samples.jsonl");
    let mut samples = Samples::create(&file, &Host::default(), true).unwrap();
    let mut peers = Peers::of(&all, "restore", Ability::Restore, &mut samples).unwrap();
    assert_eq!(peers.names_with_ours(), ["ratoon", "firecracker"]);
    let failed = peers.attempt("firecracker", &mut samples, |_| -> Result<()> {
        bail!("it said: no memory")
    });
    assert!(failed.unwrap().is_none());
    let again = peers.attempt("firecracker", &mut samples, |_| -> Result<()> {
        unreachable!("it is not asked again")
    });
    assert!(again.unwrap().is_none());
    let missing: Vec<_> = samples
        .records()
        .iter()
        .filter_map(|record| match record {
            Record::Missing(it) => Some((&*it.system, it.why.as_str())),
            _ => None,
        })
        .collect();
    assert_eq!(missing.len(), 2);
    assert!(missing[0].0 == "qemu-microvm" && missing[0].1.contains("vhost"));
    assert_eq!(missing[1], ("firecracker", "it said: no memory"));
}

#[test]
fn what_could_not_be_saved_once_is_not_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let parts = parts(dir.path());
    let count = dir.path().join("count");
    let text = format!("echo once >> {}; exit 1", count.display());
    let peer = firecracker::adapter(script(dir.path(), &text), SHORT);
    let words = [0, 1].map(|_| {
        let error = parts
            .saved
            .of(peer.as_ref(), &parts, 64, SHORT)
            .unwrap_err();
        format!("{error:#}")
    });
    assert_eq!(words[0], words[1]);
    assert_eq!(std::fs::read_to_string(count).unwrap(), "once\n");
}

#[test]
fn who_cannot_boot_is_not_booted_again() {
    let dir = tempfile::tempdir().unwrap();
    let parts = parts(dir.path());
    let peer = firecracker::adapter("/no/such/peer".into(), SHORT);
    parts.saved.cannot_boot("firecracker", "it hung");
    let error = parts.saved.of(peer.as_ref(), &parts, 64, SHORT);
    assert_eq!(format!("{:#}", error.unwrap_err()), "it hung");
}

#[test]
fn a_peer_that_hangs_while_it_is_asked_is_ended_with_its_last_words() {
    let dir = tempfile::tempdir().unwrap();
    let parts = parts(dir.path());
    let text = "echo stuck >&2; exec sleep 1000";
    let peer = firecracker::adapter(script(dir.path(), text), SHORT);
    let place = Place::new(SHORT).unwrap();
    let guest = Guest::of(peer.as_ref(), &parts, 64, &place).unwrap();
    let mut running = place.boot(peer.as_ref(), &guest).unwrap();
    let pid = running.pid();
    let ended = || ratoon_engine::vm::process::ProcessRef::of(pid as i32).is_none();
    let error = running.asked::<()>(|| {
        // As a call of the runtime does: it waits until the machine has gone.
        while !ended() {
            std::thread::sleep(Duration::from_millis(5));
        }
        bail!("the connection was closed")
    });
    let error = format!("{:#}", error.unwrap_err());
    assert!(error.contains("signal: 9"), "{error}");
    assert!(error.contains("the connection was closed"), "{error}");
    assert!(error.contains("stuck"), "{error}");
}

#[test]
fn what_a_peer_writes_to_is_a_copy_and_the_image_stays() {
    let dir = tempfile::tempdir().unwrap();
    let parts = parts(dir.path());
    std::fs::write(&parts.disk, "image").unwrap();
    let place = Place::new(SHORT).unwrap();
    let own = firecracker::adapter("/x".into(), SHORT);
    let guest = Guest::of(own.as_ref(), &parts, 64, &place).unwrap();
    assert_ne!(guest.disk, parts.disk);
    std::fs::write(&guest.disk, "other").unwrap();
    assert_eq!(std::fs::read_to_string(&parts.disk).unwrap(), "image");
    let layered = qemu::adapter("/x".into());
    let guest = Guest::of(layered.as_ref(), &parts, 64, &place).unwrap();
    assert_eq!(guest.disk, parts.disk);
    let command = format!("{:?}", layered.boot(&guest, &place).unwrap());
    assert!(command.contains("snapshot=on"), "{command}");
}

#[test]
fn each_system_is_first_in_turn() {
    let names = ["ratoon", "a", "b"];
    let first: Vec<_> = (0..4).map(|round| order(&names, round)[0]).collect();
    assert_eq!(first, ["ratoon", "a", "b", "ratoon"]);
    assert_eq!(order(&names, 1), ["a", "b", "ratoon"]);
}
