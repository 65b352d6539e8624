//! Tells what changes in a file or directory (inotify).
//!
//! ```text
//!   begin --> tell of changes --> the top is removed, moved or unmounted; or the client is gone
//!     ^            |
//!     '- overflow -'     new watches on all there is, then the client is told to look again
//! ```
//!
//! No descriptor of what is watched is kept: the kernel says that a file is gone when nobody has it.
//! New directories are found again by name, as other calls find theirs, and no link leads out.
//!
//! How it fails: with too many directories, or too deep ones, the call ends with an error: it would
//! miss what happens there.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use ratoon_protocol::{
    ChangeKind, ErrorCode, ErrorReply, Event, FileChange, FileKind, FileWatch, Transferred,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, fstat, openat, openat2, statat};
use rustix::io::Errno;
use serde_json::json;

use super::tree::names;
use super::{DIRECTORY, MAX_DEPTH, bad_request, failed, kind, open, too_deep};
use crate::work::Work;

/// How many directories one call watches.
const MAX_WATCHES: usize = 8192;

const WHAT: &str = "watch";

/// `file.watch`.
pub fn watch(params: FileWatch) -> Work {
    Box::new(move |streams| {
        let Some(output) = streams.output else {
            return Ok(json!(Transferred::default()));
        };
        let mut watcher = Watcher {
            inotify: new_inotify(&params.path)?,
            shown: params.path.trim_end_matches('/').to_owned(),
            params,
            output,
            top: -1,
            top_is_directory: false,
            watched: BTreeMap::new(),
            bytes: 0,
            entries: 0,
        };
        watcher.begin()?;
        streams.tell.event(Event::Watching);
        match watcher.run() {
            Ok(()) | Err(End::Gone) => Ok(json!(Transferred {
                bytes: watcher.bytes,
                entries: watcher.entries,
            })),
            Err(End::Failed(error)) => Err(error),
        }
    })
}

fn new_inotify(path: &str) -> Result<OwnedFd, ErrorReply> {
    inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
        .map_err(|error| failed(WHAT, path, error))
}

struct Watcher {
    params: FileWatch,
    /// The top's path as it is told.
    shown: String,
    inotify: OwnedFd,
    output: File,
    /// Watch descriptor of the top.
    top: i32,
    top_is_directory: bool,
    /// Watch descriptors and the paths that they mean, below the top.
    watched: BTreeMap<i32, PathBuf>,
    bytes: u64,
    entries: u64,
}

/// Why nothing more is told.
enum End {
    /// What is watched is gone, or the client takes no more.
    Gone,
    /// The call ends with this error.
    Failed(ErrorReply),
}

impl From<ErrorReply> for End {
    fn from(error: ErrorReply) -> Self {
        Self::Failed(error)
    }
}

impl Watcher {
    /// Watches what there is now.
    fn begin(&mut self) -> Result<(), ErrorReply> {
        let (path, root) = (self.params.path.as_str(), self.params.root.as_deref());
        let refused = |error| failed(WHAT, path, error);
        let file = open(path, root, OFlags::PATH, WHAT)?;
        let stat = fstat(&file).map_err(refused)?;
        self.top_is_directory = kind(&stat) == FileKind::Directory;
        let dir = match self.params.recursive && self.top_is_directory {
            true => Some(openat(&file, c".", DIRECTORY, Mode::empty()).map_err(refused)?),
            false => None,
        };
        self.watched.clear();
        self.top = self.add(&file, Path::new(""))?;
        match dir {
            // Nothing is told, and so nobody can be gone.
            Some(dir) => match self.below(&dir, Path::new(""), 1, false) {
                Err(End::Failed(error)) => Err(error),
                Ok(()) | Err(End::Gone) => Ok(()),
            },
            None => Ok(()),
        }
    }

    /// A path below the top, as it is told.
    fn shown(&self, below: &Path) -> String {
        match below.as_os_str().is_empty() {
            true => self.params.path.clone(),
            false => format!("{}/{}", self.shown, below.to_string_lossy()),
        }
    }

    /// Watches what is open as `file`.
    fn add(&mut self, file: &OwnedFd, below: &Path) -> Result<i32, ErrorReply> {
        let shown = self.shown(below);
        if self.watched.len() >= MAX_WATCHES {
            return Err(bad_request(format!(
                "cannot {WHAT} {}: there are more than {MAX_WATCHES} directories",
                shown.escape_debug()
            )));
        }
        let flags = WatchFlags::CREATE
            | WatchFlags::MOVED_TO
            | WatchFlags::MOVED_FROM
            | WatchFlags::DELETE
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::MODIFY
            | WatchFlags::ATTRIB;
        // By descriptor: what was looked up is what is watched.
        let by_descriptor = format!("/proc/self/fd/{}", file.as_raw_fd());
        let number = inotify::add_watch(&self.inotify, by_descriptor, flags)
            .map_err(|error| failed(WHAT, &shown, error))?;
        // Another name of the top (a mount): the top keeps its own.
        if number != self.top || below.as_os_str().is_empty() {
            self.watched.insert(number, below.to_owned());
        }
        Ok(number)
    }

    /// Watches all directories below one, which is `depth` deep; `tell`: what is in them is new.
    fn below(&mut self, dir: &OwnedFd, path: &Path, depth: usize, tell: bool) -> Result<(), End> {
        if depth > MAX_DEPTH + 1 {
            return Err(too_deep(WHAT, &self.shown(path)).into());
        }
        let names = names(dir.as_fd()).map_err(|error| failed(WHAT, &self.shown(path), error))?;
        for name in names {
            let Ok(stat) = statat(dir, &*name, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            let below = path.join(OsStr::from_bytes(name.to_bytes()));
            let is_directory = kind(&stat) == FileKind::Directory;
            if tell {
                self.tell(ChangeKind::Created, self.shown(&below), is_directory)?;
            }
            if is_directory && let Ok(next) = openat(dir, &*name, DIRECTORY, Mode::empty()) {
                self.add(&next, &below)?;
                self.below(&next, &below, depth + 1, tell)?;
            }
        }
        Ok(())
    }

    /// Opens a directory below the top; no link leads there. `None`: it is gone again.
    fn find(&self, below: &Path) -> Result<Option<OwnedFd>, ErrorReply> {
        let (path, root) = (self.params.path.as_str(), self.params.root.as_deref());
        let top = match open(path, root, OFlags::PATH | OFlags::DIRECTORY, WHAT) {
            Err(error) if error.code == ErrorCode::NotFound => return Ok(None),
            top => top?,
        };
        let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        match openat2(top, below, DIRECTORY, Mode::empty(), within) {
            Ok(found) => Ok(Some(found)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(error) => Err(failed(WHAT, &self.shown(below), error)),
        }
    }

    fn tell(&mut self, change: ChangeKind, path: String, directory: bool) -> Result<(), End> {
        let change = FileChange {
            change,
            path,
            directory,
        };
        let mut line = serde_json::to_vec(&change).unwrap_or_default();
        line.push(b'\n');
        self.bytes += line.len() as u64;
        self.entries += 1;
        self.output.write_all(&line).map_err(|_| End::Gone)
    }

    /// Tells changes until there is an end of it.
    fn run(&mut self) -> Result<(), End> {
        let mut buffer = [MaybeUninit::uninit(); 16 << 10];
        loop {
            let mut fds = [
                PollFd::new(&self.inotify, PollFlags::IN),
                PollFd::new(&self.output, PollFlags::empty()),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(failed(WHAT, &self.params.path, error).into()),
            }
            if fds[1].revents().contains(PollFlags::ERR) {
                return Ok(());
            }
            let mut seen = Vec::new();
            let mut reader = Reader::new(&self.inotify, &mut buffer);
            loop {
                match reader.next() {
                    Ok(event) => seen.push((
                        event.wd(),
                        event.events(),
                        event.file_name().map(CString::from),
                    )),
                    Err(Errno::AGAIN | Errno::INTR) => break,
                    Err(error) => return Err(failed(WHAT, &self.params.path, error).into()),
                }
                if reader.is_buffer_empty() {
                    break;
                }
            }
            for (number, events, name) in seen {
                if events.contains(ReadFlags::QUEUE_OVERFLOW) {
                    // What else was seen is of the old watches.
                    self.begin_again()?;
                    break;
                }
                self.event(number, events, name.as_deref())?;
            }
        }
    }

    /// Changes were lost, and with them new directories, or even the end of the top.
    fn begin_again(&mut self) -> Result<(), End> {
        self.inotify = new_inotify(&self.params.path)?;
        match self.begin() {
            Err(error) if error.code == ErrorCode::NotFound => return self.top_is_gone(),
            begun => begun?,
        }
        self.tell(ChangeKind::Overflow, String::new(), false)
    }

    fn event(&mut self, number: i32, events: ReadFlags, name: Option<&CStr>) -> Result<(), End> {
        let Some(dir) = self.watched.get(&number) else {
            return Ok(());
        };
        let directory = events.contains(ReadFlags::ISDIR);
        if events.intersects(
            ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::IGNORED | ReadFlags::UNMOUNT,
        ) {
            if number == self.top {
                return self.top_is_gone();
            }
            // A directory below: the one above has told of it.
            if events.contains(ReadFlags::IGNORED) {
                self.watched.remove(&number);
            }
            return Ok(());
        }
        let below = match name {
            Some(name) => dir.join(OsStr::from_bytes(name.to_bytes())),
            None => dir.clone(),
        };
        let change = if events.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
            ChangeKind::Created
        } else if events.intersects(ReadFlags::DELETE | ReadFlags::MOVED_FROM) {
            ChangeKind::Removed
        } else if events.contains(ReadFlags::MODIFY) {
            ChangeKind::Written
        } else {
            ChangeKind::Attributes
        };
        self.tell(change, self.shown(&below), directory)?;
        if directory && events.contains(ReadFlags::MOVED_FROM) {
            self.forget(&below);
        }
        if directory && self.params.recursive && change == ChangeKind::Created {
            // What came before the watch did is told as new; some may be told twice.
            if let Some(next) = self.find(&below)? {
                self.add(&next, &below)?;
                self.below(&next, &below, below.components().count() + 1, true)?;
            }
        }
        Ok(())
    }

    fn top_is_gone(&mut self) -> Result<(), End> {
        let path = self.params.path.clone();
        self.tell(ChangeKind::Removed, path, self.top_is_directory)?;
        Err(End::Gone)
    }

    /// A directory went elsewhere: what happens there is nobody's business here. When it stays in the
    /// tree, the event that says so comes behind, and watches it again.
    fn forget(&mut self, moved: &Path) {
        let inotify = &self.inotify;
        self.watched.retain(|number, path| {
            let stays = !path.starts_with(moved);
            if !stays {
                let _ = inotify::remove_watch(inotify, *number);
            }
            stays
        });
    }
}
