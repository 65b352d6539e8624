//! Writes the record of a run, and is its memory: budgets and stored answers are read back from it.
//!
//! One bridge at a time has a run open (a lock in its folder). Every line is masked, written in one
//! piece and chained ([`ratoon_bridge_api::record`]). A branch whose line could not be written takes
//! no more calls: what is not recorded does not happen. Lines are in the kernel's hands when a call
//! goes on, so a killed bridge loses none; a host that loses power may.

mod read_back;
mod room;
mod spool;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ratoon_bridge_api::amount::{Amount, Limits};
use ratoon_bridge_api::audit::AuditError;
use ratoon_bridge_api::record::{
    Body, Ending, Entry, FORMAT, Hash, Line, MAX_LINE_BYTES, Parent, Step, branch_file,
};

use room::Room;
pub use spool::Spool;

use crate::budget::Tree;
use crate::mask::Masker;
use crate::time::Times;

/// A run that this bridge has open.
#[derive(Debug)]
pub struct Run {
    dir: PathBuf,
    masker: Arc<Masker>,
    room: Arc<Room>,
    state: Mutex<State>,
    /// Held as long as the run is open.
    _lock: File,
}

/// What is known of a run.
#[derive(Debug, Default)]
pub struct State {
    /// Its budgets.
    pub tree: Tree,
    /// Their time.
    pub times: Times,
    branches: BTreeMap<String, Branch>,
}

/// What is known of a branch.
#[derive(Debug)]
struct Branch {
    file: File,
    seq: u64,
    head: Hash,
    calls: u64,
    steps: HashMap<Step, Stored>,
    broken: bool,
}

/// What became of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Its request.
    pub digest: Hash,
    /// Its call.
    pub call: u64,
    /// Its answer.
    pub answer: Answered,
}

/// An answer, as far as there is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answered {
    /// The call is on its way.
    NotYet,
    /// It ended without a whole answer, or the bridge ended before it.
    Never,
    /// It can be given again.
    Whole {
        /// Its media type.
        media_type: String,
        /// Its body.
        body: Body,
    },
}

/// Why a run or a branch cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A file cannot be made, read or locked.
    #[error("the record {} cannot be used", .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another bridge has it.
    #[error("run \"{run}\" is open in another bridge: one at a time")]
    Busy {
        /// Which.
        run: String,
    },
    /// What is there is not whole.
    #[error("the record of run \"{run}\" is damaged, so its budget is not known")]
    Damaged {
        /// Which.
        run: String,
        /// How.
        #[source]
        source: AuditError,
    },
    /// The branch does not fit the run.
    #[error("branch \"{branch}\": {what}")]
    Branch {
        /// Which.
        branch: String,
        /// Why.
        what: &'static str,
    },
}

impl Run {
    /// Opens a run, or begins one; reads back what was used. Its record may have `most_bytes`.
    ///
    /// # Errors
    /// When its record cannot be used.
    pub fn open(
        records: &Path,
        run: &str,
        masker: Arc<Masker>,
        most_bytes: u64,
    ) -> Result<Self, RunError> {
        let dir = ratoon_bridge_api::record::run_dir(records, run);
        let io_at = |path: &Path| {
            let path = path.to_owned();
            move |source| RunError::Io { path, source }
        };
        let bodies = dir.join("bodies");
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&bodies)
            .map_err(io_at(&bodies))?;
        let lock_path = dir.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&lock_path)
            .map_err(io_at(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(RunError::Busy {
                    run: run.to_owned(),
                });
            }
            Err(fs::TryLockError::Error(source)) => return Err(io_at(&lock_path)(source)),
        }
        let run = Self {
            dir,
            masker,
            room: Arc::new(Room::new(most_bytes)),
            state: Mutex::default(),
            _lock: lock,
        };
        run.read_back()?;
        // Requests that a killed bridge was writing, and answers whose call had ended.
        for entry in fs::read_dir(&bodies).map_err(io_at(&bodies))?.flatten() {
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                fs::remove_file(entry.path()).map_err(io_at(&entry.path()))?;
            }
        }
        run.room
            .count([&run.dir, &bodies])
            .map_err(io_at(&run.dir))?;
        Ok(run)
    }

    /// The state. A thread that panicked holding it would have ended the process.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The run's name.
    #[must_use]
    pub fn name(&self) -> String {
        self.dir
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default()
    }

    /// Begins a branch, or goes on with it.
    ///
    /// # Errors
    /// When it does not fit the run, or its record cannot be written.
    pub fn begin(&self, name: &str, parent: Option<&str>, budget: Limits) -> Result<(), RunError> {
        let refuse = |what| RunError::Branch {
            branch: name.to_owned(),
            what,
        };
        let mut state = self.state();
        if let Some(node) = state.tree.get(name) {
            if node.parent.as_deref() != parent {
                return Err(refuse("is there already, with another parent"));
            }
            if !budget.is_unlimited() && node.limits != budget {
                return Err(refuse("is there already, with another budget"));
            }
            return self
                .rest_in(&mut state, name)
                .map_err(|source| RunError::Io {
                    path: branch_file(&self.dir, name),
                    source,
                });
        }
        let above = match parent {
            None if !state.branches.is_empty() => {
                return Err(refuse("a run has one first branch; name a parent"));
            }
            None if budget.is_unlimited() => {
                return Err(refuse("a run's first branch needs a budget"));
            }
            None => None,
            Some(parent) => match state.branches.get(parent) {
                Some(branch) => Some(Parent {
                    branch: parent.to_owned(),
                    seq: branch.seq - 1,
                    head: branch.head.clone(),
                }),
                None => return Err(refuse("its parent is not a branch of this run")),
            },
        };
        let path = branch_file(&self.dir, name);
        let io = |source| RunError::Io {
            path: path.clone(),
            source,
        };
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(io)?;
        let mut branch = Branch {
            file,
            seq: 0,
            head: above
                .as_ref()
                .map_or_else(Hash::zero, |parent| parent.head.clone()),
            calls: 0,
            steps: HashMap::new(),
            broken: false,
        };
        let entry = Entry::Begin {
            format: FORMAT,
            run: self.name(),
            branch: name.to_owned(),
            parent: above,
            budget,
        };
        branch.append(self, entry).map_err(io)?;
        if let Some(parent) = parent {
            // It was forked while it stood still.
            self.rest_in(&mut state, parent).map_err(io)?;
        }
        state.tree.add(name, parent, budget);
        state.times.begin(name, parent, budget, now_ms());
        state.branches.insert(name.to_owned(), branch);
        Ok(())
    }

    /// Adds a line to a branch.
    ///
    /// # Errors
    /// When it cannot be written: the branch takes no more then.
    pub fn append(&self, branch: &str, entry: Entry) -> io::Result<()> {
        self.state().append(self, branch, entry)
    }

    /// A branch stood still until now.
    ///
    /// # Errors
    /// As [`Run::append`].
    pub fn rest(&self, branch: &str) -> io::Result<()> {
        self.rest_in(&mut self.state(), branch)
    }

    fn rest_in(&self, state: &mut State, branch: &str) -> io::Result<()> {
        let now = now_ms();
        for (name, ms) in state.times.resting(branch, now) {
            state.append(self, &name, Entry::Rest { ms })?;
            state.times.rested(&name, ms, now);
        }
        Ok(())
    }

    /// Adds a call and remembers its step; gives the call's number.
    ///
    /// # Errors
    /// As [`Run::append`].
    pub fn begin_call(
        &self,
        state: &mut State,
        branch: &str,
        make: impl FnOnce(u64) -> Entry,
    ) -> io::Result<u64> {
        let found = state.branch(branch)?;
        let number = found.calls;
        let entry = make(number);
        let step = match &entry {
            Entry::Call { step, digest, .. } => step.clone().map(|step| (step, digest.clone())),
            _ => None,
        };
        found.append(self, entry)?;
        found.calls += 1;
        if let Some((step, digest)) = step {
            let stored = Stored {
                digest,
                call: number,
                answer: Answered::NotYet,
            };
            found.steps.insert(step, stored);
        }
        state.times.call(branch, now_ms());
        Ok(number)
    }

    /// Adds a call's end, and settles its budget whether or not the line can be written.
    ///
    /// # Errors
    /// As [`Run::append`].
    pub fn end_call(
        &self,
        branch: &str,
        step: Option<&Step>,
        reserved: Amount,
        entry: Entry,
    ) -> io::Result<()> {
        let Entry::Answer {
            ending,
            media_type,
            body,
            charged,
            total_us,
            ..
        } = &entry
        else {
            return Ok(());
        };
        let answer = answered(*ending, media_type, body);
        let mut state = self.state();
        state.tree.settle(branch, reserved, *charged);
        let took = Duration::from_micros(*total_us);
        state.times.ended(branch, took, now_ms());
        let written = state.append(self, branch, entry);
        if let Some(stored) = step.and_then(|step| state.branch(branch).ok()?.steps.get_mut(step)) {
            stored.answer = answer;
        }
        written
    }

    /// Stores a whole body, masked.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn store(&self, label: &str, bytes: &[u8]) -> io::Result<Body> {
        let mut spool = self.spool(label)?;
        spool.write(&self.masker.mask(bytes))?;
        spool.finish()
    }

    /// Begins a body that comes in pieces, which are masked already. Two with one label must not be
    /// open at once.
    ///
    /// # Errors
    /// When its file cannot be made.
    pub fn spool(&self, label: &str) -> io::Result<Spool> {
        let bodies = self.dir.join("bodies");
        let path = self.part(label);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)?;
        Ok(Spool {
            file,
            room: self.room.clone(),
            hasher: blake3::Hasher::new(),
            len: 0,
            path,
            bodies,
            done: false,
        })
    }

    /// The file of a body that is being written.
    fn part(&self, label: &str) -> PathBuf {
        self.dir.join("bodies").join(format!(".{label}"))
    }

    /// Opens a stored body.
    ///
    /// # Errors
    /// When it is not there.
    pub fn open_body(&self, body: &Body) -> io::Result<File> {
        File::open(ratoon_bridge_api::record::body_file(&self.dir, &body.hash))
    }
}

/// The label of a call's answer while it is written.
pub(crate) fn answer_label(branch: &str, call: u64) -> String {
    format!("{branch}.{call}")
}

/// As lines have it.
pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

fn answered(ending: Ending, media_type: &str, body: &Body) -> Answered {
    if ending == Ending::Complete {
        Answered::Whole {
            media_type: media_type.to_owned(),
            body: body.clone(),
        }
    } else {
        Answered::Never
    }
}

impl State {
    /// What became of a step.
    #[must_use]
    pub fn step(&self, branch: &str, step: &Step) -> Option<Stored> {
        self.branches.get(branch)?.steps.get(step).cloned()
    }

    /// The hash of a branch's last line.
    #[must_use]
    pub fn head(&self, branch: &str) -> Hash {
        self.branches
            .get(branch)
            .map_or_else(Hash::zero, |branch| branch.head.clone())
    }

    fn append(&mut self, run: &Run, branch: &str, entry: Entry) -> io::Result<()> {
        self.branch(branch)?.append(run, entry)
    }

    fn branch(&mut self, name: &str) -> io::Result<&mut Branch> {
        self.branches
            .get_mut(name)
            .ok_or_else(|| io::Error::other("there is no such branch"))
    }
}

impl Branch {
    fn append(&mut self, run: &Run, entry: Entry) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::other("an earlier line could not be written"));
        }
        let line = Line {
            seq: self.seq,
            prev: self.head.clone(),
            time_ms: now_ms(),
            entry,
        };
        let mut bytes = run.masker.mask(&serde_json::to_vec(&line)?);
        if bytes.len() >= MAX_LINE_BYTES {
            return Err(io::Error::other("the line is too long"));
        }
        run.room.take_line(bytes.len() as u64 + 1, &line.entry)?;
        let head = Hash::of_line(&bytes);
        bytes.push(b'\n');
        self.broken = true;
        self.file.write_all(&bytes)?;
        self.broken = false;
        self.head = head;
        self.seq += 1;
        Ok(())
    }
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
