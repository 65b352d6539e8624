//! The real `ratoon-bridge` before a scripted model, and a guest that writes HTTP by hand.

#![allow(dead_code, reason = "each test uses its part")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ratoon_bridge_api::amount::{Amount, Limits};
use ratoon_bridge_api::control::{AddVm, Client, MintToken, Reply, Request, UsageOf};
use ratoon_bridge_api::record::{Entry, Line};
use ratoon_scripted_model::{Script, Server, Turn};
use serde_json::{Value, json};

/// The host's key. Nothing that a guest or a file has may ever contain it.
pub const KEY: &str = "sk-ant-the/Hosts+own_key-0123456789";

/// A bridge, its control connection, and a folder.
pub struct Host {
    pub folder: tempfile::TempDir,
    process: Child,
    pub control: Client,
}

/// A VM's socket and token.
pub struct Guest {
    pub socket: PathBuf,
    pub token: String,
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
    /// The body came to its end.
    pub whole: bool,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(given, _)| given == name);
        found.map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).expect("JSON")
    }

    pub fn code(&self) -> &str {
        self.header("x-ratoon-error").unwrap_or("none")
    }
}

pub fn script(turns: impl IntoIterator<Item = Turn>) -> Server {
    Server::start(Script::new(turns).with_key(KEY)).expect("a scripted model")
}

/// A configuration for a server: all wires, models `m` (with a price) and `free`.
pub fn config(base_url: &str) -> Value {
    json!({
        "providers": [{
            "name": "scripted", "base_url": base_url, "key": {"fd": 3},
            "wires": ["messages", "chat", "responses"],
            "models": [
                {"id": "m", "upstream": "real-m", "max_output_tokens": 1000,
                 "price": {"input": 3_000_000, "output": 15_000_000, "cached": 300_000}},
                {"id": "free", "max_output_tokens": 1000},
            ],
        }],
        "limits": {"retry_s": 5},
    })
}

impl Host {
    pub fn start(config: Value) -> Self {
        Self::start_in(tempfile::tempdir().expect("a folder"), config)
    }

    pub fn start_in(folder: tempfile::TempDir, config: Value) -> Self {
        Self::start_as(None, folder, config)
    }

    /// Starts it as another user, who gets the folder.
    pub fn start_as(user: Option<u32>, folder: tempfile::TempDir, mut config: Value) -> Self {
        let path = |name: &str| folder.path().join(name);
        config["records"] = path("runs").to_str().expect("UTF-8").into();
        std::fs::write(path("config.json"), config.to_string()).expect("a file");
        std::fs::write(path("key"), format!("{KEY}\n")).expect("a file");
        let mut command = Command::new("sh");
        if let Some(user) = user {
            std::os::unix::fs::chown(folder.path(), Some(user), None).expect("chown");
            command.uid(user);
        }
        let process = command
            .args([
                "-c",
                "exec \"$0\" serve --config \"$1\" --control \"$2\" --lifeline 3<\"$3\"",
            ])
            .arg(env!("CARGO_BIN_EXE_ratoon-bridge"))
            .args([path("config.json"), path("control"), path("key")])
            .stdin(Stdio::piped())
            .stderr(std::fs::File::create(path("log")).expect("a file"))
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
        std::fs::remove_file(path("key")).expect("the key's file");
        Self {
            folder,
            process,
            control,
        }
    }

    /// Kills the bridge as a crash would, and starts it anew in the same folder.
    pub fn crash_and_restart(mut self, config: Value) -> Self {
        self.process.kill().expect("a process");
        self.process.wait().expect("a process");
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir().expect("a folder"));
        drop(self);
        Self::start_in(folder, config)
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    pub fn tell(&mut self, request: Request) -> Reply {
        self.control.call(&request).expect("an answer")
    }

    pub fn refused(&mut self, request: Request) -> String {
        self.control
            .call(&request)
            .expect_err("a refusal")
            .to_string()
    }

    pub fn add_vm(&self, vm: &str, branch: &str, parent: Option<&str>, budget: Limits) -> AddVm {
        AddVm {
            vm: vm.to_owned(),
            socket: self.folder.path().join(format!("{vm}.sock_1025")),
            run: "run".into(),
            branch: branch.to_owned(),
            parent: parent.map(str::to_owned),
            budget,
            models: None,
        }
    }

    /// Adds a VM on a branch and mints a token.
    pub fn vm(&mut self, vm: &str, branch: &str, parent: Option<&str>, budget: Limits) -> Guest {
        let add = self.add_vm(vm, branch, parent, budget);
        self.guest(add)
    }

    pub fn guest(&mut self, add: AddVm) -> Guest {
        let (vm, socket) = (add.vm.clone(), add.socket.clone());
        self.tell(Request::AddVm(add));
        Guest {
            socket,
            token: self.mint(&vm, false),
        }
    }

    /// The first VM, on the first branch, with calls enough.
    pub fn first(&mut self) -> Guest {
        self.vm("vm", "main", None, calls(100))
    }

    pub fn mint(&mut self, vm: &str, revoke_older: bool) -> String {
        let mint = MintToken {
            vm: vm.to_owned(),
            ttl_s: 600,
            revoke_older,
        };
        match self.tell(Request::MintToken(mint)) {
            Reply::Token { token, .. } => token.0,
            other => panic!("{other:?}"),
        }
    }

    pub fn spent(&mut self, branch: &str) -> Amount {
        let Reply::Usage { branches } = self.tell(Request::Usage(UsageOf { run: "run".into() }))
        else {
            panic!("no usage");
        };
        let found = branches.iter().find(|usage| usage.branch == branch);
        let found = found.expect("the branch");
        assert_eq!(found.reserved, Amount::default(), "nothing is on its way");
        found.spent
    }

    pub fn run_dir(&self) -> PathBuf {
        self.folder.path().join("runs/run")
    }

    pub fn entries(&self, branch: &str) -> Vec<Entry> {
        let text = std::fs::read_to_string(self.run_dir().join(format!("{branch}.jsonl")))
            .expect("a record");
        text.lines()
            .map(|line| serde_json::from_str::<Line>(line).expect("a line").entry)
            .collect()
    }

    /// The model saw nothing that is wrong, the record is whole, and no file of the host's has its key.
    pub fn check_record(&self, model: &Server) {
        assert_eq!(model.violations(), Vec::<String>::new());
        self.check_files();
    }

    /// The record is whole, and no file of the host's has its key.
    pub fn check_files(&self) {
        ratoon_bridge_api::audit::verify_run(&self.run_dir(), &[]).expect("a whole record");
        self.check_no_key();
    }

    pub fn check_no_key(&self) {
        fn search(folder: &Path) {
            for entry in std::fs::read_dir(folder).expect("a folder") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    search(&path);
                } else if path.is_file() {
                    let bytes = std::fs::read(&path).expect("a file");
                    let found = bytes.windows(KEY.len()).any(|part| part == KEY.as_bytes());
                    assert!(!found, "{} has the key", path.display());
                }
            }
        }
        search(self.folder.path());
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The lifeline's end is what ends it.
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

/// A user who is neither root nor, most likely, anybody.
pub const NOBODY: u32 = 65_534;

/// Does something as another user, in a thread of its own, if this is root.
pub fn as_user<T: Send>(user: Option<u32>, what: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if let Some(user) = user {
                let user = rustix::process::Uid::from_raw(user);
                rustix::thread::set_thread_res_uid(user, user, user).expect("root");
            }
            what()
        });
        thread.join().expect("its result")
    })
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

pub fn calls(calls: u64) -> Limits {
    Limits {
        calls: Some(calls),
        ..Limits::default()
    }
}

/// A small request on each wire.
pub fn body(path: &str, stream: bool) -> Value {
    match path {
        MESSAGES => json!({"model": "m", "max_tokens": 50, "stream": stream,
                           "messages": [{"role": "user", "content": "hi"}]}),
        CHAT => json!({"model": "m", "max_tokens": 50, "stream": stream,
                       "messages": [{"role": "user", "content": "hi"}]}),
        RESPONSES => json!({"model": "m", "max_output_tokens": 50, "stream": stream,
                            "input": "hi"}),
        _ => json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]}),
    }
}

pub const MESSAGES: &str = "/v1/messages";
pub const COUNT: &str = "/v1/messages/count_tokens";
pub const CHAT: &str = "/v1/chat/completions";
pub const RESPONSES: &str = "/v1/responses";

impl Guest {
    pub fn ask(&self, path: &str, body: &Value) -> Answer {
        self.ask_with(path, body, &[])
    }

    pub fn ask_with(&self, path: &str, body: &Value, headers: &[(&str, &str)]) -> Answer {
        let mut all = vec![("x-ratoon-token", self.token.as_str())];
        all.extend_from_slice(headers);
        self.raw("POST", path, &all, body.to_string().as_bytes())
    }

    pub fn step(&self, path: &str, body: &Value, step: u64, attempt: u32) -> Answer {
        let (step, attempt) = (step.to_string(), attempt.to_string());
        let headers = [
            ("x-ratoon-step", step.as_str()),
            ("x-ratoon-attempt", &attempt),
        ];
        self.ask_with(path, body, &headers)
    }

    pub fn raw(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        read_answer(self.send(method, path, headers, body))
    }

    /// Sends a request and leaves the answer to be read.
    pub fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> BufReader<UnixStream> {
        self.send_part(method, path, headers, body, body.len())
    }

    /// Sends the first part of a request whose body is `len` bytes long.
    pub fn send_part(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
        len: usize,
    ) -> BufReader<UnixStream> {
        let mut stream = UnixStream::connect(&self.socket).expect("the VM's socket");
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .expect("a socket");
        let mut head =
            format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str(&format!("content-length: {len}\r\n\r\n"));
        stream.write_all(head.as_bytes()).expect("sent");
        // It may refuse before it has read all.
        let _ = stream.write_all(body);
        BufReader::new(stream)
    }
}

/// Whether anything is answered at a socket, if one can connect: a request without a token.
pub fn is_served(socket: &Path) -> std::io::Result<bool> {
    let mut stream = UnixStream::connect(socket)?;
    // It may be closed already.
    let _ = stream.write_all(b"POST / HTTP/1.1\r\nhost: localhost\r\n\r\n");
    Ok(matches!(stream.read(&mut [0]), Ok(1)))
}

/// Reads a whole answer.
pub fn read_answer(mut stream: BufReader<UnixStream>) -> Answer {
    let (status, headers) = read_head(&mut stream);
    let chunked = headers.contains(&("transfer-encoding".into(), "chunked".into()));
    let mut body = Vec::new();
    let mut whole = true;
    if chunked {
        whole = false;
        while let Some(piece) = read_chunk(&mut stream) {
            if piece.is_empty() {
                whole = true;
                break;
            }
            body.extend_from_slice(&piece);
        }
    } else {
        stream.read_to_end(&mut body).expect("a body");
    }
    Answer {
        status,
        headers,
        body: String::from_utf8(body).expect("UTF-8"),
        whole,
    }
}

pub fn read_head(stream: &mut BufReader<UnixStream>) -> (u16, Vec<(String, String)>) {
    let mut line = String::new();
    stream.read_line(&mut line).expect("a status");
    let status = line.split(' ').nth(1).and_then(|text| text.parse().ok());
    let mut headers = Vec::new();
    loop {
        line.clear();
        stream.read_line(&mut line).expect("a header");
        let Some((name, value)) = line.trim_end().split_once(": ") else {
            break;
        };
        headers.push((name.to_lowercase(), value.to_owned()));
    }
    (status.expect("a status"), headers)
}

/// One chunk; an empty one is the last; none when the connection broke.
pub fn read_chunk(stream: &mut BufReader<UnixStream>) -> Option<Vec<u8>> {
    let mut line = String::new();
    stream.read_line(&mut line).ok()?;
    let len = usize::from_str_radix(line.trim_end(), 16).ok()?;
    let mut piece = vec![0; len + 2];
    stream.read_exact(&mut piece).ok()?;
    piece.truncate(len);
    Some(piece)
}
