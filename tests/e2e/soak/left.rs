//! What there is of processes, descriptors, memory files, control groups, mounts and files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use ratoon_tests::Ratoon;

use super::population::Population;

/// How long what was killed may take to be gone.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counts {
    /// Descriptors of this process, by what they lead to: numbers are left out.
    descriptors: Vec<String>,
    /// Processes that it has not asked how they ended.
    zombies: usize,
    /// Files in memory that any process has which is ours, by what they are called.
    memory_files: usize,
    /// Processes with something of ours, but for this one.
    processes: usize,
    mounts: usize,
}

impl Counts {
    pub fn now(ratoon: &Ratoon) -> Self {
        // A shell that has become a machine is among both.
        let mut processes: BTreeSet<_> = ratoon.processes().into_iter().collect();
        processes.extend(shells());
        let all = processes.iter().copied().chain([std::process::id() as i32]);
        Self {
            descriptors: descriptors(),
            zombies: children().filter(|(_, state, _)| state == "Z").count(),
            memory_files: all.map(memory_files).sum(),
            processes: processes.len(),
            mounts: read("/proc/self/mountinfo").lines().count(),
        }
    }

    /// Waits for it.
    pub fn are_those_of(&self, ratoon: &Ratoon) {
        wait(|| {
            let now = Self::now(ratoon);
            (now != *self).then(|| format!("{now:?}, and there were {self:?}"))
        });
    }
}

/// Until there is nothing to say.
fn wait(mut what: impl FnMut() -> Option<String>) {
    let end = Instant::now() + PATIENCE;
    while let Some(left) = what() {
        assert!(Instant::now() < end, "left behind: {left}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn names(folder: impl AsRef<Path>) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned())
}

/// Children of this process: pid, state, name (proc_pid_stat(5)).
fn children() -> impl Iterator<Item = (i32, String, String)> {
    let own = std::process::id().to_string();
    names("/proc").filter_map(move |name| {
        let pid: i32 = name.parse().ok()?;
        let stat = read(&format!("/proc/{pid}/stat"));
        let (head, tail) = stat.rsplit_once(')')?;
        let mut tail = tail.split_whitespace();
        let (state, parent) = (tail.next()?.to_owned(), tail.next()?);
        let name = head.split_once('(')?.1.to_owned();
        (parent == own).then_some((pid, state, name))
    })
}

/// Processes that wait to become machines: they have nothing of the state directory yet.
fn shells() -> Vec<i32> {
    let is_shell = |pid: &i32| read(&format!("/proc/{pid}/cmdline")).contains("--shell");
    let all = children().map(|(pid, ..)| pid).filter(is_shell);
    all.collect()
}

fn descriptors() -> Vec<String> {
    let links = names("/proc/self/fd");
    let links = links.filter_map(|fd| fs::read_link(Path::new("/proc/self/fd").join(fd)).ok());
    let kind = |link: std::path::PathBuf| {
        link.to_string_lossy()
            .replace(|c: char| c.is_ascii_digit(), "")
    };
    let mut kinds: Vec<_> = links.map(kind).collect();
    kinds.sort();
    kinds
}

fn memory_files(pid: i32) -> usize {
    let folder = format!("/proc/{pid}/fd");
    let links = names(&folder).filter_map(|fd| fs::read_link(Path::new(&folder).join(fd)).ok());
    links
        .filter(|link| link.to_string_lossy().starts_with("/memfd:"))
        .count()
}

/// Processes that serve compressed memory.
pub fn pagers(ratoon: &Ratoon) -> Vec<i32> {
    let is_pager = |pid: &i32| {
        let exe = fs::read_link(format!("/proc/{pid}/exe"));
        exe.is_ok_and(|exe| exe.ends_with("ratoon-pager"))
    };
    ratoon.processes().into_iter().filter(is_pager).collect()
}

impl Population {
    /// In between: there is what the machines need, and nothing else.
    pub fn nothing_is_left_over(&mut self) {
        self.note("what is left?");
        wait(|| self.processes_too_many().or_else(|| self.files_too_many()));
    }

    fn processes_too_many(&self) -> Option<String> {
        // An engine asks how its children have ended when it is asked for machines; one may have been on its way then.
        self.look();
        let now = Counts::now(&self.ratoon);
        let pagers = pagers(&self.ratoon).len();
        let wanted = self.at_rest.processes + self.machines.len() + pagers;
        let has_pager = self.machines.values().any(|machine| machine.paged);
        let is_right = now.processes == wanted
            && now.descriptors == self.at_rest.descriptors
            && now.zombies == 0
            && now.mounts == self.before.mounts
            && (pagers == 0 || has_pager);
        (!is_right).then(|| format!("{now:?} with {pagers} pagers, at rest {:?}", self.at_rest))
    }

    fn files_too_many(&self) -> Option<String> {
        let root = self.ratoon.vms_dir();
        let folders: BTreeSet<_> = names(&root).filter(|name| name != ".lock").collect();
        let known: BTreeSet<_> = self.machines.keys().cloned().collect();
        if folders != known {
            return Some(format!("{folders:?}, not {known:?}"));
        }
        let layers = self.layers();
        known.iter().find_map(|id| {
            let known = layers.get(id)?;
            let is_known = |name: &String| {
                let plain = [
                    "record.json",
                    "serial.log",
                    "serial.log.1",
                    "vmm.log",
                    "control.sock",
                    "vsock.sock",
                    "layers.lock",
                ];
                // Of what a machine has merged its record hears with the next freeze. What a child was started from
                // stays, merged or not: a relative may be put back to it.
                plain.contains(&name.as_str())
                    || known.contains(name)
                    || name.starts_with("joined-")
                    || name.starts_with("inherited-")
            };
            let odd: Vec<_> = names(root.join(id))
                .filter(|name| !is_known(name))
                .collect();
            (!odd.is_empty()).then(|| format!("in {id}: {odd:?}; its layers: {known:?}"))
        })
    }

    /// Files of the machines' disks, as their records have them.
    fn layers(&self) -> BTreeMap<String, BTreeSet<String>> {
        let entries = self.engine().store().list().expect("records");
        let layers = entries.iter().filter_map(|entry| {
            let record = entry.record.as_ref().ok()?;
            let disks = record.config.disks.iter();
            let files = disks.flat_map(|disk| disk.frozen.iter().chain(&disk.layer));
            let names = files.filter_map(|file| file.file_name());
            let names = names.map(|name| name.to_string_lossy().into_owned());
            Some((record.id.clone(), names.collect()))
        });
        layers.collect()
    }
}
