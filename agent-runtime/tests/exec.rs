//! Commands through the host's client, against a real runtime on a Unix socket.
#![allow(missing_docs)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::io::{self, Write};
use std::time::Duration;

use common::{LONG, Ran, Runtime, command, is_alive, run, run_with, sh, until};
use ratoon_client::RuntimeError;
use ratoon_client::blocking::ExecIo;
use ratoon_protocol::{ErrorCode, ErrorReply, ExecParams, ExitStatus};

fn refused(result: Result<Ran, RuntimeError>) -> ErrorReply {
    match result {
        Err(RuntimeError::Call(error)) => error,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn output_and_errors_come_apart_with_the_exit_code() {
    let runtime = Runtime::start();
    let mut client = runtime.client();
    let ran = run(&mut client, &sh("echo out; echo err >&2; exit 7")).unwrap();
    assert_eq!(
        ran,
        Ran {
            status: ExitStatus::Code(7),
            out: "out\n".into(),
            err: "err\n".into()
        }
    );
}

#[test]
fn the_signal_that_ended_a_command_is_told() {
    let runtime = Runtime::start();
    let ran = run(&mut runtime.client(), &sh("kill -9 $$")).unwrap();
    assert_eq!(ran.status, ExitStatus::Signal(9));
}

#[test]
fn ten_megabytes_pass_the_window_unchanged_on_both_outputs() {
    let runtime = Runtime::start();
    let script = "seq 1 1400000; seq 1 1400000 >&2";
    let ran = run(&mut runtime.client(), &sh(script)).unwrap();
    let mut expected = String::new();
    for number in 1..=1_400_000 {
        std::fmt::Write::write_fmt(&mut expected, format_args!("{number}\n")).unwrap();
    }
    assert!(expected.len() > 10_000_000);
    assert!(ran.out == expected, "stdout differs");
    assert!(ran.err == expected, "stderr differs");
}

#[test]
fn input_reaches_the_command_whole_and_ends() {
    let runtime = Runtime::start();
    let mut file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..3_000_000u32)
        .map(|n| (n.wrapping_mul(n) >> 7) as u8)
        .collect();
    file.write_all(&bytes).unwrap();
    io::Seek::rewind(&mut file).unwrap();
    let (status, out) = run_with(&mut runtime.client(), &command(&["cat"]), &file);
    assert_eq!(status, ExitStatus::Code(0));
    assert!(
        out == bytes,
        "cat changed {} bytes to {}",
        bytes.len(),
        out.len()
    );
}

#[test]
fn without_input_a_command_reads_end_of_file() {
    let runtime = Runtime::start();
    let ran = run(&mut runtime.client(), &sh("cat; echo done")).unwrap();
    assert_eq!(ran.out, "done\n");
}

#[test]
fn a_command_may_end_while_its_input_is_silent() {
    let runtime = Runtime::start();
    let (reader, _writer) = io::pipe().unwrap();
    let (status, _) = run_with(&mut runtime.client(), &sh("exit 3"), &reader);
    assert_eq!(status, ExitStatus::Code(3));
}

#[test]
fn a_command_that_closes_its_input_early_stops_the_flow() {
    let runtime = Runtime::start();
    let mut client = runtime.client();
    let endless = std::fs::File::open("/dev/zero").unwrap();
    let (status, out) = run_with(&mut client, &sh("exec <&-; echo ok"), &endless);
    assert_eq!(
        (status, out.as_slice()),
        (ExitStatus::Code(0), &b"ok\n"[..])
    );
    let (status, out) = run_with(&mut client, &command(&["head", "-c", "3"]), &endless);
    assert_eq!((status, out.as_slice()), (ExitStatus::Code(0), &[0; 3][..]));
    client.ping(LONG).unwrap();
}

#[test]
fn each_reason_not_to_start_is_told_by_name() {
    let runtime = Runtime::start();
    let mut client = runtime.client();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let script = |name: &str, text: &str| {
        std::fs::write(path(name), text).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(path(name), mode).unwrap();
    };
    std::fs::write(path("plain"), "text").unwrap();
    script("orphan", "#!/no/such/interpreter\n");
    script("noise", "\x01\x02\x03");
    let cases = [
        (
            command(&["no-such-thing"]),
            ErrorCode::NotFound,
            "command not found: `no-such-thing` is in none of PATH=/usr/local/sbin:".to_owned(),
        ),
        (
            ExecParams {
                env: vec![("PATH".into(), "/a:/b".into())],
                ..command(&["sh"])
            },
            ErrorCode::NotFound,
            "command not found: `sh` is in none of PATH=/a:/b".into(),
        ),
        (
            command(&["/no/such"]),
            ErrorCode::NotFound,
            "no such program: /no/such".into(),
        ),
        (
            command(&["/etc"]),
            ErrorCode::PermissionDenied,
            "/etc is a directory, not a program".into(),
        ),
        (
            command(&[&path("plain")]),
            ErrorCode::PermissionDenied,
            format!("{} is not executable", path("plain")),
        ),
        (
            command(&[&path("orphan")]),
            ErrorCode::NotFound,
            format!("{} is there, but the interpreter", path("orphan")),
        ),
        (
            command(&[&path("noise")]),
            ErrorCode::PermissionDenied,
            format!("{} is not in a format", path("noise")),
        ),
        (
            ExecParams {
                cwd: Some("/no/such".into()),
                ..sh("true")
            },
            ErrorCode::NotFound,
            "cannot start in directory /no/such: No such file".into(),
        ),
        (
            ExecParams {
                cwd: Some("/etc/passwd".into()),
                ..sh("true")
            },
            ErrorCode::NotFound,
            "cannot start in directory /etc/passwd: Not a directory".into(),
        ),
        (
            ExecParams {
                user: Some("nobody-here".into()),
                ..sh("true")
            },
            ErrorCode::NotFound,
            "cannot run as the user: no user `nobody-here` in /etc/passwd".into(),
        ),
        (command(&[]), ErrorCode::BadRequest, "argv is empty".into()),
        (
            command(&["sh", "a\0b"]),
            ErrorCode::BadRequest,
            "an argument with a zero byte".into(),
        ),
    ];
    for (params, code, start) in cases {
        let error = refused(run(&mut client, &params));
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.starts_with(&start), "{error}");
    }
    client.ping(LONG).unwrap();
}

#[test]
fn the_environment_is_what_was_given_and_the_five_that_every_program_needs() {
    let runtime = Runtime::start();
    let params = ExecParams {
        env: vec![("A".into(), "b=c".into()), ("LANG".into(), "C".into())],
        ..command(&["env"])
    };
    let ran = run(&mut runtime.client(), &params).unwrap();
    let mut lines: Vec<_> = ran.out.lines().collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        [
            "A=b=c",
            "HOME=/root",
            "LANG=C",
            "LOGNAME=root",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "USER=root"
        ]
    );
}

#[test]
fn a_command_starts_in_its_directory_with_a_session_of_its_own_and_clean_signals() {
    let runtime = Runtime::start();
    let params = ExecParams {
        cwd: Some("/usr".into()),
        ..sh(
            "pwd; cut -d' ' -f5,6 /proc/$$/stat; echo $$; exec grep -E 'Sig(Blk|Ign)' /proc/self/status",
        )
    };
    let ran = run(&mut runtime.client(), &params).unwrap();
    let lines: Vec<_> = ran.out.lines().collect();
    let pid = lines[2];
    assert_eq!(lines[0], "/usr");
    assert_eq!(lines[1], format!("{pid} {pid}"));
    assert_eq!(lines[3], "SigBlk:\t0000000000000000");
    // Whoever started this test may have had some ignored (nohup); 32 and up are the C library's.
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let own = own.lines().find(|line| line.starts_with("SigIgn:"));
    let ignored =
        |line: &str| u64::from_str_radix(line.trim_start_matches("SigIgn:\t"), 16).unwrap();
    assert_eq!(ignored(lines[4]) & !ignored(own.unwrap()) & 0x7fff_ffff, 0);
}

#[test]
fn a_command_inherits_no_descriptor_of_the_runtime() {
    let runtime = Runtime::start();
    let ran = run(&mut runtime.client(), &command(&["ls", "/proc/self/fd"])).unwrap();
    // Whoever started this test may have left some open for all of us.
    let ours = std::process::Command::new("ls")
        .arg("/proc/self/fd")
        .output()
        .unwrap();
    assert_eq!(ran.out, String::from_utf8(ours.stdout).unwrap());
}

#[test]
fn a_command_runs_as_the_user_that_was_asked_for_as_root() {
    let runtime = Runtime::start();
    let mut client = runtime.client();
    for (user, expected) in [("daemon", "1:1"), ("1", "1:1"), ("4242:17", "4242:17")] {
        let params = ExecParams {
            user: Some(user.into()),
            ..sh("echo $(id -u):$(id -g)")
        };
        assert_eq!(
            run(&mut client, &params).unwrap().out.trim(),
            expected,
            "{user}"
        );
    }
}

#[test]
fn a_signal_reaches_the_whole_process_group() {
    let runtime = Runtime::start();
    let mut client = runtime.client();
    let controller = client.controller();
    let (mut reader, writer) = io::pipe().unwrap();
    let thread = std::thread::spawn(move || {
        let mut line = [0; 6];
        io::Read::read_exact(&mut reader, &mut line).unwrap();
        controller.signal(15);
        reader
    });
    let mut writer = writer;
    let io = ExecIo {
        stdin: None,
        stdout: &mut writer,
        stderr: &mut io::sink(),
    };
    let status = client
        .exec(
            &sh("sh -c 'sleep 1000; true' & echo ready; wait; exit 9"),
            io,
        )
        .unwrap();
    assert_eq!(status.status, ExitStatus::Signal(15));
    thread.join().unwrap();
    client.ping(LONG).unwrap();
}

#[test]
fn a_call_can_be_cancelled_and_its_command_dies_with_the_connection() {
    let runtime = Runtime::start();
    let mut client = runtime.client();
    let controller = client.controller();
    let (reader, mut writer) = io::pipe().unwrap();
    let thread = std::thread::spawn(move || {
        let mut line = String::new();
        io::BufRead::read_line(&mut io::BufReader::new(reader), &mut line).unwrap();
        controller.cancel();
        line.trim().parse::<i32>().unwrap()
    });
    let io = ExecIo {
        stdin: None,
        stdout: &mut writer,
        stderr: &mut io::sink(),
    };
    let result = client.exec(&sh("echo $$; trap '' TERM HUP; sleep 1000"), io);
    assert!(matches!(result, Err(RuntimeError::Cancelled)), "{result:?}");
    let pid = thread.join().unwrap();
    assert!(matches!(client.ping(LONG), Err(RuntimeError::Broken)));
    drop(client);
    until("the command outlives its connection", || !is_alive(pid));
}

#[test]
fn a_closed_reader_ends_the_writer_as_a_closed_pipe_does() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let runtime = Runtime::start();
    let mut client = runtime.client();
    let io = ExecIo {
        stdin: None,
        stdout: &mut Full,
        stderr: &mut io::sink(),
    };
    let status = client.exec(&command(&["yes"]), io).unwrap();
    assert_eq!(status.status, ExitStatus::Signal(libc::SIGPIPE));
    client.ping(LONG).unwrap();
}

#[test]
fn a_writer_that_fails_is_told_after_the_command_has_ended() {
    let runtime = Runtime::start();
    let mut full = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let io = ExecIo {
        stdin: None,
        stdout: &mut full,
        stderr: &mut io::sink(),
    };
    let mut client = runtime.client();
    match client.exec(&sh("echo x"), io) {
        Err(RuntimeError::Output {
            stream: "stdout",
            source,
        }) => {
            assert_eq!(source.kind(), io::ErrorKind::StorageFull);
        }
        other => panic!("{other:?}"),
    }
    client.ping(LONG).unwrap();
}

#[test]
fn what_a_background_child_holds_open_does_not_hold_the_call() {
    let runtime = Runtime::start();
    let mut client = runtime.client();
    // 60,000 bytes wait in the pipe when the shell ends; a child keeps writing for ever.
    let script = "head -c 60000 /dev/zero | tr '\\0' x; (trap '' PIPE; while sleep 0.02; do echo late 2>/dev/null || exit; done) & exit 4";
    let ran = run(&mut client, &sh(script)).unwrap();
    assert_eq!(ran.status, ExitStatus::Code(4));
    assert_eq!(ran.out.matches('x').count(), 60_000);
}

#[test]
fn many_calls_run_at_once_on_many_connections() {
    let runtime = Runtime::start();
    std::thread::scope(|scope| {
        for number in 0..16 {
            let mut client = runtime.client();
            scope.spawn(move || {
                for round in 0..4 {
                    let script = format!("echo {number}.{round}; exit {number}");
                    let ran = run(&mut client, &sh(&script)).unwrap();
                    assert_eq!(ran.out, format!("{number}.{round}\n"));
                    assert_eq!(ran.status, ExitStatus::Code(number));
                }
            });
        }
    });
}

#[test]
fn orphans_are_reaped() {
    let runtime = Runtime::start();
    let mut client = runtime.client();
    let ran = run(&mut client, &sh("(sh -c 'echo $$; sleep 0.05' &) | cat")).unwrap();
    let orphan: i32 = ran.out.trim().parse().unwrap();
    until("a zombie stays", || {
        !std::path::Path::new(&format!("/proc/{orphan}")).exists()
    });
}

#[test]
fn a_request_over_the_limit_is_refused_before_it_is_sent() {
    let runtime = Runtime::start();
    let mut client = runtime.client();
    let result = run(&mut client, &command(&["echo", &"x".repeat(70_000)]));
    assert!(matches!(result, Err(RuntimeError::TooLarge { len }) if len > 70_000));
    client.ping(LONG).unwrap();
}

#[test]
fn shutdown_ends_commands_answers_and_stops() {
    let mut runtime = Runtime::start();
    let mut other = runtime.client();
    let thread = std::thread::spawn(move || run(&mut other, &sh("echo $$; sleep 1000")));
    let mut client = runtime.client();
    client.shutdown(LONG).unwrap();
    drop(client);
    // Ended by TERM, or refused when the shutdown came first.
    match thread.join().unwrap() {
        Ok(ran) => assert_eq!(ran.status, ExitStatus::Signal(15)),
        Err(RuntimeError::Call(error)) => assert!(error.message.contains("shutting down")),
        Err(RuntimeError::Closed) => {}
        Err(other) => panic!("{other:?}"),
    }
    assert!(runtime.wait().success());
}

#[test]
fn a_ping_tells_a_clock_that_goes_on() {
    let runtime = Runtime::start();
    let mut client = runtime.client();
    let first = client.ping(LONG).unwrap().uptime_us;
    std::thread::sleep(Duration::from_millis(1));
    assert!(client.ping(LONG).unwrap().uptime_us > first);
    assert!(client.hello().ready_at_us <= first);
    assert!(client.hello().methods.iter().any(|method| method == "exec"));
}
