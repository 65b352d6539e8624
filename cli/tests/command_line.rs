//! The binary's promises that need no VM: messages, exit codes, damaged state, closed pipes.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    fn ratoon(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ratoon"));
        command
            .args(args)
            .env_clear()
            .env("HOME", self.0.path())
            .stdin(Stdio::null());
        command
    }

    fn vms(&self) -> PathBuf {
        self.0.path().join(".local/state/ratoon/vms")
    }
}

fn run(command: &mut Command) -> (i32, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().expect("ratoon starts");
    (
        status.code().expect("no signal ended it"),
        String::from_utf8(stdout).expect("UTF-8"),
        String::from_utf8(stderr).expect("UTF-8"),
    )
}

#[test]
fn an_unknown_vm_is_an_error_that_says_where_to_look() {
    let home = Home::new();
    for command in ["stop", "kill", "rm", "logs"] {
        let (code, out, err) = run(&mut home.ratoon(&[command, "web"]));
        assert_eq!((code, out.as_str()), (125, ""), "{command}");
        assert_eq!(
            err,
            "error: no such VM \"web\"; `ratoon ps -a` lists them\n"
        );
    }
}

#[test]
fn with_several_names_each_is_tried() {
    let home = Home::new();
    let (code, out, err) = run(&mut home.ratoon(&["rm", "--json", "a", "b"]));
    assert_eq!((code, err.as_str()), (125, ""));
    let done: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(done[0]["vm"], "a");
    assert_eq!(
        done[1]["error"],
        "no such VM \"b\"; `ratoon ps -a` lists them"
    );
}

#[test]
fn wrong_usage_is_2_and_names_the_flag() {
    let home = Home::new();
    for (args, word) in [
        (&["run", "--memory", "256", "--", "x"][..], "give a unit"),
        (&["run", "--net", "t0", "--", "x"], "tap=NAME"),
        (&["run", "ls"], "unexpected argument 'ls'"),
        (&["run", "-d", "--timeout", "5s"], "--timeout"),
        (&["run", "-d", "--", "ls"], "-d starts a machine"),
        (&["run", "-e", "=x", "--", "ls"], "NAME=VALUE"),
        (&["image", "build", "windows"], "debian"),
    ] {
        let (code, out, err) = run(&mut home.ratoon(args));
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {err}");
        assert!(err.contains(word), "{args:?}: {err}");
    }
}

#[test]
fn a_missing_image_is_named_with_how_to_get_it() {
    let home = Home::new();
    let (code, _, err) = run(&mut home.ratoon(&["run", "--image", "nope", "--", "true"]));
    assert_eq!(code, 125);
    assert!(
        err.contains("`nope`") && err.contains("ratoon image"),
        "{err}"
    );
}

#[test]
fn nothing_there_is_an_empty_list() {
    let home = Home::new();
    let (code, out, err) = run(&mut home.ratoon(&["ps", "-a", "--json"]));
    assert_eq!((code, out.as_str(), err.as_str()), (0, "[]\n", ""));
    assert!(!home.vms().exists(), "looking makes nothing");
}

#[test]
fn a_broken_record_is_shown_and_removed_only_by_force() {
    let home = Home::new();
    let dir = home.vms().join("0123456789ab");
    std::fs::create_dir_all(&dir).expect("a directory");
    std::fs::write(dir.join("record.json"), "{").expect("a file");
    let (code, out, _) = run(&mut home.ratoon(&["ps"]));
    assert_eq!(code, 0);
    assert!(out.contains("0123456789ab  -     -      broken"), "{out}");
    let (code, _, err) = run(&mut home.ratoon(&["rm", "0123"]));
    assert_eq!(code, 125);
    assert!(
        err.starts_with("error: the record of VM 0123456789ab is broken; `ratoon rm -f"),
        "{err}"
    );
    assert!(err.contains("\n  caused by: "), "{err}");
    assert!(dir.exists());
    let (code, out, _) = run(&mut home.ratoon(&["rm", "-f", "0123"]));
    assert_eq!((code, out.as_str()), (0, "0123\n"));
    assert!(!dir.exists());
}

#[test]
fn a_reader_that_went_away_is_no_panic() {
    let home = Home::new();
    for args in [&["ps"][..], &["ps", "--json"], &["doctor"], &["--help"]] {
        let (read, write) = std::io::pipe().expect("a pipe");
        drop(read);
        let output = home
            .ratoon(args)
            .stdout(write)
            .stderr(Stdio::piped())
            .output()
            .expect("ratoon starts");
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(output.stderr.is_empty(), "{args:?}: {output:?}");
    }
}

#[test]
fn without_a_home_the_variables_are_named() {
    let home = Home::new();
    let (code, _, err) = run(home.ratoon(&["ps"]).env_remove("HOME"));
    assert_eq!(code, 125);
    assert!(err.contains("XDG_STATE_HOME"), "{err}");
}

#[test]
fn the_doctor_tells_a_missing_kernel_and_ends_with_1() {
    let home = Home::new();
    let (code, out, _) = run(&mut home.ratoon(&["doctor", "--json"]));
    assert_eq!(code, 1);
    let findings: Vec<serde_json::Value> = serde_json::from_str(&out).expect("JSON");
    let kernel = findings
        .iter()
        .find(|finding| finding["check"] == "guest kernel")
        .expect("it is looked at");
    assert_eq!(kernel["level"], "fail");
    let mend = kernel["mend"].as_str().unwrap_or_default();
    assert!(mend.contains("guest-kernel/build"), "{mend}");
    assert!(!Path::new(&home.0.path().join(".cache")).exists());
}

#[test]
fn logs_come_older_file_first_and_byte_for_byte() {
    let home = Home::new();
    let dir = home.vms().join("0123456789ab");
    std::fs::create_dir_all(&dir).expect("a directory");
    std::fs::write(dir.join("serial.log.1"), b"one\x1b[0m\n").expect("a file");
    std::fs::write(dir.join("serial.log"), b"two\xff\n").expect("a file");
    let output = home
        .ratoon(&["logs", "01"])
        .output()
        .expect("ratoon starts");
    assert_eq!(output.stdout, b"one\x1b[0m\ntwo\xff\n");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn an_agent_that_cannot_start_says_what_is_missing_where_and_what_to_do() {
    let home = Home::new();
    let start_with = |model: &str, args: &[&str]| {
        let mut all = vec!["agent", "run", "--model", model];
        all.extend(args);
        all.push("do it");
        let mut command = home.ratoon(&all);
        let (code, out, err) = run(command.env("RATOON_AGENT", "/none/ratoon-agent"));
        assert_eq!(out, "");
        (code, err)
    };
    let start = |args: &[&str]| start_with("local/m", args);
    let (code, err) = start(&[]);
    let place = home.0.path().join(".config/ratoon/bridge.json");
    assert_eq!(code, 2);
    assert!(err.contains(place.to_str().expect("plain")), "{err}");
    assert!(err.contains("--bridge-config"), "{err}");

    let config = home.0.path().join("bridge.json");
    let file = config.to_str().expect("plain");
    let write = |json: &str| std::fs::write(&config, json).expect("a file");
    write("{");
    let (code, err) = start(&["--bridge-config", file]);
    assert!(
        code == 2 && err.contains("is no bridge configuration"),
        "{err}"
    );
    write(
        r#"{"records": "/none", "providers": [{"name": "local", "key": "none", "wires": ["chat"],
            "models": [{"id": "n", "max_output_tokens": 9}]}]}"#,
    );
    let (code, err) = start(&["--bridge-config", file]);
    assert!(code == 2 && err.contains("one of local/n"), "{err}");
    let money = ["--bridge-config", file, "--max-money", "1"];
    let (code, err) = start_with("local/n", &money);
    assert!(code == 2 && err.contains("has no price"), "{err}");
    // What it needs is looked for before a machine is started.
    let (code, err) = start_with("local/n", &money[..2]);
    assert!(code == 125 && err.contains("/none/ratoon-agent"), "{err}");

    for args in [
        &["agent", "attach", "r1"][..],
        &["agent", "fork", "r1"],
        &["agent", "tree", "r1"],
        &["agent", "log", "r1"],
        &["agent", "diff", "r1"],
        &["audit", "verify", "r1"],
    ] {
        let (code, out, err) = run(&mut home.ratoon(args));
        assert_eq!((code, out.as_str()), (125, ""), "{args:?}");
        assert_eq!(
            err, "error: no run \"r1\": `ratoon agent ps` lists them\n",
            "{args:?}"
        );
    }
    let (code, out, _) = run(&mut home.ratoon(&["agent", "bridge", "status"]));
    assert_eq!((code, out.as_str()), (0, "no bridge runs\n"));
    let (code, out, _) = run(&mut home.ratoon(&["agent", "ps", "--json"]));
    assert_eq!((code, out.as_str()), (0, "[]\n"));
}
