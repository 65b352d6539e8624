//! A generation on its way from a VMM to this process.
//!
//! ```text
//!   begin: the VMM is asked, connects, prepares -- go: it freezes, sends files -> Generation
//!                                               `- dropped: it gives up
//! ```
//!
//! It is asked before its guest is at rest, so that only what needs the pause comes after. It fails when the
//! VMM refuses, ends, or sends what is no generation.

use std::fs::File;
use std::io::{ErrorKind, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ratoon_vmm_api::{BirthRequest, FreezeReply, FreezeRequest, FrozenDisk, FrozenMeta, Run};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::control::{Control, ControlError};
use super::freeze::{FreezeError, transfer};
use super::process::timespec;
use super::record::VmDir;
use crate::lineage::ROOT;

/// How long the VMM may take: it copies what was written to memory since the last freeze.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(300);
/// How often the wait for the generation looks whether the VMM has refused.
const LOOK: Duration = Duration::from_millis(20);
/// The longest description that is taken, in bytes.
const MAX_META_LEN: u64 = 64 << 20;

/// A frozen VM: immutable files, and its state.
#[derive(Debug)]
pub struct Generation {
    /// The VMM's blob, which nobody writes again.
    pub state: File,
    /// The memory's layers, the lowest first.
    pub layers: Vec<MemoryLayer>,
    /// Its disks' layers, immutable but for the topmost, in which the VM goes on.
    pub disks: Vec<FrozenDisk>,
    /// How long no vCPU ran.
    pub pause: Duration,
    /// When its guest slept and the pause began, nearly: the VMM's own time since it was told to go.
    pub at_rest: Instant,
    /// The host's vsock port of the connection to the runtime that goes on in children, if it was named.
    pub control_port: Option<u32>,
}

/// One layer of frozen memory.
#[derive(Debug)]
pub struct MemoryLayer {
    /// The file.
    pub file: File,
    /// Which parts of memory it has.
    pub runs: Vec<Run>,
    /// They are end to end in the file, not where they are in memory.
    pub packed: bool,
    /// How many freezes it stands for: layers of many are merged.
    pub freezes: u32,
}

impl Generation {
    /// The VMM's blob as text.
    ///
    /// # Errors
    /// When it cannot be read, or is none.
    pub fn state(&self) -> std::io::Result<String> {
        let bytes = contents(&self.state)?;
        String::from_utf8(bytes).map_err(std::io::Error::other)
    }

    /// The frozen layers of a disk, the lowest first.
    pub fn frozen(&self, disk: &str) -> &[PathBuf] {
        let disk = self.disks.iter().find(|it| it.id == disk);
        disk.map_or(&[], |disk| &disk.frozen)
    }

    /// How many layers of freezes each of [`Self::frozen`] stands for.
    pub fn freezes(&self, disk: &str) -> Vec<u32> {
        let disk = self.disks.iter().find(|it| it.id == disk);
        disk.map_or_else(Vec::new, |disk| disk.freezes().collect())
    }

    /// How many freezes its memory and this disk of it stand for: what is merged counts as what it was.
    pub fn depth(&self, disk: &str) -> (usize, usize) {
        let memory = self.layers.iter().map(|layer| layer.freezes as usize);
        let disk = self.freezes(disk).into_iter().map(|it| it as usize);
        (memory.sum(), disk.sum())
    }
}

/// Freezes the machine in `dir` as it is, without a word to its runtime: a child of it would not
/// wait for its wake. `control_port`: see [`FreezeRequest`].
///
/// # Errors
/// [`FreezeError`]; the VM goes on.
pub fn take(dir: &VmDir, control_port: Option<u32>) -> Result<Generation, FreezeError> {
    Taking::begin(dir, control_port)?.go()
}

/// The generation of this name that the machine in `dir` was started from, if that came to it in memory.
///
/// # Errors
/// [`FreezeError`]: it has none, or was started from another.
pub(crate) fn birth(
    dir: &VmDir,
    id: &str,
    control_port: Option<u32>,
) -> Result<Generation, FreezeError> {
    let id = id.to_owned();
    let birth = Taking::asking(dir, control_port, |control, socket| {
        control.birth(&BirthRequest { socket, id })
    });
    birth?.go()
}

/// A VMM that prepares a freeze. Dropped, it gives that up.
#[derive(Debug)]
pub(super) struct Taking {
    socket: PathBuf,
    listener: UnixListener,
    control_port: Option<u32>,
    asked: Option<JoinHandle<Result<FreezeReply, ControlError>>>,
}

impl Drop for Taking {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl Taking {
    /// Asks the VMM of the VM in `dir`.
    ///
    /// # Errors
    /// [`FreezeError::Transfer`]: no socket.
    pub(super) fn begin(dir: &VmDir, control_port: Option<u32>) -> Result<Self, FreezeError> {
        let next_layers = [(ROOT.to_owned(), dir.next_layer())].into();
        Self::asking(dir, control_port, move |control, socket| {
            control.freeze(&FreezeRequest {
                socket,
                next_layers,
                control_port,
            })
        })
    }

    fn asking(
        dir: &VmDir,
        control_port: Option<u32>,
        ask: impl FnOnce(&Control, PathBuf) -> Result<FreezeReply, ControlError> + Send + 'static,
    ) -> Result<Self, FreezeError> {
        let socket = dir.freeze_socket();
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).map_err(transfer("a socket for it"))?;
        listener
            .set_nonblocking(true)
            .map_err(transfer("a socket for it"))?;
        let answer_at = socket.clone();
        let control = Control::new(dir.control_socket(), FREEZE_TIMEOUT);
        let asked = std::thread::Builder::new()
            .name("freeze".into())
            .spawn(move || ask(&control, answer_at))
            .map_err(transfer("a thread for it"))?;
        Ok(Self {
            socket,
            listener,
            control_port,
            asked: Some(asked),
        })
    }

    /// Freezes the machine as it is now.
    ///
    /// # Errors
    /// [`FreezeError`]; the VM goes on.
    pub(super) fn go(mut self) -> Result<Generation, FreezeError> {
        let begun = Instant::now();
        let received = match self.stream() {
            Some(stream) => receive(stream),
            None => Err(ErrorKind::UnexpectedEof.into()),
        };
        let (meta, state, files) = match received {
            Ok(received) => received,
            // The VMM's own words say more.
            Err(source) => {
                self.asked()?;
                return Err(transfer("its files")(source));
            }
        };
        if meta.layers.len() != files.len() {
            let mismatch = std::io::Error::other("not as many files as layers");
            return Err(transfer("its files")(mismatch));
        }
        let layers = files.into_iter().zip(meta.layers);
        Ok(Generation {
            state,
            layers: layers
                .map(|(file, layer)| MemoryLayer {
                    file,
                    runs: layer.runs,
                    packed: layer.packed,
                    freezes: layer.freezes,
                })
                .collect(),
            disks: meta.disks,
            pause: Duration::from_nanos(meta.pause_ns),
            at_rest: begun + Duration::from_nanos(meta.waited_ns),
            control_port: self.control_port,
        })
    }

    /// The VMM's connection; `None`: it has refused.
    fn stream(&self) -> Option<UnixStream> {
        loop {
            let over = self.asked.as_ref().is_none_or(JoinHandle::is_finished);
            if let Ok((stream, _)) = self.listener.accept() {
                return Some(stream);
            }
            if over {
                return None;
            }
            let mut fds = [PollFd::new(&self.listener, PollFlags::IN)];
            let _ = poll(&mut fds, Some(&timespec(LOOK)));
        }
    }

    /// What the VMM answered.
    fn asked(&mut self) -> Result<(), FreezeError> {
        match self.asked.take().map(JoinHandle::join) {
            Some(Ok(reply)) => Ok(reply.map(drop)?),
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(()),
        }
    }
}

/// Says the word, and takes what comes.
fn receive(mut stream: UnixStream) -> std::io::Result<(FrozenMeta, File, Vec<File>)> {
    stream.write_all(b"g")?;
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let mut fds = [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::IN)];
    poll(&mut fds, Some(&timespec(FREEZE_TIMEOUT)))?;
    recvmsg(
        &stream,
        &mut [IoSliceMut::new(&mut byte)],
        &mut ancillary,
        flags,
    )?;
    let mut files = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .map(|fd: OwnedFd| File::from(fd));
    let (Some(meta), Some(state)) = (files.next(), files.next()) else {
        return Err(ErrorKind::UnexpectedEof.into());
    };
    let files = files.collect();
    Ok((serde_json::from_slice(&contents(&meta)?)?, state, files))
}

/// All of it, by its offsets: others have the same descriptor.
fn contents(file: &File) -> std::io::Result<Vec<u8>> {
    let len = file.metadata()?.len();
    if len > MAX_META_LEN {
        return Err(ErrorKind::FileTooLarge.into());
    }
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}
