//! What the record of a run says when it is opened again: budgets, and what became of each step.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use ratoon_bridge_api::amount::Amount;
use ratoon_bridge_api::audit::{branch_names, read_branch};
use ratoon_bridge_api::record::{Body, Ending, Entry, Hash, Step, body_file, branch_file};

use super::{Answered, Branch, Run, RunError, State, Stored, answer_label, answered, now_ms};
use crate::relay;

impl Run {
    pub(super) fn read_back(&self) -> Result<(), RunError> {
        let run = self.name();
        let damaged = |source| RunError::Damaged {
            run: run.clone(),
            source,
        };
        let mut waiting = Vec::new();
        for name in branch_names(&self.dir).map_err(damaged)? {
            let path = branch_file(&self.dir, &name);
            let read = read_branch(&path).map_err(damaged)?;
            // Its first line was never whole: nothing was ever done in it.
            if read.lines.is_empty() {
                fs::remove_file(&path).map_err(|source| RunError::Io { path, source })?;
            } else {
                waiting.push((name, read));
            }
        }
        let mut state = self.state();
        // Parents first; a parent that never comes is a damage.
        while !waiting.is_empty() {
            let before = waiting.len();
            let mut later = Vec::new();
            for (name, read) in waiting {
                match &read.lines[0].0.entry {
                    Entry::Begin { parent, budget, .. }
                        if parent
                            .as_ref()
                            .is_none_or(|parent| state.branches.contains_key(&parent.branch)) =>
                    {
                        let above = parent.as_ref().map(|parent| parent.branch.as_str());
                        state.tree.add(&name, above, *budget);
                        let begun = read.lines[0].0.time_ms;
                        state.times.begin(&name, above, *budget, begun);
                        self.read_branch_back(&mut state, &name, &read)?;
                    }
                    _ => later.push((name, read)),
                }
            }
            waiting = later;
            if waiting.len() == before {
                return Err(RunError::Branch {
                    branch: waiting.swap_remove(0).0,
                    what: "the branch that it was forked from has no record",
                });
            }
        }
        Ok(())
    }

    fn read_branch_back(
        &self,
        state: &mut State,
        name: &str,
        read: &ratoon_bridge_api::audit::Branch,
    ) -> Result<(), RunError> {
        let path = branch_file(&self.dir, name);
        let io = |source| RunError::Io {
            path: path.clone(),
            source,
        };
        let file = OpenOptions::new().append(true).open(&path).map_err(io)?;
        let mut branch = Branch {
            file,
            seq: read.lines.len() as u64,
            head: read.head(),
            calls: 0,
            steps: HashMap::new(),
            broken: false,
        };
        let mut open: BTreeMap<u64, (Option<Step>, Amount)> = BTreeMap::new();
        for (line, _) in &read.lines {
            match &line.entry {
                Entry::Call {
                    call,
                    step,
                    digest,
                    reserved,
                    ..
                } => {
                    branch.calls = branch.calls.max(call + 1);
                    state.times.call(name, line.time_ms);
                    open.insert(*call, (step.clone(), *reserved));
                    if let Some(step) = step {
                        let stored = Stored {
                            digest: digest.clone(),
                            call: *call,
                            answer: Answered::Never,
                        };
                        branch.steps.insert(step.clone(), stored);
                    }
                }
                Entry::Answer {
                    call,
                    ending,
                    media_type,
                    body,
                    charged,
                    total_us,
                    ..
                } => {
                    let took = Duration::from_micros(*total_us);
                    state.times.ended(name, took, line.time_ms);
                    state.tree.settle(name, Amount::default(), *charged);
                    let step = open.remove(call).and_then(|(step, _)| step);
                    if let Some(stored) = step.and_then(|step| branch.steps.get_mut(&step)) {
                        stored.answer = answered(*ending, media_type, body);
                    }
                }
                Entry::Rest { ms } => state.times.rested(name, *ms, line.time_ms),
                _ => {}
            }
        }
        if read.torn_bytes > 0 {
            let len = branch.file.metadata().map_err(io)?.len();
            branch.file.set_len(len - read.torn_bytes).map_err(io)?;
            let entry = Entry::Torn {
                bytes: read.torn_bytes,
            };
            branch.append(self, entry).map_err(io)?;
        }
        // The bridge ended while these were on their way: they count as all that they could be.
        for (call, (_, reserved)) in open {
            let (body, media_type) = self.part_of_answer(name, call)?;
            let entry = Entry::Answer {
                call,
                ending: Ending::Cut,
                status: 0,
                media_type: media_type.to_owned(),
                body,
                charged: reserved,
                cached_tokens: 0,
                attempts: 0,
                first_byte_us: 0,
                total_us: 0,
            };
            branch.append(self, entry).map_err(io)?;
            state.tree.settle(name, Amount::default(), reserved);
            // How long it took nobody knows.
            state.times.ended(name, Duration::ZERO, now_ms());
        }
        state.branches.insert(name.to_owned(), branch);
        Ok(())
    }

    /// What came of an answer before its bridge ended, by its hash from now on; nothing, as a rule,
    /// when no byte of it had come.
    fn part_of_answer(&self, branch: &str, call: u64) -> Result<(Body, &'static str), RunError> {
        let path = self.part(&answer_label(branch, call));
        let keep = || {
            let mut file = match File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Ok((Body::empty(), relay::JSON));
                }
                opened => opened?,
            };
            let mut hasher = blake3::Hasher::new();
            let len = io::copy(&mut file, &mut hasher)?;
            let mut first = [0];
            let read = file.read_at(&mut first, 0)?;
            let is_json = read == 0 || first == *b"{";
            let hash = Hash(hasher.finalize().to_hex().to_string());
            fs::rename(&path, body_file(&self.dir, &hash))?;
            let media_type = if is_json { relay::JSON } else { relay::EVENTS };
            Ok((Body { hash, len }, media_type))
        };
        keep().map_err(|source| RunError::Io {
            path: path.clone(),
            source,
        })
    }
}
