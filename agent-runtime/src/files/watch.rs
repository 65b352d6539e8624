//! Tells what changes in a file or directory (inotify).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use ratoon_protocol::{
    ChangeKind, ErrorReply, Event, FileChange, FileKind, FileWatch, Transferred,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::fs::{AtFlags, Mode, OFlags, openat, statat};
use rustix::io::Errno;
use serde_json::json;

use super::tree::names;
use super::{DIRECTORY, failed, kind, open};
use crate::work::Work;

/// How many directories one call watches.
const MAX_WATCHES: usize = 8192;

/// `file.watch`.
pub fn watch(params: FileWatch) -> Work {
    Box::new(move |streams| {
        const WHAT: &str = "watch";
        let path = params.path.as_str();
        let file = open(path, params.root.as_deref(), OFlags::PATH, WHAT)?;
        let stat = rustix::fs::fstat(&file).map_err(|error| failed(WHAT, path, error))?;
        let Some(output) = streams.output else {
            return Ok(json!(Transferred::default()));
        };
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
            .map_err(|error| failed(WHAT, path, error))?;
        let mut watcher = Watcher {
            inotify,
            output,
            recursive: params.recursive,
            watched: BTreeMap::new(),
            bytes: 0,
            entries: 0,
        };
        let shown = path.trim_end_matches('/').to_owned();
        watcher
            .add(&file, &shown)
            .map_err(|error| failed(WHAT, path, error))?;
        if params.recursive && kind(&stat) == FileKind::Directory {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            let dir = open(path, params.root.as_deref(), flags, WHAT)?;
            watcher
                .below(&dir, &shown, false)
                .map_err(|error| failed(WHAT, path, error))?;
        }
        streams.tell.event(Event::Watching);
        watcher.run(path)?;
        Ok(json!(Transferred {
            bytes: watcher.bytes,
            entries: watcher.entries,
        }))
    })
}

struct Watcher {
    inotify: OwnedFd,
    output: File,
    recursive: bool,
    /// Watch descriptors and the paths that they mean.
    watched: BTreeMap<i32, String>,
    bytes: u64,
    entries: u64,
}

/// The client takes no more.
struct Gone;

impl Watcher {
    /// Watches what is open as `file`.
    fn add(&mut self, file: &OwnedFd, path: &str) -> rustix::io::Result<()> {
        if self.watched.len() >= MAX_WATCHES {
            return Err(Errno::NOSPC);
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
        let number = inotify::add_watch(&self.inotify, by_descriptor, flags)?;
        self.watched.insert(number, path.to_owned());
        Ok(())
    }

    /// Watches all directories below one; `tell`: what is in them is new.
    fn below(&mut self, dir: &OwnedFd, path: &str, tell: bool) -> rustix::io::Result<()> {
        for name in names(dir.as_fd())? {
            let Ok(stat) = statat(dir, &*name, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            let below = format!("{path}/{}", name.to_string_lossy());
            let is_directory = kind(&stat) == FileKind::Directory;
            if tell
                && self
                    .tell(ChangeKind::Created, below.clone(), is_directory)
                    .is_err()
            {
                return Ok(());
            }
            if is_directory && let Ok(next) = openat(dir, &*name, DIRECTORY, Mode::empty()) {
                self.add(&next, &below)?;
                self.below(&next, &below, tell)?;
            }
        }
        Ok(())
    }

    fn tell(&mut self, change: ChangeKind, path: String, directory: bool) -> Result<(), Gone> {
        let change = FileChange {
            change,
            path,
            directory,
        };
        let mut line = serde_json::to_vec(&change).unwrap_or_default();
        line.push(b'\n');
        self.bytes += line.len() as u64;
        self.entries += 1;
        self.output.write_all(&line).map_err(|_| Gone)
    }

    /// Tells changes until the client takes no more, or what is watched is gone.
    fn run(&mut self, path: &str) -> Result<(), ErrorReply> {
        let mut buffer = [MaybeUninit::uninit(); 16 << 10];
        while !self.watched.is_empty() {
            let mut fds = [
                PollFd::new(&self.inotify, PollFlags::IN),
                PollFd::new(&self.output, PollFlags::empty()),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(failed("watch", path, error)),
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
                        event
                            .file_name()
                            .map(|name| name.to_string_lossy().into_owned()),
                    )),
                    Err(Errno::AGAIN | Errno::INTR) => break,
                    Err(error) => return Err(failed("watch", path, error)),
                }
                if reader.is_buffer_empty() {
                    break;
                }
            }
            for (number, events, name) in seen {
                if self.event(number, events, name.as_deref()).is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn event(&mut self, number: i32, events: ReadFlags, name: Option<&str>) -> Result<(), Gone> {
        if events.contains(ReadFlags::QUEUE_OVERFLOW) {
            return self.tell(ChangeKind::Overflow, String::new(), false);
        }
        let Some(dir) = self.watched.get(&number).cloned() else {
            return Ok(());
        };
        if events.contains(ReadFlags::IGNORED) {
            self.watched.remove(&number);
            return Ok(());
        }
        let directory = events.contains(ReadFlags::ISDIR);
        let path = match name {
            Some(name) => format!("{dir}/{name}"),
            None => dir.clone(),
        };
        let own = events.intersects(ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF);
        if own {
            // A directory below: the one above has told of it.
            if self
                .watched
                .values()
                .any(|other| dir.starts_with(&format!("{other}/")))
            {
                return Ok(());
            }
            return self.tell(ChangeKind::Removed, path, directory);
        }
        let change = if events.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
            ChangeKind::Created
        } else if events.intersects(ReadFlags::DELETE | ReadFlags::MOVED_FROM) {
            ChangeKind::Removed
        } else if events.contains(ReadFlags::MODIFY) {
            ChangeKind::Written
        } else {
            ChangeKind::Attributes
        };
        self.tell(change, path.clone(), directory)?;
        if directory && self.recursive && change == ChangeKind::Created {
            // What came before the watch did is told as new; some may be told twice.
            if let Ok(next) = rustix::fs::open(path.as_str(), DIRECTORY, Mode::empty())
                && self.add(&next, &path).is_ok()
            {
                let _ = self.below(&next, &path, true);
            }
        }
        Ok(())
    }
}
