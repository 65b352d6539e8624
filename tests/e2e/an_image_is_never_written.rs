//! Two machines of one image at once: neither sees the other's writes, and the image stays as it is.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use ratoon_tests::Ratoon;

crate::promises![writes_go_to_a_layer_of_the_machines_own];

/// Where `ratoon image inspect` says that the image's disk is.
fn disk(ratoon: &Ratoon) -> PathBuf {
    let done = ratoon.run(["image", "inspect", "debian"]).ok();
    let image: serde_json::Value = serde_json::from_str(&done.stdout).expect("inspect prints JSON");
    let disk = image["disk"].as_str().expect("an image has a disk");
    disk.into()
}

/// A checksum of a file's content: FNV-1a over 8-byte words, enough to see a change.
fn checksum(path: &PathBuf) -> u64 {
    let mut file = File::open(path).expect("the disk can be read");
    let mut buffer = vec![0; 1 << 20];
    let mut sum = 0xcbf2_9ce4_8422_2325_u64;
    loop {
        let len = file.read(&mut buffer).expect("the disk can be read");
        if len == 0 {
            return sum;
        }
        for word in buffer[..len].chunks_exact(8) {
            let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
            sum = (sum ^ word).wrapping_mul(0x100_0000_01b3);
        }
    }
}

fn writes_go_to_a_layer_of_the_machines_own() {
    let ratoon = Ratoon::warm();
    let disk = disk(&ratoon);
    let before = checksum(&disk);
    // Each waits long enough for the other to have written, then looks for the other's file.
    let script = |own: &str, other: &str| {
        format!(
            "head -c 300000 /dev/zero > /{own}; rm /etc/debian_version; sync; sleep 5; \
             test -s /{own} && test ! -e /{other} && test ! -e /etc/debian_version"
        )
    };
    let start = |script: String| {
        let args = [
            "run", "--image", "debian", "--memory", "256M", "--", "sh", "-c",
        ];
        ratoon
            .command(args)
            .arg(script)
            .spawn()
            .expect("ratoon can be started")
    };
    let a = start(script("a", "b"));
    let b = start(script("b", "a"));
    ratoon_tests::finish(a).ok();
    ratoon_tests::finish(b).ok();
    assert_eq!(checksum(&disk), before, "the image has changed");
    // A machine started afterwards has the image as it was.
    ratoon
        .run([
            "run",
            "--image",
            "debian",
            "--memory",
            "256M",
            "--",
            "test",
            "-e",
            "/etc/debian_version",
        ])
        .ok();
    ratoon.nothing_is_left();
}
