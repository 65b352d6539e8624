//! Forks of forks, and forks again and again: what a generation is made of is merged, and no byte is another.

use std::time::{Duration, Instant};

use ratoon_tests::Ratoon;

crate::promises![
    a_machine_is_forked_again_and_again_and_its_layers_stay_few,
    a_child_of_a_child_of_a_child_has_what_each_of_them_wrote,
    a_machine_goes_back_to_a_generation_that_a_child_still_has,
];

/// More than a machine may have layers of its own.
const DEPTH: usize = 18;

/// A machine with what the others need.
pub fn start(ratoon: &Ratoon) {
    let args = ["run", "-d", "--name", "box", "--memory", "256M"];
    ratoon.run(args).ok();
    let line = "x = []; a = bytearray(4 << 20)";
    ratoon.run(["code", "box", "-c", line]).ok();
}

/// Writes to memory and disk what tells step `step`: some of it over what earlier ones wrote.
pub fn mark(ratoon: &Ratoon, vm: &str, step: usize) {
    let line = format!(
        "x.append({step}); a[{step} * 65536] = {step}; a[0] = {step}\n\
         import os\n\
         open('/root/of-{step}', 'w').write('{step}' * 70000)\n\
         open('/root/last', 'w').write('{step}')\n\
         if {step} > 2: os.remove('/root/of-{}')\n\
         os.sync()",
        step as i64 - 3
    );
    ratoon.run(["code", vm, "-c", &line]).ok();
}

/// All that was written up to step `step` is there, and nothing else.
pub fn check(ratoon: &Ratoon, vm: &str, step: usize) {
    // From the disk, and not what the kernel has of it in memory.
    let line = "import os\n\
        def read(name):\n\
        \x20   with open('/root/' + name) as file:\n\
        \x20       os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)\n\
        \x20       return file.read()\n\
        print(x, a[0], [i for i in range(1, 64) if a[i * 65536] != (i if i in x else 0)])\n\
        n = sorted(int(f[3:]) for f in os.listdir('/root') if f.startswith('of-'))\n\
        print(n, [i for i in n if read(f'of-{i}') != str(i) * 70000])\n\
        print(read('last'))";
    let said = ratoon.run(["code", vm, "-c", line]).ok().stdout;
    let all: Vec<usize> = (0..=step).collect();
    let files: Vec<usize> = (step.saturating_sub(2)..=step).collect();
    let wanted = format!("{all:?} {step} []\n{files:?} []\n{step}\n");
    assert_eq!(said, wanted, "{vm} at {step}");
}

/// How many layers of memory the VM maps, and how many files of its disk it has in its folder.
fn layers(ratoon: &Ratoon, vm: &str) -> (usize, usize) {
    let list = ratoon.run(["ps", "--json"]).ok().stdout;
    let list: serde_json::Value = serde_json::from_str(&list).expect("JSON");
    let list = list.as_array().expect("a list");
    let found = list.iter().find(|it| it["name"] == vm).expect("it runs");
    let folder = ratoon.vms_dir().join(found["id"].as_str().expect("an id"));
    let maps = format!("/proc/{}/maps", found["pid"]);
    let maps = std::fs::read_to_string(maps).expect("its memory map");
    let inodes = maps.lines().filter(|line| line.contains("/memfd:ratoon-"));
    let inodes = inodes.filter_map(|line| line.split_whitespace().nth(4));
    let memory: std::collections::BTreeSet<_> = inodes.collect();
    let files = std::fs::read_dir(folder).expect("its folder").flatten();
    let disk = files.filter(|file| file.path().extension().is_some_and(|it| it == "qcow2"));
    (memory.len(), disk.count())
}

fn a_machine_is_forked_again_and_again_and_its_layers_stay_few() {
    let ratoon = Ratoon::warm();
    start(&ratoon);
    let mut most = (0, 0);
    for step in 0..DEPTH {
        mark(&ratoon, "box", step);
        ratoon
            .run(["fork", "box", "--name", &format!("at-{step}")])
            .ok();
        if step % 6 != 2 {
            ratoon.run(["rm", "-f", &format!("at-{step}-0")]).ok();
        }
        let now = layers(&ratoon, "box");
        most = (most.0.max(now.0), most.1.max(now.1));
    }
    check(&ratoon, "box", DEPTH - 1);
    for step in (2..DEPTH).step_by(6) {
        check(&ratoon, &format!("at-{step}-0"), step);
    }
    // Without merging there would be as many as forks; with it, some wait for their turn.
    assert!(most.0 < DEPTH, "{most:?}");
    let end = Instant::now() + Duration::from_secs(120);
    loop {
        // What is left is done after the next fork, and seen when it is.
        ratoon
            .run(["fork", "box", "--name", "more", "--", "true"])
            .ok();
        let now = layers(&ratoon, "box");
        if now.0 <= 10 && now.1 <= 10 {
            break;
        }
        assert!(Instant::now() < end, "{now:?}");
    }
    // A snapshot of it is a restore's, whatever was merged.
    ratoon.run(["snapshot", "box", "point"]).ok();
    mark(&ratoon, "box", DEPTH);
    ratoon.run(["snapshot", "box", "later"]).ok();
    for (name, step) in [("point", DEPTH - 1), ("later", DEPTH)] {
        ratoon.run(["restore", name, "--name", "again"]).ok();
        check(&ratoon, "again", step);
        ratoon.run(["rm", "-f", "again"]).ok();
        ratoon.run(["snapshots", "verify", name]).ok();
    }
    ratoon.run(["snapshots", "rm", "later", "point"]).ok();
    ratoon
        .run(["rm", "-f", "box", "at-2-0", "at-8-0", "at-14-0"])
        .ok();
    ratoon.nothing_is_left();
}

fn a_child_of_a_child_of_a_child_has_what_each_of_them_wrote() {
    let ratoon = Ratoon::warm();
    start(&ratoon);
    let mut vm = "box".to_owned();
    for step in 0..DEPTH {
        mark(&ratoon, &vm, step);
        let next = format!("kid-{step}");
        ratoon.run(["fork", &vm, "--name", &next]).ok();
        // Some stay: their files are their children's, too.
        if step % 4 != 1 {
            ratoon.run(["rm", "-f", &vm]).ok();
        }
        vm = format!("{next}-0");
        let (memory, disk) = layers(&ratoon, &vm);
        assert!(memory <= 17 && disk <= 18, "{memory} and {disk}");
    }
    check(&ratoon, &vm, DEPTH - 1);
    let mut all = vec!["rm".to_owned(), "-f".into(), vm];
    for step in (1..DEPTH).step_by(4) {
        let kid = format!("kid-{}-0", step - 1);
        check(&ratoon, &kid, step);
        all.push(kid);
    }
    ratoon.run(&all).ok();
    ratoon.nothing_is_left();
}

fn a_machine_goes_back_to_a_generation_that_a_child_still_has() {
    let ratoon = Ratoon::warm();
    start(&ratoon);
    mark(&ratoon, "box", 0);
    ratoon.run(["fork", "box", "-n", "2", "--name", "kid"]).ok();
    let tree = ratoon.run(["tree", "--json"]).ok().stdout;
    let tree: serde_json::Value = serde_json::from_str(&tree).expect("JSON");
    let generation = &tree[0]["children"][0]["parent"]["generation"];
    let generation = &generation.as_str().expect("a generation")[..12];
    // A child, to where it was forked: as often as it likes.
    for step in 1..3 {
        mark(&ratoon, "kid-0", 1);
        mark(&ratoon, "kid-0", 2);
        let args = ["rollback", "kid-0", generation];
        let done = ratoon.run(&args[..4 - step]).ok();
        assert!(done.stdout.starts_with(generation), "{done:?}");
        check(&ratoon, "kid-0", 0);
    }
    let index = ratoon.run(["exec", "kid-1", "--", "cat", "/run/ratoon/index"]);
    assert_eq!(index.ok().stdout.trim(), "1");
    // The machine that was forked, and one that comes from a child.
    mark(&ratoon, "kid-1", 1);
    ratoon.run(["fork", "kid-1", "--name", "grandkid"]).ok();
    mark(&ratoon, "box", 1);
    ratoon.run(["rm", "-f", "kid-0"]).ok();
    for vm in ["box", "grandkid-0"] {
        ratoon.run(["rollback", vm, generation]).ok();
        check(&ratoon, vm, 0);
    }
    check(&ratoon, "kid-1", 1);
    // With the last of its children it has gone.
    ratoon.run(["rm", "-f", "kid-1"]).ok();
    mark(&ratoon, "box", 1);
    let refused = ratoon.run(["rollback", "box", generation]);
    assert!(refused.stderr.contains("goes with the last"), "{refused:?}");
    check(&ratoon, "box", 1);
    mark(&ratoon, "grandkid-0", 1);
    ratoon.run(["fork", "grandkid-0", "--name", "last"]).ok();
    check(&ratoon, "last-0", 1);
    ratoon.run(["rm", "-f", "box", "grandkid-0", "last-0"]).ok();
    ratoon.nothing_is_left();
}
