//! A machine that goes on from another one's memory is another machine: docs/fork-safety.md has a line for
//! each way in which it is, and names these tests.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ratoon_client::blocking::Client;
use ratoon_protocol::{Awake, Call, Wake};
use ratoon_tests::{PATIENCE, Ratoon};
use serde_json::Value;

crate::promises![
    children_and_clones_differ_in_all_that_is_a_machines_own,
    connections_to_elsewhere_are_reset_and_the_parents_go_on_as_root,
    a_child_that_cannot_be_woken_is_ended_and_its_forker_told,
    a_secret_is_no_childs,
];

const PROBE: &str = include_str!("siblings.py");
const CONNECTED: &str = include_str!("connected.py");

fn exec(ratoon: &Ratoon, vm: &str, line: &str) -> String {
    ratoon.run(["exec", vm, "--", "sh", "-c", line]).ok().stdout
}

fn code(ratoon: &Ratoon, vm: &str, language: &str, cell: &str) -> String {
    let args = ["code", vm, "-l", language, "-c", cell];
    ratoon.run(args).ok().stdout
}

/// Puts a program into a machine.
fn put(ratoon: &Ratoon, vm: &str, name: &str, text: &str) {
    let file = ratoon.state_dir().join(name);
    std::fs::write(&file, text).expect("a file for the program");
    let path = file.to_str().expect("a path of letters");
    ratoon.run(["cp", path, &format!("{vm}:/root/{name}")]).ok();
}

fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("a time after 1970").as_secs_f64()
}

/// All that a machine says of itself. What differs from machine to machine has a name that does not begin with
/// `same`.
fn ask(ratoon: &Ratoon, vm: &str) -> BTreeMap<String, Value> {
    let before = now();
    let said = exec(
        ratoon,
        vm,
        "cd /root; echo > asks; cat answers; echo; hostname; cat /etc/hostname; \
         echo $(cat /etc/machine-id); cat /run/ratoon/id /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | od -An -tx1 | tr -d ' '; \
         date +%s.%N; cat /run/ratoon/wakes /proc/sys/kernel/random/boot_id; \
         cd /run/ratoon; stat -c '%n %a' * | tr '\\n' ' '; echo; grep -c '^tmpfs /etc/' /proc/mounts",
    );
    let after = now();
    let mut lines = said.lines();
    let mut line = || lines.next().unwrap_or_else(|| panic!("{vm}: {said}"));
    let mut all: BTreeMap<String, Value> =
        serde_json::from_str(line()).unwrap_or_else(|error| panic!("{vm}: {error}: {said}"));
    let mut note = |name: &str, value: &str| all.insert(name.to_owned(), value.into());
    let hostname = line();
    note("hostname", hostname);
    assert_eq!(line(), hostname, "/etc/hostname");
    for name in ["machine-id", "id", "kernel's uuid", "/dev/urandom"] {
        note(name, line());
    }
    let time: f64 = line().parse().expect("a time");
    assert!(
        (before - 2.0..=after + 2.0).contains(&time),
        "{vm}: its clock says {time}, we {before} to {after}"
    );
    note("same: woken so often", line());
    note("same: boot", line());
    assert!(
        line().starts_with("generation 644 id 644 index 644"),
        "{vm}: {said}"
    );
    assert_eq!(line(), "3", "names are in memory");
    let context = "print(random.random(), ssl.RAND_bytes(8).hex(), uuid.uuid4())";
    let said = code(ratoon, vm, "python", context);
    let words = said.split_whitespace();
    for (name, word) in ["random", "OpenSSL", "uuid"].into_iter().zip(words) {
        note(&format!("context's {name}"), word);
    }
    note(
        "context's RANDOM",
        &code(ratoon, vm, "bash", "echo $RANDOM $RANDOM $RANDOM $RANDOM"),
    );
    assert_eq!(all.len(), 16, "{vm}: {all:?}");
    all
}

fn children_and_clones_differ_in_all_that_is_a_machines_own() {
    let ratoon = Ratoon::warm();
    ratoon
        .run(["run", "-d", "--name", "parent", "--memory", "256M"])
        .ok();
    put(&ratoon, "parent", "siblings.py", PROBE);
    let begin = "cd /root && mkfifo asks answers && (setsid sh -c 'python3 siblings.py asks answers \
                 2>errors; cat errors > answers' >/dev/null 2>&1 </dev/null &) ; cat answers; \
                 cat /proc/sys/kernel/random/boot_id > /dev/null";
    assert_eq!(exec(&ratoon, "parent", begin), "ready");
    // Generators are seeded by their first use: each machine has this state.
    let seeded = "import random, ssl, uuid; random.random(); ssl.RAND_bytes(1); uuid.uuid4(); None";
    code(&ratoon, "parent", "python", seeded);
    code(&ratoon, "parent", "bash", "true $RANDOM");

    let forked = [
        "fork",
        "parent",
        "-n",
        "2",
        "--name",
        "child",
        "--message",
        "try it",
    ];
    assert_eq!(ratoon.run(forked).ok().stdout, "child-0\nchild-1\n");
    ratoon.run(["snapshot", "child-1", "siblings"]).ok();
    for name in ["clone", "twin"] {
        ratoon.run(["restore", "siblings", "--name", name]).ok();
    }

    let machines = ["parent", "child-0", "child-1", "clone", "twin"];
    let said = machines.map(|vm| (vm, ask(&ratoon, vm)));
    for (index, (vm, all)) in said.iter().enumerate() {
        assert_eq!(all["hostname"], *vm);
        for (other, theirs) in &said[..index] {
            for (what, value) in all.iter().filter(|(what, _)| !what.starts_with("same")) {
                assert_ne!(*value, theirs[what], "{what} of {vm} and {other}");
            }
        }
    }
    // It is one boot, and one seed of a program that asked for it: see docs/fork-safety.md.
    for what in ["same: boot", "same: a generator of its own"] {
        assert!(said.iter().all(|(_, all)| all[what] == said[0].1[what]));
    }
    let wakes = ["1", "1", "2", "2", "2"];
    for ((vm, all), wakes) in said.iter().zip(wakes) {
        // A warm start was woken once more.
        let own = |all: &BTreeMap<String, Value>| -> Option<u64> {
            all["same: woken so often"].as_str()?.parse().ok()
        };
        let first = own(&said[0].1).expect("a number") - 1;
        let expected = wakes.parse::<u64>().expect("a number") + first;
        assert_eq!(own(all), Some(expected), "{vm}");
    }

    // Which child it is: of a fork, and still so when it goes on from its own snapshot; not when it is a
    // restored machine.
    let which = "cd /run/ratoon; echo ${RATOON_CHILD-none} $(cat index) $(cat message)";
    let expected = [
        ("parent", "none 0\n"),
        ("child-0", "0 0 try it\n"),
        ("child-1", "1 1 try it\n"),
        ("clone", "none 0\n"),
    ];
    for (vm, expected) in expected {
        assert_eq!(exec(&ratoon, vm, which), expected, "{vm}");
    }
    let cell = "import os; print(os.environ.get('RATOON_CHILD'))";
    let later = ["code", "child-1", "-x", "later", "-c", cell];
    assert_eq!(ratoon.run(later).ok().stdout, "1\n");

    for vm in machines {
        ratoon.run(["rm", "-f", vm]).ok();
    }
    ratoon.run(["snapshots", "rm", "siblings"]).ok();
    ratoon.nothing_is_left();
}

fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).output();
    let done = done.expect("the command `ip` (Debian: iproute2)");
    assert!(done.status.success(), "ip {arguments}: {done:?}");
}

/// Runs in a thread with a network namespace of its own, which its children have too. Takes root.
fn in_own_network(test: fn()) {
    let thread = std::thread::spawn(move || {
        // SAFETY: this thread alone gets another network namespace; it has no sockets.
        let outcome = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Says a word over the connection and hears it back in capitals.
fn is_answered(stream: &mut TcpStream, word: &str) {
    stream.write_all(word.as_bytes()).expect("it is taken");
    let mut answer = vec![0; word.len()];
    stream.read_exact(&mut answer).expect("an answer");
    assert_eq!(answer, word.to_uppercase().into_bytes());
}

fn connections_to_elsewhere_are_reset_and_the_parents_go_on_as_root() {
    in_own_network(|| {
        // One wire for all: what a child sends in its parent's name would reach the parent's peer.
        for command in [
            "link add br0 type bridge",
            "address add 10.77.0.1/24 dev br0",
            "link set br0 up",
            "tuntap add dev rt0 mode tap",
            "tuntap add dev rt1 mode tap",
            "link set rt0 master br0 up",
            "link set rt1 master br0 up",
        ] {
            ip(command);
        }
        let listener = TcpListener::bind("10.77.0.1:0").expect("a port");
        let port = listener.local_addr().expect("a port").port();
        let accept = || {
            let (stream, peer) = listener.accept().expect("a connection");
            stream.set_read_timeout(Some(PATIENCE)).expect("a limit");
            (stream, peer.ip().to_string())
        };
        let ratoon = Ratoon::warm();
        let parent = [
            "run", "-d", "--name", "parent", "--memory", "256M", "--net", "tap=rt0",
        ];
        ratoon.run(parent).ok();
        put(&ratoon, "parent", "connected.py", CONNECTED);
        let begin = format!(
            "ip address add 10.77.0.2/24 dev eth0; ip link set eth0 up; cat /sys/class/net/eth0/address; \
             cd /root; setsid python3 connected.py 10.77.0.1 {port} >/dev/null 2>errors </dev/null &"
        );
        let parents_mac = exec(&ratoon, "parent", &begin);
        let (mut stream, peer) = accept();
        assert_eq!(peer, "10.77.0.2");
        is_answered(&mut stream, "before");
        ratoon.run(["snapshot", "parent", "connected"]).ok();
        is_answered(&mut stream, "after the freeze");
        let child = [
            "run",
            "-d",
            "--snapshot",
            "connected",
            "--name",
            "child",
            "--net",
            "tap=rt1",
        ];
        ratoon.run(child).ok();

        let deadline = Instant::now() + PATIENCE;
        let outcome = loop {
            let said = exec(&ratoon, "child", "cat /root/outcome /root/errors; true");
            if !said.is_empty() {
                break said;
            }
            assert!(Instant::now() < deadline, "the child's program waits on");
            std::thread::sleep(Duration::from_millis(100));
        };
        assert_eq!(outcome, "ECONNABORTED, within: hello\n");
        // The peer heard nothing of that, and nothing came from the parent's address by the child's wire.
        is_answered(&mut stream, "after the child");
        let childs_mac = exec(&ratoon, "child", "cat /sys/class/net/eth0/address");
        assert_ne!(childs_mac, parents_mac);
        let forwarding = Command::new("bridge")
            .args(["fdb", "show", "br", "br0", "dynamic"])
            .output()
            .expect("the command `bridge` (Debian: iproute2)");
        let forwarding = String::from_utf8_lossy(&forwarding.stdout).into_owned();
        let parents = forwarding
            .lines()
            .find(|line| line.starts_with(parents_mac.trim()));
        assert!(
            parents.is_some_and(|line| line.contains("dev rt0 ")),
            "{forwarding}"
        );
        // With an address of its own it reaches the same server as another machine.
        let again = format!(
            "ip address flush dev eth0; ip address add 10.77.0.3/24 dev eth0; cd /root; \
             setsid python3 connected.py 10.77.0.1 {port} >/dev/null 2>errors </dev/null &"
        );
        exec(&ratoon, "child", &again);
        let (mut second, peer) = accept();
        assert_eq!(peer, "10.77.0.3");
        is_answered(&mut second, "from the child");
        is_answered(&mut stream, "from the parent");
        ratoon.run(["rm", "-f", "child", "parent"]).ok();
        ratoon.run(["snapshots", "rm", "connected"]).ok();
        ratoon.nothing_is_left();
    });
}

fn a_child_that_cannot_be_woken_is_ended_and_its_forker_told() {
    let ratoon = Ratoon::warm();
    ratoon
        .run(["run", "-d", "--name", "odd", "--memory", "256M"])
        .ok();
    // Nobody can give this machine a machine-id.
    let spoil = "umount /etc/machine-id; rm /etc/machine-id; mkdir -p /etc/machine-id/x";
    exec(&ratoon, "odd", spoil);
    ratoon.run(["snapshot", "odd", "spoilt"]).ok();
    let restored = ratoon.run(["restore", "spoilt", "--name", "never"]);
    assert_ne!(restored.code(), 0);
    let told = "wake, `machine-id`: /etc/machine-id";
    assert!(restored.stderr.contains(told), "{restored:?}");
    let forked = ratoon.run(["fork", "odd", "-n", "2", "--name", "never"]);
    assert_ne!(forked.code(), 0);
    assert_eq!(forked.stderr.matches(told).count(), 2, "{forked:?}");
    // The parent lives, and none of the others.
    assert_eq!(exec(&ratoon, "odd", "echo here"), "here\n");
    let shown = ratoon.run(["ps", "-a", "--json"]).ok().stdout;
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    assert_eq!(shown.as_array().map(Vec::len), Some(1), "{shown}");
    ratoon.run(["rm", "-f", "odd"]).ok();
    ratoon.run(["snapshots", "rm", "spoilt"]).ok();
    ratoon.nothing_is_left();
}

fn a_secret_is_no_childs() {
    let ratoon = Ratoon::warm();
    let run = ["run", "-d", "--name", "secretive", "--memory", "256M"];
    let id = ratoon.run(run).ok().stdout.trim().to_owned();
    let socket = ratoon.vms_dir().join(&id).join("vsock.sock");
    let mut client = Client::connect(&socket, PATIENCE).expect("the runtime answers");
    let mut call = |call: Call| {
        let answer = client.call::<Value>(&call, "answered", PATIENCE);
        answer.expect("it is done")
    };
    call(Call::ExpectWake);
    let wake = Wake {
        generation: "g".into(),
        id,
        entropy: "ab".repeat(32),
        token: Some("an open sesame".into()),
        ..Wake::default()
    };
    let awake = call(Call::Wake(Box::new(wake)));
    serde_json::from_value::<Awake>(awake).expect("an identity");
    let read = "cat /run/ratoon/token; stat -c ' %a %U' /run/ratoon/token";
    assert_eq!(
        exec(&ratoon, "secretive", read),
        "an open sesame 400 root\n"
    );
    let as_nobody = [
        "exec",
        "-u",
        "nobody",
        "secretive",
        "--",
        "cat",
        "/run/ratoon/token",
    ];
    let refused = ratoon.run(as_nobody);
    assert_ne!(refused.code(), 0);
    assert_eq!(refused.stdout, "");
    ratoon.run(["fork", "secretive", "--name", "child"]).ok();
    // Each wake brings its own; the fork's bring none.
    for vm in ["secretive", "child-0"] {
        let left = exec(&ratoon, vm, "ls /run/ratoon");
        assert!(left.contains("wakes") && !left.contains("token"), "{left}");
    }
    ratoon.run(["rm", "-f", "secretive", "child-0"]).ok();
    ratoon.nothing_is_left();
}
