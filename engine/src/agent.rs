//! Runs of agents: what is written about each, so that every later command finds it.
//!
//! ```text
//!   <state>/agents/<run>/run.json        the record, replaced by rename
//!   <state>/agents/<run>/base.tar        the directory as it was uploaded
//!   <state>/agents/<run>/heads           last lines of the bridge's record that were told: BRANCH=HASH
//!   <state>/agents/<run>/<branch>.patch  what a branch that is gone had done
//! ```
//!
//! How it fails: [`RunError`], which names the file.

use std::io::{ErrorKind, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use ratoon_protocol::{Ending, Profile};
use serde::{Deserialize, Serialize};

use crate::bridge::write_json;
use crate::engine::Engine;

/// The format that this version writes.
const FORMAT: u32 = 1;
/// A longer file is no record.
const MAX_LEN: u64 = 4 << 20;

/// What is written about a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// See [`RunError::Format`].
    pub format: u32,
    /// Its id, also its folder's name and what the bridge calls it.
    pub id: String,
    /// When it began, in milliseconds after the Unix epoch.
    pub created_ms: u64,
    /// What is to be done.
    pub prompt: String,
    /// `PROVIDER/NAME`.
    pub model: String,
    /// The model's tools; none when the run is a program's that has its own loop.
    pub profile: Option<Profile>,
    /// The bridge's configuration.
    pub config: PathBuf,
    /// Where the bridge records it.
    pub records: PathBuf,
    /// The directory that was uploaded, if one was.
    pub directory: Option<PathBuf>,
    /// What its content was then (the content itself is [`Runs::base`]).
    pub digest: Option<String>,
    /// The loop's process in the guest; the same in all children.
    pub pid: Option<i32>,
    /// Its branches, a parent before its children.
    pub branches: Vec<Branch>,
    /// Boundaries are kept, at least so many of the last ones ([`crate::steps`]).
    #[serde(default)]
    pub keep_steps: Option<u32>,
}

/// A branch of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Branch {
    /// Its name.
    pub name: String,
    /// What it was forked from.
    pub parent: Option<String>,
    /// The id of its VM.
    pub vm: String,
    /// What was said to it at the fork.
    #[serde(default)]
    pub steer: Option<String>,
    /// How it ended, when it has.
    #[serde(default)]
    pub ending: Option<Ending>,
    /// Steps when it ended.
    #[serde(default)]
    pub steps: u32,
    /// The exit code of the program whose run it is, when that has ended.
    #[serde(default)]
    pub exit_code: Option<u8>,
    /// What its scorer gave it.
    #[serde(default)]
    pub score: Option<f64>,
    /// It took its parent's place.
    #[serde(default)]
    pub kept: bool,
}

/// Why a run cannot be found or written.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A file.
    #[error("{what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// A record that is none.
    #[error("{} is damaged", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// How.
        #[source]
        source: serde_json::Error,
    },
    /// A record of another version.
    #[error("{} has format {format}; this Ratoon reads format {FORMAT}", path.display())]
    Format {
        /// Which.
        path: PathBuf,
        /// Its format.
        format: u32,
    },
    /// There is none.
    #[error("no run {0:?}: `ratoon agent ps` lists them")]
    NotFound(String),
    /// There are several.
    #[error("{text:?} is the beginning of several runs: {}", ids.join(", "))]
    Ambiguous {
        /// What was asked for.
        text: String,
        /// Whose ids begin so.
        ids: Vec<String>,
    },
    /// The system has no random numbers.
    #[error("no random numbers: {0}")]
    Random(getrandom::Error),
}

/// All runs of a state directory.
#[derive(Debug, Clone)]
pub struct Runs(PathBuf);

impl Engine {
    /// The runs of agents.
    pub fn runs(&self) -> Runs {
        Runs(self.dirs().state().join("agents"))
    }
}

fn io<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> RunError + use<'a> {
    move |source| RunError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

impl Run {
    /// A run that begins now, without branches.
    pub fn new(id: String, prompt: String, model: String, profile: Option<Profile>) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self {
            format: FORMAT,
            id,
            created_ms: now.map_or(0, |now| now.as_millis() as u64),
            prompt,
            model,
            profile,
            config: PathBuf::new(),
            records: PathBuf::new(),
            directory: None,
            digest: None,
            pid: None,
            branches: Vec::new(),
            keep_steps: None,
        }
    }

    /// A branch by its name.
    pub fn branch(&self, name: &str) -> Option<&Branch> {
        self.branches.iter().find(|branch| branch.name == name)
    }

    /// The same, to be changed.
    pub fn branch_mut(&mut self, name: &str) -> Option<&mut Branch> {
        self.branches.iter_mut().find(|branch| branch.name == name)
    }

    /// So many names for children of a branch that no branch has yet.
    pub fn free_names(&self, parent: &str, count: usize) -> Vec<String> {
        (0..)
            .map(|number| format!("{parent}.{number}"))
            .filter(|name| self.branch(name).is_none())
            .take(count)
            .collect()
    }
}

impl Runs {
    /// Makes a folder for a new run; gives its id.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn begin(&self) -> Result<String, RunError> {
        loop {
            let mut bytes = [0; 4];
            getrandom::fill(&mut bytes).map_err(RunError::Random)?;
            let id = format!("r{:08x}", u32::from_ne_bytes(bytes));
            let folder = self.folder(&id);
            let mut builder = std::fs::DirBuilder::new();
            let made = builder.mode(0o700).recursive(true).create(&self.0);
            made.map_err(io("making", &self.0))?;
            match builder.recursive(false).create(&folder) {
                Ok(()) => return Ok(id),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(io("making", &folder)(error)),
            }
        }
    }

    /// Removes a run that came to nothing.
    pub fn forget(&self, id: &str) {
        // What stays is a folder without a record, which nobody lists.
        let _ = std::fs::remove_dir_all(self.folder(id));
    }

    /// A run's folder.
    pub fn folder(&self, id: &str) -> PathBuf {
        self.0.join(id)
    }

    /// The directory as it was uploaded.
    pub fn base(&self, id: &str) -> PathBuf {
        self.folder(id).join("base.tar")
    }

    /// Where heads of its record are kept.
    pub fn heads(&self, id: &str) -> PathBuf {
        self.folder(id).join("heads")
    }

    /// The patch of a branch.
    pub fn patch(&self, id: &str, branch: &str) -> PathBuf {
        self.folder(id).join(format!("{branch}.patch"))
    }

    /// The heads that were kept, with their branches.
    pub fn kept_heads(&self, id: &str) -> Vec<(String, String)> {
        let text = std::fs::read_to_string(self.heads(id)).unwrap_or_default();
        let pair = |line: &str| line.split_once('=').map(|(a, b)| (a.into(), b.into()));
        text.lines().filter_map(pair).collect()
    }

    /// Writes a run's record.
    ///
    /// # Errors
    /// [`RunError::Io`].
    pub fn write(&self, run: &Run) -> Result<(), RunError> {
        let path = self.record(&run.id);
        write_json(&path, run).map_err(io("writing", &path))
    }

    /// Reads a run's record, changes it, writes it. One command at a time.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn update(&self, id: &str, change: impl FnOnce(&mut Run)) -> Result<Run, RunError> {
        let folder = self.folder(id);
        let lock = std::fs::File::open(&folder).map_err(io("opening", &folder))?;
        lock.lock().map_err(io("locking", &folder))?;
        let mut run = self.read(id)?;
        change(&mut run);
        self.write(&run)?;
        Ok(run)
    }

    /// All runs that can be read, oldest first.
    ///
    /// # Errors
    /// When the folder cannot be read; its absence means that there are none.
    pub fn list(&self) -> Result<Vec<Run>, RunError> {
        let mut runs: Vec<Run> = self
            .ids()?
            .iter()
            .filter_map(|id| self.read(id).ok())
            .collect();
        runs.sort_by_key(|run| (run.created_ms, run.id.clone()));
        Ok(runs)
    }

    /// The run with this id or unique beginning of one, or the youngest that has a branch in the VM `vm`.
    ///
    /// # Errors
    /// [`RunError::NotFound`], [`RunError::Ambiguous`], or what is wrong with its record.
    pub fn find(&self, text: &str, vm: Option<&str>) -> Result<Run, RunError> {
        let ids = self.ids()?;
        let mut found: Vec<String> = ids
            .into_iter()
            .filter(|id| id == text || (!text.is_empty() && id.starts_with(text)))
            .collect();
        if let Some(exact) = found.iter().position(|id| id == text) {
            found = vec![found.swap_remove(exact)];
        }
        match found.as_slice() {
            [id] => self.read(id),
            [] => {
                let works_in = |run: &Run| run.branches.iter().any(|it| Some(&*it.vm) == vm);
                let mut runs = self.list()?.into_iter();
                let found = runs.rfind(works_in);
                found.ok_or_else(|| RunError::NotFound(text.to_owned()))
            }
            _ => Err(RunError::Ambiguous {
                text: text.to_owned(),
                ids: found,
            }),
        }
    }

    fn record(&self, id: &str) -> PathBuf {
        self.folder(id).join("run.json")
    }

    fn ids(&self) -> Result<Vec<String>, RunError> {
        let listing = match std::fs::read_dir(&self.0) {
            Ok(listing) => listing,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io("reading", &self.0)(error)),
        };
        let names = listing.flatten().map(|entry| entry.file_name());
        Ok(names.filter_map(|name| name.into_string().ok()).collect())
    }

    fn read(&self, id: &str) -> Result<Run, RunError> {
        let path = self.record(id);
        let read = || {
            let mut bytes = Vec::new();
            let file = std::fs::File::open(&path)?;
            file.take(MAX_LEN).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let bytes = read().map_err(io("reading", &path))?;
        let damaged = |source| RunError::Damaged {
            path: path.clone(),
            source,
        };
        // The format first: what follows may be of a later one.
        let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(damaged)?;
        let format = value["format"].as_u64().unwrap_or_default() as u32;
        if format != FORMAT {
            return Err(RunError::Format { path, format });
        }
        serde_json::from_value(value).map_err(damaged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(runs: &Runs, vm: &str) -> Run {
        let id = runs.begin().unwrap();
        let mut run = Run::new(id, "fix it".into(), "a/b".into(), Some(Profile::Minimal));
        run.branches.push(Branch {
            name: "main".into(),
            vm: vm.into(),
            ..Branch::default()
        });
        runs.write(&run).unwrap();
        run
    }

    #[test]
    fn a_run_is_found_by_its_id_the_beginning_of_it_or_its_vm() {
        let temp = tempfile::tempdir().unwrap();
        let runs = Runs(temp.path().join("agents"));
        assert!(runs.list().unwrap().is_empty());
        let first = run(&runs, "v1");
        let second = run(&runs, "v2");
        assert_eq!(runs.find(&first.id, None).unwrap(), first);
        assert_eq!(runs.find("box", Some("v2")).unwrap(), second);
        assert!(matches!(
            runs.find("r", None),
            Err(RunError::Ambiguous { .. })
        ));
        for unknown in ["", "x", "box"] {
            let found = runs.find(unknown, Some("v3"));
            assert!(matches!(found, Err(RunError::NotFound(_))), "{found:?}");
        }
    }

    #[test]
    fn a_damaged_record_is_named_and_does_not_hide_others() {
        let temp = tempfile::tempdir().unwrap();
        let runs = Runs(temp.path().join("agents"));
        let (good, bad) = (run(&runs, "v1"), run(&runs, "v2"));
        std::fs::write(runs.record(&bad.id), "{").unwrap();
        let error = runs.find(&bad.id, None).unwrap_err();
        assert!(
            matches!(error, RunError::Format { .. } | RunError::Damaged { .. }),
            "{error}"
        );
        assert!(error.to_string().contains(&bad.id));
        assert_eq!(runs.list().unwrap(), [good]);
        std::fs::write(runs.record(&bad.id), r#"{"format": 9}"#).unwrap();
        let error = runs.find(&bad.id, None).unwrap_err();
        assert!(
            matches!(error, RunError::Format { format: 9, .. }),
            "{error}"
        );
    }

    #[test]
    fn children_have_names_that_no_branch_has() {
        let temp = tempfile::tempdir().unwrap();
        let runs = Runs(temp.path().join("agents"));
        let mut run = run(&runs, "v1");
        assert_eq!(run.free_names("main", 2), ["main.0", "main.1"]);
        run.branches.push(Branch {
            name: "main.0".into(),
            ..Branch::default()
        });
        assert_eq!(run.free_names("main", 2), ["main.1", "main.2"]);
    }

    #[test]
    fn heads_are_kept_by_branch() {
        let temp = tempfile::tempdir().unwrap();
        let runs = Runs(temp.path().join("agents"));
        let run = run(&runs, "v1");
        assert!(runs.kept_heads(&run.id).is_empty());
        std::fs::write(runs.heads(&run.id), "main=aa\nmain.0=bb\n").unwrap();
        let heads = runs.kept_heads(&run.id);
        assert_eq!(heads[1], ("main.0".to_owned(), "bb".to_owned()));
    }
}
