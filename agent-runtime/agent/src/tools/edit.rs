//! `str_replace_based_edit_tool` and `read_file`: looking at files and changing them, byte for byte.
//!
//! A file is never decoded and written back: what is not replaced keeps its bytes, tabs and line ends too.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::capture::readable;

/// The largest file that is looked at or changed.
pub const MAX_FILE_BYTES: u64 = 64 << 20;
const MAX_ENTRIES: usize = 1000;
/// Lines shown around a change.
const AROUND: usize = 4;

/// The arguments.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Edit {
    /// Shows a file with line numbers, or a directory.
    View {
        path: String,
        #[serde(default)]
        view_range: Option<(i64, i64)>,
    },
    /// Writes a file.
    Create { path: String, file_text: String },
    /// Replaces text that is there once.
    StrReplace {
        path: String,
        old_str: String,
        #[serde(default)]
        new_str: String,
    },
    /// Adds lines behind a line.
    Insert {
        path: String,
        insert_line: u64,
        #[serde(alias = "new_str")]
        insert_text: String,
    },
}

/// The arguments of `read_file`.
#[derive(Debug, Clone, Deserialize)]
pub struct Read {
    #[serde(alias = "file_path")]
    path: String,
    #[serde(default)]
    offset: Option<u64>,
    #[serde(default)]
    limit: Option<u64>,
}

/// Does it; paths are taken from `base`.
pub fn edit(base: &Path, edit: &Edit) -> Result<String, String> {
    match edit {
        Edit::View { path, view_range } => view(&base.join(path), *view_range),
        Edit::Create { path, file_text } => create(&base.join(path), file_text),
        Edit::StrReplace {
            path,
            old_str,
            new_str,
        } => replace(&base.join(path), old_str, new_str),
        Edit::Insert {
            path,
            insert_line,
            insert_text,
        } => insert(&base.join(path), *insert_line, insert_text),
    }
}

/// `read_file`.
pub fn read_file(base: &Path, read: &Read) -> Result<String, String> {
    let path = base.join(&read.path);
    let bytes = read_bytes(&path)?;
    let lines = lines(&bytes);
    let first = usize::try_from(read.offset.unwrap_or(1).max(1)).unwrap_or(usize::MAX);
    let count = usize::try_from(read.limit.unwrap_or(2000)).unwrap_or(usize::MAX);
    if first > lines.len().max(1) {
        return Err(format!(
            "{} has {} lines; there is no line {first}",
            path.display(),
            lines.len()
        ));
    }
    let last = (first - 1).saturating_add(count).min(lines.len());
    let mut text = numbered(&lines[first - 1..last], first);
    if last < lines.len() {
        text.push_str(&format!(
            "[... {} more lines; go on with offset {} ...]\n",
            lines.len() - last,
            last + 1
        ));
    }
    if lines.is_empty() {
        text = "(the file is empty)".into();
    }
    Ok(text)
}

/// The file's bytes, if it is one that can be read whole.
pub fn read_bytes(path: &Path) -> Result<Vec<u8>, String> {
    let name = path.display();
    let meta = fs::metadata(path).map_err(|error| format!("{name}: {error}"))?;
    if meta.is_dir() {
        return Err(format!("{name} is a directory"));
    }
    if !meta.is_file() {
        return Err(format!("{name} is no regular file"));
    }
    if meta.len() > MAX_FILE_BYTES {
        return Err(format!(
            "{name} has {} bytes, which is too much for this tool; use the shell",
            meta.len()
        ));
    }
    fs::read(path).map_err(|error| format!("{name}: {error}"))
}

/// Writes a file in place: its owner, mode and links stay.
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<(), String> {
    if fs::metadata(path).is_ok_and(|meta| !meta.is_file()) {
        return Err(format!("{} is no regular file", path.display()));
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|error| format!("{}: {error}", parent.display()))?;
    }
    fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))
}

/// Lines without their ends.
fn lines(bytes: &[u8]) -> Vec<&[u8]> {
    let mut lines: Vec<&[u8]> = bytes.split(|byte| *byte == b'\n').collect();
    if lines.last().is_some_and(|line| line.is_empty()) {
        lines.pop();
    }
    lines
}

/// As `cat -n` has it.
fn numbered(lines: &[&[u8]], first: usize) -> String {
    let mut text = String::new();
    for (index, line) in lines.iter().enumerate() {
        text.push_str(&format!("{:6}\t{}\n", first + index, readable(line)));
    }
    text
}

fn view(path: &Path, range: Option<(i64, i64)>) -> Result<String, String> {
    if path.is_dir() {
        if range.is_some() {
            return Err("view_range is for files; this is a directory".into());
        }
        return list(path);
    }
    let bytes = read_bytes(path)?;
    let lines = lines(&bytes);
    let Some((first, last)) = range else {
        return Ok(if lines.is_empty() {
            "(the file is empty)".into()
        } else {
            numbered(&lines, 1)
        });
    };
    let count = lines.len() as i64;
    let end = if last == -1 { count } else { last };
    if first < 1 || first > count.max(1) || end < first || end > count.max(1) {
        return Err(format!(
            "view_range [{first}, {last}] does not fit: the file has {count} lines"
        ));
    }
    Ok(numbered(
        &lines[(first - 1) as usize..(end as usize).min(lines.len())],
        first as usize,
    ))
}

/// Two levels, without hidden ones.
fn list(path: &Path) -> Result<String, String> {
    let mut entries = Vec::new();
    listed(path, 2, &mut entries).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut text = format!(
        "Files and directories in {}, two levels deep, without hidden ones:\n",
        path.display()
    );
    let more = entries.len() > MAX_ENTRIES;
    for entry in entries.iter().take(MAX_ENTRIES) {
        let slash = if entry.is_dir() { "/" } else { "" };
        text.push_str(&format!("{}{slash}\n", entry.display()));
    }
    if more {
        text.push_str("[... and more ...]\n");
    }
    Ok(text)
}

fn listed(dir: &Path, depth: u32, into: &mut Vec<PathBuf>) -> std::io::Result<()> {
    let mut names: Vec<PathBuf> = fs::read_dir(dir)?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| {
            !path
                .file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
        })
        .collect();
    names.sort();
    for name in names {
        if into.len() > MAX_ENTRIES {
            break;
        }
        let below = depth > 1 && name.is_dir() && !name.is_symlink();
        into.push(name.clone());
        if below {
            // One that may not be read is shown without what is in it.
            let _ = listed(&name, depth - 1, into);
        }
    }
    Ok(())
}

fn create(path: &Path, text: &str) -> Result<String, String> {
    let existed = path.exists();
    write_bytes(path, text.as_bytes())?;
    Ok(format!(
        "{} was {}.",
        path.display(),
        if existed { "overwritten" } else { "created" }
    ))
}

/// Where the bytes begin, overlapping ones too.
fn places(bytes: &[u8], wanted: &[u8]) -> Vec<usize> {
    bytes
        .windows(wanted.len())
        .enumerate()
        .filter(|(_, window)| *window == wanted)
        .map(|(at, _)| at)
        .take(100)
        .collect()
}

fn line_of(bytes: &[u8], at: usize) -> usize {
    bytes[..at].iter().filter(|byte| **byte == b'\n').count() + 1
}

fn replace(path: &Path, old: &str, new: &str) -> Result<String, String> {
    if old.is_empty() {
        return Err("old_str is empty: say what is to be replaced, or use insert".into());
    }
    if old == new {
        return Err("old_str and new_str are the same".into());
    }
    let bytes = read_bytes(path)?;
    let places = places(&bytes, old.as_bytes());
    let at = match places.as_slice() {
        [at] => *at,
        [] => {
            return Err(format!(
                "nothing was replaced: old_str is not in {}, letter for letter",
                path.display()
            ));
        }
        several => {
            let lines: Vec<String> = several
                .iter()
                .map(|at| line_of(&bytes, *at).to_string())
                .collect();
            return Err(format!(
                "nothing was replaced: old_str is in {} {} times, beginning in lines {}; give more of what is around the one that you mean",
                path.display(),
                several.len(),
                lines.join(", ")
            ));
        }
    };
    let mut changed = bytes[..at].to_vec();
    changed.extend_from_slice(new.as_bytes());
    changed.extend_from_slice(&bytes[at + old.len()..]);
    write_bytes(path, &changed)?;
    let first = line_of(&changed, at);
    let count = new.matches('\n').count() + 1;
    Ok(around(path, &changed, first, count))
}

fn insert(path: &Path, after: u64, text: &str) -> Result<String, String> {
    let bytes = read_bytes(path)?;
    let count = lines(&bytes).len();
    let after = usize::try_from(after)
        .ok()
        .filter(|after| *after <= count)
        .ok_or_else(|| format!("insert_line {after} does not fit: the file has {count} lines"))?;
    let mut at = 0;
    for _ in 0..after {
        at += bytes[at..]
            .iter()
            .position(|byte| *byte == b'\n')
            .map_or(bytes.len() - at, |end| end + 1);
    }
    let mut changed = bytes[..at].to_vec();
    if changed.last().is_some_and(|last| *last != b'\n') {
        changed.push(b'\n');
    }
    changed.extend_from_slice(text.as_bytes());
    if at < bytes.len() && !text.ends_with('\n') {
        changed.push(b'\n');
    }
    changed.extend_from_slice(&bytes[at..]);
    write_bytes(path, &changed)?;
    Ok(around(
        path,
        &changed,
        after + 1,
        text.lines().count().max(1),
    ))
}

fn around(path: &Path, bytes: &[u8], first: usize, count: usize) -> String {
    let lines = lines(bytes);
    let begin = first.saturating_sub(AROUND).max(1);
    let end = (first + count + AROUND - 1).min(lines.len());
    let part = lines.get(begin - 1..end).unwrap_or_default();
    format!(
        "{} was changed. It now has here:\n{}",
        path.display(),
        numbered(part, begin)
    )
}

#[cfg(test)]
#[path = "edit_tests.rs"]
mod tests;
