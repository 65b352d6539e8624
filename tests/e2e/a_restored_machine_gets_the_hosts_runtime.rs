//! The runtime in a snapshot is as old as the snapshot: a restored machine gets the host's, and what
//! runs in it does not notice.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ratoon_client::blocking::{CallIo, Client};
use ratoon_engine::snapshot::Digest;
use ratoon_protocol::{AttachParams, Call, Event, ExecParams, ExitReport, ExitStatus};
use ratoon_tests::{Done, Ratoon, program};

crate::promises![what_ran_goes_on_under_the_new_runtime_and_under_the_old_one_if_that_is_no_good];

/// Prints numbered lines until it is told to end, and some in any case.
const COUNT: &str = "sleep 2; i=0; while [ $i -lt 3 -o ! -e /root/go ]; do echo line $i; \
    i=$((i+1)); sleep 1; done; echo end $i; exit 7";

fn client(ratoon: &Ratoon, id: &str) -> Client {
    let socket = ratoon.vms_dir().join(id).join("vsock.sock");
    Client::connect(&socket, Duration::from_secs(60)).expect("the runtime answers")
}

/// Calls; gives the result, the output, and the first event.
fn run(
    client: &mut Client,
    call: &Call,
    leaves: bool,
) -> (Option<ExitReport>, String, Option<Event>) {
    let controller = client.controller();
    let first = Cell::new(None);
    let mut out = Vec::new();
    let mut io = CallIo {
        stdin: None,
        stdout: &mut out,
        stderr: &mut std::io::sink(),
        data: &mut std::io::sink(),
        events: &mut |event| {
            first.set(Some(event));
            if leaves {
                controller.cancel();
            }
        },
        ended: &mut |_| {},
    };
    let report = client.run(call, &mut io).ok();
    (
        report,
        String::from_utf8_lossy(&out).into_owned(),
        first.get(),
    )
}

fn restore(ratoon: &Ratoon, name: &str, runtime: &Path, flags: &[&str]) -> Done {
    let mut args = vec!["restore", "point", "--name", name];
    args.extend(flags);
    let mut command = ratoon.command(args);
    let child = command.env("RATOON_RUNTIME", runtime).spawn();
    ratoon_tests::finish(child.expect("ratoon can be started")).ok()
}

/// What serves in the machine.
fn served_by(ratoon: &Ratoon, vm: &str) -> String {
    let args = ["exec", vm, "--", "readlink", "/proc/1/exe"];
    ratoon.run(args).ok().stdout.trim().to_owned()
}

/// It goes on: the interpreter, and the program with all its output.
fn went_on(ratoon: &Ratoon, vm: &str, id: &str, pid: i32) {
    let said = ratoon.run(["code", vm, "-c", "print(x + 1)"]).ok();
    assert_eq!(said.stdout, "42\n", "{vm}");
    ratoon.run(["exec", vm, "--", "touch", "/root/go"]).ok();
    let attach = Call::Attach(AttachParams { pid, have: [0, 0] });
    let (report, text, event) = run(&mut client(ratoon, id), &attach, false);
    let from = match event {
        Some(Event::Attached { from, .. }) => from,
        other => panic!("{vm}: {other:?}"),
    };
    assert_eq!(from, [0, 0], "{vm}: nobody had any of it");
    let report = report.expect("it ends");
    assert_eq!(report.status, ExitStatus::Code(7), "{vm}");
    let lines = text.lines().count() - 1;
    let whole: String = (0..lines).map(|i| format!("line {i}\n")).collect();
    assert_eq!(text, format!("{whole}end {lines}\n"), "{vm}");
    assert!(lines >= 3, "{vm}");
}

/// The runtime's program, with bytes behind it that make it another one.
fn another(dir: &Path) -> PathBuf {
    let mut bytes = std::fs::read(program("ratoon-runtime")).expect("the runtime");
    bytes.extend_from_slice(b"another");
    let path = dir.join("another");
    std::fs::write(&path, bytes).expect("a file");
    path
}

fn what_ran_goes_on_under_the_new_runtime_and_under_the_old_one_if_that_is_no_good() {
    let (ratoon, dir) = (Ratoon::warm(), tempfile::tempdir().expect("a directory"));
    let id = ratoon
        .run(["run", "-d", "--name", "first", "--memory", "256M"])
        .ok()
        .stdout;
    ratoon.run(["code", "first", "-c", "x = 41"]).ok();
    let params = ExecParams {
        shell: Some(COUNT.into()),
        keep: true,
        ..ExecParams::default()
    };
    let exec = Call::Exec(Box::new(params));
    let pid = match run(&mut client(&ratoon, id.trim()), &exec, true) {
        (None, _, Some(Event::Started { pid })) => pid,
        other => panic!("{other:?}"),
    };
    ratoon.run(["snapshot", "first", "point"]).ok();
    ratoon.run(["rm", "-f", "first"]).ok();

    let another = another(dir.path());
    let done = restore(&ratoon, "second", &another, &[]);
    assert_eq!(done.stderr, "", "there is nothing to tell");
    let exe = served_by(&ratoon, "second");
    assert!(exe.contains("memfd:ratoon-runtime"), "{exe}");
    went_on(&ratoon, "second", done.stdout.trim(), pid);
    // What is taken of it says which runtime it has.
    ratoon.run(["snapshot", "second", "later"]).ok();
    let snapshots = ratoon.state_dir().join("ratoon/snapshots");
    let later = std::fs::read_to_string(snapshots.join("names/later")).expect("its name");
    let manifest = std::fs::read(snapshots.join(later.trim()).join("manifest.json"));
    let manifest: serde_json::Value =
        serde_json::from_slice(&manifest.expect("a manifest")).expect("JSON");
    let digest = Digest::of(&std::fs::read(&another).expect("the other runtime")).to_string();
    assert!(
        manifest
            .to_string()
            .contains(&format!("\"runtime\":\"{digest}\"")),
        "{manifest}"
    );
    ratoon.run(["rm", "-f", "second"]).ok();

    let garbage = dir.path().join("garbage");
    std::fs::write(&garbage, "no program\n").expect("a file");
    let done = restore(&ratoon, "third", &garbage, &[]);
    assert_eq!(
        done.stderr,
        "note: the runtime in third stays as the snapshot has it: it did not take this host's: \
         the new runtime is not an ELF program for x86-64\n"
    );
    assert_eq!(served_by(&ratoon, "third"), "/init");
    went_on(&ratoon, "third", done.stdout.trim(), pid);
    ratoon.run(["rm", "-f", "third"]).ok();

    let done = restore(&ratoon, "fourth", &another, &["--keep-runtime"]);
    assert_eq!(done.stderr, "");
    assert_eq!(served_by(&ratoon, "fourth"), "/init");
    ratoon.run(["rm", "-f", "fourth"]).ok();

    for (runtime, serves, told) in [
        (&another, "memfd:ratoon-runtime", ""),
        (&garbage, "/init", "in children of point stays"),
    ] {
        let args = ["fork", "--snapshot", "point", "--name", "kid"];
        let mut command = ratoon.command(args);
        let child = command.env("RATOON_RUNTIME", runtime).spawn();
        let done = ratoon_tests::finish(child.expect("ratoon can be started")).ok();
        assert!(done.stderr.contains(told), "{done:?}");
        assert_eq!(done.stderr.is_empty(), told.is_empty(), "{done:?}");
        let exe = served_by(&ratoon, "kid-0");
        assert!(exe.contains(serves), "{exe}");
        let said = ratoon.run(["code", "kid-0", "-c", "print(x + 1)"]).ok();
        assert_eq!(said.stdout, "42\n");
        ratoon.run(["rm", "-f", "kid-0"]).ok();
    }
    ratoon.nothing_is_left();
}
