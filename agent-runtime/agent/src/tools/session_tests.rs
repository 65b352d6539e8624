//! Sessions with real shells and a real Python.

use std::time::{Duration, Instant};

use super::*;
use crate::clock;

struct Host {
    session: Session,
    stop: Stop,
    _dir: tempfile::TempDir,
}

fn host(language: Language) -> Host {
    let dir = tempfile::tempdir().expect("a folder");
    let store = Store::in_folder(dir.path());
    Host {
        session: Session::new(language, dir.path(), store),
        stop: Stop::new().expect("an eventfd"),
        _dir: dir,
    }
}

impl Host {
    fn run_for(&mut self, code: &str, ms: u64) -> (Ran, String) {
        let until = clock::now() + Duration::from_millis(ms);
        let (ran, shown) = self
            .session
            .run(code, 4096, until, &self.stop)
            .expect("a session");
        (ran, shown.text)
    }

    fn run(&mut self, code: &str) -> (Ran, String) {
        self.run_for(code, 20_000)
    }
}

fn said(status: i32, text: &str) -> (Ran, String) {
    (Ran::Status(status), text.to_owned())
}

#[test]
fn directory_variables_and_functions_stay() {
    let mut host = host(Language::Shell);
    assert_eq!(
        host.run("cd / && x='a b'; f() { echo \"<$x>\"; }"),
        said(0, "")
    );
    assert_eq!(host.run("pwd; f"), said(0, "/\n<a b>\n"));
    assert_eq!(host.run("false"), said(1, ""));
    assert_eq!(host.run("echo it\\'s; (exit 7)"), said(7, "it's\n"));
    assert_eq!(host.run("cat <<E\na\n'b'\nE"), said(0, "a\n'b'\n"));
    assert_eq!(
        host.run("cat; echo $?"),
        said(0, "0\n"),
        "the input is empty"
    );
    assert_eq!(host.run("echo 0 >&9 || true").0, Ran::Status(0));
    let (ran, text) = host.run("if");
    assert_eq!(ran, Ran::Status(2), "{text}");
}

#[test]
fn a_shell_that_exits_is_followed_by_another() {
    let mut host = host(Language::Shell);
    assert_eq!(
        host.run("x=1; echo a; exit 3"),
        (Ran::Ended("exit code 3".into()), "a\n".into())
    );
    assert_eq!(host.run("echo \"<$x>\""), said(0, "<>\n"));
    assert_eq!(
        host.run("kill -9 $$").0,
        Ran::Ended("killed by signal 9".into())
    );
}

#[test]
fn what_takes_too_long_is_killed_with_its_children() {
    let mut host = host(Language::Shell);
    let began = Instant::now();
    let (ran, text) = host.run_for("cd /tmp; echo a; sleep 7131 & sleep 7132", 500);
    assert_eq!((ran, text.as_str()), (Ran::TooLong, "a\n"));
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!(host.run("pwd"), said(0, "/tmp\n"), "the directory stays");
    let (_, left) =
        host.run("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -c 'sleep 713[12] ' ");
    assert_eq!(left, "0\n");
}

#[test]
fn a_process_that_holds_the_output_open_hangs_nothing() {
    let mut host = host(Language::Shell);
    let began = Instant::now();
    let (ran, text) = host.run("(sleep 0.3; echo late; sleep 5) & echo now");
    assert_eq!((ran, text.as_str()), (Ran::Status(0), "now\n"));
    assert!(began.elapsed() < Duration::from_secs(3));
    let (_, text) = host.run("sleep 0.6; echo then");
    assert_eq!(text, "late\nthen\n");
    host.session.restart();
}

#[test]
fn much_output_is_shortened_and_ends() {
    let mut host = host(Language::Shell);
    let (ran, text) = host.run("head -c 300000 /dev/zero | tr '\\0' x; echo end");
    assert_eq!(ran, Ran::Status(0));
    assert!(
        text.contains("bytes of 300004") && text.ends_with("end\n"),
        "{text}"
    );
    let (ran, text) = host.run_for("yes", 300);
    assert_eq!(ran, Ran::TooLong);
    assert!(text.contains("are left out"));
}

#[test]
fn an_order_to_stop_is_heard() {
    let mut host = host(Language::Shell);
    host.stop.set();
    assert_eq!(host.run("sleep 100").0, Ran::Stopped);
}

#[test]
fn names_stay_in_python_and_errors_are_shown() {
    if !has("python3") {
        return;
    }
    let mut host = host(Language::Python);
    assert_eq!(host.run("x = 20\ndef f():\n    return x + 1"), said(0, ""));
    assert_eq!(host.run("print('a')\nf()"), said(0, "a\n21\n"));
    let (ran, text) = host.run("1/0");
    assert_eq!(ran, Ran::Status(1));
    assert!(
        text.contains("1/0") && text.contains("ZeroDivisionError"),
        "{text}"
    );
    assert!(!text.contains("_serve"), "{text}");
    let (ran, text) = host.run("x = (");
    assert_eq!(ran, Ran::Status(1));
    assert!(text.contains("SyntaxError"), "{text}");
    assert_eq!(host.run("input()").0, Ran::Status(1));
    assert_eq!(host.run("import sys; sys.exit(3)").0, Ran::Status(1));
    assert_eq!(host.run("'ü' * 2"), said(0, "'üü'\n"));
    let (ran, _) = host.run_for("while True: pass", 300);
    assert_eq!(ran, Ran::TooLong);
    assert_eq!(host.run("'x' in globals()"), said(0, "False\n"));
    assert_eq!(
        host.run("import os; os._exit(4)").0,
        Ran::Ended("exit code 4".into())
    );
}
