//! `ratoon snapshots`: what was taken, and what may be done with it without a VM.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{IsTerminal, stdin, stdout};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ratoon_engine::Engine;
use ratoon_engine::snapshot::{Digest, Manifest, PublicKey, SigningKey, Snapshot, Store};
use ratoon_engine::snapshots::{image_digest_of, image_of};
use serde::Serialize;

use super::snapshot::{stored, trusted_key};
use crate::failure::{FAILED, Failure};
use crate::interrupt::cancel_on_signals;
use crate::progress::ImageProgress;
use crate::{output, units};

/// List, check, move and remove snapshots.
///
/// The list is a tree: a snapshot stands below the one that its VM was started from, or that it
/// holds the difference from. SIZE is what it takes on the disk by itself.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  ratoon snapshots
  ratoon snapshots export ready ready.tar        # one file; `-` writes it to a pipe
  ratoon snapshots import ready.tar --name ready
  ratoon snapshots key new signer && ratoon snapshot box ready --sign-key signer
  ratoon restore ready --require-signature signer.pub")]
pub struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Show all that is known of a snapshot, as JSON.
    Inspect {
        /// Name or id.
        snapshot: String,
    },
    /// Read all of a snapshot and check it against its hashes.
    Verify {
        /// Name or id.
        snapshot: String,
        /// Also check that one of these keys signed it.
        #[arg(long, value_name = "KEY", value_parser = trusted_key)]
        require_signature: Vec<PublicKey>,
    },
    /// Write a snapshot into one file. The image that it stands on is not in it.
    Export {
        /// Name or id.
        snapshot: String,
        /// The file, which appears when it is complete; `-` for standard output.
        file: PathBuf,
    },
    /// Take a snapshot from a file that `export` wrote, after checking all of it.
    Import {
        /// The file; `-` for standard input.
        file: PathBuf,
        /// What to call it; default: its id alone.
        #[arg(long)]
        name: Option<String>,
        /// Refuse it unless one of these keys signed it.
        #[arg(long, value_name = "KEY", value_parser = trusted_key)]
        require_signature: Vec<PublicKey>,
    },
    /// Remove snapshots. One that a VM or another snapshot needs is refused.
    Rm {
        /// Names or ids.
        #[arg(required = true)]
        snapshots: Vec<String>,
    },
    /// Keys that sign snapshots.
    #[command(subcommand)]
    Key(Key),
}

#[derive(clap::Subcommand)]
enum Key {
    /// Make a key: FILE to sign with, FILE.pub to hand out; prints the public half.
    New {
        /// Where; it must not exist.
        file: PathBuf,
    },
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    if let Some(Command::Key(Key::New { file })) = &args.command {
        output::line(&SigningKey::create(file)?.public().to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    let store = engine.snapshots()?;
    match &args.command {
        Some(Command::Inspect { snapshot }) => inspect(&store, snapshot)?,
        Some(Command::Verify {
            snapshot,
            require_signature,
        }) => {
            if !require_signature.is_empty() {
                store.get(snapshot)?.check_signature(require_signature)?;
            }
            let progress = ImageProgress::new(cancel_on_signals()?);
            let verified = store.verify(snapshot, &progress);
            drop(progress);
            verified.map_err(stored)?;
            output::line(&format!("{snapshot}: every byte is as it was written"))?;
        }
        Some(Command::Export { snapshot, file }) => export(&store, snapshot, file)?,
        Some(Command::Import {
            file,
            name,
            require_signature,
        }) => {
            let imported = import(&store, file, name.as_deref(), require_signature)?;
            output::line(name.as_deref().unwrap_or(&imported.id.to_string()))?;
            tell_missing_image(engine, &imported);
        }
        Some(Command::Rm { snapshots }) => return remove(&store, snapshots),
        Some(Command::Key(_)) => {}
        None => list(&store, args.json)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn is_pipe(file: &Path) -> bool {
    file == Path::new("-")
}

fn export(store: &Store, snapshot: &str, file: &Path) -> Result<(), Failure> {
    let to_pipe = is_pipe(file);
    if to_pipe && stdout().is_terminal() {
        let failure = Failure::new("a snapshot is nothing for a terminal");
        return Err(failure.hint("name a file, or send it into a pipe").code(2));
    }
    let progress = ImageProgress::new(cancel_on_signals()?);
    let exported = if to_pipe {
        let out = File::from(stdout().as_fd().try_clone_to_owned()?);
        store.export_into(snapshot, out, Path::new("standard output"), &progress)
    } else {
        store.export(snapshot, file, &progress)
    };
    drop(progress);
    exported.map_err(stored)?;
    if !to_pipe {
        output::line(&file.display().to_string())?;
    }
    Ok(())
}

fn import(
    store: &Store,
    file: &Path,
    name: Option<&str>,
    trusted: &[PublicKey],
) -> Result<Snapshot, Failure> {
    let progress = ImageProgress::new(cancel_on_signals()?);
    let imported = if is_pipe(file) {
        let from = File::from(stdin().as_fd().try_clone_to_owned()?);
        let label = Path::new("standard input");
        store.import_from(from, label, name, trusted, &progress)
    } else {
        store.import(file, name, trusted, &progress)
    };
    drop(progress);
    imported.map_err(stored)
}

/// The image is not in the file: better told now than at the restore.
fn tell_missing_image(engine: &Engine, snapshot: &Snapshot) {
    let Some(digest) = image_digest_of(snapshot) else {
        return;
    };
    let here = engine.images().and_then(|images| images.get(digest));
    if here.is_err() {
        let name = image_of(snapshot).unwrap_or_default();
        eprintln!(
            "note: it stands on the image {name} ({digest}), which is not here: it cannot be \
             restored before that is imported"
        );
    }
}

/// In whatever order they are named: one that another of them needs goes after it.
fn remove(store: &Store, snapshots: &[String]) -> Result<ExitCode, Failure> {
    let mut left: Vec<&String> = snapshots.iter().collect();
    loop {
        let mut refused = Vec::new();
        for snapshot in &left {
            match store.remove(snapshot) {
                Ok(_) => output::line(snapshot)?,
                Err(error) => refused.push((*snapshot, error)),
            }
        }
        if refused.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        if refused.len() == left.len() {
            for (_, error) in refused {
                Failure::from(error).report();
            }
            return Ok(ExitCode::from(FAILED));
        }
        left = refused.into_iter().map(|(snapshot, _)| snapshot).collect();
    }
}

/// A snapshot that another one names.
#[derive(Serialize)]
struct Named {
    id: Digest,
    names: Vec<String>,
    /// Whether it is in this store.
    here: bool,
}

impl Named {
    fn of(snapshot: &Snapshot) -> Self {
        Self {
            id: snapshot.id,
            names: snapshot.names.clone(),
            here: true,
        }
    }
}

/// `snapshots inspect`.
#[derive(Serialize)]
struct Inspected<'i> {
    id: Digest,
    names: &'i [String],
    folder: &'i Path,
    disk_bytes: u64,
    apparent_bytes: u64,
    image: Option<&'i str>,
    image_digest: Option<&'i str>,
    signed_by: Option<String>,
    /// The one that its VM was started from, the one that was started from, and so on.
    parents: Vec<Named>,
    /// Those that keep it from being removed.
    needed_by: Vec<Named>,
    manifest: &'i Manifest,
}

fn inspect(store: &Store, wanted: &str) -> Result<(), Failure> {
    let snapshot = store.get(wanted)?;
    let sizes = snapshot.sizes()?;
    let manifest = &snapshot.manifest;
    let mut parents: Vec<Named> = Vec::new();
    let mut next = manifest.about.parent;
    // An id is a hash of what names the parent, so there is no circle.
    while let Some(id) = next {
        let parent = store.get(&id.to_string()).ok();
        next = parent.as_ref().and_then(|it| it.manifest.about.parent);
        parents.push(parent.as_ref().map_or(
            Named {
                id,
                names: Vec::new(),
                here: false,
            },
            Named::of,
        ));
    }
    let signature = manifest.signature.as_ref();
    output::json(&Inspected {
        id: snapshot.id,
        names: &snapshot.names,
        folder: &snapshot.folder,
        disk_bytes: sizes.disk_bytes,
        apparent_bytes: sizes.apparent_bytes,
        image: image_of(&snapshot),
        image_digest: image_digest_of(&snapshot),
        signed_by: signature.map(|signature| signature.key.to_string()),
        parents,
        needed_by: store
            .needed_by(snapshot.id)?
            .iter()
            .map(Named::of)
            .collect(),
        manifest,
    })
}

/// `snapshots --json`.
#[derive(Serialize)]
struct Row {
    id: Digest,
    names: Vec<String>,
    image: Option<String>,
    vcpus: u32,
    memory_mib: u64,
    created: u64,
    disk_bytes: u64,
    /// The snapshot here that it stands below in the tree.
    parent: Option<Digest>,
    signed_by: Option<String>,
}

/// The snapshot that another one stands below: its parent, or the one whose memory it needs.
fn above(snapshot: &Snapshot, all: &[Snapshot]) -> Option<Digest> {
    let manifest = &snapshot.manifest;
    let parent = manifest.about.parent;
    let base = manifest.memory.base;
    let by_id = all.iter().find(|other| Some(other.id) == parent);
    by_id
        .or_else(|| {
            all.iter()
                .find(|other| Some(other.manifest.memory.blake3) == base)
        })
        .map(|found| found.id)
        .filter(|id| *id != snapshot.id)
}

/// The order of a tree and how each row is indented: `parents` holds each row's parent.
fn tree(parents: &[Option<usize>]) -> Vec<(usize, String)> {
    let children = |of: Option<usize>| -> Vec<usize> {
        (0..parents.len())
            .filter(|row| parents[*row] == of)
            .collect()
    };
    let mut order = Vec::new();
    let mut told = BTreeSet::new();
    // Row, the lines before it, what is put before its children.
    let mut open: Vec<(usize, String, String)> = children(None)
        .into_iter()
        .rev()
        .map(|row| (row, String::new(), String::new()))
        .collect();
    while let Some((row, lines, below)) = open.pop() {
        // No row comes twice, whatever manifests say.
        if !told.insert(row) {
            continue;
        }
        order.push((row, lines));
        let own = children(Some(row));
        let last = own.last().copied();
        for child in own.into_iter().rev() {
            let (line, more) = match Some(child) == last {
                true => ("└─ ", "   "),
                false => ("├─ ", "│  "),
            };
            open.push((child, format!("{below}{line}"), format!("{below}{more}")));
        }
    }
    let rest = (0..parents.len()).filter(|row| !told.contains(row));
    order.extend(rest.map(|row| (row, String::new())));
    order
}

fn list(store: &Store, json: bool) -> Result<(), Failure> {
    let listing = store.list()?;
    let mut rows = Vec::new();
    for snapshot in &listing.snapshots {
        let manifest = &snapshot.manifest;
        let signature = manifest.signature.as_ref();
        rows.push(Row {
            id: snapshot.id,
            names: snapshot.names.clone(),
            image: image_of(snapshot).map(str::to_owned),
            vcpus: manifest.about.vcpus,
            memory_mib: manifest.about.memory_mib,
            created: manifest.created_unix_seconds,
            disk_bytes: snapshot.sizes()?.disk_bytes,
            parent: above(snapshot, &listing.snapshots),
            signed_by: signature.map(|signature| signature.key.to_string()),
        });
    }
    for damaged in &listing.damaged {
        eprintln!("{}: {}", damaged.id, damaged.error);
    }
    if json {
        return output::json(&rows);
    }
    let place = |id: Digest| rows.iter().position(|row| row.id == id);
    let parents: Vec<_> = rows.iter().map(|row| row.parent.and_then(place)).collect();
    let head = [
        "NAME", "ID", "IMAGE", "CPUS", "MEMORY", "AGE", "SIZE", "SIGNED",
    ];
    let cells = |(index, lines): &(usize, String)| {
        let row = &rows[*index];
        let name = match row.names.is_empty() {
            true => "-".into(),
            false => row.names.join(","),
        };
        vec![
            format!("{lines}{name}"),
            row.id.to_string().chars().take(12).collect(),
            row.image.clone().unwrap_or_else(|| "-".into()),
            row.vcpus.to_string(),
            units::bytes(row.memory_mib << 20),
            units::age_of(row.created * 1000),
            units::bytes(row.disk_bytes),
            match &row.signed_by {
                Some(key) => key.chars().take(12).collect(),
                None => "-".into(),
            },
        ]
    };
    let rows: Vec<Vec<String>> = tree(&parents).iter().map(cells).collect();
    output::write(output::table(&head, &rows).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_stand_below_their_parent_and_no_row_is_lost() {
        let drawn = |parents: &[Option<usize>]| -> Vec<String> {
            tree(parents)
                .into_iter()
                .map(|(row, lines)| format!("{lines}{row}"))
                .collect()
        };
        let parents = [None, Some(0), None, Some(0), Some(1), Some(4)];
        assert_eq!(
            drawn(&parents),
            ["0", "├─ 1", "│  └─ 4", "│     └─ 5", "└─ 3", "2"]
        );
        // Manifests that name each other cannot be, and would be told all the same.
        assert_eq!(drawn(&[Some(1), Some(0)]), ["0", "1"]);
    }
}
