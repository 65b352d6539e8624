//! Limits on what forked VMs take of the host's memory, by control groups (cgroups(7), version 2 or 1).
//!
//! ```text
//!   <own cgroup>/ratoon-<store>/<generation>/          all children of a fork, and theirs: the tree's limit
//!                                  <VM>/               one child: its limit
//!                                  <generation>/ …     children of one of them
//! ```
//!
//! `<store>` stands for where the records of the VMs are, so that engines with other records leave these groups alone.
//!
//! What a VM shares with others was counted where it was made. One that is over its limit is killed by the kernel, and
//! its group remembers it. A group that is empty is removed with its last VM.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// So long an empty family may be about to get its first VM.
const NEW: Duration = Duration::from_secs(60);

/// How much memory of the host children may take, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Each child.
    pub child: Option<u64>,
    /// All children of the fork together, with all that will be forked from them.
    pub tree: Option<u64>,
}

impl Limits {
    /// Whether there is any.
    pub fn any(self) -> bool {
        self.child.is_some() || self.tree.is_some()
    }
}

/// The control group of one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// That of all children of its fork.
    pub family: PathBuf,
    /// Its own.
    pub own: PathBuf,
    /// What was asked for.
    pub limits: Limits,
}

/// Why memory cannot be limited.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// There is no such controller.
    #[error("memory cannot be limited: no memory controller of control groups is mounted")]
    None,
    /// It cannot be used.
    #[error("{} of a control group; it takes root, or a group that was delegated", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// The names of the files, which the versions have different.
struct Files {
    limit: &'static str,
    events: &'static str,
}

const V1: Files = Files {
    limit: "memory.limit_in_bytes",
    events: "memory.oom_control",
};
const V2: Files = Files {
    limit: "memory.max",
    events: "memory.events",
};

fn files(group: &Path) -> &'static Files {
    match group.join(V1.limit).exists() {
        true => &V1,
        false => &V2,
    }
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> GroupError {
    let path = path.to_owned();
    |source| GroupError::File { path, source }
}

fn write(path: &Path, text: &str) -> Result<(), GroupError> {
    std::fs::write(path, text).map_err(failed(path))
}

/// What the name of a store's group begins with.
const TOP: &str = "ratoon-";

/// The group below which all groups of the VMs are whose records are in `store`.
fn top(store: &Path) -> Result<PathBuf, GroupError> {
    let hash = blake3::hash(store.as_os_str().as_encoded_bytes()).to_hex();
    Ok(own_group()?.join(format!("{TOP}{}", &hash[..16])))
}

/// The group for children of a fork, below that of the VM that was forked, made with its limit. `store` is where the
/// records are.
///
/// # Errors
/// [`GroupError`].
pub fn family(
    store: &Path,
    parent: Option<&Group>,
    generation: &str,
    limits: Limits,
) -> Result<Option<PathBuf>, GroupError> {
    let above = match (parent, limits.any()) {
        (Some(parent), _) => parent.family.clone(),
        (None, false) => return Ok(None),
        (None, true) => top(store)?,
    };
    make(&above)?;
    let family = above.join(generation);
    make_family(&family, limits)?;
    Ok(Some(family))
}

fn make_family(family: &Path, limits: Limits) -> Result<(), GroupError> {
    family.parent().map_or(Ok(()), make)?;
    make(family)?;
    if let Some(bytes) = limits.tree {
        let path = family.join(files(family).limit);
        write(&path, &bytes.to_string())?;
    }
    Ok(())
}

impl Group {
    /// The group of one child.
    pub fn of(family: &Path, id: &str, limits: Limits) -> Self {
        Self {
            family: family.to_owned(),
            own: family.join(id),
            limits,
        }
    }

    /// Makes it, and puts a process into it.
    ///
    /// # Errors
    /// [`GroupError`].
    pub fn take_in(&self, pid: u32) -> Result<(), GroupError> {
        // A family that waited long for its first VM may have been swept.
        make_family(&self.family, self.limits)?;
        make(&self.own)?;
        if let Some(bytes) = self.limits.child {
            let path = self.own.join(files(&self.own).limit);
            write(&path, &bytes.to_string())?;
        }
        write(&self.own.join("cgroup.procs"), &pid.to_string())
    }

    /// What became of it, if the kernel has killed it for its memory.
    pub fn verdict(&self) -> Option<String> {
        let events = std::fs::read_to_string(self.own.join(files(&self.own).events)).ok()?;
        if !has_killed(&events) {
            return None;
        }
        let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
        Some(match (self.limits.child, self.limits.tree) {
            (Some(child), None) => format!("it took more memory than its limit of {}", mib(child)),
            (None, Some(tree)) => {
                format!("its tree took more memory than its limit of {}", mib(tree))
            }
            (Some(child), Some(tree)) => format!(
                "it took more memory than its limit of {}, or its tree more than {}",
                mib(child),
                mib(tree)
            ),
            (None, None) => "a tree that it belongs to took more memory than its limit".to_owned(),
        })
    }

    /// Removes it; see `remove_empty`.
    pub fn remove(&self) {
        remove_empty(&self.own);
    }
}

/// Removes a group, and what is empty above it. The kernel refuses what is in use.
pub(crate) fn remove_empty(group: &Path) {
    let mut path = Some(group);
    while let Some(group) = path {
        if std::fs::remove_dir(group).is_err() && group.exists() {
            break;
        }
        path = group.parent();
        if is_top(group) {
            break;
        }
    }
}

fn is_top(group: &Path) -> bool {
    let name = group.file_name().unwrap_or_default();
    name.as_encoded_bytes().starts_with(TOP.as_bytes())
}

/// Removes groups of VMs that have no record in `store`: those that have gone with the command that had them.
pub(crate) fn sweep(store: &Path) {
    if let Ok(top) = top(store) {
        sweep_below(&top, &|id| store.join(id).exists());
    }
}

fn sweep_below(group: &Path, known: &dyn Fn(&str) -> bool) {
    for entry in std::fs::read_dir(group).into_iter().flatten().flatten() {
        let path = entry.path();
        if !path.is_dir() {
            continue;
        }
        sweep_below(&path, known);
        let name = entry.file_name();
        let name = name.to_str().unwrap_or_default();
        let age = entry.metadata().and_then(|found| found.modified());
        let age = age.ok().and_then(|made| made.elapsed().ok());
        // A family is made before the records of its VMs.
        let is_over = match name.len() == super::store::ID_LEN {
            true => !known(name),
            false => age.is_some_and(|age| age > NEW),
        };
        if is_over {
            // Refused while there is anything in it.
            let _ = std::fs::remove_dir(&path);
        }
    }
}

/// `oom_kill N` (cgroup-v2.rst: memory.events; cgroup-v1/memory.rst: memory.oom_control).
fn has_killed(events: &str) -> bool {
    let count = events
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "));
    count.is_some_and(|count| count.trim().parse::<u64>().is_ok_and(|count| count > 0))
}

fn make(group: &Path) -> Result<(), GroupError> {
    match std::fs::create_dir(group) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(failed(group)(error));
        }
        _ => {}
    }
    // Version 2: what is below gets the controller only when the group above hands it on.
    if let Some(above) = group.parent()
        && !group.join(V1.limit).exists()
        && !group.join(V2.limit).exists()
    {
        write(&above.join("cgroup.subtree_control"), "+memory")?;
    }
    Ok(())
}

/// This process's own group in the hierarchy that has the memory controller.
fn own_group() -> Result<PathBuf, GroupError> {
    let read = |path: &str| std::fs::read_to_string(path).map_err(failed(Path::new(path)));
    let (mounts, groups) = (read("/proc/self/mountinfo")?, read("/proc/self/cgroup")?);
    let has_memory = |mount: &Path| {
        let controllers = std::fs::read_to_string(mount.join("cgroup.controllers"));
        controllers.is_ok_and(|list| list.split_whitespace().any(|it| it == "memory"))
    };
    find(&mounts, &groups, has_memory).ok_or(GroupError::None)
}

/// See proc_pid_mountinfo(5) and cgroups(7). What `has_memory` is asked for is a mount of version 2.
fn find(mounts: &str, groups: &str, has_memory: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let own = |wanted: &str| {
        groups.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let (controllers, path) = (parts.next()?, parts.next()?);
            let fits = controllers.split(',').any(|it| it == wanted);
            fits.then(|| path.trim_start_matches('/').to_owned())
        })
    };
    let mut first_version = None;
    for line in mounts.lines() {
        let (Some((head, tail)), Some(point)) = (line.split_once(" - "), line.split(' ').nth(4))
        else {
            continue;
        };
        let root = head.split(' ').nth(3).unwrap_or("/");
        let mut tail = tail.split(' ');
        let (kind, options) = (tail.next(), tail.nth(1).unwrap_or_default());
        let place = |path: String| {
            // Where only a part of the hierarchy is mounted, as in a container.
            let below = Path::new("/").join(path);
            let below = below.strip_prefix(root).unwrap_or(Path::new(""));
            Path::new(point).join(below)
        };
        match kind {
            Some("cgroup2") if has_memory(Path::new(point)) => return own("").map(place),
            Some("cgroup") if options.split(',').any(|it| it == "memory") => {
                first_version = own("memory").map(place);
            }
            _ => {}
        }
    }
    first_version
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
31 24 0:27 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
38 31 0:34 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
42 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
    const GROUPS: &str = "4:memory:/some/one\n3:cpu,cpuacct:/\n0::/two\n";

    #[test]
    fn the_hierarchy_with_the_memory_controller_is_found() {
        let found = find(MOUNTS, GROUPS, |_| false);
        assert_eq!(found.unwrap(), Path::new("/sys/fs/cgroup/memory/some/one"));
        let found = find(MOUNTS, GROUPS, |_| true);
        assert_eq!(found.unwrap(), Path::new("/sys/fs/cgroup/unified/two"));
        assert_eq!(find("", GROUPS, |_| true), None);
    }

    #[test]
    fn a_kill_for_memory_is_known_from_the_groups_events() {
        assert!(has_killed("low 0\nmax 12\noom 1\noom_kill 1\n"));
        assert!(!has_killed("oom_kill_disable 0\nunder_oom 0\noom_kill 0\n"));
        assert!(!has_killed(""));
    }
}
