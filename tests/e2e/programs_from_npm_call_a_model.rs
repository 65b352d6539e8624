//! `ratoon run --model`: the vendors' SDKs for Node, and Codex CLI, call a model from a machine that has neither keys nor
//! a network. They are as they come from npm; the model is a script; all else is real.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use ratoon_scripted_model::Turn;
use ratoon_tests::{Done, cache, finish_within};
use serde_json::{Value, json};

use crate::any_program_calls_a_model::{LONG, all_are_ok, cases, programs, scene};
use crate::scene::Scene;

crate::promises![the_vendors_sdks_for_node_and_codex_run_as_they_are];

/// What the image is called that has them.
const IMAGE: &str = "debian-npm";
const TESTS: [&str; 4] = [
    "told.mjs",
    "openai_sdk.mjs",
    "anthropic_sdk.mjs",
    "sdks.mjs",
];

fn run(command: &mut Command) -> Done {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    finish_within(command.spawn().expect("a program"), LONG).ok()
}

/// A folder with all that npm has of them, made once and kept in the user's cache under the hash of what it is made from.
fn packages() -> PathBuf {
    let source = programs().join("node");
    let mut hasher = blake3::Hasher::new();
    for name in ["bundle", "package.json", "package-lock.json"] {
        hasher.update(&fs::read(source.join(name)).expect("a file"));
    }
    let all = cache::users().join("test-packages");
    let path = all.join(format!("npm-{}", hasher.finalize().to_hex()));
    if !path.exists() {
        fs::create_dir_all(&all).expect("a folder");
        let made = tempfile::tempdir_in(&all).expect("a folder");
        run(Command::new(source.join("bundle")).arg(made.path()));
        // Another may have been quicker: that one is the same.
        if fs::rename(made.path(), &path).is_ok() {
            let _ = made.keep();
        }
    }
    path
}

/// Makes the image: sent into a machine, so much takes minutes where guests are emulated.
fn make_image(scene: &Scene) {
    let packages = packages();
    let mut orders = fs::read_to_string(packages.join("orders")).expect("a file");
    for name in TESTS {
        let file = programs().join("node").join(name);
        orders += &format!("write \"{}\" /opt/programs/{name}\n", file.display());
    }
    fs::write(scene.path("orders"), orders).expect("a file");
    let debian = scene.told(&["image", "inspect", "debian"]);
    let disk = scene.path("disk");
    run(Command::new("cp")
        .arg("--sparse=always")
        .arg(debian["disk"].as_str().expect("a path"))
        .arg(&disk));
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o600)).expect("a mode");
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    run(Command::new("debugfs")
        .current_dir(packages)
        .env("PATH", path)
        .args(["-w", "-f"])
        .arg(scene.path("orders"))
        .arg(&disk));
    let mut import = scene.ratoon.command(["image", "import"]);
    run(import.arg(&disk).args(["--kind", "ext4", "--name", IMAGE]));
    fs::remove_file(disk).expect("it can be removed");
}

/// What Codex's model says, and what it is to be asked for.
fn codex_turns() -> [Turn; 2] {
    let make = json!({"cmd": "echo made by codex > /root/made"});
    let make = Turn::tool("exec_command", make).at(0);
    let said = Turn::text("It is made.").at(1);
    [make, said].map(|turn| turn.when("write a file"))
}

fn the_vendors_sdks_for_node_and_codex_run_as_they_are() {
    let scene = scene(codex_turns().into_iter().chain(cases()));
    make_image(&scene);
    let flags = ["-d", "--name", "box", "--image", IMAGE, "--memory", "512M"];
    scene.run_program(&flags, &[]).ok();
    let exec = |command: &[&str]| run(scene.ratoon.command(["exec", "box", "--"]).args(command));

    // In one process, for starting Node takes longest.
    let done = exec(&["node", "/opt/programs/sdks.mjs"]);
    all_are_ok(&done, 13 + 12);

    // Its home is in memory, for it begins with databases: on an emulated disk they take a minute.
    scene.give(
        &programs().join("node/codex.toml"),
        "mkdir /dev/shm/codex && cat > /dev/shm/codex/config.toml",
    );
    let codex = "CODEX_HOME=/dev/shm/codex codex exec --model $RATOON_MODEL --skip-git-repo-check \
        --dangerously-bypass-approvals-and-sandbox 'write a file' < /dev/null";
    let done = exec(&["sh", "-c", codex]);
    assert_eq!(done.stdout, "It is made.\n", "{done:?}");
    assert_eq!(exec(&["cat", "/root/made"]).stdout, "made by codex\n");
    let seen = scene.model.seen();
    let last = &seen.last().expect("its second request").body;
    let types = |list: &Value| -> Vec<Value> {
        let list = list.as_array().expect("a list").iter();
        list.map(|entry| entry["type"].clone()).collect()
    };
    assert!(
        types(&last["input"]).ends_with(&[json!("function_call"), json!("function_call_output")]),
        "{last}"
    );
    // Its search at the provider was left out (`over` looks); tools of its own and groups of them were not.
    let tools = types(&last["tools"]);
    assert!(
        tools.contains(&json!("function")) && tools.contains(&json!("namespace")),
        "{last}"
    );

    scene.ratoon.run(["rm", "-f", "box"]).ok();
    scene.ratoon.run(["image", "rm", IMAGE]).ok();
    scene.over();
}
