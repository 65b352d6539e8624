//! The tools: one executor, shown to models under the names that they know.
//!
//! ```text
//!  Call --parse--> Tool, or what is wrong with it (a format error; nothing runs)
//!  Tool --run----> Outcome: what the model is shown, and whether it is told that it failed
//! ```
//!
//! Nothing here protects anything: the machine's edge is the sandbox, and tools may do what its user may.

mod capture;
mod edit;
mod exec;
mod patch;
mod process;
mod search;
mod session;
mod spec;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ratoon_protocol::{Profile, Wire};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use capture::{Capture, Shown, Store};
use session::{Language, Ran, Session};

use crate::clock::{self, Moment};
use crate::stop::Stop;
use crate::wire::{By, Call};

/// A call whose arguments are right.
#[derive(Debug, Clone)]
pub enum Tool {
    /// A command for the shell that stays.
    Bash(Bash),
    /// The editor.
    Edit(edit::Edit),
    /// A command of its own.
    Exec(exec::Exec),
    /// To one that runs.
    Write(exec::Write),
    /// A patch.
    Patch(Patch),
    /// The plan: the model's own notes.
    Plan(Plan),
    /// Lines.
    Grep(search::Grep),
    /// Files.
    Glob(search::Glob),
    /// A file.
    Read(edit::Read),
    /// Code.
    Python(Python),
    /// The end.
    Finish(Finish),
}

/// The arguments of `bash`.
#[derive(Debug, Clone, Deserialize)]
pub struct Bash {
    #[serde(default)]
    command: Option<String>,
    #[serde(default)]
    restart: bool,
}

/// The arguments of `apply_patch`.
#[derive(Debug, Clone, Deserialize)]
pub struct Patch {
    #[serde(alias = "patch")]
    input: String,
}

/// The arguments of `update_plan`.
#[derive(Debug, Clone, Deserialize)]
pub struct Plan {
    #[serde(rename = "plan")]
    steps: Vec<PlanStep>,
}

/// A step of a plan.
#[derive(Debug, Clone, Deserialize)]
struct PlanStep {
    #[serde(rename = "step")]
    _step: String,
    status: Status,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    Pending,
    InProgress,
    Completed,
}

/// The arguments of `python`.
#[derive(Debug, Clone, Deserialize)]
pub struct Python {
    code: String,
}

/// The arguments of `finish`.
#[derive(Debug, Clone, Deserialize)]
pub struct Finish {
    /// The model's last words.
    #[serde(default)]
    pub summary: String,
    /// Whether it is done.
    #[serde(default = "yes")]
    pub success: bool,
}

fn yes() -> bool {
    true
}

/// What became of a call.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// What the model is shown.
    pub output: String,
    /// Whether it is told that it failed.
    pub error: bool,
    /// A file with all of it, where it was cut.
    pub file: Option<String>,
    /// The model is done.
    pub finish: Option<Finish>,
}

fn failed(why: impl Into<String>) -> Outcome {
    Outcome {
        output: why.into(),
        error: true,
        ..Outcome::default()
    }
}

/// The executor.
#[derive(Debug)]
pub struct Tools {
    profile: Profile,
    directory: PathBuf,
    store: Arc<Store>,
    shell: Session,
    python: Session,
    running: exec::Running,
    _reserved: process::Reserved,
}

impl Tools {
    /// For a profile, in a directory.
    pub fn new(profile: Profile, directory: &Path) -> std::io::Result<Self> {
        let store = Store::open()?;
        Ok(Self {
            profile,
            directory: directory.to_owned(),
            shell: Session::new(Language::Shell, directory, store.clone()),
            python: Session::new(Language::Python, directory, store.clone()),
            running: exec::Running::new(store.clone()),
            store,
            _reserved: process::Reserved::new()?,
        })
    }

    /// What the model is told of them.
    pub fn json(profile: Profile, wire: Wire) -> String {
        spec::json(profile, wire)
    }

    /// Their names.
    pub fn names(profile: Profile) -> Vec<&'static str> {
        spec::of(profile).map(|spec| spec.name).collect()
    }

    /// What a call means, or what is wrong with it.
    pub fn parse(&self, call: &Call) -> Result<Tool, String> {
        let names = Self::names(self.profile);
        if !names.contains(&call.name.as_str()) {
            return Err(format!(
                "There is no tool {:?}. There are: {}.",
                call.name.chars().take(64).collect::<String>(),
                names.join(", ")
            ));
        }
        // The one tool whose input some send as it is.
        if call.by == By::Custom && call.name == "apply_patch" {
            return Ok(Tool::Patch(Patch {
                input: call.text.clone(),
            }));
        }
        let raw = call.arguments.as_ref().map_err(|why| {
            format!(
                "The arguments of {} are not JSON: {why}. Nothing was run.",
                call.name
            )
        })?;
        fn read<T: DeserializeOwned>(call: &Call, raw: &str) -> Result<T, String> {
            serde_json::from_str(raw).map_err(|error| {
                format!(
                    "The arguments of {} do not fit: {error}. Nothing was run.",
                    call.name
                )
            })
        }
        let raw = raw.get();
        Ok(match call.name.as_str() {
            "bash" => {
                let bash: Bash = read(call, raw)?;
                if bash.command.is_none() && !bash.restart {
                    return Err("bash needs a command. Nothing was run.".into());
                }
                Tool::Bash(bash)
            }
            "str_replace_based_edit_tool" => Tool::Edit(read(call, raw)?),
            "exec_command" => Tool::Exec(read(call, raw)?),
            "write_stdin" => Tool::Write(read(call, raw)?),
            "apply_patch" => Tool::Patch(read(call, raw)?),
            "update_plan" => Tool::Plan(read(call, raw)?),
            "grep" => Tool::Grep(read(call, raw)?),
            "glob" => Tool::Glob(read(call, raw)?),
            "read_file" => Tool::Read(read(call, raw)?),
            "python" => Tool::Python(read(call, raw)?),
            _ => Tool::Finish(read(call, raw)?),
        })
    }

    /// Does it.
    pub fn run(&mut self, tool: &Tool, output_bytes: u64, until: Moment, stop: &Stop) -> Outcome {
        let limit = usize::try_from(output_bytes)
            .unwrap_or(usize::MAX)
            .min(16 << 20);
        let text = match tool {
            Tool::Bash(bash) => return self.bash(bash, limit, until, stop),
            Tool::Python(python) => {
                if !session::has("python3") {
                    return failed("there is no python3 in this machine");
                }
                return in_session(&mut self.python, &python.code, limit, until, stop);
            }
            Tool::Exec(exec) => {
                return self.running.exec(exec, &self.directory, limit, until, stop);
            }
            Tool::Write(write) => return self.running.write(write, limit, until, stop),
            Tool::Finish(finish) => {
                return Outcome {
                    output: "The work is ended.".into(),
                    finish: Some(finish.clone()),
                    ..Outcome::default()
                };
            }
            Tool::Plan(plan) => {
                let active = plan
                    .steps
                    .iter()
                    .filter(|step| step.status == Status::InProgress)
                    .count();
                if active > 1 {
                    Err("at most one step can be in_progress".into())
                } else {
                    Ok("The plan is noted.".into())
                }
            }
            Tool::Edit(edit) => edit::edit(&self.directory, edit),
            Tool::Read(read) => edit::read_file(&self.directory, read),
            Tool::Patch(patch) => patch::apply(&self.directory, &patch.input),
            Tool::Grep(grep) => search::grep(&self.directory, grep, until, stop),
            Tool::Glob(glob) => search::glob(&self.directory, glob, until, stop),
        };
        let (text, error) = match text {
            Ok(text) => (text, false),
            Err(text) => (text, true),
        };
        let mut capture = Capture::new(self.store.clone(), limit);
        capture.push(text.as_bytes());
        let Shown { text, file } = capture.finish();
        Outcome {
            output: text,
            error,
            file,
            finish: None,
        }
    }

    fn bash(&mut self, bash: &Bash, limit: usize, until: Moment, stop: &Stop) -> Outcome {
        if bash.restart {
            self.shell.restart();
        }
        match &bash.command {
            Some(command) => in_session(&mut self.shell, command, limit, until, stop),
            None => Outcome {
                output: format!(
                    "A new shell starts in {}.",
                    self.shell.directory().display()
                ),
                ..Outcome::default()
            },
        }
    }

    /// Kills all that runs in the sessions and beside them.
    pub fn kill(&mut self) {
        self.shell.restart();
        self.python.restart();
        self.running.kill();
    }
}

fn in_session(
    session: &mut Session,
    code: &str,
    limit: usize,
    until: Moment,
    stop: &Stop,
) -> Outcome {
    let since = clock::now();
    let (ran, shown) = match session.run(code, limit, until, stop) {
        Ok(ran) => ran,
        Err(error) => return failed(format!("it cannot be run: {error}")),
    };
    let directory = session.directory().display();
    let note = match &ran {
        Ran::Status(0) => String::new(),
        Ran::Status(code) => format!("[exit code {code}]"),
        Ran::Ended(how) => format!(
            "[{how}; with that the session has ended: the next call starts a new one in {directory}]"
        ),
        Ran::TooLong => format!(
            "[not done after {:.1} s: it was killed with all that it had started. The next call starts a new session in {directory}. What takes longer can run in the background, with its output in a file]",
            clock::now().saturating_sub(since).as_secs_f64()
        ),
        Ran::Stopped => "[cancelled: it was killed]".into(),
    };
    let mut output = shown.text;
    if !note.is_empty() && !output.is_empty() && !output.ends_with('\n') {
        output.push('\n');
    }
    output.push_str(&note);
    if output.is_empty() {
        output = "(no output)".into();
    }
    Outcome {
        output,
        error: ran != Ran::Status(0),
        file: shown.file,
        finish: None,
    }
}
