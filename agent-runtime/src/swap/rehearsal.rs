//! A new runtime shows that it starts, and that it reads this one's state, before it may take over.
//!
//! It runs as an ordinary child, `--check-state 3`, with the state as descriptor 3 and none of those
//! that the state names. It prints its version and exits with 0, or says on standard error why not.
//! The loop waits for it: nothing else is to change meanwhile. How it fails: an [`ErrorReply`] with
//! its words; the child is gone then.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use ratoon_protocol::{ErrorCode, ErrorReply, ExecParams};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, WaitStatus};

use crate::spawn::{Spawner, read_now};
use crate::sys;

/// How long it may take: a guest may be hundred times slower than its host.
const LIMIT: Duration = Duration::from_secs(20);

/// How much of what it prints is kept, in bytes.
const WORDS: usize = 1024;

fn failed(why: impl std::fmt::Display) -> ErrorReply {
    ErrorReply::new(ErrorCode::Failed, format!("the new runtime {why}"))
}

/// Has `program` read `state`; its version.
///
/// # Errors
/// It does not start, takes too long, or refuses the state: in its words.
pub fn rehearse(
    program: &OwnedFd,
    state: OwnedFd,
    spawner: &mut Spawner,
) -> Result<String, ErrorReply> {
    let path = format!("/proc/self/fd/{}", program.as_raw_fd());
    let params = ExecParams {
        argv: [&path, "--check-state", "3"].map(str::to_owned).into(),
        cwd: Some("/".into()),
        ..ExecParams::default()
    };
    let child = spawner
        .spawn_with(&params, Some(state))
        .map_err(|error| failed(format_args!("does not start: {}", error.reply().message)))?;
    let ended = wait(child.pid, &child.outputs, LIMIT);
    spawner.give_back(child.group);
    let (status, said) = ended?;
    let [out, complaint] = said.map(|bytes| shown(&bytes));
    match (status.exit_status(), status.terminating_signal()) {
        (Some(0), _) => Ok(out),
        (Some(_), _) if !complaint.is_empty() => Err(failed(format_args!("refuses: {complaint}"))),
        (Some(code), _) => Err(failed(format_args!("exits with status {code}"))),
        (None, Some(signal)) => Err(failed(format_args!("is killed by signal {signal}"))),
        _ => Err(failed("ends in no known way")),
    }
}

/// Waits for its end; what it printed, the beginning of it.
fn wait(
    pid: i32,
    outputs: &[Option<OwnedFd>; 2],
    limit: Duration,
) -> Result<(WaitStatus, [Vec<u8>; 2]), ErrorReply> {
    let unknown = |error| failed(format_args!("cannot be waited for: {error}"));
    let pid = Pid::from_raw(pid).ok_or_else(|| failed("has no number"))?;
    let until = Instant::now() + limit;
    let mut said = [Vec::new(), Vec::new()];
    let mut open = [true; 2];
    let watched = rustix::process::pidfd_open(pid, PidfdFlags::empty());
    let mut late = false;
    if let Ok(end) = &watched {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            late = left.is_zero();
            let mut polls = vec![sys::poll_fd(end.as_raw_fd(), libc::POLLIN)];
            for (output, open) in outputs.iter().zip(open) {
                let fd = output
                    .as_ref()
                    .filter(|_| open)
                    .map_or(-1, AsRawFd::as_raw_fd);
                polls.push(sys::poll_fd(fd, libc::POLLIN));
            }
            if late || sys::poll(&mut polls, Some(left)).is_err() {
                break;
            }
            for index in 0..2 {
                if polls[index + 1].revents != 0 {
                    open[index] = take(outputs[index].as_ref(), &mut said[index]);
                }
            }
            if polls[0].revents != 0 {
                break;
            }
        }
    }
    if late || watched.is_err() {
        // Nobody has reaped it: the number is its own.
        let _ = rustix::process::kill_process_group(pid, Signal::KILL);
    }
    let ended = rustix::process::waitpid(Some(pid), WaitOptions::empty()).map_err(unknown)?;
    watched.map_err(unknown)?;
    let (_, status) = ended.ok_or_else(|| failed("does not end"))?;
    for (output, said) in outputs.iter().zip(&mut said) {
        take(output.as_ref(), said);
    }
    match late {
        true => {
            let limit = limit.as_secs();
            Err(failed(format_args!(
                "did not show within {limit} s that it starts"
            )))
        }
        false => Ok((status, said)),
    }
}

/// Reads what is there; false at the end.
fn take(pipe: Option<&OwnedFd>, said: &mut Vec<u8>) -> bool {
    let Some(pipe) = pipe else { return false };
    let mut buffer = [0; 4096];
    match read_now(pipe.as_fd(), &mut buffer) {
        Ok(0) => false,
        Ok(len) => {
            let room = WORDS - said.len().min(WORDS);
            said.extend_from_slice(&buffer[..len.min(room)]);
            true
        }
        Err(error) => error == rustix::io::Errno::AGAIN,
    }
}

/// One line, for a message.
fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let text = text.trim();
    text.strip_prefix("ratoon-runtime: ")
        .unwrap_or(text)
        .replace(char::is_control, " ")
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn spawn(script: &str) -> crate::spawn::Child {
        let null = File::open("/dev/null").unwrap();
        let mut spawner = Spawner::new(null.into(), false);
        let params = ExecParams {
            shell: Some(script.into()),
            ..ExecParams::default()
        };
        spawner.spawn(&params).unwrap()
    }

    #[test]
    fn what_does_not_come_to_an_end_is_killed_with_what_it_started() {
        let child = spawn("sleep 1000 & sleep 1000");
        let error = wait(child.pid, &child.outputs, Duration::from_millis(50)).unwrap_err();
        assert_eq!(
            error.message,
            "the new runtime did not show within 0 s that it starts"
        );
        let gone = rustix::process::test_kill_process(Pid::from_raw(child.pid).unwrap());
        assert_eq!(gone, Err(rustix::io::Errno::SRCH));
    }

    #[test]
    fn a_flood_of_words_does_not_hold_it_up_and_only_the_first_are_kept() {
        let child = spawn("yes | head -c 1000000 >&2; echo 1.2.3; exit 4");
        let (status, [out, complaint]) = wait(child.pid, &child.outputs, LIMIT).unwrap();
        assert_eq!(status.exit_status(), Some(4));
        assert_eq!((out.as_slice(), complaint.len()), (&b"1.2.3\n"[..], WORDS));
    }

    #[test]
    fn its_words_are_one_line_without_its_name() {
        assert_eq!(shown(b"ratoon-runtime: no\x1b[1m\nway\n"), "no [1m way");
    }
}
