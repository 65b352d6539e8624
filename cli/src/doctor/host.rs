//! Checks of the host around KVM: kernel, memory, disks, descriptors, what later features use.

use std::path::Path;

use ratoon_engine::dirs::Dirs;
use rustix::process::{Resource, getrlimit};

use super::Finding;
use crate::units;

/// A Debian image and a few VMs' layers.
const LOW_DISK_BYTES: u64 = 4 << 30;
/// Less and not even one VM's logs and layer fit.
const NO_DISK_BYTES: u64 = 256 << 20;
/// One VM of default size, and the host.
const LOW_MEMORY_BYTES: u64 = 1 << 30;
/// A VMM needs about 40 descriptors, an embedding engine a few for each VM.
const LOW_DESCRIPTORS: u64 = 1024;
/// `struct statfs.f_type` of a cgroup v2 mount (include/uapi/linux/magic.h).
const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;

pub(super) fn check(dirs: &Dirs) -> Vec<Finding> {
    vec![
        kernel(),
        memory(),
        disk("state disk", dirs.state()),
        disk("cache disk", dirs.cache()),
        descriptors(),
        userfaultfd(),
        cgroup(),
        tun(),
    ]
}

fn kernel() -> Finding {
    const CHECK: &str = "host kernel";
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    match version(&release) {
        Some(version) if version >= (5, 10) => Finding::ok(CHECK, release),
        Some(_) => Finding::warn(CHECK, release, "Linux 5.10 or later"),
        None => Finding::warn(CHECK, release, "a kernel whose version can be read"),
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(['.', '-']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn memory() -> Finding {
    const CHECK: &str = "memory";
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    match available_bytes(&text) {
        Some(bytes) if bytes >= LOW_MEMORY_BYTES => {
            Finding::ok(CHECK, format!("{} available", units::bytes(bytes)))
        }
        Some(bytes) => Finding::warn(
            CHECK,
            format!("{} available", units::bytes(bytes)),
            "end other programs, or give VMs less with --memory",
        ),
        None => Finding::warn(CHECK, "unknown", "mount /proc"),
    }
}

fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

fn disk(check: &'static str, dir: &Path) -> Finding {
    // The directory may not be there yet; then it will be made under its nearest ancestor.
    let Some(existing) = dir.ancestors().find(|dir| dir.exists()) else {
        return Finding::fail(
            check,
            format!("{} cannot be made", dir.display()),
            "mount it",
        );
    };
    if rustix::fs::access(existing, rustix::fs::Access::WRITE_OK).is_err() {
        return Finding::fail(
            check,
            format!("{} is not writable", existing.display()),
            "own it, or set XDG_STATE_HOME and XDG_CACHE_HOME to directories of yours",
        );
    }
    let stat = match rustix::fs::statvfs(existing) {
        Ok(stat) => stat,
        Err(error) => {
            return Finding::warn(
                check,
                format!("{}: {error}", existing.display()),
                "mount it",
            );
        }
    };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let seen = format!("{} free at {}", units::bytes(free), existing.display());
    let mend = "free some, or set XDG_STATE_HOME and XDG_CACHE_HOME to a larger disk";
    match free {
        free if free < NO_DISK_BYTES => Finding::fail(check, seen, mend),
        free if free < LOW_DISK_BYTES => Finding::warn(check, seen, mend),
        _ => Finding::ok(check, seen),
    }
}

fn descriptors() -> Finding {
    const CHECK: &str = "open files";
    match getrlimit(Resource::Nofile).current {
        Some(limit) if limit < LOW_DESCRIPTORS => Finding::warn(
            CHECK,
            format!("at most {limit} a process"),
            format!("`ulimit -n {LOW_DESCRIPTORS}` or more"),
        ),
        Some(limit) => Finding::ok(CHECK, format!("at most {limit} a process")),
        None => Finding::ok(CHECK, "unlimited"),
    }
}

fn userfaultfd() -> Finding {
    const CHECK: &str = "userfaultfd";
    let device = Path::new("/dev/userfaultfd");
    let usable = |access| rustix::fs::access(device, access).is_ok();
    if usable(rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK) {
        return Finding::ok(CHECK, "/dev/userfaultfd");
    }
    let for_all = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if rustix::process::geteuid().is_root() || for_all.is_ok_and(|value| value.trim() == "1") {
        return Finding::ok(CHECK, "by system call");
    }
    Finding::warn(
        CHECK,
        "not for this user: no lazy restore of snapshots",
        "give the user access to /dev/userfaultfd, or `sysctl vm.unprivileged_userfaultfd=1`",
    )
}

fn cgroup() -> Finding {
    const CHECK: &str = "cgroup v2";
    for mount in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
        let kind = rustix::fs::statfs(mount).map(|stat| stat.f_type as u64);
        if kind.is_ok_and(|kind| kind == CGROUP2_SUPER_MAGIC) {
            let controllers = Path::new(mount).join("cgroup.controllers");
            let controllers = std::fs::read_to_string(controllers).unwrap_or_default();
            let has = |name: &str| controllers.split_whitespace().any(|c| c == name);
            let missing: Vec<_> = ["cpu", "memory", "pids"]
                .into_iter()
                .filter(|name| !has(name))
                .collect();
            return if missing.is_empty() {
                Finding::ok(CHECK, mount)
            } else {
                Finding::warn(
                    CHECK,
                    format!("{mount} without {}", missing.join(", ")),
                    "limits for VMs need them: boot with systemd.unified_cgroup_hierarchy=1",
                )
            };
        }
    }
    Finding::warn(
        CHECK,
        "not mounted: VMs run without limits of their own",
        "`mount -t cgroup2 none /sys/fs/cgroup`, or boot with systemd.unified_cgroup_hierarchy=1",
    )
}

fn tun() -> Finding {
    const CHECK: &str = "tun";
    let device = Path::new("/dev/net/tun");
    let access = rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK;
    if rustix::fs::access(device, access).is_ok() {
        Finding::ok(CHECK, "/dev/net/tun")
    } else {
        Finding::warn(
            CHECK,
            "/dev/net/tun cannot be used: no VM with --net",
            "`modprobe tun`, and give the user access to it",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn a_kernel_release_has_two_numbers() {
        assert_eq!(version("6.12.9-ratoon"), Some((6, 12)));
        assert_eq!(version("5.10-rc1"), Some((5, 10)));
        assert_eq!(version("six"), None);
    }

    #[test]
    fn available_memory_is_read_in_kib() {
        let meminfo = "MemTotal: 9 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(available_bytes(meminfo), Some(2 << 20));
        assert_eq!(available_bytes("MemTotal: 9 kB\n"), None);
    }

    #[test]
    fn a_directory_that_is_not_there_yet_is_judged_by_its_ancestor() {
        let temp = tempfile::tempdir().unwrap();
        let finding = disk("state disk", &temp.path().join("a/b"));
        assert_ne!(finding.level, Level::Fail, "{}", finding.seen);
        assert!(finding.seen.contains(&temp.path().display().to_string()));
    }
}
