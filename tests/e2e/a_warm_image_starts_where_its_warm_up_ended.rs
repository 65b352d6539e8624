//! `ratoon image warm`: later runs start from the user's own warm-up.

use ratoon_tests::{Done, Ratoon, cache};
use tempfile::TempDir;

crate::promises![
    the_users_warm_up_is_in_every_later_run,
    a_warm_up_that_fails_keeps_nothing,
    a_warm_generation_outlives_trouble_with_the_host_as_root,
];

fn run(ratoon: &Ratoon, cache: &TempDir, args: &[&str]) -> Done {
    let child = ratoon
        .command(args)
        .env("XDG_CACHE_HOME", cache.path())
        .spawn()
        .expect("ratoon can be started");
    ratoon_tests::finish(child)
}

fn warm_sizes(ratoon: &Ratoon, cache: &TempDir) -> Vec<u64> {
    let shown = run(ratoon, cache, &["image", "inspect", "debian"]).ok();
    let shown: serde_json::Value = serde_json::from_str(&shown.stdout).expect("JSON");
    let warm = shown["warm"].as_array().expect("a list");
    warm.iter()
        .map(|it| it["disk_bytes"].as_u64().expect("a size"))
        .collect()
}

fn the_users_warm_up_is_in_every_later_run() {
    let (ratoon, cache) = (Ratoon::new(), cache::another());
    assert!(warm_sizes(&ratoon, &cache).is_empty());
    let first = run(&ratoon, &cache, &["run", "--", "true"]).ok();
    assert!(first.stderr.contains("debian was booted"), "{first:?}");
    let second = run(&ratoon, &cache, &["run", "--", "true"]).ok();
    assert_eq!(second.stderr, "", "it is said once");

    let warm_up = "echo warm > /root/file; (sleep 54322 >/dev/null 2>&1 &)";
    let args = ["image", "warm", "debian", "--exec", warm_up];
    let done = run(&ratoon, &cache, &args).ok();
    assert!(done.stdout.contains("debian: warm"), "{done:?}");
    let sizes = warm_sizes(&ratoon, &cache);
    assert_eq!(sizes.len(), 1, "it replaces the one that was there");
    assert!(sizes[0] > 1 << 20, "{sizes:?}");
    let look = "cat /root/file; pgrep -f 'sleep 5432[2]' >/dev/null && echo runs; pgrep -c python3";
    for _ in 0..2 {
        let done = run(&ratoon, &cache, &["run", "--", "sh", "-c", look]);
        assert_eq!(done.ok().stdout, "warm\nruns\n1\n");
    }
    let listed = run(&ratoon, &cache, &["image", "ls"]).ok().stdout;
    assert!(listed.contains("WARM"), "{listed}");
    // The disk is a link here, and only the link goes.
    run(&ratoon, &cache, &["image", "rm", "--force", "debian"]).ok();
    let warm = cache.path().join("ratoon/warm");
    let left: Vec<_> = std::fs::read_dir(warm)
        .expect("the folder of warm generations")
        .flatten()
        .map(|entry| entry.file_name())
        .filter(|name| name.len() == 64)
        .collect();
    assert!(left.is_empty(), "{left:?}");
    ratoon.nothing_is_left();
}

fn a_warm_up_that_fails_keeps_nothing() {
    let (ratoon, cache) = (Ratoon::new(), cache::another());
    let args = ["image", "warm", "debian", "--exec", "echo said; exit 7"];
    let done = run(&ratoon, &cache, &args);
    assert_eq!(done.code(), 7, "{done:?}");
    assert!(done.stderr.contains("said\n"), "{done:?}");
    assert!(
        done.stderr.contains("the warm-up ended with exit code 7"),
        "{done:?}"
    );
    assert!(warm_sizes(&ratoon, &cache).is_empty());
    ratoon.nothing_is_left();
}

fn a_warm_generation_outlives_trouble_with_the_host_as_root() {
    let ratoon = Ratoon::warm();
    crate::bad_input_is_refused_by_name::with_kvm_replaced(c"/dev/null", 0, &["/dev/kvm"]);
    let done = ratoon.run(["run", "--memory", "256M", "--", "true"]).ok();
    assert_eq!(done.stderr, "", "it is not booted");
    ratoon.nothing_is_left();
}
