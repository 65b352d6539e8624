//! What a confined process can still do, tried by one: this program, started again.

use std::fs;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Output};

use libtest_mimic::{Arguments, Trial};
use ratoon_bridge::confine::{ConfineError, Confined, OWN_ID};

/// What the confined process is to try.
const TRY: &str = "RATOON_TEST_TRY";
/// Where.
const FOLDER: &str = "RATOON_TEST_FOLDER";

fn confined(what: &str, folder: &Path) -> Output {
    Command::new(std::env::current_exe().expect("this program"))
        .env(TRY, what)
        .env(FOLDER, folder)
        .output()
        .expect("this program")
}

fn main() {
    if let Ok(what) = std::env::var(TRY) {
        let folder = std::env::var_os(FOLDER).expect("a folder");
        return confined_process(&what, Path::new(&folder));
    }
    let trials = vec![
        trial(
            "a_confined_process_does_its_work_and_nothing_else",
            a_confined_process_does_its_work_and_nothing_else,
        ),
        trial(
            "what_only_an_attacker_tries_ends_the_process",
            what_only_an_attacker_tries_ends_the_process,
        ),
        trial(
            "records_of_roots_are_handed_over_and_nothing_else_is_as_root",
            records_of_roots_are_handed_over_and_nothing_else_is_as_root,
        ),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn trial(name: &str, test: fn()) -> Trial {
    Trial::test(name, move || {
        test();
        Ok(())
    })
}

/// What the tests start.
fn confined_process(what: &str, folder: &Path) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let there = listener.local_addr().expect("an address");
    let _confined = Confined::now(&folder.join("records")).expect("confined");
    let done: io::Result<()> = match what {
        "write a record" => fs::create_dir("run").and_then(|()| fs::write("run/main.jsonl", "x")),
        "read the resolver's files" => fs::read("/etc/hosts").map(drop),
        "start a thread" => std::thread::Builder::new()
            .spawn(|| ())
            .map(|thread| thread.join().expect("it ran")),
        "connect" => TcpStream::connect(there).map(drop),
        "resolve a name" => TcpStream::connect(("localhost", there.port())).map(drop),
        "read a file of another's" => fs::read(folder.join("other")).map(drop),
        "write beside the records" => fs::write(folder.join("open/new"), "x"),
        "listen at a port" => TcpListener::bind("127.0.0.1:0").map(drop),
        "talk netlink" => {
            // SAFETY: it only makes a descriptor, which the process ends with.
            let socket = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, 0) };
            result(socket)
        }
        // SAFETY: a child, if there is one, ends at once.
        "fork" => result(match unsafe { libc::fork() } {
            // SAFETY: it ends the child.
            0 => unsafe { libc::_exit(0) },
            pid => pid,
        }),
        // SAFETY: it only reads a number.
        "trace" => result(unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) } as i32),
        "start a program" => {
            use std::os::unix::process::CommandExt as _;
            Err(Command::new("/bin/true").exec())
        }
        // SAFETY: it takes plain numbers.
        "become root" => result(unsafe { libc::setuid(0) }),
        other => panic!("{other}?"),
    };
    match done {
        Ok(()) => println!("\nit could"),
        Err(error) => println!("\nit could not: {error}"),
    }
}

fn result(returned: i32) -> io::Result<()> {
    match returned {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let open = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("it is ours");
    };
    // By modes alone everybody may.
    open(folder.path(), 0o755);
    fs::write(folder.path().join("other"), "another's").expect("a file");
    open(&folder.path().join("other"), 0o644);
    fs::create_dir(folder.path().join("open")).expect("a folder");
    open(&folder.path().join("open"), 0o777);
    folder
}

fn a_confined_process_does_its_work_and_nothing_else() {
    for (what, may) in [
        ("write a record", true),
        ("read the resolver's files", true),
        ("start a thread", true),
        ("connect", true),
        ("resolve a name", true),
        ("read a file of another's", false),
        ("write beside the records", false),
        ("listen at a port", false),
        ("talk netlink", false),
        ("fork", false),
    ] {
        let folder = folder();
        let output = confined(what, folder.path());
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{what}: {output:?}");
        assert_eq!(said.contains("\nit could\n"), may, "{what}: {said}");
        assert_eq!(said.contains("it could not"), !may, "{what}: {said}");
    }
}

fn what_only_an_attacker_tries_ends_the_process() {
    for what in ["trace", "start a program", "become root"] {
        let output = confined(what, folder().path());
        assert_eq!(
            output.status.signal(),
            Some(libc::SIGSYS),
            "{what}: {output:?}"
        );
    }
}

fn records_of_roots_are_handed_over_and_nothing_else_is_as_root() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can be somebody else");
        return;
    }
    let folder = folder();
    let records = folder.path().join("records");
    let owner = |path: &Path| fs::symlink_metadata(path).expect("it is there").uid();
    // As a bridge that had no user of its own has left them.
    fs::create_dir_all(records.join("r1/bodies")).expect("a folder");
    for name in ["r1/lock", "r1/main.jsonl", "r1/bodies/aa"] {
        fs::write(records.join(name), "x").expect("a file");
    }
    let output = confined("write a record", folder.path());
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("\nit could\n"),
        "{output:?}"
    );
    for name in [
        "",
        "r1",
        "r1/lock",
        "r1/main.jsonl",
        "r1/bodies",
        "r1/bodies/aa",
        "run",
    ] {
        assert_eq!(owner(&records.join(name)), OWN_ID, "{name}");
    }
    // A folder that somebody has named by mistake stays as it is.
    let other = folder.path().join("etc");
    fs::create_dir_all(other.join("ssh")).expect("a folder");
    let refused = std::thread::spawn({
        let other = other.clone();
        move || Confined::now(&other).expect_err("it is no records' folder")
    });
    let error = refused.join().expect("it returns");
    assert!(matches!(error, ConfineError::NotRecords { .. }), "{error}");
    assert!(error.to_string().contains("/ssh"), "{error}");
    assert_eq!((owner(&other), owner(&other.join("ssh"))), (0, 0));
}
