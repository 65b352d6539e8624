//! Forked VMs as a family: who comes from whom, and what each has of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;

use crate::engine::Engine;
use crate::vm::life::{self, Status};
use crate::vm::record::{Parent, Record, VmDir};
use crate::vm::store::{Entry, StoreError};

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

impl Engine {
    /// All VMs as families. A child whose parent is gone stands where its parent stood.
    ///
    /// # Errors
    /// When the state directory cannot be read.
    pub fn tree(&self) -> Result<Vec<Node>, StoreError> {
        let nodes = self.store().list()?.iter().map(node).collect();
        Ok(families(nodes))
    }
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
