//! One HTTP/1.1 request over a Unix socket, for the APIs of peers.
//!
//! The peer is not trusted: its answer is bounded and has a deadline. How it fails: with what was
//! asked and what came.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The longest answer that is read.
const MAX_ANSWER_BYTES: usize = 1 << 20;
/// How much of a refusal is told.
const TOLD_CHARS: usize = 600;

/// Sends `body` (JSON) and waits for an answer with a status of 200 to 299.
///
/// # Errors
/// Every other answer, none in time, and bytes that are none.
pub fn ask(
    socket: &Path,
    method: &str,
    path: &str,
    body: &str,
    patience: Duration,
) -> Result<String> {
    asked(socket, method, path, body, patience).with_context(|| format!("{method} {path}"))
}

fn asked(
    socket: &Path,
    method: &str,
    path: &str,
    body: &str,
    patience: Duration,
) -> Result<String> {
    let deadline = Instant::now() + patience;
    let mut stream = UnixStream::connect(socket).context("connecting to its API")?;
    stream.set_write_timeout(Some(patience))?;
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    // One write: some read a request as one piece.
    stream.write_all(&[head.as_bytes(), body.as_bytes()].concat())?;
    let mut answer = Vec::new();
    loop {
        if let Some((status, length, body_at)) = parse(&answer)?
            && answer.len() >= body_at + length
        {
            let body = String::from_utf8_lossy(&answer[body_at..body_at + length]).into_owned();
            if (200..300).contains(&status) {
                return Ok(body);
            }
            let told: String = body.chars().take(TOLD_CHARS).collect();
            bail!("it answered {status}: {told}");
        }
        if answer.len() > MAX_ANSWER_BYTES {
            bail!("an answer of more than {MAX_ANSWER_BYTES} bytes");
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("no answer within {} s", patience.as_secs_f32());
        }
        stream.set_read_timeout(Some(left))?;
        let mut piece = [0; 4096];
        match stream.read(&mut piece) {
            Ok(0) => bail!("it closed the connection without an answer"),
            Ok(len) => answer.extend_from_slice(&piece[..len]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                bail!("no answer within {} s", patience.as_secs_f32());
            }
            Err(error) => return Err(error).context("waiting for its answer"),
        }
    }
}

/// Status, length of the body and where it begins, once the head is whole.
fn parse(answer: &[u8]) -> Result<Option<(u32, usize, usize)>> {
    let Some(end) = answer.windows(4).position(|four| four == b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = std::str::from_utf8(&answer[..end]).context("its answer is no HTTP")?;
    let mut lines = head.split("\r\n");
    let first = lines.next().unwrap_or_default();
    let status = first
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.split(' ').nth(1))
        .and_then(|status| status.parse().ok())
        .with_context(|| format!("its answer is no HTTP: {first:?}"))?;
    let length = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map_or(Ok(0), |(_, length)| length.trim().parse::<usize>())
        .context("the length of its answer")?;
    if length > MAX_ANSWER_BYTES {
        bail!("an answer of {length} bytes");
    }
    Ok(Some((status, length, end + 4)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// What comes of a server that takes one request, says `answer` and then closes, or waits.
    fn against(answer: &'static [u8], hang: bool) -> Result<String> {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api");
        let listener = UnixListener::bind(&socket).unwrap();
        std::thread::scope(|scope| {
            let (done, waits) = std::sync::mpsc::channel::<()>();
            scope.spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut piece = [0; 4096];
                let len = stream.read(&mut piece).unwrap();
                assert!(piece[..len].ends_with(b"\r\n\r\n{}"));
                stream.write_all(answer).unwrap();
                if hang {
                    // Until the client has given up.
                    let _ = waits.recv();
                }
            });
            let got = ask(&socket, "PUT", "/x", "{}", Duration::from_millis(300));
            drop(done);
            got
        })
    }

    #[test]
    fn an_answer_with_a_body_is_taken_and_one_without() {
        let with = b"HTTP/1.1 200 OK\r\nServer: x\r\ncontent-length: 2\r\n\r\nhi";
        assert_eq!(against(with, true).unwrap(), "hi");
        let without = b"HTTP/1.1 204 No Content\r\n\r\n";
        assert_eq!(against(without, true).unwrap(), "");
    }

    #[test]
    fn a_refusal_is_told_in_the_peers_words() {
        let answer = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 7\r\n\r\nno disk";
        let error = format!("{:#}", against(answer, true).unwrap_err());
        assert_eq!(error, "PUT /x: it answered 400: no disk");
    }

    #[test]
    fn a_peer_that_says_nothing_hangs_up_or_lies_is_an_error_in_time() {
        for (answer, hang, why) in [
            (&b""[..], true, "no answer within"),
            (b"HTTP/1.1 200 OK\r\nContent-Le", true, "no answer within"),
            (
                b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
                false,
                "closed the connection",
            ),
            (b"ready!\r\n\r\n", true, "no HTTP"),
            (
                b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
                true,
                "an answer of 99999999999 bytes",
            ),
            (
                b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
                true,
                "the length of its answer",
            ),
        ] {
            let error = format!("{:#}", against(answer, hang).unwrap_err());
            assert!(error.contains(why), "{error} for {answer:?}");
        }
    }
}
