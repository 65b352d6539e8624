//! A small loop in place of the server's, and answers that are kept.

use std::collections::BTreeMap;
use std::time::Duration;

use ratoon_protocol::{CodeData, CodeEnd};
use serde_json::Value;

use crate::code::*;
use crate::sys::{self, PollFd, poll_fd};

/// Takes what contexts answer, no faster than its window allows.
pub struct Fake {
    pub outputs: BTreeMap<u64, [Vec<u8>; 3]>,
    pub results: BTreeMap<u64, Result<Value, ErrorReply>>,
    /// Bytes that may be given in a round.
    window: usize,
    given: usize,
}

impl Answers for Fake {
    fn room(&self, _: CallRef, _: Output) -> usize {
        self.window - self.given
    }

    fn output(&mut self, at: CallRef, output: Output, bytes: &[u8]) {
        assert!(
            bytes.len() <= self.room(at, output),
            "more than there is room"
        );
        assert!(
            !self.results.contains_key(&at.call),
            "output after the reply"
        );
        self.given += bytes.len();
        self.outputs.entry(at.call).or_default()[output as usize].extend_from_slice(bytes);
    }

    fn reply<T: Serialize>(&mut self, at: CallRef, value: &T) {
        let before = self
            .results
            .insert(at.call, Ok(serde_json::to_value(value).unwrap()));
        assert_eq!(before, None, "a call is answered once");
    }

    fn fail(&mut self, at: CallRef, error: &ErrorReply) {
        let before = self.results.insert(at.call, Err(error.clone()));
        assert_eq!(before, None, "a call is answered once");
    }
}

pub struct Host {
    pub contexts: Contexts,
    pub spawner: Spawner,
    pub fake: Fake,
    next: u64,
    scratch: Vec<u8>,
}

/// What came of a cell.
pub struct Ran {
    pub stdout: String,
    pub stderr: String,
    pub data: Vec<CodeData>,
    pub end: CodeEnd,
}

impl Ran {
    pub fn value(&self) -> Option<&str> {
        let last = self.data.last().filter(|data| data.result)?;
        last.data["text/plain"].as_str()
    }

    pub fn error(&self) -> &ratoon_protocol::CodeError {
        self.end.error.as_ref().unwrap()
    }
}

impl Host {
    pub fn new() -> Self {
        let null = std::fs::File::open("/dev/null").unwrap();
        Self {
            contexts: Contexts::default(),
            spawner: Spawner::new(null.into(), false),
            fake: Fake {
                outputs: BTreeMap::new(),
                results: BTreeMap::new(),
                window: 64 * 1024,
                given: 0,
            },
            next: 0,
            scratch: vec![0; 64 * 1024],
        }
    }

    pub fn at(&mut self) -> CallRef {
        self.next += 1;
        CallRef {
            session: 1,
            call: self.next,
        }
    }

    /// A round of the server's loop.
    fn round(&mut self, longest: Duration) {
        self.reap();
        let now = Instant::now();
        let next = self.contexts.due(now, &mut self.fake);
        self.fake.given = 0;
        let (mut polls, mut tokens): (Vec<PollFd>, Vec<u64>) = (Vec::new(), Vec::new());
        self.contexts.poll(&self.fake, &mut |fd, events, token| {
            polls.push(poll_fd(fd, events));
            tokens.push(token);
        });
        let wait = next.map_or(longest, |at| at.saturating_duration_since(now).min(longest));
        sys::poll(&mut polls, Some(wait)).unwrap();
        for (poll, token) in polls.iter().zip(tokens) {
            if poll.revents != 0 {
                self.contexts
                    .ready(token, poll.revents, &mut self.fake, &mut self.scratch);
            }
        }
    }

    /// As the server does, but of our own children alone: other tests have theirs.
    fn reap(&mut self) {
        let ours = self.contexts.contexts.values();
        let ours = ours.filter(|context| context.zygote.is_none());
        let ours = ours.filter_map(|context| context.pid);
        let zygotes = self.contexts.zygotes.values().map(|zygote| zygote.pid);
        let all: Vec<i32> = ours.chain(zygotes).collect();
        for pid in all {
            let wait = rustix::process::WaitOptions::NOHANG;
            if let Ok(Some((_, status))) = rustix::process::waitpid(Pid::from_raw(pid), wait) {
                let status = match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => ExitStatus::Code(code),
                    (None, Some(signal)) => ExitStatus::Signal(signal),
                    (None, None) => continue,
                };
                self.contexts.reaped(pid, status, &mut self.fake);
            }
        }
    }

    pub fn wait_until(&mut self, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !done(self) {
            assert!(Instant::now() < deadline, "it takes too long");
            self.round(Duration::from_millis(20));
        }
    }

    pub fn answer(&mut self, at: CallRef) -> Result<Value, ErrorReply> {
        self.wait_until(|host| host.fake.results.contains_key(&at.call));
        self.fake.results.remove(&at.call).unwrap()
    }

    pub fn start(&mut self, mut params: CodeStart) -> Result<CodeContext, ErrorReply> {
        if !params.env.iter().any(|(name, _)| name == "PATH") {
            let path = std::env::var("PATH").unwrap();
            params.env.push(("PATH".into(), path));
        }
        let at = self.at();
        let Self {
            contexts,
            spawner,
            fake,
            ..
        } = self;
        contexts.start(at, params, spawner, fake)?;
        self.answer(at)
            .map(|value| serde_json::from_value(value).unwrap())
    }

    pub fn context(&mut self, language: Language, name: &str) -> CodeContext {
        self.start(CodeStart {
            language,
            context: Some(name.into()),
            ..CodeStart::default()
        })
        .unwrap()
    }

    pub fn send(&mut self, params: CodeRun) -> Result<CallRef, ErrorReply> {
        let at = self.at();
        let Self {
            contexts,
            spawner,
            fake,
            ..
        } = self;
        contexts.run(at, params, spawner, fake)?;
        Ok(at)
    }

    pub fn begin(&mut self, name: &str, code: &str) -> CallRef {
        self.send(CodeRun {
            code: code.into(),
            context: Some(name.into()),
            ..CodeRun::default()
        })
        .unwrap()
    }

    pub fn end(&mut self, at: CallRef) -> Ran {
        let end = serde_json::from_value(self.answer(at).unwrap()).unwrap();
        let [stdout, stderr, data] = self.fake.outputs.remove(&at.call).unwrap_or_default();
        let data = String::from_utf8(data).unwrap();
        Ran {
            stdout: String::from_utf8(stdout).unwrap(),
            stderr: String::from_utf8(stderr).unwrap(),
            data: data
                .lines()
                .map(|line| serde_json::from_str(line).unwrap())
                .collect(),
            end,
        }
    }

    pub fn run(&mut self, name: &str, code: &str) -> Ran {
        let at = self.begin(name, code);
        self.end(at)
    }

    pub fn run_for(&mut self, name: &str, code: &str, timeout_ms: u64) -> Ran {
        let params = CodeRun {
            code: code.into(),
            context: Some(name.into()),
            timeout_ms: Some(timeout_ms),
            ..CodeRun::default()
        };
        let at = self.send(params).unwrap();
        self.end(at)
    }

    /// Interrupts a cell when it has printed something.
    pub fn interrupt_when_it_prints(&mut self, name: &str, at: CallRef) {
        self.wait_until(|host| host.fake.outputs.contains_key(&at.call));
        let interrupt = self.at();
        let params = CodeName {
            context: name.into(),
        };
        self.contexts
            .interrupt(interrupt, &params, &mut self.fake)
            .unwrap();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let names = self.contexts.list().into_iter().map(|info| info.context);
        for context in names.collect::<Vec<_>>() {
            let _ = self.contexts.remove(&context);
        }
        for _ in 0..500 {
            if self.contexts.contexts.is_empty() {
                break;
            }
            self.round(Duration::from_millis(10));
        }
        for zygote in self.contexts.zygotes.values() {
            if let Some(pid) = Pid::from_raw(zygote.pid) {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
                let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
            }
        }
    }
}
