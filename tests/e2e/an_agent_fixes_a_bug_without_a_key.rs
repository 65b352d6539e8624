//! `ratoon agent`: a model works on a directory in a machine that has neither keys nor a network, and what it did comes
//! back as a patch. The model is a script; bridge, machine and the loop in it are real.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ratoon_scripted_model::{Fault, Turn};
use ratoon_tests::{Done, PATIENCE, Ratoon, finish, program};
use serde_json::{Value, json};

use crate::scene::{KEY, Scene, search};

crate::promises![
    a_bug_is_fixed_and_the_patch_is_all_that_comes_back,
    the_best_of_two_children_takes_its_parents_place,
    a_step_that_was_kept_is_tried_once_more,
    a_machine_that_dies_in_a_call_goes_on_from_its_last_step_and_nothing_is_paid_twice,
    a_run_outlives_its_tokens_and_its_suspended_machine,
    a_bridge_that_dies_is_started_again_and_the_agent_goes_on,
    a_cancelled_agent_ends_and_leaves_nothing,
    the_key_is_in_no_file_and_in_no_machine,
];

/// How long an event may be waited for.
const SOON: Duration = PATIENCE;

/// With a directory that has a bug in it.
fn scene(turns: impl IntoIterator<Item = Turn>) -> Scene {
    let price = json!({"input": 3_000_000, "output": 15_000_000});
    let model = json!({"id": "m", "max_output_tokens": 1000, "price": price});
    let provider = json!({"wires": ["messages"], "models": [model]});
    let scene = Scene::new(turns, provider, json!({}));
    let work = scene.path("work");
    fs::create_dir_all(work.join(".git")).expect("a folder");
    fs::write(work.join(".git/config"), "[core]\n").expect("a file");
    fs::write(work.join("calc.py"), "def add(a, b):\n    return a - b\n").expect("a file");
    let test = "from calc import add\nassert add(2, 3) == 5, add(2, 3)\nprint('ok')\n";
    fs::write(work.join("test_calc.py"), test).expect("a file");
    scene
}

impl Scene {
    /// `ratoon agent run` on the directory.
    fn run_agent(&self, args: &[&str]) -> Command {
        let mut command = self
            .ratoon
            .command(["agent", "run", "--model", "scripted/m"]);
        command
            .args(["--memory", "256M", "--name", "box"])
            .arg("--bridge-config")
            .arg(self.path("bridge.json"))
            .arg("--dir")
            .arg(self.path("work"))
            .args(args)
            .arg("make the test pass")
            .env("RATOON_AGENT", program("ratoon-agent"));
        command
    }

    fn done(&self, args: &[&str]) -> Done {
        finish(self.run_agent(args).spawn().expect("ratoon can be started"))
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).expect("it is there")
    }
}

/// Looks, fixes, says that it is done.
fn fixes() -> Vec<Turn> {
    vec![
        Turn::tool(
            "bash",
            json!({"command": "python3 test_calc.py; cat calc.py"}),
        )
        .at(0),
        fix().at(1),
        Turn::text("The test passes.").at(2),
    ]
}

fn fix() -> Turn {
    Turn::tool(
        "str_replace_based_edit_tool",
        json!({"command": "str_replace", "path": "/work/calc.py", "old_str": "a - b", "new_str": "a + b"}),
    )
}

const PATCH: &str = "diff --git a/calc.py b/calc.py\n--- a/calc.py\n+++ b/calc.py\n@@ -1,2 +1,2 @@\n \
    def add(a, b):\n-    return a - b\n+    return a + b\n";

fn a_bug_is_fixed_and_the_patch_is_all_that_comes_back() {
    let scene = scene(fixes());
    let patch = scene.path("fix.patch");
    let done = scene
        .done(&[
            "--apply",
            "--patch",
            patch.to_str().expect("plain"),
            "--json",
        ])
        .ok();
    // Python has left its cache there, which is no part of the work.
    assert_eq!(scene.read("fix.patch"), PATCH);
    assert_eq!(
        scene.read("work/calc.py"),
        "def add(a, b):\n    return a + b\n"
    );
    assert!(!scene.path("work/__pycache__").exists());
    let lines: Vec<Value> = done
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let event = |name: &str| lines.iter().filter(|it| it["event"] == name).count();
    assert_eq!(
        (event("tool_call"), event("tool_result"), event("ended")),
        (2, 2, 1)
    );
    let last = lines.last().expect("a result");
    assert_eq!(
        (&last["ending"], &last["steps"]),
        (&json!("finished"), &json!(3)),
        "{last}"
    );
    assert_eq!(last["patch"], PATCH);

    let run = last["run"].as_str().expect("an id");
    let verified = scene.ratoon.run(["audit", "verify", run]).ok().stdout;
    assert!(
        verified.contains("1 kept heads; all as written"),
        "{verified}"
    );
    let log = scene.ratoon.run(["agent", "log", run]).ok().stdout;
    assert_eq!(log.matches("complete (200)").count(), 3, "{log}");
    let listed = scene.ratoon.run(["agent", "ps"]).ok().stdout;
    assert_eq!(listed.lines().count(), 1, "{listed}");
    assert!(scene.ratoon.run(["agent", "diff", run]).ok().stdout == PATCH);

    // A record that was touched is not what was written.
    let record = scene.path("runs").join(run).join("main.jsonl");
    let text = fs::read_to_string(&record).expect("a record");
    fs::write(&record, text.replacen("\"calls\":400", "\"calls\":900", 1)).expect("a file");
    let spoilt = scene.ratoon.run(["audit", "verify", run]);
    assert_eq!(spoilt.code(), 1, "{spoilt:?}");
    scene.over();
}

fn the_best_of_two_children_takes_its_parents_place() {
    let wild = "sed -i 's/a - b/5/' calc.py; touch wild";
    let scene = scene([
        Turn::tool("bash", json!({"command": "cat calc.py"})).at(0),
        Turn::tool("bash", json!({"command": wild}))
            .at(1)
            .when("be wild"),
        fix().at(1).when("be careful"),
        Turn::text("Done.").at(2).repeated(),
    ]);
    let run = scene.done(&["-d", "--hold-before", "2"]).ok().stdout;
    fs::write(scene.path("steer"), "be wild\n---\nbe careful\n").expect("a file");
    let path = |name: &str| scene.path(name).to_str().expect("plain").to_owned();
    // Files that are there cost a point; Python's own cache does not count.
    let scorer = "python3 test_calc.py && ls | grep -vc __pycache__ | sed 's/^/score -/'";
    let (steer, patch) = (path("steer"), path("best.patch"));
    let args = [
        "agent", "fork", "box", "-n", "2", "--json", "--steer", &steer, "--score", scorer,
    ];
    let forked = scene
        .ratoon
        .run(args.iter().chain(&["--patch", &patch]))
        .ok();
    let told: Value = serde_json::from_str(&forked.stdout).expect("JSON");
    let children = told["children"].as_array().expect("children");
    let of = |name: &str| {
        children
            .iter()
            .map(|it| it[name].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(of("branch"), ["main.0", "main.1"], "{told}");
    assert_eq!(of("ending"), ["finished", "finished"], "{told}");
    assert_eq!(of("score"), [-3.0, -2.0], "{told}");
    assert_eq!(of("kept"), [false, true], "{told}");
    assert_eq!(scene.read("best.patch"), PATCH);

    // The best has its parent's name; the loser has left its patch.
    let listed = scene.ratoon.run(["ps", "-a", "--json"]).ok().stdout;
    let listed: Value = serde_json::from_str(&listed).expect("JSON");
    assert_eq!(listed.as_array().map(Vec::len), Some(1), "{listed}");
    assert_eq!(
        (&listed[0]["name"], &listed[0]["id"]),
        (&json!("box"), &children[1]["vm"])
    );
    let loser = ["agent", "diff", run.trim(), "--branch", "main.0"];
    let loser = scene.ratoon.run(loser).ok().stdout;
    assert!(
        loser.contains("+    return 5") && loser.contains("new file mode"),
        "{loser}"
    );
    let tree = scene.ratoon.run(["agent", "tree", run.trim()]).ok().stdout;
    assert!(tree.contains("finished, kept"), "{tree}");

    scene.ratoon.run(["rm", "-f", "box"]).ok();
    let verified = scene
        .ratoon
        .run(["audit", "verify", run.trim()])
        .ok()
        .stdout;
    assert!(
        verified.contains("3 kept heads; all as written"),
        "{verified}"
    );
    scene.over();
}

/// What `ratoon agent tree` says of the first branch's kept steps.
fn kept(scene: &Scene, run: &str) -> Value {
    let tree = scene.ratoon.run(["agent", "tree", "--json", run]).ok();
    let tree: Value = serde_json::from_str(&tree.stdout).expect("JSON");
    tree["kept"]["main"].clone()
}

fn snapshots(scene: &Scene) -> Vec<String> {
    let listed = scene.ratoon.run(["snapshots", "--json"]).ok().stdout;
    let listed: Value = serde_json::from_str(&listed).expect("JSON");
    let all = listed.as_array().expect("a list").iter();
    let names = all.flat_map(|it| it["names"].as_array().expect("names"));
    names.filter_map(Value::as_str).map(str::to_owned).collect()
}

fn a_step_that_was_kept_is_tried_once_more() {
    let wild = "echo wild > wild; echo 'def add(a, b): return 5' > calc.py";
    let look = Turn::tool("bash", json!({"command": "cat calc.py; export SEEN=yes"}));
    let scene = scene([
        look.at(0),
        Turn::tool("bash", json!({"command": wild})).at(1),
        Turn::tool(
            "bash",
            json!({"command": "test \"$SEEN\" = yes && ! test -e wild && sed -i 's/a - b/a + b/' calc.py"}),
        )
        .at(1)
        .when("be careful")
        .repeated(),
        Turn::text("Done.").at(2).repeated(),
    ]);
    // It is done, and done badly; its machine and its steps stay.
    let done = scene.done(&["--keep-steps", "2", "--keep", "--json"]).ok();
    let last: Value =
        serde_json::from_str(done.stdout.lines().last().expect("a result")).expect("JSON");
    let run = last["run"].as_str().expect("an id").to_owned();
    assert_eq!(
        (&last["files"], &last["ending"]),
        (&json!(2), &json!("finished")),
        "{last}"
    );
    // At least the last two, and at most twice as many.
    assert_eq!(kept(&scene, &run), json!([1, 2, 3]));
    let names = [3, 2, 1].map(|step| format!("agent-{run}-main-{step}"));
    assert_eq!(snapshots(&scene), names);

    let refused = scene.ratoon.run(["agent", "fork", &run, "--at", "7"]);
    assert!(
        refused
            .stderr
            .contains("kept are steps 1 of main, 2 of main, 3 of main"),
        "{refused:?}"
    );

    fs::write(scene.path("steer"), "be careful\n").expect("a file");
    let path = |name: &str| scene.path(name).to_str().expect("plain").to_owned();
    let (steer, patch) = (path("steer"), path("best.patch"));
    let args = [
        "agent",
        "fork",
        &run,
        "--at",
        "2",
        "-n",
        "2",
        "--json",
        "--steer",
        &steer,
        "--score",
        "python3 test_calc.py && echo 1",
        "--patch",
        &patch,
    ];
    let forked = scene.ratoon.run(args).ok();
    let told: Value = serde_json::from_str(&forked.stdout).expect("JSON");
    for (child, kept) in told["children"]
        .as_array()
        .expect("children")
        .iter()
        .zip([true, false])
    {
        assert_eq!(
            (
                &child["ending"],
                &child["score"],
                &child["kept"],
                &child["error"]
            ),
            (&json!("finished"), &json!(1.0), &json!(kept), &Value::Null),
            "{told}"
        );
    }
    // Shell, files and conversation are those of that moment: nothing wild is in it.
    assert_eq!(scene.read("best.patch"), PATCH);
    // The best has its parent's place, so nobody can go back to the parent's steps.
    let listed = scene.ratoon.run(["ps", "-a", "--json"]).ok().stdout;
    let listed: Value = serde_json::from_str(&listed).expect("JSON");
    assert_eq!(listed.as_array().map(Vec::len), Some(1), "{listed}");
    assert_eq!(listed[0]["name"], "box");
    scene.ratoon.run(["rm", "-f", "box"]).ok();
    assert!(snapshots(&scene).is_empty(), "{:?}", snapshots(&scene));
    let verified = scene.ratoon.run(["audit", "verify", &run]).ok().stdout;
    assert!(
        verified.contains("3 kept heads; all as written"),
        "{verified}"
    );
    scene.over();
}

/// Waits until the model has been asked so often.
fn asked(scene: &Scene, times: usize) {
    let end = Instant::now() + SOON;
    while scene.model.seen().len() < times {
        assert!(Instant::now() < end, "the model is not called");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Kills the VMM of the machine that is called box.
fn kill_machine(scene: &Scene) {
    let listed = scene.ratoon.run(["ps", "--json"]).ok().stdout;
    let listed: Value = serde_json::from_str(&listed).expect("JSON");
    let pid = listed[0]["pid"].as_i64().expect("a pid");
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).expect("a pid"));
    rustix::process::kill_process(pid.expect("a pid"), rustix::process::Signal::KILL)
        .expect("it is ours");
}

fn a_machine_that_dies_in_a_call_goes_on_from_its_last_step_and_nothing_is_paid_twice() {
    let late = |turn: Turn| turn.broken(Fault::Late { ms: 20_000 });
    let scene = scene([
        Turn::tool("bash", json!({"command": "cat calc.py"})).at(0),
        fix().at(1),
        // Killed in the middle of the first one; the second is for the machine that goes on.
        late(Turn::text("never heard")).at(2),
        Turn::text("The test passes.").at(2),
    ]);
    let child = scene
        .run_agent(&["--keep-steps", "8", "--json"])
        .spawn()
        .expect("ratoon can be started");
    asked(&scene, 3);
    kill_machine(&scene);
    let done = finish(child);
    assert_ne!(done.code(), 0, "{done:?}");
    let run = fs::read_dir(scene.ratoon.vms_dir().with_file_name("agents"))
        .expect("runs")
        .next();
    let run = run.expect("a run").expect("a run").file_name();
    let run = run.to_str().expect("plain");
    wait_for(&scene, run, "the cut call", |log| cut(log) == 1);

    // Back to the first step: the answers of the first two are there.
    let resumed = ["agent", "resume", run, "--at", "1"];
    scene.ratoon.run(resumed).ok();
    let attached = scene.ratoon.run(["agent", "attach", run]).ok();
    assert_eq!(attached.stdout, PATCH, "{}", attached.stderr);
    // The boundary that it went on from among them.
    assert!(!attached.stderr.contains("is not kept"), "{attached:?}");
    assert_eq!(
        scene.model.seen().len(),
        4,
        "three, and one of a new attempt"
    );
    let log = scene.ratoon.run(["agent", "log", run]).ok().stdout;
    assert_eq!(log.matches("is given again").count(), 2, "{log}");
    assert_eq!(log.matches("complete (200)").count(), 3, "{log}");
    assert_eq!(cut(&log), 1, "{log}");
    scene.ratoon.run(["audit", "verify", run]).ok();
    assert!(snapshots(&scene).is_empty(), "{:?}", snapshots(&scene));
    scene.over();
}

fn a_run_outlives_its_tokens_and_its_suspended_machine() {
    let waits = |what: &str| Turn::tool("bash", json!({"command": format!("sleep 7; {what}")}));
    let scene = scene([
        waits("cd /tmp; KEPT=yes").at(0),
        waits("sleep 7; cd /work; test $KEPT = yes && sed -i 's/a - b/a + b/' calc.py").at(1),
        waits("python3 test_calc.py").at(2),
        Turn::text("The test passes.").at(3),
    ]);
    let config = scene.read("bridge.json");
    let mut config: Value = serde_json::from_str(&config).expect("JSON");
    config["limits"] = json!({"token_s": 6});
    fs::write(scene.path("bridge.json"), config.to_string()).expect("a file");
    // Its first tool takes longer than a token lives.
    let mut child = scene
        .run_agent(&["--json"])
        .spawn()
        .expect("ratoon can be started");
    asked(&scene, 2);
    // It leaves the machine alone, as a terminal that is closed.
    let pid = i32::try_from(child.id()).expect("a pid");
    let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::HUP).expect("it is ours");
    child.wait().expect("it ends");
    scene.ratoon.run(["suspend", "box"]).ok();
    let listed = scene
        .ratoon
        .run(["agent", "ps", "-a", "--json"])
        .ok()
        .stdout;
    let listed: Value = serde_json::from_str(&listed).expect("JSON");
    let run = listed[0]["id"].as_str().expect("an id").to_owned();
    assert_eq!(listed[0]["machines"], json!({}), "{listed}");
    // All tokens that there were are too old.
    std::thread::sleep(Duration::from_secs(7));
    scene
        .ratoon
        .run(["agent", "resume", &run, "--from", "box", "--name", "again"])
        .ok();
    let done = scene.ratoon.run(["agent", "attach", &run]).ok();
    assert_eq!(done.stdout, PATCH, "{}", done.stderr);
    let log = scene.ratoon.run(["agent", "log", &run]).ok().stdout;
    assert_eq!(log.matches("complete (200)").count(), 4, "{log}");
    assert!(
        log.matches(", 6 s").count() >= 5,
        "tokens were renewed: {log}"
    );
    assert!(log.contains("it stood still"), "{log}");
    scene.ratoon.run(["audit", "verify", &run]).ok();
    scene.ratoon.run(["snapshots", "rm", "box"]).ok();
    scene.over();
}

/// The process of the bridge.
fn bridge(ratoon: &Ratoon) -> i32 {
    let status = ratoon.run(["agent", "bridge", "status", "--json"]).ok();
    let status: Value = serde_json::from_str(&status.stdout).expect("JSON");
    let pid = status["running"]["process"]["pid"].as_i64();
    i32::try_from(pid.expect("it runs")).expect("a pid")
}

fn a_bridge_that_dies_is_started_again_and_the_agent_goes_on() {
    let scene = scene(fixes());
    let run = scene.done(&["-d", "--hold-before", "2"]).ok().stdout;
    wait_for(&scene, run.trim(), "the answer", |log| {
        log.contains("complete (200)")
    });
    let first = bridge(&scene.ratoon);
    let pid = rustix::process::Pid::from_raw(first).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it is ours");
    let args = ["agent", "attach", run.trim(), "--go"];
    let done = scene.ratoon.run(args).ok();
    assert_eq!(done.stdout, PATCH, "{}", done.stderr);
    // What was spent before is not forgotten: one record, which goes on.
    let log = scene.ratoon.run(["agent", "log", run.trim()]).ok().stdout;
    assert_eq!(log.matches("complete (200)").count(), 3, "{log}");
    assert_eq!(log.matches("works on it").count(), 2, "{log}");
    scene.ratoon.run(["audit", "verify", run.trim()]).ok();
    scene.over();
}

fn wait_for(scene: &Scene, run: &str, what: &str, is_there: impl Fn(&str) -> bool) {
    let end = Instant::now() + SOON;
    while !is_there(&scene.ratoon.run(["agent", "log", run]).stdout) {
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Calls that ended with their machine: its connection broke, or somebody had heard of its end before.
fn cut(log: &str) -> usize {
    log.matches("guest_gone").count() + log.matches("removed").count()
}

fn a_cancelled_agent_ends_and_leaves_nothing() {
    let waits = "echo begun; sleep 1000";
    let scene = scene([Turn::tool("bash", json!({"command": waits})).at(0)]);
    let child = scene
        .run_agent(&["--json"])
        .spawn()
        .expect("ratoon can be started");
    let end = Instant::now() + SOON;
    while scene.model.seen().is_empty() {
        assert!(Instant::now() < end, "the model is not called");
        std::thread::sleep(Duration::from_millis(50));
    }
    interrupt(&child);
    let done = finish(child);
    assert_eq!(done.code(), 130, "{done:?}");
    assert!(done.stdout.contains("\"ending\":\"cancelled\""), "{done:?}");
    scene.over();
}

fn interrupt(child: &Child) {
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(rustix::process::Pid::from_raw);
    let sent = rustix::process::kill_process(pid.expect("a pid"), rustix::process::Signal::INT);
    sent.expect("it is ours");
}

fn the_key_is_in_no_file_and_in_no_machine() {
    let look = "cat /proc/*/environ /proc/*/cmdline /run/ratoon/* 2> /dev/null | tr '\\0' ' '; env";
    let scene = scene([
        Turn::tool("bash", json!({"command": look})).at(0),
        Turn::text("Nothing here.").at(1),
    ]);
    // By descriptor this time.
    let config = scene.read("bridge.json");
    let mut config: Value = serde_json::from_str(&config).expect("JSON");
    config["providers"][0]["key"] = json!({"fd": 3});
    fs::write(scene.path("bridge.json"), config.to_string()).expect("a file");
    let run = scene.run_agent(&["--keep", "--json"]);
    let mut command = Command::new("sh");
    command
        .args(["-c", "exec 3< \"$0\"; exec \"$@\""])
        .arg(scene.path("key"))
        .arg(run.get_program())
        .args(run.get_args())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    for (name, value) in run.get_envs() {
        command.env(name, value.unwrap_or_default());
    }
    let done = finish(command.spawn().expect("a shell")).ok();
    let processes = scene.ratoon.processes();
    assert!(
        processes.len() >= 2,
        "the bridge and the machine: {processes:?}"
    );
    for pid in processes {
        let open = fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten();
        let open = open
            .flatten()
            .filter_map(|fd| fs::read_link(fd.path()).ok());
        let open: Vec<_> = open.collect();
        assert!(!open.contains(&scene.path("key")), "{pid} has {open:?}");
    }
    // A snapshot of it: its memory, its disk.
    scene.ratoon.run(["snapshot", "box", "after"]).ok();
    for text in [&done.stdout, &done.stderr] {
        assert!(!text.contains(KEY), "{text}");
    }
    let folders = [scene.ratoon.state_dir().to_owned(), scene.path("runs")];
    let searched: u64 = folders.iter().map(|folder| search(folder)).sum();
    assert!(searched > 1 << 20, "only {searched} bytes were searched");
    scene.ratoon.run(["rm", "-f", "box"]).ok();
    scene.ratoon.run(["snapshots", "rm", "after"]).ok();
    scene.over();
}
