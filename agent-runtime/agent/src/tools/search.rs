//! `grep` and `glob`: finding files and lines without any program of the image's.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use ratoon_runtime::files::glob::Glob as Pattern;
use regex_lite::RegexBuilder;
use serde::Deserialize;

use super::capture::readable;
use crate::clock::{self, Moment};
use crate::stop::Stop;

const MAX_MATCHES: usize = 200;
const MAX_FILES: usize = 1000;
/// Entries looked at in all.
const MAX_SEEN: usize = 1_000_000;
const MAX_FILE_BYTES: u64 = 16 << 20;
const MAX_LINE_CHARS: usize = 400;
const MAX_DEPTH: usize = 64;
/// What has no files of a user's.
const SKIPPED: &[&str] = &["/proc", "/sys", "/dev"];

/// The arguments of `grep`.
#[derive(Debug, Clone, Deserialize)]
pub struct Grep {
    pattern: String,
    #[serde(default)]
    path: Option<String>,
    #[serde(default, alias = "include")]
    glob: Option<String>,
    #[serde(default)]
    ignore_case: bool,
    #[serde(default)]
    files_only: bool,
}

/// The arguments of `glob`.
#[derive(Debug, Clone, Deserialize)]
pub struct Glob {
    pattern: String,
    #[serde(default)]
    path: Option<String>,
}

/// Goes through files until there is enough, the time is over, or all is to end.
struct Walk<'a> {
    until: Moment,
    stop: &'a Stop,
    seen: usize,
}

impl Walk<'_> {
    fn enough(&self) -> bool {
        self.seen >= MAX_SEEN || self.stop.is_set() || clock::now() >= self.until
    }

    /// Calls `each` with each file below `dir`, in order; ends when it says so. False when it did not come to the end.
    fn files(&mut self, dir: &Path, depth: usize, each: &mut dyn FnMut(&Path) -> bool) -> bool {
        if depth > MAX_DEPTH || SKIPPED.iter().any(|skipped| dir == Path::new(skipped)) {
            return true;
        }
        // What may not be read is passed over, as a shell's grep does with -s.
        let Ok(entries) = fs::read_dir(dir) else {
            return true;
        };
        let mut entries: Vec<(PathBuf, fs::FileType)> = entries
            .filter_map(|entry| {
                let entry = entry.ok()?;
                Some((entry.path(), entry.file_type().ok()?))
            })
            .collect();
        entries.sort_by(|one, other| one.0.cmp(&other.0));
        for (path, kind) in entries {
            self.seen += 1;
            if self.enough() {
                return false;
            }
            let on = if kind.is_dir() {
                path.file_name().is_some_and(|name| name == ".git")
                    || self.files(&path, depth + 1, each)
            } else {
                !kind.is_file() || each(&path)
            };
            if !on {
                return false;
            }
        }
        true
    }
}

fn root(base: &Path, path: Option<&String>) -> Result<PathBuf, String> {
    let root = match path.filter(|path| !path.is_empty()) {
        Some(path) => base.join(path),
        None => base.to_owned(),
    };
    if root.exists() {
        Ok(root)
    } else {
        Err(format!("{}: there is no such place", root.display()))
    }
}

fn below<'a>(root: &Path, path: &'a Path) -> std::borrow::Cow<'a, str> {
    path.strip_prefix(root).unwrap_or(path).to_string_lossy()
}

/// Files whose names fit.
pub fn glob(base: &Path, glob: &Glob, until: Moment, stop: &Stop) -> Result<String, String> {
    let root = root(base, glob.path.as_ref())?;
    let pattern = Pattern::new(&glob.pattern)?;
    let mut found = Vec::new();
    let mut walk = Walk {
        until,
        stop,
        seen: 0,
    };
    let whole = walk.files(&root, 0, &mut |path| {
        if pattern.fits(&below(&root, path)) {
            found.push(path.display().to_string());
        }
        found.len() < MAX_FILES
    });
    Ok(told(found, whole, "files"))
}

/// Lines that fit.
pub fn grep(base: &Path, grep: &Grep, until: Moment, stop: &Stop) -> Result<String, String> {
    let root = root(base, grep.path.as_ref())?;
    let regex = RegexBuilder::new(&grep.pattern)
        .case_insensitive(grep.ignore_case)
        .size_limit(1 << 20)
        .build()
        .map_err(|error| format!("the pattern is no regular expression: {error}"))?;
    let names = grep.glob.as_deref().map(Pattern::new).transpose()?;
    let mut found = Vec::new();
    let mut walk = Walk {
        until,
        stop,
        seen: 0,
    };
    let mut each = |path: &Path| {
        let fits = names
            .as_ref()
            .is_none_or(|names| names.fits(&below(&root, path)));
        let Some(text) = fits.then(|| text(path)).flatten() else {
            return true;
        };
        for (index, line) in text.lines().enumerate() {
            if index % 1024 == 1023 && (stop.is_set() || clock::now() >= until) {
                return false;
            }
            if !regex.is_match(line) {
                continue;
            }
            if grep.files_only {
                found.push(path.display().to_string());
                break;
            }
            let line: String = line.chars().take(MAX_LINE_CHARS).collect();
            found.push(format!("{}:{}:{line}", path.display(), index + 1));
            if found.len() >= MAX_MATCHES {
                break;
            }
        }
        found.len() < MAX_MATCHES
    };
    let whole = if root.is_dir() {
        walk.files(&root, 0, &mut each)
    } else {
        each(&root)
    };
    Ok(told(found, whole, "matches"))
}

/// A file's text; none if it is large or no text.
fn text(path: &Path) -> Option<String> {
    let file = File::open(path).ok()?;
    if file.metadata().ok()?.len() > MAX_FILE_BYTES {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).ok()?;
    let is_text = !bytes.iter().take(8192).any(|byte| *byte == 0);
    is_text.then(|| readable(&bytes))
}

fn told(found: Vec<String>, whole: bool, what: &str) -> String {
    let mut text = found.join("\n");
    if found.is_empty() {
        text = format!("There are no {what}.");
    }
    if !whole {
        text.push_str(&format!(
            "\n[... the search ended after {} {what}: there may be more; narrow it ...]",
            found.len()
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a folder");
        for (name, text) in [
            ("a.rs", "fn main() {}\n"),
            ("src/b.rs", "// Main\nlet x = 1;\n"),
            ("src/c.txt", "main\n"),
            (".git/d.rs", "main\n"),
            ("bin", "main\0\n"),
        ] {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            fs::write(path, text).expect("a file");
        }
        dir
    }

    fn later() -> Moment {
        clock::now() + std::time::Duration::from_secs(60)
    }

    fn run_grep(value: serde_json::Value) -> Result<Vec<String>, String> {
        let dir = folder();
        let grep_: Grep = serde_json::from_value(value).expect("arguments");
        let stop = Stop::new().expect("an eventfd");
        let text = grep(dir.path(), &grep_, later(), &stop)?;
        let root = format!("{}/", dir.path().display());
        Ok(text.lines().map(|line| line.replace(&root, "")).collect())
    }

    #[test]
    fn lines_are_found_in_text_files_alone() {
        let found = run_grep(serde_json::json!({"pattern": "main"})).expect("matches");
        assert_eq!(found, ["a.rs:1:fn main() {}", "src/c.txt:1:main"]);
        let found = run_grep(
            serde_json::json!({"pattern": "MAIN", "ignore_case": true, "glob": "*.rs", "files_only": true}),
        );
        assert_eq!(found.expect("files"), ["a.rs", "src/b.rs"]);
        let found = run_grep(serde_json::json!({"pattern": "x = \\d", "path": "src/b.rs"}));
        assert_eq!(found.expect("matches"), ["src/b.rs:2:let x = 1;"]);
        let found = run_grep(serde_json::json!({"pattern": "nothing"}));
        assert_eq!(found.expect("none"), ["There are no matches."]);
    }

    #[test]
    fn what_cannot_be_searched_is_said() {
        let pattern = run_grep(serde_json::json!({"pattern": "("}));
        assert!(
            pattern
                .expect_err("an error")
                .contains("regular expression")
        );
        let place = run_grep(serde_json::json!({"pattern": "x", "path": "none"}));
        assert!(place.expect_err("an error").contains("no such place"));
    }

    #[test]
    fn files_are_found_by_name() {
        let dir = folder();
        let stop = Stop::new().expect("an eventfd");
        let run = |pattern: &str| {
            let wanted = Glob {
                pattern: pattern.into(),
                path: None,
            };
            let text = glob(dir.path(), &wanted, later(), &stop).expect("files");
            text.replace(&format!("{}/", dir.path().display()), "")
        };
        assert_eq!(run("*.rs"), "a.rs\nsrc/b.rs");
        assert_eq!(run("src/**"), "src/b.rs\nsrc/c.txt");
        assert_eq!(run("*.c"), "There are no files.");
    }
}
