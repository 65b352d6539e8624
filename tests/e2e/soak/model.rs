//! What the soak believes that every machine and snapshot holds.

use std::collections::BTreeMap;

use ratoon_tests::Random;

/// Pages of the witness's memory; see `witness_in_machine.py`.
const MEMORY_PAGES: usize = 512;
/// Pages of its file.
const DISK_PAGES: usize = 128;

/// The number of each page: what a witness holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    memory: Vec<u64>,
    disk: Vec<u64>,
}

/// One write of the witness.
#[derive(Debug, Clone, Copy)]
pub struct Write {
    to_disk: bool,
    first: usize,
    step: usize,
    count: usize,
    number: u64,
    settle: bool,
}

impl Write {
    /// Any; `number` is one that no page has had, and the next [`Write::MOST`] are as new.
    pub fn any(random: &mut Random, number: u64) -> Self {
        Self {
            to_disk: random.below(2) == 0,
            first: random.below(MEMORY_PAGES as u64) as usize,
            step: [1, 1, 3, 17][random.below(4) as usize],
            count: 1 + random.below(Self::MOST) as usize,
            number,
            settle: random.below(3) == 0,
        }
    }

    /// The most pages of one write.
    pub const MOST: u64 = 64;

    /// How the witness is told.
    pub fn call(&self) -> String {
        let name = |truth| if truth { "True" } else { "False" };
        format!(
            "put({}, {}, {}, {}, {}, {})",
            name(self.to_disk),
            self.first,
            self.step,
            self.count,
            self.number,
            name(self.settle)
        )
    }
}

impl Contents {
    /// Of a witness that has just begun.
    pub fn new() -> Self {
        Self {
            memory: vec![0; MEMORY_PAGES],
            disk: vec![0; DISK_PAGES],
        }
    }

    /// What a write makes of it.
    pub fn put(&mut self, write: &Write) {
        let pages = if write.to_disk {
            &mut self.disk
        } else {
            &mut self.memory
        };
        for index in 0..write.count {
            let page = (write.first + index * write.step) % pages.len();
            pages[page] = write.number + index as u64;
        }
    }

    /// The first page that is not as it should be, of what the witness said.
    pub fn difference(&self, said: &str) -> Option<String> {
        let mut lines = said.lines();
        for (what, pages) in [("memory", &self.memory), ("disk", &self.disk)] {
            let words: Vec<_> = lines.next().unwrap_or_default().split(' ').collect();
            if words.len() != pages.len() {
                return Some(format!("{what}: {} pages", words.len()));
            }
            let differs = |(word, number): (&&str, &u64)| **word != format!("{number:x}");
            if let Some(page) = words.iter().zip(pages).position(differs) {
                return Some(format!(
                    "page {page} of {what} has {}, not {:x}",
                    words[page], pages[page]
                ));
            }
        }
        None
    }
}

/// A machine.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Its name now.
    pub name: String,
    /// What its witness holds.
    pub contents: Contents,
    /// The machine and the generation that it was forked from.
    pub parent: Option<(Option<String>, String)>,
    /// Some of its memory may come from a pager.
    pub paged: bool,
}

/// A snapshot.
#[derive(Debug, Clone)]
pub struct Saved {
    /// What it holds.
    pub contents: Contents,
    /// Machines that are started from it may need a pager.
    pub paged: bool,
}

/// The machines by their ids.
pub type Machines = BTreeMap<String, Machine>;

/// Who goes when this child takes its parent's place: docs/cli.md.
pub fn discarded(machines: &Machines, child: &str) -> Vec<String> {
    let Some((parent, generation)) = &machines[child].parent else {
        return Vec::new();
    };
    let mut gone: Vec<String> = Vec::new();
    loop {
        let goes = |(id, machine): &(&String, &Machine)| {
            let comes_from_gone = machine.parent.as_ref().is_some_and(|(above, of)| {
                of == generation
                    || above
                        .as_ref()
                        .is_some_and(|above| gone.contains(above) || Some(above) == parent.as_ref())
            });
            *id != child && !gone.contains(id) && (comes_from_gone || Some(*id) == parent.as_ref())
        };
        let Some((next, _)) = machines.iter().find(goes) else {
            return gone;
        };
        gone.push(next.clone());
    }
}
