//! Who this machine is: nobody in particular until `wake` says so.
//!
//! ```text
//!   --expect_wake--> waiting --wake--> awake        a wake that fails leaves it waiting
//! ```
//!
//! The steps of a wake: entropy, time, thaw (the next ones write to `/`; processes stay frozen until
//! `thaw`), hostname, machine-id, network, files of `/run/ratoon`. All parameters are checked before
//! the first. How it fails: the message names the step; those before it are done, and a second wake
//! does them again.

use std::path::{Path, PathBuf};

use ratoon_protocol::{Awake, ErrorCode, ErrorReply, Wake};
use rustix::io::Errno;

use super::network::Plan;
use super::settings::{self, ETC};
use super::{bad_request, failed, files, quiet, shown};

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

/// The state. See the module.
#[derive(Debug)]
pub struct Identity {
    waiting: bool,
    awake: Awake,
    token: Option<String>,
    /// `None` on somebody's host.
    dir: Option<PathBuf>,
}

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
            token: None,
            dir,
        }
    }

    /// From now on calls wait for [`Identity::wake`].
    pub fn expect_wake(&mut self) {
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
        let network = wake.network.as_ref().map(Plan::new);
        let network = network.transpose().map_err(step("network"))?;

        settings::apply_entropy(&entropy).map_err(step("entropy"))?;
        if let Some(time) = time {
            settings::apply_time(time).map_err(step("time"))?;
        }
        quiet::thaw_for_wake().map_err(step("thaw"))?;
        if let Some(hostname) = hostname {
            settings::apply_hostname(hostname).map_err(step("hostname"))?;
        }
        if let Some(id) = machine_id {
            settings::apply_machine_id(&id).map_err(step("machine-id"))?;
        }
        if let Some(plan) = network {
            super::only_init("the network").map_err(step("network"))?;
            plan.apply(Path::new(ETC)).map_err(step("network"))?;
        }
        let awake = Awake {
            generation: wake.generation.clone(),
            id: wake.id.clone(),
            index: wake.index,
            wakes: self.awake.wakes.saturating_add(1),
            message: wake.message.clone(),
        };
        if let Some(dir) = &self.dir {
            write_files(dir, &awake, wake.token.as_deref()).map_err(step("files"))?;
        }
        self.awake = awake;
        self.token.clone_from(&wake.token);
        self.waiting = false;
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

fn write_files(dir: &Path, awake: &Awake, token: Option<&str>) -> Result<(), ErrorReply> {
    let refused = |path: &Path| {
        let path = path.display().to_string();
        move |error| failed(path, error)
    };
    match rustix::fs::mkdir(dir, rustix::fs::Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(refused(dir)(error)),
    }
    let kind = rustix::fs::statfs(dir).map_err(refused(dir))?.f_type;
    if !IN_MEMORY.contains(&kind) {
        let message = format!(
            "{} is not in memory, and a token must not get to a disk",
            dir.display()
        );
        return Err(ErrorReply::new(ErrorCode::Unsupported, message));
    }
    let line = |text: &dyn std::fmt::Display| Some(format!("{text}\n"));
    let message = awake.message.as_ref();
    for (name, text, mode) in [
        // First, so that nobody finds another machine's secret beside this one's name.
        ("token", token.map(str::to_owned), 0o400),
        ("generation", line(&awake.generation), 0o644),
        ("id", line(&awake.id), 0o644),
        ("index", line(&awake.index), 0o644),
        ("message", message.and_then(|text| line(text)), 0o644),
        ("wakes", line(&awake.wakes), 0o644),
    ] {
        let path = dir.join(name);
        match text {
            Some(text) => files::replace(&path, text.as_bytes(), mode),
            None => files::remove(&path),
        }
        .map_err(refused(&path))?;
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
            index: 3,
            entropy: "5a".repeat(32),
            ..Wake::default()
        }
    }

    #[test]
    fn nothing_is_waited_for_unless_told() {
        let mut identity = Identity::new(None);
        assert!(!identity.is_waiting());
        identity.expect_wake();
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
            identity.expect_wake();
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
        identity.expect_wake();
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
    fn a_token_does_not_get_to_a_disk() {
        // /proc is no memory file system; making the directory there fails already below it.
        let error = write_files(Path::new("/proc"), &Awake::default(), Some("x")).unwrap_err();
        assert_eq!(error.code, ErrorCode::Unsupported);
    }
}
