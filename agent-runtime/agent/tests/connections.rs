//! What a real bridge does seldom: here a listener says it, byte for byte.

mod common;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};

use common::Host;
use ratoon_protocol::{AgentEvent, Ending, Profile, Wire};
use ratoon_scripted_model::{Fault, Turn};
use serde_json::{Value, json};

/// A request's attempt, and its body.
type Asked = (String, Value);

fn read(stream: &TcpStream) -> Asked {
    let mut reader = BufReader::new(stream);
    let (mut attempt, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a head");
        let line = line.trim().to_lowercase();
        if let Some(value) = line.strip_prefix("x-ratoon-attempt: ") {
            attempt = value.to_owned();
        } else if let Some(value) = line.strip_prefix("content-length: ") {
            length = value.parse().expect("a length");
        } else if line.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).expect("a body");
    (attempt, serde_json::from_slice(&body).expect("JSON"))
}

/// Runs the agent on Chat before these answers, one a connection; gives what it asked, its events and its code.
fn run(answers: &[String]) -> (Vec<Asked>, Vec<AgentEvent>, i32) {
    let folder = tempfile::tempdir().expect("a folder");
    let token = folder.path().join("token");
    std::fs::write(&token, "rtn_x\n").expect("a file");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let mut process = Command::new(env!("CARGO_BIN_EXE_ratoon-agent"))
        .arg("loop")
        .env("RATOON_BRIDGE", format!("tcp:{address}"))
        .env("RATOON_TOKEN_FILE", &token)
        .env("RATOON_AGENT_DIR", folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("ratoon-agent");
    let task = json!({"run": "r", "branch": "b", "wire": "chat", "model": "m", "profile": "minimal",
                      "prompt": "Do it.", "directory": folder.path(), "max_tokens": 7});
    let mut stdin = process.stdin.take().expect("a pipe");
    writeln!(stdin, "{task}").expect("it reads");
    let mut asked = Vec::new();
    for answer in answers {
        let (mut stream, _) = listener.accept().expect("a connection");
        asked.push(read(&stream));
        stream.write_all(answer.as_bytes()).expect("sent");
    }
    drop(listener);
    let stdout = process.stdout.take().expect("a pipe");
    let events = BufReader::new(stdout)
        .lines()
        .map(|line| serde_json::from_str(&line.expect("UTF-8")).expect("an event"))
        .collect();
    let code = process.wait().expect("a process").code();
    (asked, events, code.expect("a code"))
}

fn stream(chunks: &[Value]) -> String {
    let mut all = String::from("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n");
    for chunk in chunks {
        all.push_str(&format!("data: {chunk}\n\n"));
    }
    all
}

fn says(text: &str, finish: &str) -> String {
    stream(&[
        json!({"choices": [{"delta": {"content": text}}]}),
        json!({"choices": [{"delta": {}, "finish_reason": finish}]}),
    ])
}

fn ended(events: &[AgentEvent]) -> (Ending, &str) {
    match events.last() {
        Some(AgentEvent::Ended { ending, text, .. }) => (*ending, text),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_connection_that_breaks_is_asked_about_under_the_same_attempt() {
    let cut = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n40\r\ndata: {";
    let step = "HTTP/1.1 409 Conflict\r\nx-ratoon-error: step\r\nx-should-retry: false\r\ncontent-length: 2\r\n\r\n{}";
    let answers = [
        cut.to_owned(),
        String::new(),
        step.to_owned(),
        says("Done.", "stop"),
    ];
    let (asked, events, code) = run(&answers);
    assert_eq!((ended(&events), code), ((Ending::Finished, "Done."), 0));
    let attempts: Vec<&str> = asked.iter().map(|(attempt, _)| attempt.as_str()).collect();
    assert_eq!(attempts, ["0", "0", "0", "1"]);
    assert_eq!(asked[0].1, asked[3].1, "it is the same question");
}

#[test]
fn answers_that_are_cut_again_and_again_end_the_run() {
    let (asked, events, _) = run(&[says("a", "length"), says("b", "stop")]);
    assert_eq!(ended(&events), (Ending::Finished, "b"));
    assert!(asked[1].1.to_string().contains("limit of 7 tokens"));
    let (_, events, code) = run(&[(); 3].map(|()| says("a", "length")));
    assert_eq!((ended(&events).0, code), (Ending::Refused, 15));
}

#[test]
fn a_model_that_declines_ends_the_run() {
    let (_, events, _) = run(&[says("I will not.", "content_filter")]);
    assert_eq!(ended(&events), (Ending::Refused, "I will not."));
}

#[test]
fn what_is_no_answer_ends_the_run() {
    for answer in [
        "hello\r\n\r\n".to_owned(),
        "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 2\r\n\r\nhi".to_owned(),
        stream(&[json!(7)]),
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: \u{1}\n\n".to_owned(),
    ] {
        let (_, events, code) = run(std::slice::from_ref(&answer));
        assert_eq!((ended(&events).0, code), (Ending::Model, 16), "{answer}");
    }
}

#[test]
fn reasoning_that_cannot_be_had_encrypted_is_not_asked_for_again() {
    let refused = Fault::Status {
        status: 400,
        retry_after: None,
        message: "Encrypted content is not supported with this model.".into(),
    };
    let host = Host::start([
        Turn::text("x").broken(refused),
        common::bash("echo a"),
        Turn::text("Done."),
    ]);
    let done = host.whole(&host.task(Wire::Responses, Profile::Anthropic));
    host.check();
    assert_eq!((done.ending, done.steps), (Ending::Finished, 2));
    assert!(host.request(0).contains("encrypted_content"));
    assert!(!host.request(1).contains("encrypted_content"));
    assert!(!host.request(2).contains("encrypted_content"));
}
