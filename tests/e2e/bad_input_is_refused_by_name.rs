//! What cannot work is refused at once: one clear error that names the thing, exit code 125 (2 for
//! a wrong command line), nothing left behind. None of these needs a guest.

use std::ffi::CStr;
use std::os::unix::process::CommandExt;

use ratoon_tests::{Done, Ratoon, finish, kernel};

crate::promises![
    a_missing_kernel,
    a_compressed_kernel,
    a_kernel_that_is_garbage,
    a_missing_image,
    no_processors_and_too_many,
    too_little_memory,
    an_unknown_flag_and_a_missing_command,
    a_damaged_ext4,
    no_kvm_and_no_permission_for_it_as_root,
    an_unknown_machine,
    no_children_and_too_many,
];

/// Runs with `args` before the image; the error must contain every one of `words`.
fn refused(args: &[&str], words: &[&str]) -> Done {
    let ratoon = Ratoon::new();
    let all = ["run"]
        .iter()
        .chain(args)
        .chain(&["--image", "debian", "--", "true"]);
    let done = ratoon.run(all);
    check(&ratoon, done, 125, words)
}

fn check(ratoon: &Ratoon, done: Done, code: i32, words: &[&str]) -> Done {
    assert_eq!(done.code(), code, "{done:?}");
    assert_eq!(done.stdout, "", "an error goes to stderr");
    for word in words {
        assert!(done.stderr.contains(word), "no {word:?} in {done:?}");
    }
    assert!(!done.stderr.contains("panicked at"), "{done:?}");
    ratoon.nothing_is_left();
    done
}

fn a_missing_kernel() {
    refused(
        &["--kernel", "/no/such/vmlinux"],
        &["/no/such/vmlinux", "No such file"],
    );
}

fn a_compressed_kernel() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("bzImage");
    let mut bytes = vec![0; 4096];
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    std::fs::write(&path, bytes).expect("it can be written");
    let path = path.to_str().expect("a plain path");
    refused(&["--kernel", path], &[path, "compressed", "vmlinux"]);
}

fn a_kernel_that_is_garbage() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("vmlinux");
    std::fs::write(&path, "not a kernel").expect("it can be written");
    let path = path.to_str().expect("a plain path");
    refused(&["--kernel", path], &[path, "not an x86-64 ELF"]);
    // Cut off in the middle of a segment.
    let whole = std::fs::read(kernel()).expect("scripts/setup has built a kernel");
    std::fs::write(path, &whole[..whole.len() / 2]).expect("it can be written");
    refused(&["--kernel", path], &[path, "damaged"]);
}

fn a_missing_image() {
    let ratoon = Ratoon::new();
    let done = ratoon.run(["run", "--image", "no-such-image", "--", "true"]);
    check(&ratoon, done, 125, &["no-such-image", "image"]);
}

fn no_processors_and_too_many() {
    for count in ["0", "1000"] {
        let ratoon = Ratoon::new();
        let done = ratoon.run(["run", "--cpus", count, "--image", "debian", "--", "true"]);
        assert!(matches!(done.code(), 2 | 125), "{done:?}");
        let code = done.code();
        check(&ratoon, done, code, &[count, "32"]);
    }
}

fn too_little_memory() {
    for size in ["1M", "0M"] {
        let ratoon = Ratoon::new();
        let done = ratoon.run(["run", "--memory", size, "--image", "debian", "--", "true"]);
        assert!(matches!(done.code(), 2 | 125), "{done:?}");
        let code = done.code();
        check(&ratoon, done, code, &["64"]);
    }
}

fn an_unknown_flag_and_a_missing_command() {
    let ratoon = Ratoon::new();
    let done = ratoon.run(["run", "--no-such-flag"]);
    check(&ratoon, done, 2, &["--no-such-flag"]);
    let done = ratoon.run(["no-such-command"]);
    check(&ratoon, done, 2, &["no-such-command"]);
}

fn a_damaged_ext4() {
    let ratoon = Ratoon::new();
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("disk.ext4");
    std::fs::write(&path, vec![7; 1 << 20]).expect("it can be written");
    let path = path.to_str().expect("a plain path");
    let args = [
        "image", "import", "--kind", "ext4", "--name", "damaged", path,
    ];
    let done = ratoon.run(args);
    check(&ratoon, done, 125, &[path, "ext4"]);
}

/// Runs in a mount namespace in which `by` lies over /dev/kvm, with these mount flags.
pub fn with_kvm_replaced(by: &'static CStr, flags: libc::c_ulong, words: &[&str]) {
    let ratoon = Ratoon::new();
    let mut command = ratoon.command(["run", "--memory", "256M", "--", "true"]);
    // SAFETY: only system calls that are safe between fork and exec, on memory made before.
    unsafe {
        command.pre_exec(move || {
            let mount = |from: &CStr, to: &CStr, flags: libc::c_ulong| {
                let none = std::ptr::null();
                match libc::mount(from.as_ptr(), to.as_ptr(), none, flags, none.cast()) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            };
            if libc::unshare(libc::CLONE_NEWNS) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            mount(c"none", c"/", libc::MS_REC | libc::MS_PRIVATE)?;
            mount(by, c"/dev/kvm", libc::MS_BIND)?;
            mount(
                c"none",
                c"/dev/kvm",
                libc::MS_BIND | libc::MS_REMOUNT | flags,
            )
        });
    }
    let done = finish(command.spawn().expect("ratoon can be started"));
    check(&ratoon, done, 125, words);
}

fn no_kvm_and_no_permission_for_it_as_root() {
    if ratoon_tests::kvm().is_err() {
        // Then it is the host itself that shows it.
        refused(&[], &["/dev/kvm"]);
        return;
    }
    // Something that is no KVM in its place.
    with_kvm_replaced(c"/dev/null", 0, &["/dev/kvm"]);
    // The device itself, but it may not be opened.
    with_kvm_replaced(
        c"/dev/kvm",
        libc::MS_NODEV,
        &["/dev/kvm", "ermission denied", "group kvm"],
    );
}

fn an_unknown_machine() {
    for command in ["logs", "stop", "kill", "rm"] {
        let ratoon = Ratoon::new();
        let done = ratoon.run([command, "no-such-vm"]);
        check(&ratoon, done, 125, &["no-such-vm"]);
    }
}

fn no_children_and_too_many() {
    for count in ["0", "-1", "1000000", "99999999999999999999", "several"] {
        for flag in [&["-n", count][..], &[&format!("--count={count}")]] {
            let ratoon = Ratoon::new();
            let done = ratoon.run(["fork", "box"].iter().chain(flag));
            check(&ratoon, done, 2, &[count, "--count", "choose 1 to 10000"]);
        }
    }
    let ratoon = Ratoon::new();
    let done = ratoon.run(["fork", "box", "--deadline=-1s"]);
    check(&ratoon, done, 2, &["--deadline"]);
}
