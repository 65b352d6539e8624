//! A guest that panics, powers off, or floods its console ends in a defined way, and says so.

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use ratoon_tests::Ratoon;
use ratoon_vmm_api::{ExitReport, Outcome};

crate::promises![
    a_panic_is_an_error_that_names_it,
    a_power_off_under_a_command_is_an_error_that_names_it,
    a_missing_init_is_an_error_with_the_guests_last_words,
    a_flood_on_the_serial_port_stays_bounded,
    a_command_that_does_not_exist_is_told_as_a_shell_would,
    a_guest_that_does_not_come_up_in_time_is_ended,
    a_full_disk_is_the_guests_error_and_not_the_machines_end_as_root,
];

const RUN: [&str; 6] = ["run", "--image", "debian", "--memory", "256M", "--"];

fn run(ratoon: &Ratoon, command: &[&str]) -> ratoon_tests::Done {
    ratoon.run(RUN.iter().chain(command))
}

fn a_panic_is_an_error_that_names_it() {
    let ratoon = Ratoon::warm();
    // The runtime is init: a kernel whose init dies panics. Only its own crash can do that, so the
    // panic is asked for by the magic key.
    let done = run(
        &ratoon,
        &["sh", "-c", "echo c > /proc/sysrq-trigger; sleep 60"],
    );
    assert_eq!(done.code(), 125, "{done:?}");
    assert!(done.stderr.contains("panicked"), "{done:?}");
    ratoon.nothing_is_left();
}

fn a_power_off_under_a_command_is_an_error_that_names_it() {
    let ratoon = Ratoon::warm();
    let off = "import ctypes; ctypes.CDLL(None).reboot(0x4321fedc)";
    let done = run(&ratoon, &["python3", "-c", off]);
    assert_eq!(done.code(), 125, "{done:?}");
    assert!(done.stderr.contains("powered off"), "{done:?}");
    ratoon.nothing_is_left();
}

fn a_missing_init_is_an_error_with_the_guests_last_words() {
    let ratoon = Ratoon::new();
    let args = [
        "run",
        "--image",
        "debian",
        "--kernel-arg",
        "rdinit=/no/such/init root=/dev/none",
        "--",
        "true",
    ];
    let done = ratoon.run(args);
    assert_eq!(done.code(), 125, "{done:?}");
    assert!(done.stderr.contains("panic"), "{done:?}");
    ratoon.nothing_is_left();
}

/// A kernel that says all it can, into a log of 8 KiB: the log stays within it, has the last words,
/// and the report names the panic (there is no root file system).
fn a_flood_on_the_serial_port_stays_bounded() {
    const LIMIT: u64 = 8 << 10;
    let dir = tempfile::tempdir().expect("a directory");
    let log = dir.path().join("serial.log");
    let report = dir.path().join("exit.json");
    let config = serde_json::json!({
        "id": "flood", "vcpus": 1, "memory_mib": 128, "kernel": ratoon_tests::kernel(),
        "kernel_args": "ignore_loglevel initcall_debug",
        "serial": { "log": log, "limit_bytes": LIMIT }, "exit_report": report,
    });
    let config_file = dir.path().join("vm.json");
    std::fs::write(&config_file, config.to_string()).expect("it can be written");
    let child = Command::new(ratoon_tests::program("ratoon-vmm"))
        .arg("--config")
        .arg(&config_file)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the VMM can be started");
    let done = ratoon_tests::finish(child);
    assert_eq!(done.code(), 1, "{done:?}");
    assert!(done.stderr.contains("panicked"), "{done:?}");
    let report: ExitReport =
        serde_json::from_slice(&std::fs::read(report).expect("a report is left"))
            .expect("it is a report");
    assert_eq!(report.outcome, Outcome::Panicked);
    let last = std::fs::read(&log).expect("a log is left");
    let older = std::fs::read(dir.path().join("serial.log.1")).expect("it was full once");
    assert!(
        (last.len() + older.len()) as u64 <= LIMIT,
        "{} + {}",
        last.len(),
        older.len()
    );
    let text = String::from_utf8_lossy(&[older, last].concat()).into_owned();
    assert!(text.contains("Kernel panic"), "{text}");
}

fn a_command_that_does_not_exist_is_told_as_a_shell_would() {
    let ratoon = Ratoon::warm();
    let done = run(&ratoon, &["no-such-command"]);
    assert_eq!(done.code(), 127, "{done:?}");
    assert!(done.stderr.contains("no-such-command"), "{done:?}");
    ratoon.nothing_is_left();
}

fn a_guest_that_does_not_come_up_in_time_is_ended() {
    let ratoon = Ratoon::new();
    let args = [
        "run",
        "--cold",
        "--boot-timeout",
        "1s",
        "--image",
        "debian",
        "--",
        "true",
    ];
    let done = ratoon.run(args);
    assert_eq!(done.code(), 125, "{done:?}");
    assert!(done.stderr.contains("--boot-timeout"), "{done:?}");
    ratoon.nothing_is_left();
}

/// The machine's layer lies on a file system of 2 MiB.
fn a_full_disk_is_the_guests_error_and_not_the_machines_end_as_root() {
    let ratoon = Ratoon::warm();
    let script = "dd if=/dev/zero of=/big bs=1M count=8 conv=fsync; echo dd $?";
    let mut command = ratoon.command(RUN.iter().chain(&["sh", "-c", script]));
    let state = CString::new(ratoon.state_dir().as_os_str().as_bytes()).expect("a plain path");
    // SAFETY: only system calls that are safe between fork and exec, on memory made before.
    unsafe {
        command.pre_exec(move || {
            let mount = |what: &CStr, to: &CStr, flags: libc::c_ulong, options: &CStr| {
                let what = what.as_ptr();
                match libc::mount(what, to.as_ptr(), what, flags, options.as_ptr().cast()) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            };
            if libc::unshare(libc::CLONE_NEWNS) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            mount(c"none", c"/", libc::MS_REC | libc::MS_PRIVATE, c"")?;
            mount(c"tmpfs", &state, 0, c"size=2m")
        });
    }
    let done = ratoon_tests::finish(command.spawn().expect("ratoon can be started"));
    assert_eq!(done.stdout, "dd 1\n", "{done:?}");
    assert_eq!(done.code(), 0, "{done:?}");
    ratoon.nothing_is_left();
}
