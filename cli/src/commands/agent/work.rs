//! What an agent works on: the directory and its program into the guest, and the directory out again.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::AsFd;
use std::path::Path;

use ratoon_client::RuntimeError;
use ratoon_client::blocking::Client;
use ratoon_engine::Engine;
use ratoon_engine::agent::Run;
use ratoon_protocol::{Call, FileMkdir, FileRead, FileWrite, TreePack, TreeUnpack};

use super::patch::{self, Changed, Patch};
use super::session::PROGRAM;
use super::tree::{LeftOut, Tree, pack};
use crate::failure::Failure;
use crate::{guest, output};

/// Where it works in the guest.
pub const DIRECTORY: &str = "/work";
/// The digest of the program that is in the guest, beside it.
const PROGRAM_DIGEST: &str = "/run/ratoon-agent.blake3";
/// A file that holds a digest has no more bytes than this.
const MAX_DIGEST_LEN: u64 = 128;

/// Puts a packed directory into the guest.
pub fn upload(client: &mut Client, base: Option<&File>) -> Result<(), Failure> {
    let failed = |error| guest::failure(error, &format!("{DIRECTORY} in the VM"));
    let mkdir = Call::FileMkdir(FileMkdir {
        path: DIRECTORY.into(),
        parents: true,
        ..FileMkdir::default()
    });
    client
        .call::<()>(&mkdir, "made a directory", guest::CALL_TIMEOUT)
        .map_err(failed)?;
    let Some(mut base) = base else {
        return Ok(());
    };
    base.rewind()?;
    let unpack = Call::TreeUnpack(TreeUnpack {
        path: DIRECTORY.into(),
        root: None,
        owner: Some("root".into()),
    });
    guest::transfer(client, &unpack, Some(base.as_fd()), &mut io::sink()).map_err(failed)
}

/// Puts the agent's program into the guest, unless it is there.
pub fn put_program(client: &mut Client, program: &Path) -> Result<(), Failure> {
    let failed = |error| guest::failure(error, &format!("{PROGRAM} in the VM"));
    let bytes = std::fs::read(program).map_err(|error| missing_program(program, &error))?;
    let digest = blake3::hash(&bytes).to_hex().to_string();
    let mut there = Vec::new();
    let read = Call::FileRead(FileRead {
        path: PROGRAM_DIGEST.into(),
        length: Some(MAX_DIGEST_LEN),
        ..FileRead::default()
    });
    match guest::transfer(client, &read, None, &mut there) {
        Ok(()) if there == digest.as_bytes() => return Ok(()),
        Ok(()) | Err(RuntimeError::Call(_)) => {}
        Err(error) => return Err(failed(error)),
    }
    let file = File::open(program).map_err(|error| missing_program(program, &error))?;
    let write = |path: &str, mode| {
        Call::FileWrite(FileWrite {
            path: path.into(),
            mode: Some(mode),
            owner: Some("root".into()),
            ..FileWrite::default()
        })
    };
    guest::transfer(
        client,
        &write(PROGRAM, 0o755),
        Some(file.as_fd()),
        &mut io::sink(),
    )
    .map_err(failed)?;
    let (pipe, mut digest_in) = io::pipe()?;
    digest_in.write_all(digest.as_bytes())?;
    drop(digest_in);
    let call = write(PROGRAM_DIGEST, 0o644);
    guest::transfer(client, &call, Some(pipe.as_fd()), &mut io::sink()).map_err(failed)
}

/// The agent's program cannot be read.
pub fn missing_program(program: &Path, error: &io::Error) -> Failure {
    Failure::new(format!(
        "the agent's program {} cannot be read: {error}",
        program.display()
    ))
    .hint("build ratoon-agent beside ratoon (scripts/test does), or name it with RATOON_AGENT")
}

/// Takes the directory out of the guest.
pub fn download(client: &mut Client) -> Result<Tree, Failure> {
    let mut file = tempfile::tempfile()?;
    let pack = Call::TreePack(TreePack {
        path: DIRECTORY.into(),
        root: None,
        follow: true,
        name: Some("work".into()),
    });
    guest::transfer(client, &pack, None, &mut file)
        .map_err(|error| guest::failure(error, &format!("{DIRECTORY} in the VM")))?;
    file.rewind()?;
    Ok(Tree::read(file, "work/")?)
}

/// What an agent has done.
#[derive(Debug)]
pub struct Work {
    after: Tree,
    /// What differs.
    pub changes: Vec<Changed>,
    /// The patch.
    pub patch: Patch,
}

impl Work {
    /// What was done to the directory of a run, as the machine behind `client` has it.
    pub fn of(engine: &Engine, run: &Run, client: &mut Client) -> Result<Self, Failure> {
        let base = base(engine, run)?;
        let after = download(client)?;
        let changes = patch::changes(&base, &after, &LeftOut::of(&base));
        let patch = patch::patch(&base, &after, &changes)?;
        Ok(Self {
            after,
            changes,
            patch,
        })
    }

    /// Puts it into the directory that it was taken from, if that is as it was.
    pub fn apply(&self, engine: &Engine, run: &Run) -> Result<(), Failure> {
        let Some(dir) = &run.directory else {
            return Err(Failure::new(
                "the run has no directory: it was started without --dir",
            ));
        };
        let base = base(engine, run)?;
        let now = Tree::read(pack(dir, tempfile::tempfile()?)?, "")?;
        let left_out = LeftOut::of(&base);
        if Some(now.digest(&left_out)) != run.digest {
            let changed = patch::changes(&base, &now, &left_out);
            let first = changed.first().map_or("", |it| &it.path);
            return Err(Failure::new(format!(
                "{} has changed since it was uploaded ({first:?} among others): nothing was applied",
                dir.display()
            ))
            .hint("write the patch with --patch FILE and apply it by `git apply -3`"));
        }
        patch::apply(dir, &self.after, &self.changes)
            .map_err(|error| Failure::new(format!("applying to {}: {error}", dir.display())))
    }

    /// Shows the patch, writes it into a file, or applies it, and says what cannot be in it.
    pub fn deliver(
        &self,
        (engine, run): (&Engine, &Run),
        file: Option<&Path>,
        apply: bool,
        quiet: bool,
    ) -> Result<(), Failure> {
        if let Some(file) = file {
            std::fs::write(file, &self.patch.text).map_err(|error| {
                Failure::new(format!("writing the patch {}: {error}", file.display()))
            })?;
        }
        let count = self.changes.len();
        if apply {
            self.apply(engine, run)?;
        } else if file.is_none() && !quiet {
            let is_seen = output::is_terminal();
            let text = match is_seen {
                true => super::show::clean_text(&self.patch.text),
                false => self.patch.text.clone(),
            };
            output::write(text.as_bytes())?;
        }
        if !self.patch.binary.is_empty() {
            let names: Vec<String> = self
                .patch
                .binary
                .iter()
                .map(|it| format!("{it:?}"))
                .collect();
            let what = if apply {
                "applied, and in no patch"
            } else {
                "not in the patch"
            };
            eprintln!(
                "note: no text, or too large, so {what}: {}",
                names.join(", ")
            );
        }
        match (apply, file) {
            (true, _) => eprintln!("{} changed in {}", files(count), told(run)),
            (false, Some(file)) => {
                eprintln!("{} changed; patch in {}", files(count), file.display());
            }
            (false, None) if count == 0 => eprintln!("no file changed"),
            (false, None) => {}
        }
        Ok(())
    }
}

fn told(run: &Run) -> String {
    let dir = run.directory.as_ref();
    dir.map_or_else(String::new, |dir| dir.display().to_string())
}

/// The directory as it was uploaded.
fn base(engine: &Engine, run: &Run) -> Result<Tree, Failure> {
    let path = engine.runs().base(&run.id);
    let read = File::open(&path).and_then(|file| Tree::read(file, ""));
    read.map_err(|error| {
        Failure::new(format!(
            "what was uploaded cannot be read from {}: {error}",
            path.display()
        ))
    })
}

fn files(count: usize) -> String {
    match count {
        1 => "1 file".to_owned(),
        count => format!("{count} files"),
    }
}
