//! The real `ratoon-agent` before the real `ratoon-bridge` before a scripted model. Tools run on this host, in a folder
//! of the test's own.

#![allow(dead_code, reason = "each test uses its part")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use ratoon_bridge_api::amount::Limits;
use ratoon_bridge_api::control::{AddVm, Client, MintToken, Reply, Request};
use ratoon_protocol::{AgentEvent, AgentLimits, Ending, Order, Profile, Task, Wire};
use ratoon_scripted_model::{Script, Server, Turn};
use serde_json::{Value, json};

const KEY: &str = "sk-ant-the-hosts-own-key-0123456789";
/// Longer than anything here may take.
const PATIENCE: Duration = Duration::from_secs(60);

pub const WIRES: [Wire; 3] = [Wire::Messages, Wire::Chat, Wire::Responses];

/// A bridge with one VM, and the model behind it.
pub struct Host {
    pub folder: tempfile::TempDir,
    pub model: Server,
    pub control: Client,
    bridge: Child,
}

impl Host {
    pub fn start(turns: impl IntoIterator<Item = Turn>) -> Self {
        Self::with(turns, json!({"retry_s": 5}), 1000)
    }

    /// With limits of the bridge's own, and calls that the VM may make.
    pub fn with(turns: impl IntoIterator<Item = Turn>, limits: Value, calls: u64) -> Self {
        let model = Server::start(Script::new(turns).with_key(KEY)).expect("a scripted model");
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        let config = json!({
            "records": path("runs"),
            "providers": [{
                "name": "scripted", "base_url": model.url(), "key": {"fd": 3},
                "wires": ["messages", "chat", "responses"],
                "models": [{"id": "m", "upstream": "real-m", "max_output_tokens": 1000}],
            }],
            "limits": limits,
        });
        std::fs::write(path("config.json"), config.to_string()).expect("a file");
        std::fs::write(path("key"), format!("{KEY}\n")).expect("a file");
        let bridge = Command::new("sh")
            .args([
                "-c",
                "exec \"$0\" serve --config \"$1\" --control \"$2\" --lifeline 3<\"$3\"",
            ])
            .arg(program("ratoon-bridge"))
            .args([path("config.json"), path("control"), path("key")])
            .stdin(Stdio::piped())
            .stderr(std::fs::File::create(path("bridge.log")).expect("a file"))
            .spawn()
            .expect("ratoon-bridge");
        let control = (0..500)
            .find_map(|_| {
                let client = Client::connect(&path("control"), Duration::from_secs(20));
                if client.is_err() {
                    std::thread::sleep(Duration::from_millis(10));
                }
                client.ok()
            })
            .expect("the control socket");
        let mut host = Self {
            folder,
            model,
            control,
            bridge,
        };
        let add = AddVm {
            vm: "vm".into(),
            socket: host.socket(),
            run: "run".into(),
            branch: "main".into(),
            parent: None,
            budget: Limits {
                calls: Some(calls),
                ..Limits::default()
            },
            models: None,
        };
        host.control.call(&Request::AddVm(add)).expect("a VM");
        std::fs::create_dir(host.work()).expect("a folder");
        let token = host.mint(false);
        std::fs::write(host.token_file(), token).expect("a file");
        host
    }

    pub fn mint(&mut self, revoke_older: bool) -> String {
        let mint = MintToken {
            vm: "vm".into(),
            ttl_s: 600,
            revoke_older,
        };
        match self.control.call(&Request::MintToken(mint)) {
            Ok(Reply::Token { token, .. }) => token.0,
            other => panic!("{other:?}"),
        }
    }

    pub fn calls_in_flight(&mut self) -> usize {
        match self.control.call(&Request::Status {}) {
            Ok(Reply::Status {
                calls_in_flight, ..
            }) => calls_in_flight,
            other => panic!("{other:?}"),
        }
    }

    /// The most memory that the bridge has taken so far, in KiB.
    pub fn bridge_memory_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.bridge.id()));
        let status = status.expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
        number.expect("a number").parse().expect("a number")
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("vm.sock_1025")
    }

    pub fn token_file(&self) -> PathBuf {
        self.folder.path().join("token")
    }

    /// Where tools work.
    pub fn work(&self) -> PathBuf {
        self.folder.path().join("work")
    }

    pub fn task(&self, wire: Wire, profile: Profile) -> Task {
        Task {
            run: "run".into(),
            branch: "main".into(),
            wire,
            model: "m".into(),
            profile,
            prompt: "Do it.".into(),
            system: None,
            directory: self.work().to_str().expect("UTF-8").into(),
            max_tokens: 500,
            temperature: None,
            seed: None,
            limits: AgentLimits::default(),
            hold_before: Vec::new(),
            boundaries: false,
        }
    }

    /// The agent, with the way to this bridge in its environment.
    pub fn command(&self, word: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ratoon-agent"));
        command
            .arg(word)
            .env("RATOON_BRIDGE", format!("unix:{}", self.socket().display()))
            .env("RATOON_TOKEN_FILE", self.token_file())
            .env("RATOON_AGENT_DIR", self.folder.path().join("spool"))
            .stdout(Stdio::piped())
            .stdin(Stdio::piped());
        command
    }

    /// Starts a run.
    pub fn run(&self, task: &Task) -> Run {
        let mut process = self.command("loop").spawn().expect("ratoon-agent");
        let stdin = process.stdin.take().expect("a pipe");
        let stdout = BufReader::new(process.stdout.take().expect("a pipe"));
        let (sender, events) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines() {
                let Ok(line) = line else { return };
                let event: AgentEvent = serde_json::from_str(&line).expect("an event");
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        let mut run = Run {
            process,
            stdin: Some(stdin),
            events,
            seen: Vec::new(),
        };
        run.line(&serde_json::to_string(task).expect("JSON"));
        run
    }

    /// All of a run that needs no orders.
    pub fn whole(&self, task: &Task) -> Done {
        self.run(task).end()
    }

    /// Nothing that the model was sent broke a rule.
    pub fn check(&self) {
        let violations = self.model.violations();
        assert!(violations.is_empty(), "{violations:#?}");
    }

    /// The body of a request.
    pub fn request(&self, number: usize) -> String {
        let seen = self.model.seen();
        let seen = seen.get(number).expect("a request");
        String::from_utf8_lossy(&seen.bytes).into_owned()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The lifeline's end is what ends it.
        drop(self.bridge.stdin.take());
        let _ = self.bridge.wait();
    }
}

/// A program that lies where tests' programs lie.
fn program(name: &str) -> PathBuf {
    let exe = std::env::current_exe().expect("a test has an executable");
    let dir = exe.parent().and_then(Path::parent).expect("a folder");
    let path = dir.join(name);
    assert!(
        path.exists(),
        "{} is missing: cargo build -p {name} first",
        path.display()
    );
    path
}

/// A run on its way.
pub struct Run {
    pub process: Child,
    pub stdin: Option<ChildStdin>,
    events: Receiver<AgentEvent>,
    pub seen: Vec<AgentEvent>,
}

/// A run that has ended.
#[derive(Debug)]
pub struct Done {
    pub events: Vec<AgentEvent>,
    pub code: i32,
    pub ending: Ending,
    pub text: String,
    pub steps: u32,
}

impl Run {
    pub fn line(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("an open input");
        writeln!(stdin, "{line}").expect("the agent reads");
    }

    pub fn order(&mut self, order: &Order) {
        self.line(&serde_json::to_string(order).expect("JSON"));
    }

    /// The next event that fits.
    pub fn wait(&mut self, fits: impl Fn(&AgentEvent) -> bool) -> AgentEvent {
        let began = Instant::now();
        loop {
            let left = PATIENCE.saturating_sub(began.elapsed());
            let event = self.events.recv_timeout(left);
            let event = event.unwrap_or_else(|_| panic!("no such event: {:#?}", self.seen));
            self.seen.push(event.clone());
            if fits(&event) {
                return event;
            }
        }
    }

    /// Nothing happens for so long.
    pub fn is_quiet(&mut self, time: Duration) {
        match self.events.recv_timeout(time) {
            Err(RecvTimeoutError::Timeout) => {}
            other => panic!("{other:?}"),
        }
    }

    pub fn end(mut self) -> Done {
        let last = self.wait(|event| matches!(event, AgentEvent::Ended { .. }));
        let AgentEvent::Ended {
            ending,
            text,
            steps,
            ..
        } = last
        else {
            unreachable!()
        };
        let code = self.process.wait().expect("a process").code();
        let done = Done {
            events: std::mem::take(&mut self.seen),
            code: code.expect("a code"),
            ending,
            text,
            steps,
        };
        assert_eq!(done.code, i32::from(done.ending.code()));
        assert!(self.events.recv().is_err(), "nothing behind the end");
        done
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // A test that failed leaves none behind.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Done {
    /// What tools answered, and whether it was an error.
    pub fn results(&self) -> Vec<(String, bool)> {
        self.events
            .iter()
            .filter_map(|event| match event {
                AgentEvent::ToolResult { output, error, .. } => Some((output.clone(), *error)),
                _ => None,
            })
            .collect()
    }

    pub fn notices(&self) -> String {
        self.events
            .iter()
            .filter_map(|event| match event {
                AgentEvent::Notice { text } => Some(text.as_str()),
                _ => None,
            })
            .collect::<Vec<_>>()
            .join("\n")
    }

    pub fn said(&self) -> String {
        self.events
            .iter()
            .filter_map(|event| match event {
                AgentEvent::Text { text } => Some(text.as_str()),
                _ => None,
            })
            .collect()
    }
}

/// A turn that calls `bash`.
pub fn bash(command: &str) -> Turn {
    Turn::tool("bash", json!({"command": command}))
}
