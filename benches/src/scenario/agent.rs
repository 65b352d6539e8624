//! What an agent costs beyond its model and its tools: the bridge alone, a step of the loop, many agents at once, a
//! fork with all children at the model. The model is the scripted one of the tests: it answers at once.
//!
//! A step is split by who measured it: the loop itself (`own_ms`), the call as the guest sees it, the same call as the
//! bridge records it. What lies between the last two is vsock, with the guest's kernel on one side and the VMM on the
//! other; of the bridge's the model's own answer is a part, which is measured beside it without a bridge.

use std::io::{BufRead as _, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use ratoon_bridge_api::amount::Limits;
use ratoon_bridge_api::control::{AddVm, Client, MintToken, Reply, Request};
use ratoon_engine::vm::store::Store;
use ratoon_scripted_model::{Fault, Script, Server, Turn};
use serde_json::{Value, json};

use super::{Plan, series, verdict};
use crate::machine::{Process, go_on};
use crate::proc;
use crate::samples::{Readiness, Samples, number, percentile};

const NAME: &str = "agent";
const ROUTE: &str = "/v1/chat/completions";
const WHOLE: &str = "bridge: a whole answer, added";
const FIRST: &str = "bridge: first byte of a stream, added";
const RESIDENT: &str = "bridge: peak memory, all agents";
const WHOLE_TARGET_MS: f64 = 1.0;
const FIRST_TARGET_MS: f64 = 5.0;
const RESIDENT_TARGET_MIB: f64 = 32.0;
/// Agents at once.
const MANY: usize = 20;
/// Children of the fork.
const CHILDREN: usize = 4;
const PATIENCE: Duration = Duration::from_secs(600);

/// Runs it.
///
/// # Errors
/// When the bridge or an agent does not do its work.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    bridge_alone(plan, samples)?;
    steps(plan, samples)?;
    fork(plan, samples)?;
    if !plan.quick {
        many(plan, samples)?;
    }
    Ok(())
}

/// A folder, a model in it, and its bridge's configuration.
struct Place {
    folder: tempfile::TempDir,
    model: Server,
    ratoon: PathBuf,
    cache: PathBuf,
}

impl Place {
    fn new(plan: &Plan<'_>, turns: impl IntoIterator<Item = Turn>) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("ratoon-bench-").tempdir()?;
        let model = Server::start(Script::new(turns))?;
        let config = json!({
            "records": folder.path().join("runs"),
            "limits": {"vm_requests_a_minute": 1_000_000},
            "providers": [{"name": "p", "base_url": model.url(), "key": "none", "wires": ["chat"],
                           "models": [{"id": "m", "max_output_tokens": 100}]}],
        });
        std::fs::write(folder.path().join("bridge.json"), config.to_string())?;
        // Beside the programs that it starts.
        let ratoon = plan.parts.vmm.with_file_name("ratoon");
        let cache = plan.parts.cache.clone();
        Ok(Self {
            folder,
            model,
            ratoon,
            cache,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `ratoon agent …` in a state of its own, with the user's images.
    fn agent(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.ratoon);
        command
            .arg("agent")
            .args(args)
            .env("XDG_STATE_HOME", self.path("state"))
            .env(
                "XDG_CACHE_HOME",
                self.cache.parent().unwrap_or(Path::new("/")),
            )
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn run(&self, args: &[&str]) -> Command {
        let mut command = self.agent(&["run", "--model", "p/m", "--memory", "256M"]);
        command
            .arg("--bridge-config")
            .arg(self.path("bridge.json"))
            .args(args)
            .arg("work");
        command
    }

    /// The bridge that the agents use.
    fn bridge_pid(&self) -> Result<u32> {
        let state = std::fs::read(self.path("state/ratoon/bridge/process.json"))?;
        let state: Value = serde_json::from_slice(&state)?;
        let pid = state["process"]["pid"].as_u64().context("no pid")?;
        Ok(u32::try_from(pid)?)
    }

    /// What all machines and the bridge have used of the processors by now.
    fn used(&self) -> Result<Used> {
        let mut used = Used {
            ours_ns: proc::cpu_total_ns(self.bridge_pid()?)?,
            ..Used::default()
        };
        for entry in Store::new(self.path("state/ratoon/vms")).list()? {
            let vmm = entry.record.ok().and_then(|record| record.vmm);
            let pid = u32::try_from(vmm.context("a machine without a VMM")?.pid)?;
            let vcpus_ns = proc::cpu(pid)?.vcpus_ns;
            used.vcpus_ns += vcpus_ns;
            used.ours_ns += proc::cpu_total_ns(pid)?.saturating_sub(vcpus_ns);
        }
        Ok(used)
    }
}

/// Processor time, in nanoseconds.
#[derive(Debug, Clone, Copy, Default)]
struct Used {
    /// Guests' processors: their kernels and programs, and what KVM does for them.
    vcpus_ns: u64,
    /// All else.
    ours_ns: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        // What a failure has left; there is nothing, as a rule.
        let mut ended = Command::new(&self.ratoon);
        let state = self.path("state");
        let vms = std::fs::read_dir(state.join("ratoon/vms"))
            .into_iter()
            .flatten();
        let vms: Vec<_> = vms.flatten().map(|vm| vm.file_name()).collect();
        if !vms.is_empty() {
            let _ = ended
                .args(["rm", "-f"])
                .args(vms)
                .env("XDG_STATE_HOME", &state)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
        }
    }
}

fn peak_mib(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.context("no VmHWM")?.parse::<f64>()? / 1024.0)
}

/// Waits for a command; its standard output.
fn output(mut command: Command) -> Result<String> {
    let output = command.output().context("ratoon")?;
    if !output.status.success() {
        bail!(
            "{command:?} ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8(output.stdout)?)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The same request by way of the bridge and without it, by turns.
fn bridge_alone(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let place = Place::new(plan, [Turn::text("ok").repeated()])?;
    let control = place.path("control");
    let child = Command::new(&plan.parts.programs.bridge)
        .args(["serve", "--lifeline", "--config"])
        .arg(place.path("bridge.json"))
        .arg("--control")
        .arg(&control)
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("ratoon-bridge")?;
    let process = Process(child);
    let from = Instant::now();
    while !control.exists() {
        if from.elapsed() > PATIENCE {
            bail!("the bridge does not listen");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut control = Client::connect(&control, Duration::from_secs(10))?;
    let socket = place.path("vm.sock");
    control.call(&Request::AddVm(AddVm {
        vm: "vm".into(),
        socket: socket.clone(),
        run: "run".into(),
        branch: "main".into(),
        parent: None,
        budget: Limits {
            calls: Some(1_000_000),
            ..Limits::default()
        },
        models: None,
    }))?;
    let mint = MintToken {
        vm: "vm".into(),
        ttl_s: 3600,
        revoke_older: false,
    };
    let Reply::Token { token, .. } = control.call(&Request::MintToken(mint))? else {
        bail!("no token");
    };
    let address = place.model.url().trim_start_matches("http://").to_owned();
    for (streamed, what, target) in [
        (false, WHOLE, WHOLE_TARGET_MS),
        (true, FIRST, FIRST_TARGET_MS),
    ] {
        let bridged = UnixStream::connect(&socket)?;
        let direct = std::net::TcpStream::connect(&address)?;
        direct.set_nodelay(true)?;
        let (mut to_bridge, mut to_model) = (bridged.try_clone()?, direct.try_clone()?);
        let (mut bridged, mut direct) = (BufReader::new(bridged), BufReader::new(direct));
        let budget = plan.budget.part(0.1);
        // The first round makes connections.
        for round in budget.rounds(plan.rounds(500, 100) + 1) {
            go_on()?;
            let with = ask(&mut to_bridge, &mut bridged, &token.0, streamed)?;
            let without = ask(&mut to_model, &mut direct, &token.0, streamed)?;
            if round > 0 {
                add(samples, what, round, ms(with) - ms(without))?;
                let model = format!("{}, without", what.trim_end_matches(", added"));
                add(samples, &model, round, ms(without))?;
            }
        }
        judge(samples, what, target, "ms");
    }
    drop(process);
    Ok(())
}

fn judge(samples: &mut Samples, what: &str, target: f64, unit: &str) {
    if let Some(p50) = percentile(samples.of_case(NAME, "ratoon", "", what), 50) {
        samples.note(format!(
            "{NAME}: {what}: p50 {} {unit}, target at most {} {unit}: {}",
            number(p50),
            number(target),
            verdict(p50 <= target)
        ));
    }
}

/// Asks; the time until the first byte of the body of a stream, or the last of a document.
fn ask(
    to: &mut impl Write,
    from: &mut BufReader<impl Read>,
    token: &str,
    streamed: bool,
) -> Result<Duration> {
    let body = json!({
        "model": "m", "max_tokens": 100, "stream": streamed,
        "messages": [{"role": "user", "content": "hi"}],
    })
    .to_string();
    let request = format!(
        "POST {ROUTE} HTTP/1.1\r\nhost: h\r\nx-ratoon-token: {token}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let since = Instant::now();
    to.write_all(request.as_bytes())?;
    let mut line = String::new();
    from.read_line(&mut line)?;
    if !line.contains(" 200 ") {
        bail!("answered with {line:?}");
    }
    while from.read_line(&mut line)? > 2 {
        line.clear();
    }
    let mut first = None;
    loop {
        line.clear();
        from.read_line(&mut line)?;
        let len = usize::from_str_radix(line.trim_end(), 16)?;
        let mut piece = vec![0; len + 2];
        from.read_exact(&mut piece)?;
        first.get_or_insert_with(|| since.elapsed());
        if len == 0 {
            return Ok(first.filter(|_| streamed).unwrap_or(since.elapsed()));
        }
    }
}

/// One agent, whose tool does nothing.
fn steps(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let count = plan.rounds(30, 5);
    let mut turns: Vec<Turn> = (0..count)
        .map(|number| Turn::tool("bash", json!({"command": format!("true {number}")})))
        .collect();
    turns.push(Turn::text("Done.").repeated());
    let place = Place::new(plan, turns)?;
    let most = (count + 5).to_string();
    let mut command = place.run(&["--json", "--profile", "minimal", "--max-steps", &most]);
    command.stderr(Stdio::null());
    let said = output(command)?;
    let mut calls = Vec::new();
    for line in said.lines() {
        let event: Value = serde_json::from_str(line)?;
        match event["event"].as_str() {
            Some("answered") => calls.push((
                event["own_ms"].as_f64().context("no own_ms")?,
                event["first_ms"].as_f64().context("no first_ms")?,
                event["ms"].as_f64().context("no ms")?,
            )),
            Some("tool_result") => {
                let tool = series(
                    NAME,
                    "ratoon",
                    "step: the tool (true)",
                    "ms",
                    Readiness::None,
                );
                samples.add(&tool, calls.len(), event["ms"].as_f64().unwrap_or(f64::NAN))?;
            }
            _ => {}
        }
    }
    let recorded = recorded(&place)?;
    if calls.len() != count + 1 || recorded.len() != calls.len() {
        bail!(
            "{} answers in the guest, {} in the record",
            calls.len(),
            recorded.len()
        );
    }
    // The first step pays for what was never touched.
    for (round, ((own, first, all), (bridge_first, bridge))) in
        calls.into_iter().zip(recorded).enumerate().skip(1)
    {
        for (what, value) in [
            ("step: the loop's own work in the guest", own),
            ("step: call, as the guest sees it", all),
            ("step: call, first byte, as the guest sees it", first),
            (
                "step: call, as the bridge has it (the model's answer with it)",
                bridge,
            ),
            ("step: vsock and the guest's kernel", all - bridge),
            (
                "step: vsock and the guest's kernel, first byte",
                first - bridge_first,
            ),
            ("step: beyond model and tool", own + all - bridge),
        ] {
            add(samples, what, round, value)?;
        }
    }
    Ok(())
}

/// A time of ours, in milliseconds.
fn add(samples: &mut Samples, what: &str, round: usize, value: f64) -> Result<()> {
    let series = series(NAME, "ratoon", what, "ms", Readiness::None);
    samples.add(&series, round, value)
}

/// First byte and whole of each answer, in milliseconds, as the only run's record has them.
fn recorded(place: &Place) -> Result<Vec<(f64, f64)>> {
    let mut runs = std::fs::read_dir(place.path("runs"))?;
    let run = runs.next().context("no record")??.path();
    let text = std::fs::read_to_string(run.join("main.jsonl"))?;
    let mut found = Vec::new();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line)?;
        if line["kind"] == "answer" {
            let of = |name: &str| line[name].as_f64().map(|us| us / 1e3);
            let times = of("first_byte_us").zip(of("total_us"));
            found.push(times.context("an answer without times")?);
        }
    }
    Ok(found)
}

/// An agent that is held, forked: until all children are at the model.
fn fork(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    for round in plan.budget.part(0.3).rounds(plan.rounds(5, 1)) {
        go_on()?;
        let late = Turn::text("Done.").broken(Fault::Late { ms: 3000 });
        let place = Place::new(
            plan,
            [
                Turn::tool("bash", json!({"command": "true"})).at(0),
                late.repeated(),
            ],
        )?;
        let run = output(place.run(&["-d", "--hold-before", "2", "--profile", "minimal"]))?;
        let run = run.trim();
        let held = Instant::now();
        // It is held once its only call has been answered and its tool has run.
        while place.model.seen().is_empty() {
            if held.elapsed() > PATIENCE {
                bail!("the agent does not call its model");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_secs(2));
        let count = CHILDREN.to_string();
        let before = place.used()?;
        let from = Instant::now();
        let child = place
            .agent(&["fork", run, "-n", &count, "--json"])
            .spawn()?;
        let mut at = Vec::new();
        while at.len() < CHILDREN {
            let calls = place.model.seen().len() - 1;
            while at.len() < calls {
                at.push(ms(from.elapsed()));
            }
            if from.elapsed() > PATIENCE {
                bail!("{} of {CHILDREN} children call their model", at.len());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let used = place.used()?;
        let command_ns = proc::cpu_of_all_ns(child.id())?;
        let in_flight = at.last().copied().unwrap_or_default() - at[0] < 3000.0;
        let done = child.wait_with_output()?;
        if !done.status.success() {
            bail!("the fork: {}", String::from_utf8_lossy(&done.stderr));
        }
        if !in_flight {
            samples.note(format!(
                "{NAME}: round {round}: the first answer came before the last call"
            ));
        }
        for (what, value) in [
            ("fork: to the first call in flight", at[0]),
            ("fork: to four calls in flight", at[CHILDREN - 1]),
            (
                "fork: processor time meanwhile, guests' vCPUs",
                used.vcpus_ns.saturating_sub(before.vcpus_ns) as f64 / 1e6,
            ),
            (
                "fork: processor time meanwhile, VMMs' other threads, engine, bridge",
                (used.ours_ns.saturating_sub(before.ours_ns) + command_ns) as f64 / 1e6,
            ),
        ] {
            add(samples, what, round, value)?;
        }
    }
    Ok(())
}

/// Many agents at once, each two steps.
fn many(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let place = Place::new(
        plan,
        [
            Turn::tool("bash", json!({"command": "true"}))
                .at(0)
                .repeated(),
            Turn::text("Done.").at(1).repeated(),
        ],
    )?;
    // It keeps the bridge when the first of the others have ended.
    output(place.run(&["-d", "--hold-before", "1", "--name", "first"]))?;
    let from = Instant::now();
    let all: Vec<_> = (0..MANY)
        .map(|_| {
            place
                .run(&["--profile", "minimal", "--boot-timeout", "10m"])
                .spawn()
        })
        .collect::<Result<_, _>>()?;
    let mut failed = Vec::new();
    for (number, child) in all.into_iter().enumerate() {
        let done = child.wait_with_output()?;
        if !done.status.success() {
            failed.push(format!(
                "{number}: {}",
                String::from_utf8_lossy(&done.stderr).trim()
            ));
        }
    }
    let seconds = from.elapsed().as_secs_f64();
    let peak = peak_mib(place.bridge_pid()?)?;
    samples.add(
        &series(NAME, "ratoon", RESIDENT, "MiB", Readiness::None),
        0,
        peak,
    )?;
    let what = series(
        NAME,
        "ratoon",
        "20 agents at once, from run to removed",
        "s",
        Readiness::None,
    );
    samples.add(&what, 0, seconds)?;
    samples.note(format!(
        "{NAME}: {MANY} agents at once: {} failed; the bridge's peak is {} MiB, target at most {} MiB: {}",
        failed.len(),
        number(peak),
        number(RESIDENT_TARGET_MIB),
        verdict(failed.is_empty() && peak <= RESIDENT_TARGET_MIB)
    ));
    match failed.first() {
        None => Ok(()),
        Some(first) => Err(anyhow!(
            "{} of {MANY} agents failed, the first: {first}",
            failed.len()
        )),
    }
}
