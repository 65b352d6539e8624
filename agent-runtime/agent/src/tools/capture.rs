//! What a tool has said: the model is shown its head and its tail, a file in the guest has all of it.
//!
//! ```text
//!   head (half of the limit) ... [N bytes are left out; all of it is in FILE] ... tail (the other half)
//! ```
//!
//! A file is made only when something is left out, and has at most [`MAX_FILE_BYTES`]; all files together have
//! [`MAX_STORE_BYTES`], then the oldest goes.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

const MAX_FILE_BYTES: u64 = 64 << 20;
const MAX_STORE_BYTES: u64 = 256 << 20;

/// Where whole outputs are kept.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    made: Mutex<(u64, VecDeque<PathBuf>)>,
}

impl Store {
    /// In `RATOON_AGENT_DIR`, `/run/ratoon-agent-output`, or the place for temporary files.
    pub fn open() -> io::Result<Arc<Self>> {
        let places = match std::env::var_os("RATOON_AGENT_DIR") {
            Some(dir) => vec![PathBuf::from(dir)],
            None => vec![
                PathBuf::from("/run/ratoon-agent-output"),
                std::env::temp_dir().join(format!("ratoon-agent-{}", std::process::id())),
            ],
        };
        let mut last = io::Error::other("no place");
        for dir in places {
            let mut builder = fs::DirBuilder::new();
            match builder.recursive(true).mode(0o700).create(&dir) {
                Ok(()) => {
                    return Ok(Arc::new(Self {
                        dir,
                        made: Mutex::default(),
                    }));
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// In a folder of a test's.
    #[cfg(test)]
    pub fn in_folder(dir: &Path) -> Arc<Self> {
        Arc::new(Self {
            dir: dir.to_owned(),
            made: Mutex::default(),
        })
    }

    fn create(&self) -> io::Result<(PathBuf, File)> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let size = |path: &PathBuf| fs::metadata(path).map_or(0, |meta| meta.len());
        let mut all: u64 = made.1.iter().map(size).sum();
        while all > MAX_STORE_BYTES - MAX_FILE_BYTES
            && let Some(oldest) = made.1.pop_front()
        {
            all = all.saturating_sub(size(&oldest));
            // What somebody removed is gone already.
            let _ = fs::remove_file(&oldest);
        }
        made.0 += 1;
        let name = format!("output-{}-{}.txt", std::process::id(), made.0);
        let path = self.dir.join(name);
        let file = File::create(&path)?;
        made.1.push_back(path.clone());
        Ok((path, file))
    }
}

/// What is shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shown {
    /// The text.
    pub text: String,
    /// The file with all of it, when something is left out.
    pub file: Option<String>,
}

/// Output that is being taken.
#[derive(Debug)]
pub struct Capture {
    store: Arc<Store>,
    limit: usize,
    head: Vec<u8>,
    tail: VecDeque<u8>,
    total: u64,
    kept: Option<Kept>,
}

#[derive(Debug)]
struct Kept {
    path: PathBuf,
    file: Option<File>,
    bytes: u64,
}

impl Capture {
    /// Nothing yet; `limit` bytes will be shown.
    pub fn new(store: Arc<Store>, limit: usize) -> Self {
        Self {
            store,
            limit: limit.max(256),
            head: Vec::new(),
            tail: VecDeque::new(),
            total: 0,
            kept: None,
        }
    }

    /// Shows fewer bytes from now on.
    pub fn limit(&mut self, limit: usize) {
        self.limit = self.limit.min(limit.max(256));
    }

    /// Takes some more.
    pub fn push(&mut self, bytes: &[u8]) {
        self.total += bytes.len() as u64;
        let room = self.limit.saturating_sub(self.head.len());
        if self.kept.is_none() && bytes.len() > room {
            let mut kept = match self.store.create() {
                Ok((path, file)) => Kept {
                    path,
                    file: Some(file),
                    bytes: 0,
                },
                Err(_) => Kept {
                    path: PathBuf::new(),
                    file: None,
                    bytes: 0,
                },
            };
            kept.write(&self.head);
            self.kept = Some(kept);
        }
        if let Some(kept) = &mut self.kept {
            kept.write(bytes);
        }
        self.head.extend_from_slice(&bytes[..bytes.len().min(room)]);
        let half = self.limit / 2;
        self.tail.extend(&bytes[bytes.len().saturating_sub(half)..]);
        let over = self.tail.len().saturating_sub(half);
        self.tail.drain(..over);
    }

    /// What is shown of it.
    pub fn finish(self) -> Shown {
        let half = self.limit / 2;
        if self.total <= self.limit as u64 {
            return Shown {
                text: readable(&self.head),
                file: None,
            };
        }
        let mut head = &self.head[..half.min(self.head.len())];
        let mut tail: &[u8] = &self.tail.into_iter().collect::<Vec<u8>>();
        // Letters stay whole.
        while let Some((&last, rest)) = head.split_last()
            && std::str::from_utf8(head).is_err_and(|error| error.error_len().is_none())
            && last >= 0x80
        {
            head = rest;
        }
        while let Some((&first, rest)) = tail.split_first()
            && (0x80..0xc0).contains(&first)
        {
            tail = rest;
        }
        let left_out = self.total - (head.len() + tail.len()) as u64;
        let file = self.kept.and_then(Kept::told);
        let place = match &file {
            Some((path, true)) => format!("; all of it is in {path}"),
            Some((path, false)) => format!("; its beginning is in {path}"),
            None => String::new(),
        };
        Shown {
            text: format!(
                "{}\n[... {left_out} bytes of {} are left out{place} ...]\n{}",
                readable(head),
                self.total,
                readable(tail)
            ),
            file: file.map(|(path, _)| path),
        }
    }
}

impl Kept {
    fn write(&mut self, bytes: &[u8]) {
        let room = usize::try_from(MAX_FILE_BYTES.saturating_sub(self.bytes)).unwrap_or(0);
        let part = &bytes[..bytes.len().min(room)];
        let Some(file) = &mut self.file else { return };
        // A full disk ends the file; what is shown does not suffer.
        if file.write_all(part).is_err() || part.len() < bytes.len() {
            self.file = None;
        }
        self.bytes += part.len() as u64;
    }

    /// Its path, and whether it has all.
    fn told(self) -> Option<(String, bool)> {
        let whole = self.file.is_some();
        (self.path != Path::new("")).then(|| (self.path.display().to_string(), whole))
    }
}

/// Bytes as text that a request may have.
pub fn readable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).replace('\0', "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Arc<Store>) {
        let dir = tempfile::tempdir().expect("a folder");
        let store = Store::in_folder(dir.path());
        (dir, store)
    }

    fn shown(bytes: &[u8], piece: usize, limit: usize) -> (Shown, tempfile::TempDir) {
        let (dir, store) = store();
        let mut capture = Capture::new(store, limit);
        bytes.chunks(piece).for_each(|piece| capture.push(piece));
        (capture.finish(), dir)
    }

    #[test]
    fn what_fits_is_shown_whole_and_has_no_file() {
        let text = "x".repeat(300);
        let (shown, dir) = shown(text.as_bytes(), 7, 300);
        assert_eq!(shown.text, text);
        assert_eq!(shown.file, None);
        assert_eq!(fs::read_dir(dir.path()).expect("a folder").count(), 0);
    }

    #[test]
    fn head_and_tail_are_shown_and_the_file_has_all() {
        let text: String = (0..10_000).map(|n| format!("{n}\n")).collect();
        for piece in [1, 13, 255, 256, 257, 5000, text.len()] {
            let (shown, _dir) = shown(text.as_bytes(), piece, 512);
            assert!(shown.text.starts_with("0\n1\n"), "{}", shown.text);
            assert!(shown.text.ends_with("9998\n9999\n"), "{}", shown.text);
            let left_out = format!("{} bytes of {}", text.len() - 512, text.len());
            assert!(shown.text.contains(&left_out), "{}", shown.text);
            let file = shown.file.expect("a file");
            assert!(shown.text.contains(&file));
            assert_eq!(fs::read_to_string(file).expect("a file"), text);
        }
    }

    #[test]
    fn one_byte_too_many_leaves_one_byte_out() {
        let (shown, _dir) = shown(&[b'a'; 257], 100, 256);
        assert!(shown.text.contains("[... 1 bytes of 257"), "{}", shown.text);
    }

    #[test]
    fn letters_are_not_split() {
        let text = "ü".repeat(1000);
        for limit in 256..262 {
            let (shown, _dir) = shown(text.as_bytes(), 3, limit);
            assert!(!shown.text.contains('\u{fffd}'), "{}", shown.text);
        }
        assert_eq!(readable(b"a\0\xff"), "a\u{fffd}\u{fffd}");
    }
}
