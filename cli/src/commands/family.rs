//! `ratoon tree`, `commit`, `rollback`, `diff`: what comes after a fork.

use std::path::PathBuf;
use std::process::ExitCode;

use ratoon_engine::Engine;
use ratoon_engine::diff::{Difference, diff};
use ratoon_engine::rollback::RollbackError;
use ratoon_engine::tree::{Node, Shares};

use super::snapshot;
use crate::failure::Failure;
use crate::interrupt::Interrupts;
use crate::progress::Spinner;
use crate::{guest, output, units};

/// Show forked VMs below the VM that they come from, and what each takes.
///
/// MEMORY and DISK are what a VM has alone, and after the + what it has in common with others. Memory of a
/// generation that no other VM has touched yet counts as a VM's own.
#[derive(clap::Args)]
pub struct TreeArgs {
    /// Only this one, and what comes from it.
    #[arg(value_name = "VM")]
    vm: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Let a child take its parent's place.
///
/// It gets the parent's name; the parent and all others that come from it are ended and removed. What was
/// forked from the child itself stays.
#[derive(clap::Args)]
pub struct CommitArgs {
    /// Name, id or beginning of an id of the child.
    #[arg(value_name = "CHILD")]
    vm: String,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Put a running VM back to a snapshot, in place.
///
/// Its id, name and sockets stay; what it did since is gone. VMs that were forked from it stay as they are.
#[derive(clap::Args)]
pub struct RollbackArgs {
    /// Name, id or beginning of an id.
    #[arg(value_name = "VM")]
    vm: String,
    /// Name or id of a snapshot, or of a generation as `tree` shows it; default: the youngest snapshot that was
    /// taken of it, or that it comes from, or else where it was forked.
    #[arg(value_name = "SNAPSHOT")]
    snapshot: Option<String>,
}

/// Show which files differ between two VMs that come from one.
///
/// A line is `+` for what only the second has, `-` for what only the first has, and `M` for what differs by
/// kind, length, mode, owner or time of the last change. /proc, /sys, /dev and /run are left out.
#[derive(clap::Args)]
pub struct DiffArgs {
    /// Name, id or beginning of an id.
    #[arg(value_name = "VM")]
    one: String,
    /// The other one.
    #[arg(value_name = "OTHER")]
    other: String,
    /// Only what is in this directory of both.
    #[arg(long, value_name = "DIR", default_value = "/")]
    path: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub fn tree(engine: &Engine, args: &TreeArgs) -> Result<ExitCode, Failure> {
    let mut nodes = engine.tree()?;
    if let Some(name) = &args.vm {
        let id = guest::find(engine, name)?.dir.id();
        nodes = find(nodes, &id).into_iter().collect();
    }
    if args.json {
        output::json(&nodes)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = Vec::new();
    for node in &nodes {
        rows.push(row("", node));
        below("", node, &mut rows);
    }
    let head = [
        "VM",
        "NAME",
        "STATUS",
        "CHILD",
        "GENERATION",
        "MEMORY",
        "DISK",
    ];
    output::write(output::table(&head, &rows).as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

fn find(nodes: Vec<Node>, id: &str) -> Option<Node> {
    nodes.into_iter().find_map(|node| match node.id == id {
        true => Some(node),
        false => find(node.children, id),
    })
}

fn below(indent: &str, node: &Node, rows: &mut Vec<Vec<String>>) {
    let count = node.children.len();
    for (number, child) in node.children.iter().enumerate() {
        let (branch, deeper) = match number + 1 == count {
            true => ("└─ ", "   "),
            false => ("├─ ", "│  "),
        };
        rows.push(row(&format!("{indent}{branch}"), child));
        below(&format!("{indent}{deeper}"), child, rows);
    }
}

fn row(indent: &str, node: &Node) -> Vec<String> {
    let dash = || "-".to_owned();
    let shares = |shares: &Shares| {
        let (unique, shared) = (units::bytes(shares.unique), units::bytes(shares.shared));
        format!("{unique} + {shared}")
    };
    let parent = node.parent.as_ref();
    vec![
        format!("{indent}{}", node.id),
        node.name.clone().unwrap_or_else(dash),
        node.status.to_string(),
        parent.map_or_else(dash, |parent| parent.index.to_string()),
        parent.map_or_else(dash, |parent| parent.generation.chars().take(12).collect()),
        node.memory.as_ref().map_or_else(dash, shares),
        shares(&node.disk),
    ]
}

pub fn commit(engine: &Engine, args: &CommitArgs) -> Result<ExitCode, Failure> {
    let entry = guest::find(engine, &args.vm)?;
    let committed = engine.commit(&entry)?;
    if args.json {
        output::json(&committed)?;
    } else {
        output::line(committed.name.as_deref().unwrap_or(&committed.id))?;
    }
    Ok(ExitCode::SUCCESS)
}

pub fn rollback(engine: &Engine, args: &RollbackArgs) -> Result<ExitCode, Failure> {
    let entry = guest::find(engine, &args.vm)?;
    let interrupts = Interrupts::listen()?;
    let spinner = Spinner::start(format!("rolling {} back", args.vm));
    let done = engine.rollback(&entry, args.snapshot.as_deref(), Some(interrupts.cancel()));
    drop(spinner);
    let id = done.map_err(|error| match error {
        RollbackError::Snapshot(error) => snapshot::failed(error, &interrupts),
        error => Failure::from(error),
    })?;
    output::line(&id)?;
    Ok(ExitCode::SUCCESS)
}

pub fn compare(engine: &Engine, args: &DiffArgs) -> Result<ExitCode, Failure> {
    let one = guest::find_running(engine, &args.one)?;
    let other = guest::find_running(engine, &args.other)?;
    let spinner = Spinner::start("comparing".to_owned());
    let changed = diff(&one.dir, &other.dir, &args.path);
    drop(spinner);
    let changed = changed?;
    if args.json {
        output::json(&changed)?;
        return Ok(ExitCode::SUCCESS);
    }
    let line = |it: &ratoon_engine::diff::Changed| {
        let sign = match it.difference {
            Difference::Added => '+',
            Difference::Removed => '-',
            Difference::Modified => 'M',
        };
        // The guests' words are not to be trusted with a terminal.
        let path: String = it.path.chars().flat_map(escaped).collect();
        format!("{sign} {path}\n")
    };
    let text: String = changed.iter().map(line).collect();
    output::write(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

fn escaped(c: char) -> Vec<char> {
    match c.is_control() {
        true => c.escape_default().collect(),
        false => vec![c],
    }
}
