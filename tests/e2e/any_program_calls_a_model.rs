//! `ratoon run --model`: programs that know nothing of Ratoon, the vendors' own SDKs among them, call a model from a
//! machine that has neither keys nor a network. The model is a script; all else is real.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use ratoon_scripted_model::{Fault, ToolCall, Turn};
use ratoon_tests::{Done, cache, finish, finish_within, program};
use serde_json::{Value, json};

use crate::scene::{Scene, search};

crate::promises![
    a_program_calls_its_model_by_the_usual_variables,
    forks_and_restored_machines_call_with_tokens_of_their_own,
    a_hostile_program_gets_named_errors_and_nothing_else,
    the_vendors_sdks_and_an_agent_run_as_they_are,
];

/// How long importing an SDK may take, where guests are emulated and others work, too.
pub(crate) const LONG: Duration = Duration::from_secs(1200);
/// A call, by the variables alone.
const CALL: &str = "curl -s $OPENAI_BASE_URL/chat/completions -H \"Authorization: Bearer $OPENAI_API_KEY\" \
    -d \"{\\\"model\\\":\\\"$RATOON_MODEL\\\",\\\"messages\\\":[{\\\"role\\\":\\\"user\\\",\\\"content\\\":\\\"hi\\\"}]}\"";

pub(crate) fn scene(turns: impl IntoIterator<Item = Turn>) -> Scene {
    let model = json!({"id": "m", "upstream": "real-m", "max_output_tokens": 1000});
    Scene::new(
        turns,
        json!({"wires": ["messages", "chat", "responses"], "models": [model]}),
        json!({"body_bytes": 256 << 10, "attempts": 2, "vm_requests_a_minute": 10_000}),
    )
}

impl Scene {
    /// `ratoon run --model` with these flags, and the command.
    pub(crate) fn run_program(&self, flags: &[&str], command: &[&str]) -> Done {
        let mut run = self.ratoon.command(["run", "--model", "scripted/m"]);
        run.arg("--bridge-config")
            .arg(self.path("bridge.json"))
            .args(flags)
            .env("RATOON_AGENT", program("ratoon-agent"));
        if !command.is_empty() {
            run.arg("--").args(command);
        }
        finish(run.spawn().expect("ratoon can be started"))
    }

    fn exec(&self, command: &str) -> Done {
        self.ratoon.run(["exec", "box", "--", "sh", "-c", command])
    }

    /// What a run has as JSON.
    pub(crate) fn told(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ratoon.run(args).ok().stdout).expect("JSON")
    }

    /// Gives a file to a command in the machine.
    pub(crate) fn give(&self, file: &Path, command: &str) {
        let mut exec = self
            .ratoon
            .command(["exec", "box", "--", "sh", "-c", command]);
        exec.stdin(File::open(file).expect("a file"));
        let child = exec.spawn().expect("ratoon can be started");
        finish_within(child, LONG).ok();
    }
}

fn answer(done: &Done) -> String {
    let told: Value = serde_json::from_str(&done.stdout).unwrap_or_default();
    let words = told["choices"][0]["message"]["content"].as_str();
    words.map_or_else(|| format!("{done:?}"), str::to_owned)
}

fn a_program_calls_its_model_by_the_usual_variables() {
    let scene = scene([Turn::text("Hello.").repeated()]);
    let done = scene.run_program(
        &["--memory", "256M", "--max-calls", "1"],
        &["sh", "-c", &format!("{CALL}; exit 7")],
    );
    assert_eq!(done.code(), 7, "{done:?}");
    assert_eq!(answer(&done), "Hello.");
    // The host's key went to the model's server, and the dummy did not: `over` looks.
    let runs = scene.told(&["agent", "ps", "-a", "--json"]);
    let run = runs[0]["id"].as_str().expect("an id").to_owned();
    assert!(done.stderr.contains(&run), "{done:?}");
    let listed = scene.ratoon.run(["agent", "ps", "-a"]).ok().stdout;
    assert!(
        listed.contains("exit code 7") && listed.contains("sh -c curl"),
        "{listed}"
    );
    let log = scene.ratoon.run(["agent", "log", &run]).ok().stdout;
    assert_eq!(log.matches("complete (200)").count(), 1, "{log}");
    let verified = scene.ratoon.run(["audit", "verify", &run]).ok().stdout;
    assert!(
        verified.contains("1 kept heads; all as written"),
        "{verified}"
    );
    for command in ["attach", "diff", "fork"] {
        let refused = scene.ratoon.run(["agent", command, &run]);
        assert_eq!(refused.code(), 125, "{refused:?}");
    }
    // What cannot be is said before a machine is started.
    for (flags, words) in [
        (&["--model", "scripted/x"][..], "scripted/m"),
        (&["--max-money", "1"], "has no price"),
        (&["--max-calls", "0"], "--max-calls"),
    ] {
        let refused = scene.run_program(flags, &["true"]);
        assert_eq!(refused.code(), 2, "{refused:?}");
        assert!(refused.stderr.contains(words), "{refused:?}");
    }
    assert_eq!(scene.model.seen().len(), 1);
    scene.over();
}

fn forks_and_restored_machines_call_with_tokens_of_their_own() {
    let scene = scene([Turn::text("Hello.").repeated()]);
    scene
        .run_program(
            &[
                "-d",
                "--name",
                "box",
                "--memory",
                "256M",
                "--max-calls",
                "6",
            ],
            &[],
        )
        .ok();
    assert_eq!(answer(&scene.exec(CALL)), "Hello.");
    // A proxy that is killed comes back, also when all of it is killed.
    for victim in ["[k]ept-by", "[-]-keep"] {
        scene
            .exec(&format!("kill -9 $(pgrep -f -- '{victim}')"))
            .ok();
        let done = scene.exec(&format!("sleep 1; {CALL}"));
        assert_eq!(answer(&done), "Hello.", "{victim}");
    }
    let token = "sha256sum < /run/ratoon/token; ";
    let forked = scene
        .ratoon
        .run([
            "fork",
            "box",
            "-n",
            "2",
            "--json",
            "--",
            "sh",
            "-c",
            &format!("{token}{CALL}"),
        ])
        .ok();
    let forked: Value = serde_json::from_str(&forked.stdout).expect("JSON");
    let mut tokens = vec![scene.exec("sha256sum < /run/ratoon/token").ok().stdout];
    for child in forked["children"].as_array().expect("children") {
        let out = child["stdout"].as_str().expect("an output");
        let (token, said) = out.split_once('\n').expect("two lines");
        assert!(said.contains("Hello."), "{child}");
        tokens.push(format!("{token}\n"));
    }
    tokens.sort();
    tokens.dedup();
    assert_eq!(tokens.len(), 3, "two machines have one token: {tokens:?}");
    let runs = scene.told(&["agent", "ps", "--json"]);
    let branches: Vec<_> = runs[0]["branches"]
        .as_array()
        .expect("branches")
        .iter()
        .map(|it| it["name"].clone())
        .collect();
    assert_eq!(branches, ["main", "main.0", "main.1"]);
    // One budget for all of them: five of six calls are made.
    assert_eq!(answer(&scene.exec(CALL)), "Hello.");
    assert!(scene.exec(CALL).stdout.contains("insufficient_quota"));
    // In a snapshot is no live token; who restores it says what its programs may call.
    scene.ratoon.run(["snapshot", "box", "ready"]).ok();
    scene.ratoon.run(["rm", "-f", "box"]).ok();
    let plain = "curl -s http://127.0.0.1:8019/v1/messages -d '{}'";
    let refused = scene
        .ratoon
        .run(["run", "--snapshot", "ready", "--", "sh", "-c", plain])
        .ok()
        .stdout;
    assert!(
        refused.contains("api_error") && refused.contains("token"),
        "{refused}"
    );
    let done = scene
        .run_program(&["--snapshot", "ready", "--json"], &["sh", "-c", CALL])
        .ok();
    assert!(done.stdout.contains("Hello."), "{done:?}");
    scene.ratoon.run(["snapshots", "rm", "ready"]).ok();
    scene.over();
}

pub(crate) fn programs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("programs")
}

fn a_hostile_program_gets_named_errors_and_nothing_else() {
    let scene = scene([Turn::text("Hello.").repeated()]);
    let run = scene
        .run_program(&["-d", "--name", "box", "--memory", "256M", "--json"], &[])
        .ok();
    let run: Value = serde_json::from_str(&run.stdout).expect("JSON");
    let run = run["run"].as_str().expect("a run");
    scene.give(&programs().join("hostile.py"), "cat > /root/hostile.py");
    let exec = ["exec", "box", "--", "python3", "/root/hostile.py"];
    let child = scene
        .ratoon
        .command(exec)
        .spawn()
        .expect("ratoon can be started");
    let done = finish_within(child, LONG).ok();
    let mut told: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for line in done.stdout.lines() {
        let (name, rest) = line.split_once(' ').expect("a name");
        told.entry(name).or_default().push(rest);
    }
    assert_eq!(told["keys"], ["200 None"; 2], "{done:?}");
    let invalid = "400 invalid_request_error";
    for name in [
        "mcp",
        "container",
        "url",
        "file",
        "search",
        "many",
        "state",
        "twice",
        "lengths",
        "codings",
        "nonsense",
    ] {
        assert_eq!(told[name], [invalid], "{name}: {done:?}");
    }
    assert_eq!(
        told["tools"],
        ["200 None"],
        "what the provider would run is left out"
    );
    assert_eq!(told["model"], ["403 invalid_request_error"]);
    assert_eq!(told["large"], ["413 invalid_request_error"], "{done:?}");
    assert_eq!(told["route"].len(), 7);
    for answer in &told["route"] {
        let status = answer.split(' ').next();
        assert!(
            matches!(status, Some("404" | "405")) && !answer.contains("None"),
            "{answer}"
        );
    }
    let crowd: usize = told["crowd"]
        .iter()
        .map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            assert!(
                matches!(words[..2], ["200", "None"] | ["429", "rate_limit_error"]),
                "{line}"
            );
            words[2].parse::<usize>().expect("a number")
        })
        .sum();
    assert_eq!(crowd, 200, "each is answered: {done:?}");
    assert!(!told.contains_key("LEAK"), "{done:?}");
    for seen in scene.model.seen() {
        let text = format!("{:?} {}", seen.headers, seen.body);
        assert!(
            !text.contains("evil") && !text.contains("web_search"),
            "{text}"
        );
    }
    let status = scene.told(&["agent", "bridge", "status", "--json"]);
    let pid = &status["running"]["process"]["pid"];
    let memory = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let most = memory
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .expect("its memory");
    let most: u64 = most
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .expect("a number");
    assert!(most < 32 << 10, "the bridge took {most} KiB");
    eprintln!("the bridge took {most} KiB at most");
    scene.ratoon.run(["audit", "verify", run]).ok();
    // The machine's memory and disk, all files of the host, the record.
    scene.ratoon.run(["snapshot", "box", "after"]).ok();
    let folders = [scene.ratoon.state_dir().to_owned(), scene.path("runs")];
    let searched: u64 = folders.iter().map(|folder| search(folder)).sum();
    assert!(searched > 1 << 20, "only {searched} bytes were searched");
    scene.ratoon.run(["rm", "-f", "box"]).ok();
    scene.ratoon.run(["snapshots", "rm", "after"]).ok();
    scene.over();
}

fn said(words: &str) -> Turn {
    Turn::text(words).repeated()
}

fn broken(status: u16, retry_after: Option<&str>, message: &str) -> Fault {
    Fault::Status {
        status,
        retry_after: retry_after.map(str::to_owned),
        message: message.to_owned(),
    }
}

/// What the programs of `tests/programs` are told.
pub(crate) fn cases() -> Vec<Turn> {
    let city = |name: &str| json!({"city": name});
    let invalid = Turn {
        tools: vec![ToolCall {
            name: "weather".into(),
            arguments: Value::Null,
            raw: Some("{\"city\": \"Os".into()),
            id: None,
        }],
        ..Turn::text("")
    };
    let drip = Fault::Drip {
        bytes: 3,
        pause_ms: 1,
    };
    let long = "word ".repeat(200);
    vec![
        said("Grüße aus dem Norden.").when("case whole"),
        said("Grüße 🌱 aus dem Norden.")
            .broken(drip)
            .when("case stream"),
        Turn::tool("weather", city("Oslo"))
            .and_tool("weather", city("Bergen"))
            .repeated()
            .at(0)
            .when("case tools"),
        said("It rains in both.").at(1).when("case tools"),
        invalid.when("case invalid"),
        Turn::tool("weather", city("Oslo"))
            .at(0)
            .when("case function"),
        said("It rains.").at(1).when("case function"),
        // Once on each wire.
        Turn::text("")
            .broken(broken(429, Some("0"), "soon"))
            .when("case soon"),
        said("At last.").when("case soon"),
        Turn::text("")
            .broken(broken(529, None, "soon"))
            .when("case busy"),
        said("At last.").when("case busy"),
        Turn::text("")
            .broken(broken(429, Some("3600"), "slow down"))
            .repeated()
            .when("case later"),
        Turn::text("")
            .broken(broken(529, None, "overloaded"))
            .repeated()
            .when("case overloaded"),
        Turn::text(&long)
            .broken(Fault::Cut { after_bytes: 900 })
            .repeated()
            .when("case cut"),
        Turn::tool("bash", json!({"command": "echo made by mini > /root/made"}))
            .at(0)
            .when("make a file"),
        Turn::tool(
            "bash",
            json!({"command": "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"}),
        )
        .at(1)
        .when("make a file"),
    ]
}

/// The packages as one file, made once and kept in the user's cache under its list's hash.
fn packages() -> PathBuf {
    let list = fs::read(programs().join("packages.txt")).expect("a list");
    let bundle = fs::read(programs().join("bundle.py")).expect("a program");
    let hash = blake3::hash(&[list, bundle].concat()).to_hex();
    let folder = cache::users().join("test-packages");
    let path = folder.join(format!("{hash}.tar.gz"));
    if !path.exists() {
        fs::create_dir_all(&folder).expect("a folder");
        let made = tempfile::NamedTempFile::new_in(&folder).expect("a file");
        let child = Command::new("python3")
            .arg(programs().join("bundle.py"))
            .arg(programs().join("packages.txt"))
            .arg("minisweagent")
            .stdin(Stdio::null())
            .stdout(made.reopen().expect("a file"))
            .stderr(Stdio::piped())
            .spawn()
            .expect("python3");
        finish_within(child, LONG).ok();
        made.persist(&path).expect("its name");
    }
    path
}

/// A program of checks has told of so many, each on a line, and none is wrong.
pub(crate) fn all_are_ok(done: &Done, count: usize) {
    let wrong: Vec<&str> = done
        .stdout
        .lines()
        .filter(|line| !line.ends_with(" ok"))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}\n{done:?}");
    assert_eq!(done.stdout.lines().count(), count, "{done:?}");
}

fn the_vendors_sdks_and_an_agent_run_as_they_are() {
    let packages = packages();
    let scene = scene(cases());
    scene
        .run_program(&["-d", "--name", "box", "--memory", "768M"], &[])
        .ok();
    // Memory in large pages costs fewer faults, which take most of the time where guests are emulated.
    scene
        .exec("echo always > /sys/kernel/mm/transparent_hugepage/enabled; mkdir /opt/p")
        .ok();
    scene.give(&packages, "tar -xz --no-same-owner -C /opt/p");
    for name in ["openai_sdk.py", "anthropic_sdk.py", "mini_model.py"] {
        scene.give(&programs().join(name), &format!("cat > /opt/p/{name}"));
    }
    let python = |args: &[&str]| {
        let env = [
            "PYTHONPATH=/opt/p/pure.zip:/opt/p/folders:/opt/p",
            "PYTHONMALLOC=malloc",
            "GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.top_pad=67108864",
            "PYTHONDONTWRITEBYTECODE=1",
            "MSWEA_SILENT_STARTUP=1",
            "MSWEA_CONFIGURED=true",
        ];
        let mut all = vec!["exec"];
        for variable in &env {
            all.extend(["-e", variable]);
        }
        all.extend(["box", "--", "python3"]);
        all.extend(args);
        let child = scene
            .ratoon
            .command(all)
            .spawn()
            .expect("ratoon can be started");
        finish_within(child, LONG).ok()
    };
    // In one process, for they share much: both are as they come.
    let done = python(&["-c", "import openai_sdk, anthropic_sdk"]);
    all_are_ok(&done, 15 + 13);

    let mini = [
        "-m",
        "minisweagent.run.mini",
        "--model-class",
        "mini_model.Model",
        "-m",
        "m",
        "-t",
        "make a file",
        "-y",
        "--exit-immediately",
        "-o",
        "/root/trajectory.json",
    ];
    let done = python(&mini);
    assert_eq!(
        scene.exec("cat /root/made").ok().stdout,
        "made by mini\n",
        "{done:?}"
    );
    let trajectory = scene.exec("cat /root/trajectory.json").ok().stdout;
    let trajectory: Value = serde_json::from_str(&trajectory).expect("JSON");
    assert_eq!(trajectory["info"]["exit_status"], "Submitted");

    scene.ratoon.run(["rm", "-f", "box"]).ok();
    scene.over();
}
