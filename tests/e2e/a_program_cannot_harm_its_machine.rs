//! A program that takes all it can get, or behaves as no program should, is told so or ended; the
//! machine and its other programs go on.

use std::io::{Read, Write};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ratoon_client::blocking::{Client, ExecIo};
use ratoon_protocol::{
    Call, ExecParams, ExitReport, ExitStatus, Metrics, MetricsParams, ProcessInfo, Size,
};
use ratoon_tests::{PATIENCE, finish};

use crate::shared::{NAME, client, exec, machine};

crate::promises![
    a_full_disk_is_its_programs_own_error,
    a_program_that_takes_all_memory_is_killed_alone_and_it_is_told,
    a_reader_that_has_had_enough_ends_the_writer,
    a_client_that_stops_reading_holds_its_program_up_and_fills_no_memory,
    output_beyond_its_limit_is_kept_in_the_machine,
    bytes_go_through_a_program_as_they_are,
    a_program_that_closes_its_outputs_early_is_waited_for,
    a_full_screen_program_is_drawn_resized_and_quit_by_its_key,
];

/// Most that the runtime may have in memory, bytes.
const RUNTIME_LIMIT: u64 = 8 << 20;

fn sh(script: &str) -> ratoon_tests::Done {
    exec(&[], &["sh", "-c", script])
}

fn shell(script: &str) -> ExecParams {
    ExecParams {
        shell: Some(script.into()),
        ..ExecParams::default()
    }
}

/// Runs it by a client without input: the report and standard output.
fn run(client: &mut Client, params: &ExecParams) -> (ExitReport, Vec<u8>) {
    let mut out = Vec::new();
    let io = ExecIo {
        stdin: None,
        stdout: &mut out,
        stderr: &mut std::io::sink(),
    };
    let report = client.exec(params, io).expect("it runs");
    (report, out)
}

fn metrics(client: &mut Client) -> Metrics {
    let call = Call::Metrics(MetricsParams { top: 100 });
    client.call(&call, "told", PATIENCE).expect("metrics")
}

/// Waits until no process of an exec call has this word in its command line.
fn until_gone(word: &str) {
    let deadline = Instant::now() + PATIENCE;
    let mut client = client();
    loop {
        let all: Vec<ProcessInfo> = client
            .call(&Call::Processes, "listed", PATIENCE)
            .expect("a list");
        if !all
            .iter()
            .any(|process| process.argv.join(" ").contains(word))
        {
            return;
        }
        assert!(Instant::now() < deadline, "it goes on: {all:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn a_full_disk_is_its_programs_own_error() {
    let done = sh(
        "mkdir /mnt/full && mount -t tmpfs -o size=512k full /mnt/full && \
         dd if=/dev/zero of=/mnt/full/a bs=64k",
    );
    assert_eq!(done.code(), 1, "{done:?}");
    assert!(done.stderr.contains("No space left on device"), "{done:?}");
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), vec![7; 100_000]).expect("it is written");
    let from = file.path().to_str().expect("plain");
    let copied = machine().run(["cp", from, &format!("{NAME}:/mnt/full/b")]);
    assert_ne!(copied.code(), 0, "{copied:?}");
    assert!(copied.stderr.contains("No space left"), "{copied:?}");
    let done =
        sh("cd /mnt/full && rm a && echo room > c && ls -A && cat c; cd / && umount /mnt/full");
    assert_eq!(done.ok().stdout, "c\nroom\n", "nothing of the copy is left");
}

fn a_program_that_takes_all_memory_is_killed_alone_and_it_is_told() {
    // Another one, which waits for a word meanwhile.
    let mut bystander = machine()
        .command(["exec", "-i", NAME, "--", "cat"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut stdin = bystander.stdin.take().expect("a pipe");
    stdin.write_all(b"hello\n").expect("it reads");
    let mut heard = [0; 6];
    let stdout = bystander.stdout.as_mut().expect("a pipe");
    stdout.read_exact(&mut heard).expect("it runs");

    // To fill the whole machine takes minutes on a host that emulates it.
    let greedy = sh(
        "cd /sys/fs/cgroup && echo +memory > cgroup.subtree_control && \
         echo +memory > ratoon/cgroup.subtree_control && \
         echo 8M > .$(cut -d : -f 3 /proc/self/cgroup)/memory.max && exec tail /dev/zero",
    );
    assert_eq!(greedy.code(), 137, "{greedy:?}");
    assert!(greedy.stderr.contains("out of memory"), "{greedy:?}");
    sh(
        "cd /sys/fs/cgroup && echo -memory > ratoon/cgroup.subtree_control && \
         echo -memory > cgroup.subtree_control",
    )
    .ok();

    stdin.write_all(b"still here\n").expect("it reads");
    drop(stdin);
    assert_eq!(finish(bystander).ok().stdout, "still here\n");
    let killed = sh("kill -9 $$");
    assert_eq!(killed.code(), 137, "{killed:?}");
    assert!(!killed.stderr.contains("memory"), "{killed:?}");
}

fn a_reader_that_has_had_enough_ends_the_writer() {
    let mut child = machine()
        .command(["exec", NAME, "--", "yes"])
        .spawn()
        .expect("it starts");
    let mut some = vec![0; 1_000_000];
    let mut stdout = child.stdout.take().expect("a pipe");
    stdout.read_exact(&mut some).expect("it writes");
    assert!(some.chunks(2).all(|line| line == b"y\n"));
    drop(stdout);
    let done = finish(child);
    assert_eq!(done.code(), 128 + libc::SIGPIPE, "as in a shell: {done:?}");
}

fn a_client_that_stops_reading_holds_its_program_up_and_fills_no_memory() {
    let mut child = machine()
        .command(["exec", NAME, "--", "yes", "unread"])
        .spawn()
        .expect("it starts");
    let mut stdout = child.stdout.take().expect("a pipe");
    stdout.read_exact(&mut [0; 7]).expect("it writes");
    let mut other = client();
    let deadline = Instant::now() + PATIENCE;
    let mut used = None;
    loop {
        let now = metrics(&mut other);
        assert!(now.runtime_memory < RUNTIME_LIMIT, "{now:?}");
        let yes = now
            .top
            .iter()
            .find(|process| process.command.contains("unread"));
        let yes = yes.unwrap_or_else(|| panic!("it has ended: {now:?}"));
        if used.replace(yes.cpu_us) == Some(yes.cpu_us) {
            break;
        }
        assert!(Instant::now() < deadline, "it is never held up: {now:?}");
        std::thread::sleep(Duration::from_millis(500));
    }
    child.kill().expect("it can be killed");
    child.wait().expect("it ends");
    until_gone("unread");
    let after = metrics(&mut other).runtime_memory;
    assert!(after < RUNTIME_LIMIT, "{after}");
}

fn output_beyond_its_limit_is_kept_in_the_machine() {
    let params = ExecParams {
        output_limit: Some(1000),
        ..shell("seq 1 200000; echo short >&2")
    };
    let mut client = client();
    let (report, head) = run(&mut client, &params);
    let all: Vec<u8> = (1..=200_000)
        .flat_map(|n| format!("{n}\n").into_bytes())
        .collect();
    assert!(head == all[..1000], "the head differs");
    let [stdout, stderr] = report.outputs.expect("counts");
    let (len, rest) = (all.len() as u64, &all[1000..]);
    assert_eq!(
        (stdout.bytes, stdout.sent, stdout.kept),
        (len, 1000, len - 1000)
    );
    assert!(
        stdout.tail.as_bytes() == &all[all.len() - 4096..],
        "the tail differs"
    );
    assert_eq!((stderr.bytes, stderr.sent, stderr.file), (6, 6, None));
    let file = stdout.file.expect("a file in the machine");
    let (_, kept) = run(&mut client, &shell(&format!("cat {file}; rm {file}")));
    assert!(kept == rest, "what was kept differs");
}

fn bytes_go_through_a_program_as_they_are() {
    let bytes: Vec<u8> = (0..1 << 20_u32)
        .map(|at: u32| (at ^ (at >> 8)) as u8)
        .collect();
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(&bytes).expect("it is written");
    std::io::Seek::rewind(&mut file).expect("a file");
    let output = machine()
        .command(["exec", "-i", NAME, "--", "cat"])
        .stdin(file)
        .output()
        .expect("it runs");
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout == bytes, "the bytes differ");
}

fn a_program_that_closes_its_outputs_early_is_waited_for() {
    let start = Instant::now();
    let done = sh("echo last words; exec >&- 2>&-; sleep 2; exit 9");
    assert_eq!(
        (done.code(), &*done.stdout),
        (9, "last words\n"),
        "{done:?}"
    );
    assert!(start.elapsed() >= Duration::from_secs(2));
}

/// What a terminal shows, for another thread to look at.
#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Screen {
    /// Waits until this has been drawn.
    fn until(&self, words: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let drawn = self.0.lock().expect("nobody panicked").clone();
            let drawn = String::from_utf8_lossy(&drawn);
            if drawn.contains(words) {
                return;
            }
            assert!(Instant::now() < deadline, "no {words:?} in {drawn:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("nobody panicked").write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn a_full_screen_program_is_drawn_resized_and_quit_by_its_key() {
    let (mut client, screen) = (client(), Screen::default());
    let controller = client.controller();
    let (keyboard, mut keys) = std::io::pipe().expect("a pipe");
    let mut drawn = screen.clone();
    let runs = std::thread::spawn(move || {
        let params = ExecParams {
            pty: Some(Size { rows: 24, cols: 80 }),
            ..shell("seq -f 'line %g' 1 100 > /tmp/lines; exec less /tmp/lines")
        };
        let io = ExecIo {
            stdin: Some(std::os::fd::AsFd::as_fd(&keyboard)),
            stdout: &mut drawn,
            stderr: &mut std::io::sink(),
        };
        client.exec(&params, io).expect("it runs")
    });
    screen.until("line 23");
    screen.until("/tmp/lines");
    controller.resize(Size {
        rows: 40,
        cols: 100,
    });
    screen.until("line 39");
    keys.write_all(b"G").expect("it takes keys");
    screen.until("line 100");
    keys.write_all(b"q").expect("it takes keys");
    let report = runs.join().expect("it ends");
    assert_eq!(report.status, ExitStatus::Code(0));
    let drawn = screen.0.lock().expect("nobody panicked").clone();
    let end = String::from_utf8_lossy(&drawn[drawn.len().saturating_sub(80)..]).into_owned();
    assert!(
        end.contains("\x1b[?1049l"),
        "the screen is given back: {end:?}"
    );
}
