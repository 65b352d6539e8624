//! Forked VMs as a family: who comes from whom, what each has of its own, and which of them stays.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use ratoon_protocol::{Call, HostnameSet};
use serde::Serialize;

use crate::engine::Engine;
use crate::vm::life::{self, LifeError, Status};
use crate::vm::record::{Parent, Record, VmDir, hostname};
use crate::vm::standstill;
use crate::vm::store::{Entry, StoreError};

/// How long the runtime may take to accept a connection and to do a small thing.
const GUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// A VM, and the children that were forked from it.
#[derive(Debug, Clone, Serialize)]
pub struct Node {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: Option<String>,
    /// Where it is in its life.
    pub status: Status,
    /// Where it comes from, if it is a child.
    pub parent: Option<Parent>,
    /// The user's own words about it.
    pub labels: BTreeMap<String, String>,
    /// What it takes, while it runs.
    pub memory: Option<Shares>,
    /// What was written to its disk.
    pub disk: Shares,
    /// VMs that were forked from it, the oldest first.
    pub children: Vec<Node>,
}

/// Bytes that one VM has alone, and those that it has in common with others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Shares {
    /// Freed when it ends.
    pub unique: u64,
    /// Used by others, too.
    pub shared: u64,
}

/// What came of a commit.
#[derive(Debug, Clone, Serialize)]
pub struct Committed {
    /// The VM that stayed.
    pub id: String,
    /// What it is called now.
    pub name: Option<String>,
    /// The ids of those that were ended and removed.
    pub discarded: Vec<String>,
}

/// Why a child does not take its parent's place.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// It is no child.
    #[error("VM {0} is no child of a fork: there is nothing to take the place of")]
    NoChild(String),
    /// It does not run.
    #[error("VM {id} is {status}: only a running VM can take its parent's place")]
    NotRunning {
        /// Which.
        id: String,
        /// What it does.
        status: Status,
    },
    /// Records.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its own record, or a VM that is to end.
    #[error(transparent)]
    Life(#[from] LifeError),
}

impl Engine {
    /// All VMs as families. A child whose parent is gone stands where its parent stood.
    ///
    /// # Errors
    /// When the state directory cannot be read.
    pub fn tree(&self) -> Result<Vec<Node>, StoreError> {
        let nodes = self.store().list()?.iter().map(node).collect();
        Ok(families(nodes))
    }

    /// `child` takes its parent's place and name; the parent, and all others that come from it, are ended and
    /// removed. What was forked from the child stays.
    ///
    /// # Errors
    /// [`CommitError`]; before the first VM is ended nothing has changed but names.
    pub fn commit(&self, child: &Entry) -> Result<Committed, CommitError> {
        let id = child.dir.id();
        let status = life::info(child).status;
        let record = match &child.record {
            Ok(record) if status == Status::Running => record,
            _ => return Err(CommitError::NotRunning { id, status }),
        };
        let Some(from) = &record.parent else {
            return Err(CommitError::NoChild(id));
        };
        let entries = self.store().list()?;
        let records: Vec<&Record> = entries
            .iter()
            .filter_map(|entry| entry.record.as_ref().ok())
            .collect();
        let discarded = others(&records, &id, from);
        let parent = from.vm.as_ref();
        let parent = parent.and_then(|parent| records.iter().find(|it| it.id == *parent));
        let name = self
            .store()
            .succeed(&child.dir, parent.map(|it| it.id.as_str()))?;
        for entry in entries
            .iter()
            .filter(|entry| discarded.contains(&entry.dir.id()))
        {
            life::remove(self.store(), entry, true)?;
        }
        if let Some(name) = &name {
            call_it(&child.dir, &hostname(Some(name), &id));
        }
        Ok(Committed {
            id,
            name,
            discarded: discarded.into_iter().collect(),
        })
    }
}

/// The guest goes by its VM's name. One that does not answer keeps the old one.
fn call_it(dir: &VmDir, name: &str) {
    let call = Call::HostnameSet(HostnameSet {
        hostname: name.to_owned(),
    });
    let set = standstill::connect(dir, GUEST_TIMEOUT)
        .and_then(|mut client| client.call::<()>(&call, "taken its name", GUEST_TIMEOUT));
    if let Err(error) = set {
        tracing::warn!(%error, "the hostname of {}", dir.id());
    }
}

/// Who has to go when `child`, which comes from `from`, takes its parent's place: the parent, and all that
/// comes from it but the child and what comes from that. Children of a snapshot have no parent: it is those
/// of the same fork then.
fn others(records: &[&Record], child: &str, from: &Parent) -> BTreeSet<String> {
    let mut gone: BTreeSet<String> = from.vm.iter().cloned().collect();
    for record in records {
        let is_sibling = record
            .parent
            .as_ref()
            .is_some_and(|parent| parent.generation == from.generation);
        if is_sibling && record.id != child {
            gone.insert(record.id.clone());
        }
    }
    loop {
        let before = gone.len();
        for record in records {
            let parent = record.parent.as_ref().and_then(|parent| parent.vm.as_ref());
            if parent.is_some_and(|parent| gone.contains(parent)) && record.id != child {
                gone.insert(record.id.clone());
            }
        }
        if gone.len() == before {
            break;
        }
    }
    let known = |id: &String| records.iter().any(|record| record.id == *id);
    gone.retain(known);
    gone
}

fn node(entry: &Entry) -> Node {
    let info = life::info(entry);
    let record = entry.record.as_ref().ok();
    Node {
        id: info.id,
        name: info.name,
        status: info.status,
        parent: record.and_then(|record| record.parent.clone()),
        labels: record.map_or_else(BTreeMap::new, |record| record.labels.clone()),
        memory: info.pid.and_then(memory),
        disk: disk(&entry.dir, record),
        children: Vec::new(),
    }
}

/// What a process has: `/proc/PID/smaps_rollup` (proc_pid_smaps(5)). Memory of a generation that nobody else
/// has touched yet counts as its own.
fn memory(pid: i32) -> Option<Shares> {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let kib = |key: &str| -> u64 {
        let line = rollup.lines().find_map(|line| line.strip_prefix(key));
        let words = line.and_then(|line| line.split_whitespace().next());
        words.and_then(|word| word.parse().ok()).unwrap_or(0)
    };
    let unique = (kib("Private_Clean:") + kib("Private_Dirty:")) << 10;
    let shared = (kib("Rss:") << 10).saturating_sub(unique);
    Some(Shares { unique, shared })
}

/// Its layers: a file with one name is its own, one with more is another's too, as is one elsewhere.
fn disk(dir: &VmDir, record: Option<&Record>) -> Shares {
    let mut shares = Shares::default();
    let disks = record.iter().flat_map(|record| &record.config.disks);
    for path in disks.flat_map(|disk| disk.frozen.iter().chain(&disk.layer)) {
        let Ok(found) = std::fs::metadata(path) else {
            continue;
        };
        let bytes = found.blocks() * 512;
        match is_own(path, dir) && found.nlink() == 1 {
            true => shares.unique += bytes,
            false => shares.shared += bytes,
        }
    }
    shares
}

fn is_own(path: &Path, dir: &VmDir) -> bool {
    path.starts_with(dir.path())
}

/// Each under its parent; those whose parent is not there stay at the top. `nodes` are the oldest first, so
/// a child comes after its parent.
fn families(nodes: Vec<Node>) -> Vec<Node> {
    let known: BTreeSet<String> = nodes.iter().map(|node| node.id.clone()).collect();
    let mut waiting: BTreeMap<String, Vec<Node>> = BTreeMap::new();
    let mut top = Vec::new();
    for mut node in nodes.into_iter().rev() {
        node.children = waiting.remove(&node.id).unwrap_or_default();
        node.children.reverse();
        by_fork(&mut node.children);
        let parent = node.parent.as_ref().and_then(|parent| parent.vm.clone());
        match parent.filter(|parent| known.contains(parent) && *parent != node.id) {
            Some(parent) => waiting.entry(parent).or_default().push(node),
            None => top.push(node),
        }
    }
    // Records that somebody has changed so that no parent comes first.
    top.extend(waiting.into_values().flatten());
    top.reverse();
    top
}

/// Children of one fork are as old as each other: they stand by their numbers, the older forks first.
fn by_fork(children: &mut [Node]) {
    let generation = |node: &Node| node.parent.as_ref().map(|it| it.generation.clone());
    let mut forks: Vec<_> = Vec::new();
    for child in children.iter() {
        let fork = generation(child);
        if !forks.contains(&fork) {
            forks.push(fork);
        }
    }
    children.sort_by_cached_key(|child| {
        let fork = generation(child);
        let index = child.parent.as_ref().map(|it| it.index);
        (forks.iter().position(|it| *it == fork), index)
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::record::tests::config;

    fn record(id: &str, parent: Option<(&str, &str)>) -> Record {
        Record {
            parent: parent.map(|(vm, generation)| Parent {
                vm: Some(vm.to_owned()),
                generation: generation.to_owned(),
                index: 0,
                control_port: None,
            }),
            ..Record::new(config(id), None, None)
        }
    }

    #[test]
    fn who_takes_the_parents_place_leaves_nobody_but_its_own_children() {
        let all = [
            record("root", None),
            record("a", Some(("root", "g"))),
            record("b", Some(("root", "g"))),
            record("c", Some(("root", "h"))),
            record("aa", Some(("a", "i"))),
            record("bb", Some(("b", "j"))),
            record("stranger", None),
        ];
        let records: Vec<&Record> = all.iter().collect();
        let from = all[1].parent.clone().unwrap();
        let gone: Vec<_> = others(&records, "a", &from).into_iter().collect();
        assert_eq!(gone, ["b", "bb", "c", "root"]);
        let from = all[5].parent.clone().unwrap();
        let gone: Vec<_> = others(&records, "bb", &from).into_iter().collect();
        assert_eq!(gone, ["b"]);
    }

    #[test]
    fn children_stand_under_their_parent_the_oldest_first() {
        let child = |id: &str, index, generation: &str| Node {
            id: id.to_owned(),
            name: None,
            status: Status::Running,
            parent: Some(Parent {
                vm: Some("1".into()),
                generation: generation.into(),
                index,
                control_port: None,
            }),
            labels: BTreeMap::new(),
            memory: None,
            disk: Shares::default(),
            children: Vec::new(),
        };
        let mut forks = vec![
            child("c", 2, "old"),
            child("a", 0, "old"),
            child("n", 0, "new"),
        ];
        by_fork(&mut forks);
        let order: Vec<_> = forks.iter().map(|node| node.id.as_str()).collect();
        assert_eq!(order, ["a", "c", "n"]);
        let node = |id: &str, parent: Option<&str>| Node {
            id: id.to_owned(),
            name: None,
            status: Status::Running,
            parent: parent.map(|vm| Parent {
                vm: Some(vm.to_owned()),
                generation: "g".into(),
                index: 0,
                control_port: None,
            }),
            labels: BTreeMap::new(),
            memory: None,
            disk: Shares::default(),
            children: Vec::new(),
        };
        let nodes = vec![
            node("1", None),
            node("2", Some("1")),
            node("3", Some("gone")),
            node("4", Some("2")),
            node("5", Some("1")),
        ];
        fn words(nodes: &[Node]) -> String {
            let words = nodes.iter().map(|node| match node.children.is_empty() {
                true => node.id.clone(),
                false => format!("{}({})", node.id, words(&node.children)),
            });
            words.collect::<Vec<_>>().join(" ")
        }
        assert_eq!(words(&families(nodes)), "1(2(4) 5) 3");
    }
}
