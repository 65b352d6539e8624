//! Who this machine is: nobody in particular until `wake` says so.
//!
//! ```text
//!   --expect_wake--> waiting --wake--> awake        a wake that fails leaves it waiting
//! ```
//!
//! The steps of a wake: entropy, time, thaw of file systems (the next ones write to `/`), hostname,
//! machine-id, a child's TCP connections, network, files of `/run/ratoon`; the answer; interpreters get new
//! random numbers; processes go on last, here with `thaw` in the parameters and else by a call of its own.
//! All parameters are checked before the first. What `expect_wake` could open ahead makes them cheap: see
//! `prepared.rs`. The token is gone from here and from its file when `expect_wake` answers, so that no
//! generation has one that is in use. How it fails: the message names the step; those before it are
//! done, and a second wake does them again.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use ratoon_protocol::{Awake, ErrorCode, ErrorReply, Wake};
use rustix::io::Errno;

use super::network::Plan;
use super::prepared::{Directory, Etc, Prepared};
use super::settings::{self, ETC};
use super::{bad_request, connections, failed, files, quiet, shown};
use crate::swap::forms::{carried, carried_by_serde};

/// Where programs read who the machine is.
const DIR: &str = "/run/ratoon";

/// Least bytes of entropy: with fewer a program could guess its sibling's random numbers.
const MIN_ENTROPY: usize = 16;

/// Longest generation and id, bytes.
const MAX_NAME: usize = 128;

/// Longest token and message, bytes.
const MAX_TEXT: usize = 16 * 1024;

/// TMPFS_MAGIC and RAMFS_MAGIC (linux/magic.h).
const IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// The files, in the order in which they are written, and whether they are there after any wake. The token is the
/// first, so that nobody finds another machine's secret beside this one's name.
pub(super) const FILES: [(&str, bool); 6] = [
    ("token", false),
    ("generation", true),
    ("id", true),
    ("index", true),
    ("message", false),
    ("wakes", true),
];

/// The state. See the module.
#[derive(Debug)]
pub struct Identity {
    waiting: bool,
    awake: Awake,
    /// Which child of a fork, if it is one.
    child: Option<u32>,
    token: Option<String>,
    /// `None` on somebody's host.
    dir: Option<PathBuf>,
    prepared: Option<Prepared>,
    /// What a wake has used: not to be used again, and closed when there is time.
    spent: Option<Prepared>,
}

carried_by_serde!(Awake);
carried!(Identity { waiting, awake, child, token, dir; prepared, spent });

impl Default for Identity {
    fn default() -> Self {
        let is_init = rustix::process::getpid().is_init();
        Self::new(is_init.then(|| DIR.into()))
    }
}

impl Identity {
    fn new(dir: Option<PathBuf>) -> Self {
        Self {
            waiting: false,
            awake: Awake::default(),
            child: None,
            token: None,
            dir,
            prepared: None,
            spent: None,
        }
    }

    /// From now on calls wait for [`Identity::wake`].
    ///
    /// # Errors
    /// The token's file cannot be removed: the machine goes on as it was.
    pub fn expect_wake(&mut self) -> Result<(), ErrorReply> {
        self.forget_token()?;
        self.waiting = true;
        self.spent = None;
        self.prepared = self.dir.as_deref().and_then(Prepared::open);
        Ok(())
    }

    /// Overwrites the token where we have it, so that it is in no generation.
    fn forget_token(&mut self) -> Result<(), ErrorReply> {
        let Some(token) = self.token.take() else {
            return Ok(());
        };
        let mut bytes = token.into_bytes();
        bytes.fill(0);
        // Or the compiler sees that nobody reads it.
        std::hint::black_box(&bytes);
        let Some(dir) = &self.dir else { return Ok(()) };
        let path = dir.join("token");
        // The file's memory is not cleared when it is given back.
        files::write_over(&path, &bytes)
            .and_then(|()| files::remove(&path))
            .map_err(|error| failed(path.display(), error))
    }

    /// Which child of a fork this machine is, if it is one.
    pub fn child(&self) -> Option<u32> {
        self.child
    }

    /// After a wake: the switch by which processes go on, if it was opened ahead.
    pub fn switch(&self) -> Option<BorrowedFd<'_>> {
        let switch = self.spent.as_ref()?.switch.as_ref()?;
        Some(switch.as_fd())
    }

    /// The wake has been answered: what is open on the disk is closed.
    pub fn put_away(&mut self) {
        if let Some(spent) = &mut self.spent {
            spent.etc = Etc::default();
        }
    }

    /// A wake came to nothing after all: calls wait on.
    pub fn wait_on(&mut self) {
        self.waiting = true;
    }

    /// Whether calls wait.
    pub fn is_waiting(&self) -> bool {
        self.waiting
    }

    /// Who this machine is.
    pub fn whoami(&self) -> Awake {
        self.awake.clone()
    }

    /// The machine's secret.
    pub fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// Becomes somebody else.
    ///
    /// # Errors
    /// The step's, with its name.
    pub fn wake(&mut self, wake: &Wake) -> Result<Awake, ErrorReply> {
        let step = |name: &'static str| {
            move |error: ErrorReply| {
                ErrorReply::new(error.code, format!("wake, `{name}`: {}", error.message))
            }
        };
        check_names(wake).map_err(step("identity"))?;
        let entropy = settings::entropy(&wake.entropy, MIN_ENTROPY).map_err(step("entropy"))?;
        let time = wake
            .time_us
            .map(settings::time)
            .transpose()
            .map_err(step("time"))?;
        let hostname = wake.hostname.as_deref();
        hostname
            .map_or(Ok(()), settings::check_hostname)
            .map_err(step("hostname"))?;
        let machine_id = wake.machine_id.as_deref().map(settings::machine_id);
        let machine_id = machine_id.transpose().map_err(step("machine-id"))?;
        let networks = wake.network.iter().chain(&wake.networks).map(Plan::new);
        let networks: Vec<Plan> = networks
            .collect::<Result<_, _>>()
            .map_err(step("network"))?;

        // What was opened ahead is as it was then only while nobody else has run.
        let mut ahead = self
            .prepared
            .take()
            .filter(|_| quiet::are_processes_frozen());
        match ahead.as_ref().and_then(Prepared::random) {
            Some(device) => settings::apply_entropy(device, &entropy),
            None => settings::open_random()
                .and_then(|device| settings::apply_entropy(device.as_fd(), &entropy)),
        }
        .map_err(step("entropy"))?;
        if let Some(time) = time {
            settings::correct_time(time).map_err(step("time"))?;
        }
        quiet::thaw_for_wake().map_err(step("thaw"))?;
        let mut none = Etc::default();
        let etc = ahead.as_mut().map_or(&mut none, |ahead| &mut ahead.etc);
        if let Some(hostname) = hostname {
            settings::apply_hostname(hostname, etc).map_err(step("hostname"))?;
        }
        if let Some(id) = machine_id {
            settings::apply_machine_id(&id, etc).map_err(step("machine-id"))?;
        }
        if wake.child && !networks.is_empty() {
            super::only_init("TCP connections").map_err(step("connections"))?;
            connections::reset().map_err(step("connections"))?;
        }
        for plan in networks {
            super::only_init("the network").map_err(step("network"))?;
            plan.apply(Path::new(ETC)).map_err(step("network"))?;
        }
        let (index, message) = match wake.child {
            true => (wake.index, wake.message.clone()),
            false => (wake.index.or(self.child), self.awake.message.clone()),
        };
        let awake = Awake {
            generation: wake.generation.clone(),
            id: wake.id.clone(),
            index: index.unwrap_or(0),
            wakes: self.awake.wakes.saturating_add(1),
            message,
        };
        if let Some(dir) = &self.dir {
            let directory = ahead.as_mut().and_then(|ahead| ahead.directory.as_mut());
            write_files(dir, directory, &awake, wake.token.as_deref()).map_err(step("files"))?;
        }
        self.awake = awake;
        self.child = index;
        self.token.clone_from(&wake.token);
        self.waiting = false;
        self.spent = ahead;
        Ok(self.whoami())
    }
}

fn check_names(wake: &Wake) -> Result<(), ErrorReply> {
    for (what, text) in [("generation", &wake.generation), ("id", &wake.id)] {
        let is_name = text.bytes().all(|byte| byte.is_ascii_graphic());
        if !is_name || !(1..=MAX_NAME).contains(&text.len()) {
            return Err(bad_request(format!(
                "{what} `{}` is not 1 to {MAX_NAME} printable characters without blanks",
                shown(text)
            )));
        }
    }
    for (what, text) in [("token", &wake.token), ("message", &wake.message)] {
        if text.as_ref().is_some_and(|text| text.len() > MAX_TEXT) {
            return Err(bad_request(format!(
                "{what} is longer than {MAX_TEXT} bytes"
            )));
        }
    }
    Ok(())
}

/// Makes the directory, which must be in memory.
pub(super) fn is_secret(dir: &Path) -> Result<(), ErrorReply> {
    let refused = |error| failed(dir.display(), error);
    match rustix::fs::mkdir(dir, rustix::fs::Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(refused(error)),
    }
    let kind = rustix::fs::statfs(dir).map_err(refused)?.f_type;
    if !IN_MEMORY.contains(&kind) {
        let message = format!(
            "{} is not in memory, and a token must not get to a disk",
            dir.display()
        );
        return Err(ErrorReply::new(ErrorCode::Unsupported, message));
    }
    Ok(())
}

/// `ahead`: the directory as `expect_wake` has opened it.
fn write_files(
    dir: &Path,
    mut ahead: Option<&mut Directory>,
    awake: &Awake,
    token: Option<&str>,
) -> Result<(), ErrorReply> {
    if ahead.is_none() {
        is_secret(dir)?;
    }
    let line = |text: &dyn std::fmt::Display| Some(format!("{text}\n"));
    for (name, _) in FILES {
        let text = match name {
            "token" => token.map(str::to_owned),
            "generation" => line(&awake.generation),
            "id" => line(&awake.id),
            "index" => line(&awake.index),
            "message" => awake.message.as_ref().and_then(|text| line(text)),
            _ => line(&awake.wakes),
        };
        let mode = if name == "token" { 0o400 } else { 0o644 };
        let path = dir.join(name);
        match (&mut ahead, text) {
            (Some(ahead), text) => ahead.put(name, text.as_deref(), mode),
            (None, Some(text)) => files::replace(&path, text.as_bytes(), mode),
            (None, None) => files::remove(&path),
        }
        .map_err(|error| failed(path.display(), error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use ratoon_protocol::NetworkSet;

    use super::*;

    type Spoil = fn(&mut Wake);

    fn wake() -> Wake {
        Wake {
            generation: "g1".into(),
            id: "vm-1".into(),
            child: true,
            index: Some(3),
            entropy: "5a".repeat(32),
            ..Wake::default()
        }
    }

    #[test]
    fn nothing_is_waited_for_unless_told() {
        let mut identity = Identity::new(None);
        assert!(!identity.is_waiting());
        identity.expect_wake().unwrap();
        assert!(identity.is_waiting());
        assert_eq!(identity.whoami(), Awake::default());
    }

    #[test]
    fn each_parameter_is_refused_by_its_step_and_the_runtime_waits_on() {
        let spoil: [(&str, Spoil); 9] = [
            ("identity", |wake| wake.generation.clear()),
            ("identity", |wake| wake.id = "a b".into()),
            ("identity", |wake| wake.id = "x".repeat(129)),
            ("identity", |wake| wake.token = Some("x".repeat(16_385))),
            ("entropy", |wake| wake.entropy = "5a".repeat(15)),
            ("time", |wake| wake.time_us = Some(1)),
            ("hostname", |wake| wake.hostname = Some("-".into())),
            ("machine-id", |wake| wake.machine_id = Some("1".into())),
            ("network", |wake| {
                wake.network = Some(NetworkSet {
                    mac: Some("01:00:00:00:00:01".into()),
                    ..NetworkSet::default()
                });
            }),
        ];
        for (step, spoil) in spoil {
            let mut identity = Identity::new(None);
            identity.expect_wake().unwrap();
            let mut wake = wake();
            spoil(&mut wake);
            let error = identity.wake(&wake).unwrap_err();
            assert_eq!(error.code, ErrorCode::BadRequest, "{error}");
            assert!(
                error.message.starts_with(&format!("wake, `{step}`: ")),
                "{error}"
            );
            assert!(identity.is_waiting());
            assert_eq!(identity.whoami(), Awake::default());
        }
    }

    #[test]
    fn programs_find_who_they_are_and_no_trace_of_who_they_were_as_root() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let dir = dir.path().join("ratoon");
        let mut identity = Identity::new(Some(dir.clone()));
        identity.expect_wake().unwrap();
        let first = Wake {
            token: Some("secret".into()),
            message: Some("hello".into()),
            ..wake()
        };
        assert_eq!(identity.wake(&first).unwrap().wakes, 1);
        assert!(!identity.is_waiting());
        assert_eq!(identity.token(), Some("secret"));
        let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
        assert_eq!(
            read("generation") + &read("id") + &read("index"),
            "g1\nvm-1\n3\n"
        );
        assert_eq!(
            (read("token"), read("message")),
            ("secret".into(), "hello\n".into())
        );
        let mode = |name: &str| fs::metadata(dir.join(name)).unwrap().mode() & 0o7777;
        assert_eq!((mode("token"), mode("id"), mode("")), (0o400, 0o644, 0o755));

        assert_eq!(identity.wake(&wake()).unwrap().wakes, 2);
        assert_eq!(identity.token(), None);
        assert_eq!(read("wakes"), "2\n");
        assert!(!dir.join("token").exists() && !dir.join("message").exists());
    }

    #[test]
    fn a_machine_that_goes_on_as_itself_is_the_child_that_it_was() {
        let mut identity = Identity::new(None);
        assert_eq!(identity.child(), None);
        let itself = Wake {
            child: false,
            index: None,
            ..wake()
        };
        identity.wake(&itself).unwrap();
        assert_eq!((identity.child(), identity.whoami().index), (None, 0));
        let child = Wake {
            message: Some("try the left".into()),
            ..wake()
        };
        identity.wake(&child).unwrap();
        let woken = identity.wake(&itself).unwrap();
        assert_eq!((identity.child(), woken.index), (Some(3), 3));
        assert_eq!(woken.message.as_deref(), Some("try the left"));
        let woken = identity.wake(&wake()).unwrap();
        assert_eq!(woken.message, None, "of another forker");
        let restored = Wake {
            index: None,
            ..wake()
        };
        identity.wake(&restored).unwrap();
        assert_eq!(identity.child(), None, "no child of a fork");
    }

    #[test]
    fn whoever_is_frozen_has_no_token_as_root() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let dir = dir.path().join("ratoon");
        let mut identity = Identity::new(Some(dir.clone()));
        let first = Wake {
            token: Some("secret".into()),
            ..wake()
        };
        identity.wake(&first).unwrap();
        // What is behind the name now is what was there when the token was.
        let mut file = fs::File::open(dir.join("token")).unwrap();
        identity.expect_wake().unwrap();
        assert_eq!(identity.token(), None);
        assert!(!dir.join("token").exists());
        let mut left = Vec::new();
        std::io::Read::read_to_end(&mut file, &mut left).unwrap();
        assert_eq!(left, [0; 6]);
    }

    #[test]
    fn a_token_does_not_get_to_a_disk() {
        // /proc is no memory file system; making the directory there fails already below it.
        let error =
            write_files(Path::new("/proc"), None, &Awake::default(), Some("x")).unwrap_err();
        assert_eq!(error.code, ErrorCode::Unsupported);
    }
}
