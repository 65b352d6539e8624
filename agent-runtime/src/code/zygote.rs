//! A Python process that has started already and forks a context for each request.
//!
//! The context's ends of its pipes and of its control socket go with the request (SCM_RIGHTS). A
//! dead context stays a zombie until we say `reap`: nobody else gets its process id while we may
//! still signal it.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use ratoon_protocol::{CodeStart, ErrorReply, ExecParams};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::groups::Group;
use crate::spawn::{CHILD, Spawner, read_now};
use crate::swap::forms::{Fd, carried};

use super::context::{refusal, socket_pair};
use super::wire::{Step, Wire};

const DRIVER: &str = include_str!("python.py");

/// How much of what a zygote printed is told when it does not start.
const COMPLAINT: usize = 2048;

/// One zygote.
#[derive(Debug)]
pub struct Zygote {
    /// Its process id.
    pub pid: i32,
    /// Its control group; its contexts are in it, too.
    pub group: Option<Group>,
    user: Option<String>,
    env: Vec<(String, String)>,
    control: Fd,
    complaints: Option<Fd>,
    pub(super) wire: Wire,
}

carried!(Zygote {
    pid,
    group,
    user,
    env,
    control,
    complaints,
    wire
});

/// What concerns the interpreter itself: contexts that differ in it do not share a zygote.
fn env_of(params: &CodeStart) -> Vec<(String, String)> {
    let matters = |name: &str| {
        name == "PATH"
            || name == "VIRTUAL_ENV"
            || name.starts_with("PYTHON")
            || name.starts_with("LD_")
    };
    let all = params.env.iter();
    all.filter(|(name, _)| matters(name)).cloned().collect()
}

impl Zygote {
    /// Starts one for contexts like this.
    ///
    /// # Errors
    /// There is no Python, no such user, no room.
    pub fn start(params: &CodeStart, spawner: &mut Spawner) -> Result<Self, ErrorReply> {
        let (control, theirs) = socket_pair()?;
        let env = env_of(params);
        let exec = ExecParams {
            argv: ["python3", "-c", DRIVER].map(str::to_owned).into(),
            env: env.clone(),
            user: params.user.clone(),
            ..ExecParams::default()
        };
        let child = spawner
            .spawn_with(&exec, Some(theirs))
            .map_err(|error| refusal("python3", &error))?;
        let [_, complaints] = child.outputs;
        Ok(Self {
            pid: child.pid,
            group: child.group,
            user: params.user.clone(),
            env,
            control: control.into(),
            complaints: complaints.map(Fd::from),
            wire: Wire::default(),
        })
    }

    /// Whether its contexts are like this.
    pub fn fits(&self, params: &CodeStart) -> bool {
        self.user == params.user && self.env == env_of(params)
    }

    /// Its control socket.
    pub fn fd(&self) -> RawFd {
        self.control.as_raw_fd()
    }

    /// Asks for a context with these as its control socket, standard output and error. `child`: which
    /// child of a fork this machine is, which its own environment may not say yet.
    ///
    /// # Errors
    /// It is gone, or far behind.
    pub fn fork(
        &self,
        params: &CodeStart,
        child: Option<&str>,
        fds: &[OwnedFd; 3],
    ) -> rustix::io::Result<()> {
        let mut request = serde_json::Map::new();
        if let Some(cwd) = &params.cwd {
            request.insert("cwd".into(), cwd.as_str().into());
        }
        let child = child.map(|index| (CHILD.to_owned(), index.into()));
        let env = params.env.iter();
        let env = env.map(|(name, value)| (name.clone(), value.as_str().into()));
        let env = child.into_iter().chain(env);
        request.insert("env".into(), serde_json::Value::Object(env.collect()));
        let mut line = serde_json::Value::Object(request).to_string();
        line.push('\n');
        let borrowed = [fds[0].as_fd(), fds[1].as_fd(), fds[2].as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&borrowed));
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let len = sendmsg(
            &self.control,
            &[IoSlice::new(line.as_bytes())],
            &mut ancillary,
            flags,
        )?;
        match len == line.len() {
            true => Ok(()),
            // The rest would have to follow; it is that far behind only when it hangs.
            false => Err(Errno::NOBUFS),
        }
    }

    /// Lets go of a dead context; [`Zygote::hear`] will tell how it ended.
    pub fn reap(&self, pid: i32) -> rustix::io::Result<()> {
        let line = format!("{{\"reap\":{pid}}}\n");
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        rustix::net::send(&self.control, line.as_bytes(), flags).map(|_| ())
    }

    /// Reads what it says: contexts that ended, with their wait status. False: it is gone.
    pub fn hear(&mut self, scratch: &mut [u8], mut reaped: impl FnMut(i32, i32)) -> bool {
        match rustix::net::recv(&self.control, &mut *scratch, RecvFlags::DONTWAIT) {
            Ok((len, _)) if len > 0 => self.wire.feed(&scratch[..len]),
            Err(Errno::AGAIN | Errno::INTR) => return true,
            _ => return false,
        }
        loop {
            match self.wire.next(|_| usize::MAX) {
                Ok(Step::Reaped(pid, status)) => reaped(pid, status),
                Ok(Step::More) => return true,
                _ => return false,
            }
        }
    }

    /// The end of what it has printed on standard error.
    pub fn complaint(&self) -> String {
        self.complaints.as_ref().map_or(String::new(), complaint)
    }
}

/// The end of what is in a pipe.
pub fn complaint(pipe: &Fd) -> String {
    let mut bytes = vec![0; 64 << 10];
    let len = read_now(pipe.as_fd(), &mut bytes).unwrap_or(0);
    let text = String::from_utf8_lossy(&bytes[len.saturating_sub(COMPLAINT)..len]);
    text.trim().to_owned()
}
