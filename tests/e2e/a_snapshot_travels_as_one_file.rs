//! A snapshot is one file when that is wanted, and can say who made it.

use std::os::unix::fs::FileExt;
use std::path::Path;

use ratoon_tests::{Done, Ratoon};
use tempfile::TempDir;

crate::promises![
    a_signed_snapshot_goes_through_a_file_and_starts_elsewhere,
    an_export_that_is_killed_leaves_nothing,
];

fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

fn text(path: &Path) -> String {
    path.to_str().expect("a plain path").to_owned()
}

fn refused(done: &Done, why: &str) {
    assert_eq!(done.code(), 125, "{done:?}");
    assert!(done.stderr.contains(why), "{why}: {}", done.stderr);
    assert!(done.stdout.is_empty(), "{done:?}");
}

/// A machine with a file of its own, and a snapshot of it.
fn snapshot(ratoon: &Ratoon, more: &[&str]) {
    let args = ["run", "-d", "--name", "it", "--memory", "256M"];
    ratoon.run(args).ok();
    let line = "echo from afar > /root/file; sync";
    ratoon.run(["exec", "it", "--", "sh", "-c", line]).ok();
    let args = ["snapshot", "it", "point"].iter().chain(more);
    ratoon.run(args.copied()).ok();
    ratoon.run(["rm", "-f", "it"]).ok();
}

fn a_signed_snapshot_goes_through_a_file_and_starts_elsewhere() {
    let (here, there) = (Ratoon::warm(), Ratoon::new());
    let folder = folder();
    let path = |name: &str| text(&folder.path().join(name));
    for name in ["ours", "theirs"] {
        here.run(["snapshots", "key", "new", &path(name)]).ok();
    }
    snapshot(&here, &["--sign-key", &path("ours")]);
    let shown = here.run(["snapshots", "inspect", "point"]).ok().stdout;
    let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
    assert_eq!(shown["image"], "debian");
    assert!(shown["disk_bytes"].as_u64() > Some(1 << 20), "{shown}");
    let ours = std::fs::read_to_string(path("ours.pub")).expect("a key");
    let signer = shown["signed_by"].as_str().expect("a signature");
    assert!(ours.contains(signer), "{ours} {signer}");

    here.run(["snapshots", "export", "point", &path("point.tar")])
        .ok();
    let refusal = there.run([
        "snapshots",
        "import",
        &path("point.tar"),
        "--require-signature",
        &path("theirs.pub"),
    ]);
    refused(&refusal, "not among the trusted keys");
    assert_eq!(there.run(["snapshots", "--json"]).ok().stdout, "[]\n");
    there
        .run(["snapshots", "import", &path("point.tar"), "--name", "got"])
        .ok();
    there.run(["snapshots", "verify", "got"]).ok();

    let start = |key: &str, command: &[&str]| {
        let args = ["run", "--snapshot", "got", "--require-signature", key, "--"];
        there.run(args.iter().chain(command).copied())
    };
    let read = ["cat", "/root/file"];
    assert_eq!(start(&path("ours.pub"), &read).ok().stdout, "from afar\n");
    refused(
        &start(&path("theirs.pub"), &read),
        "not among the trusted keys",
    );

    // One byte of what was signed.
    let id = shown["id"].as_str().expect("an id");
    let memory = there
        .state_dir()
        .join("ratoon/snapshots")
        .join(id)
        .join("memory.bin");
    let memory = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(memory)
        .expect("its memory");
    let at = rustix::fs::seek(&memory, rustix::fs::SeekFrom::Data(0)).expect("some memory");
    let mut byte = [0];
    memory.read_exact_at(&mut byte, at).expect("a byte");
    memory
        .write_all_at(&[byte[0] ^ 1], at)
        .expect("another byte");
    refused(&start(&path("ours.pub"), &read), "is damaged");
    there.nothing_is_left();

    // Importing again mends it.
    there.run(["snapshots", "import", &path("point.tar")]).ok();
    assert_eq!(start(&path("ours.pub"), &read).ok().stdout, "from afar\n");
    there.run(["snapshots", "rm", "got"]).ok();
    there.nothing_is_left();
    here.nothing_is_left();
}

fn an_export_that_is_killed_leaves_nothing() {
    let ratoon = Ratoon::warm();
    snapshot(&ratoon, &[]);
    let unsigned = ratoon.run(["restore", "point", "--require-signature", &"00".repeat(32)]);
    refused(&unsigned, "has no signature");
    let folder = folder();
    let file = text(&folder.path().join("point.tar"));
    let mut early = 0;
    for wait_ms in [0, 1, 2, 5, 10, 20, 40, 80] {
        let mut child = ratoon
            .command(["snapshots", "export", "point", &file])
            .spawn()
            .expect("ratoon can be started");
        std::thread::sleep(std::time::Duration::from_millis(wait_ms));
        child.kill().expect("it is our child");
        child.wait().expect("it is our child");
        let left: Vec<_> = std::fs::read_dir(folder.path())
            .expect("the folder")
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        match left.as_slice() {
            [] => early += 1,
            [name] if name == "point.tar" => {
                std::fs::remove_file(&file).expect("it can be removed");
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(early > 0, "no export was ended early");
    ratoon.run(["snapshots", "export", "point", &file]).ok();
    let piped = ratoon
        .command(["snapshots", "export", "point", "-"])
        .stdout(std::fs::File::create(folder.path().join("piped.tar")).expect("a file"))
        .spawn()
        .expect("ratoon can be started");
    ratoon_tests::finish(piped).ok();
    let read = |name: &str| std::fs::read(folder.path().join(name)).expect("a file");
    assert!(read("piped.tar") == read("point.tar"));
    ratoon.run(["snapshots", "rm", "point"]).ok();
    ratoon.nothing_is_left();
}
