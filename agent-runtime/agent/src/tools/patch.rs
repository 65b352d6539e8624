//! The text of `apply_patch`, read strictly and applied wholly or not at all.
//!
//! ```text
//! *** Begin Patch
//! *** Add File: PATH            then lines with +
//! *** Delete File: PATH
//! *** Update File: PATH         then, if wanted, *** Move to: PATH, then hunks:
//! @@ a line above, if it helps to find the place
//!  kept
//! -taken out
//! +put in
//! *** End of File               if the hunk is at the end
//! *** End Patch
//! ```
//!
//! What a patch comes to is worked out before the first file is written: a hunk that fits nowhere changes nothing.
//! Lines that a hunk keeps stay as they are in the file, also where they fit only but for white space.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::edit::{read_bytes, write_bytes};

/// One file's part of a patch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// A new file.
    Add { path: String, text: String },
    /// No file any more.
    Delete { path: String },
    /// Another text, and perhaps another name.
    Update {
        path: String,
        to: Option<String>,
        hunks: Vec<Hunk>,
    },
}

/// A change at one place.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hunk {
    /// A line somewhere above.
    below: Option<String>,
    lines: Vec<(Mark, String)>,
    at_end: bool,
}

/// What becomes of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    Keep,
    Out,
    In,
}

const BEGIN: &str = "*** Begin Patch";
const END: &str = "*** End Patch";
const ADD: &str = "*** Add File: ";
const DELETE: &str = "*** Delete File: ";
const UPDATE: &str = "*** Update File: ";
const MOVE: &str = "*** Move to: ";
const END_OF_FILE: &str = "*** End of File";

/// Reads a patch.
pub fn parse(text: &str) -> Result<Vec<Part>, String> {
    let mut lines: Vec<&str> = text
        .trim()
        .lines()
        .map(|line| line.strip_suffix('\r').unwrap_or(line))
        .collect();
    // Some wrap it as they would for a shell.
    let heredoc = |line: &str| {
        let words = line.trim_start_matches("apply_patch").trim();
        words.starts_with("<<") && words.contains("EOF")
    };
    if lines.len() > 2 && heredoc(lines[0]) && lines[lines.len() - 1].trim() == "EOF" {
        lines = lines[1..lines.len() - 1].to_vec();
    }
    if lines.first().is_none_or(|line| line.trim() != BEGIN) {
        return Err(format!("the first line must be \"{BEGIN}\""));
    }
    if lines.last().is_none_or(|line| line.trim() != END) || lines.len() < 2 {
        return Err(format!("the last line must be \"{END}\""));
    }
    let end = lines.len() - 1;
    let mut at = 1;
    let mut parts = Vec::new();
    while at < end {
        let line = lines[at].trim();
        let number = at + 1;
        at += 1;
        if line.is_empty() {
            continue;
        }
        let path = |prefix: &str| -> Option<String> {
            let path = line.strip_prefix(prefix.trim_end())?.trim();
            (!path.is_empty()).then(|| path.to_owned())
        };
        let body_end = (at..end)
            .find(|at| {
                let line = lines[*at].trim_end();
                [ADD, DELETE, UPDATE]
                    .iter()
                    .any(|prefix| line.starts_with(prefix.trim_end()))
            })
            .unwrap_or(end);
        if let Some(path) = path(ADD) {
            let mut text = String::new();
            for (index, line) in lines[at..body_end].iter().enumerate() {
                let Some(line) = line.strip_prefix('+') else {
                    if line.trim().is_empty() {
                        continue;
                    }
                    return Err(format!(
                        "line {}: a line of a new file must begin with +",
                        at + index + 1
                    ));
                };
                text.push_str(line);
                text.push('\n');
            }
            parts.push(Part::Add { path, text });
        } else if let Some(path) = path(DELETE) {
            if let Some(line) = lines[at..body_end]
                .iter()
                .find(|line| !line.trim().is_empty())
            {
                return Err(format!("behind \"Delete File\" stands {line:?}"));
            }
            parts.push(Part::Delete { path });
        } else if let Some(path) = path(UPDATE) {
            let mut to = None;
            if at < body_end
                && let Some(other) = lines[at].trim().strip_prefix(MOVE.trim_end())
            {
                to = Some(other.trim().to_owned()).filter(|to| !to.is_empty());
                at += 1;
            }
            let hunks = hunks(&lines[at..body_end], at + 1)?;
            if hunks.is_empty() && to.is_none() {
                return Err(format!(
                    "line {number}: the update of {path} changes nothing"
                ));
            }
            parts.push(Part::Update { path, to, hunks });
        } else {
            return Err(format!(
                "line {number}: {line:?} is none of \"{ADD}PATH\", \"{DELETE}PATH\", \"{UPDATE}PATH\""
            ));
        }
        at = body_end;
    }
    if parts.is_empty() {
        return Err("the patch has no part".into());
    }
    Ok(parts)
}

fn hunks(lines: &[&str], first: usize) -> Result<Vec<Hunk>, String> {
    let mut hunks: Vec<Hunk> = Vec::new();
    let mut open = false;
    for (index, line) in lines.iter().enumerate() {
        let number = first + index;
        if let Some(rest) = line.strip_prefix("@@") {
            // Several headers name a place within a place: the last one counts behind the ones above.
            let rest = rest.trim();
            hunks.push(Hunk {
                below: (!rest.is_empty()).then(|| rest.to_owned()),
                ..Hunk::default()
            });
            open = true;
            continue;
        }
        if line.trim() == END_OF_FILE {
            let hunk = hunks
                .last_mut()
                .filter(|_| open)
                .ok_or_else(|| format!("line {number}: \"{END_OF_FILE}\" ends no hunk"))?;
            hunk.at_end = true;
            open = false;
            continue;
        }
        if !open && line.trim().is_empty() {
            continue;
        }
        let (mark, text) = match line.chars().next() {
            Some(' ') => (Mark::Keep, &line[1..]),
            Some('-') => (Mark::Out, &line[1..]),
            Some('+') => (Mark::In, &line[1..]),
            // Editors and models strip the blank of an empty line.
            None => (Mark::Keep, ""),
            Some(_) => {
                return Err(format!(
                    "line {number}: {line:?} begins with none of ' ', '-', '+', '@@'"
                ));
            }
        };
        if !open {
            hunks.push(Hunk::default());
            open = true;
        }
        if let Some(hunk) = hunks.last_mut() {
            hunk.lines.push((mark, text.to_owned()));
        }
    }
    Ok(hunks)
}

/// A file's lines, and whether the last one has an end.
struct Lines {
    lines: Vec<String>,
    ended: bool,
}

impl Lines {
    fn of(text: &str) -> Self {
        let mut lines: Vec<String> = text.split('\n').map(str::to_owned).collect();
        let ended = lines.last().is_some_and(String::is_empty);
        if ended {
            lines.pop();
        }
        Self { lines, ended }
    }

    fn text(&self) -> String {
        let mut text = self.lines.join("\n");
        if self.ended && !self.lines.is_empty() {
            text.push('\n');
        }
        text
    }
}

/// The text with all hunks in it.
fn patched(text: &str, hunks: &[Hunk]) -> Result<String, String> {
    let mut file = Lines::of(text);
    let crlf = !file.lines.is_empty() && file.lines.iter().all(|line| line.ends_with('\r'));
    let mut from = 0;
    for hunk in hunks {
        if let Some(below) = &hunk.below {
            let place = find(&file.lines, &[below], from, false)
                .ok_or_else(|| format!("there is no line {below:?} to go below"))?;
            from = place + 1;
        }
        // A header alone only leads to the next.
        if hunk.lines.is_empty() {
            continue;
        }
        let mut hunk = hunk.clone();
        let mut place = hunk.place(&file.lines, from);
        // An empty line at the end is often only the patch's own.
        while place.is_none()
            && hunk
                .lines
                .last()
                .is_some_and(|(mark, text)| *mark == Mark::Keep && text.trim().is_empty())
        {
            hunk.lines.pop();
            place = hunk.place(&file.lines, from);
        }
        let place = place.ok_or_else(|| {
            let old: Vec<&str> = hunk.old().map(|text| text.as_str()).collect();
            format!("these lines are not there:\n{}", old.join("\n"))
        })?;
        let mut made = Vec::new();
        let mut at = place;
        for (mark, text) in &hunk.lines {
            match mark {
                Mark::Keep => {
                    made.push(file.lines[at].clone());
                    at += 1;
                }
                Mark::Out => at += 1,
                Mark::In if crlf && !text.ends_with('\r') => made.push(format!("{text}\r")),
                Mark::In => made.push(text.clone()),
            }
        }
        let last_is_new = hunk.lines.last().is_some_and(|(mark, _)| *mark == Mark::In);
        if at == file.lines.len() && last_is_new {
            file.ended = true;
        }
        from = place + made.len();
        file.lines.splice(place..at, made);
    }
    Ok(file.text())
}

impl Hunk {
    fn old(&self) -> impl Iterator<Item = &String> {
        self.lines
            .iter()
            .filter(|(mark, _)| *mark != Mark::In)
            .map(|(_, text)| text)
    }

    fn place(&self, lines: &[String], from: usize) -> Option<usize> {
        let old: Vec<&String> = self.old().collect();
        if old.is_empty() {
            // Nothing says where: below the header, or else at the end.
            return Some(if self.below.is_some() && !self.at_end {
                from
            } else {
                lines.len()
            });
        }
        find(lines, &old, from, self.at_end)
    }
}

/// Where the lines are: exactly, or but for white space at their ends, then at both sides, then but for typography.
fn find(lines: &[String], wanted: &[&String], from: usize, at_end: bool) -> Option<usize> {
    let last = lines.len().checked_sub(wanted.len())?;
    let like: [fn(&str) -> String; 4] = [
        str::to_owned,
        |line| line.trim_end().to_owned(),
        |line| line.trim().to_owned(),
        plain,
    ];
    for like in like {
        let wanted: Vec<String> = wanted.iter().map(|line| like(line)).collect();
        let fits = |at: &usize| {
            lines[*at..]
                .iter()
                .zip(&wanted)
                .all(|(line, wanted)| like(line) == *wanted)
        };
        let found = if at_end {
            // At the end if it is there, else as any other.
            Some(last)
                .filter(fits)
                .filter(|at| *at >= from)
                .or_else(|| (from..=last).find(fits))
        } else {
            (from..=last).find(fits)
        };
        if found.is_some() {
            return found;
        }
    }
    None
}

/// Without what typography makes of dashes, quotes and blanks.
fn plain(line: &str) -> String {
    line.trim()
        .chars()
        .map(|letter| match letter {
            '\u{2010}'..='\u{2015}' | '\u{2212}' => '-',
            '\u{2018}'..='\u{201b}' => '\'',
            '\u{201c}'..='\u{201f}' => '"',
            '\u{a0}' | '\u{2002}'..='\u{200a}' | '\u{202f}' | '\u{205f}' | '\u{3000}' => ' ',
            letter => letter,
        })
        .collect()
}

/// What files will be: their text, or none.
type After = BTreeMap<PathBuf, Option<String>>;

/// Applies a patch; paths are taken from `base`. Gives what was done.
pub fn apply(base: &Path, text: &str) -> Result<String, String> {
    let parts = parse(text).map_err(|why| format!("this is no patch: {why}"))?;
    let unchanged = |why: String| format!("nothing was changed: {why}");
    let mut after = After::new();
    let mut moves: Vec<(PathBuf, PathBuf)> = Vec::new();
    let mut told = Vec::new();
    for part in &parts {
        match part {
            Part::Add { path, text } => {
                let full = base.join(path);
                if full.is_dir() {
                    return Err(unchanged(format!("{path} is a directory")));
                }
                after.insert(full, Some(text.clone()));
                told.push(format!("A {path}"));
            }
            Part::Delete { path } => {
                let full = base.join(path);
                current(&after, &full).map_err(unchanged)?;
                after.insert(full, None);
                told.push(format!("D {path}"));
            }
            Part::Update { path, to, hunks } => {
                let full = base.join(path);
                let before = current(&after, &full).map_err(unchanged)?;
                let text =
                    patched(&before, hunks).map_err(|why| unchanged(format!("{path}: {why}")))?;
                match to.as_ref().map(|to| base.join(to)).filter(|to| *to != full) {
                    None => {
                        after.insert(full, Some(text));
                        told.push(format!("M {path}"));
                    }
                    Some(target) => {
                        if target.is_dir() {
                            let why = format!("{} is a directory", target.display());
                            return Err(unchanged(why));
                        }
                        after.insert(full.clone(), None);
                        after.insert(target.clone(), Some(text));
                        told.push(format!("M {path} -> {}", to.as_deref().unwrap_or_default()));
                        moves.push((full, target));
                    }
                }
            }
        }
    }
    write(&after, &moves)?;
    Ok(format!(
        "Done. These files were changed:\n{}\n",
        told.join("\n")
    ))
}

/// A file's text as it is after the parts before.
fn current(after: &After, path: &Path) -> Result<String, String> {
    match after.get(path) {
        Some(Some(text)) => Ok(text.clone()),
        Some(None) => Err(format!(
            "{} is deleted or moved by the same patch",
            path.display()
        )),
        None => String::from_utf8(read_bytes(path)?)
            .map_err(|_| format!("{} is no UTF-8 text", path.display())),
    }
}

fn write(after: &After, moves: &[(PathBuf, PathBuf)]) -> Result<(), String> {
    let stopped = |done: &[String], why: String| {
        let done = if done.is_empty() {
            "nothing was changed".to_owned()
        } else {
            format!("only these were changed: {}", done.join(", "))
        };
        format!("{why}; {done}")
    };
    let mut done = Vec::new();
    // New texts first: a disk that is full then has cost no file.
    for (path, text) in after {
        let Some(text) = text else { continue };
        // A file that moves keeps its mode.
        let mode = moves
            .iter()
            .find(|(_, to)| to == path)
            .and_then(|(from, _)| fs::metadata(from).ok())
            .map(|meta| meta.permissions());
        write_bytes(path, text.as_bytes()).map_err(|why| stopped(&done, why))?;
        if let Some(mode) = mode {
            fs::set_permissions(path, mode)
                .map_err(|error| stopped(&done, format!("{}: {error}", path.display())))?;
        }
        done.push(path.display().to_string());
    }
    for path in after
        .iter()
        .filter(|(_, text)| text.is_none())
        .map(|(path, _)| path)
    {
        // One that was added and deleted again never was.
        if path.exists() {
            fs::remove_file(path)
                .map_err(|error| stopped(&done, format!("{}: {error}", path.display())))?;
            done.push(path.display().to_string());
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "patch_tests.rs"]
mod tests;
