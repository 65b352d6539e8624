//! A runtime that is mostly right and rarely lies, against the host's client.
//!
//! Rules: no panic; what the client believes is in order and only about calls that are open; its
//! own frames are whole and few; nothing of the guest's words keeps a control character.

#![no_main]

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use ratoon_client::state::{Happening, Output, State};
use ratoon_fuzz::rarely;
use ratoon_protocol::{Call, Decoder, ExecParams, Frame, Kind, MAX_PAYLOAD_LEN};

/// What the fuzzer's runtime has sent of the calls 1 to 8.
#[derive(Default)]
struct Runtime {
    sent: [[u64; 3]; 9],
}

fn frame(runtime: &mut Runtime, input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let call = u64::from(input.int_in_range(1..=8u8)?);
    let json = |kind, text: &str| Frame::new(kind, call, text.into());
    let mut frame = match input.int_in_range(0..=9u8)? {
        0 => json(Kind::Reply, r#"{"code":0}"#),
        1 => json(Kind::Reply, r#"{"uptime_us":1}"#),
        2 => json(Kind::Reply, &input.arbitrary::<String>()?),
        3 => json(Kind::Error, r#"{"code":"not_found","message":"\u001b[2J"}"#),
        4 => json(Kind::Event, r#"{"event":"started","pid":1}"#),
        5 => Frame::ack(call, Kind::Stdin, u64::from(input.arbitrary::<u8>()?)),
        _ => {
            let index = input.int_in_range(0..=2)?;
            let len = match rarely(input)? {
                true => MAX_PAYLOAD_LEN,
                false => usize::from(input.arbitrary::<u8>()?),
            };
            let offset = runtime.sent[call as usize][index];
            runtime.sent[call as usize][index] += len as u64;
            Frame {
                kind: [Kind::Stdout, Kind::Stderr, Kind::Data][index],
                call,
                offset,
                end: rarely(input)?,
                payload: vec![b'x'; len],
            }
        }
    };
    if rarely(input)? {
        frame.offset = input.arbitrary()?;
    }
    let mut bytes = frame.encode();
    if rarely(input)? {
        let at = input.choose_index(bytes.len())?;
        bytes[at] = input.arbitrary()?;
    }
    Ok(bytes)
}

fn call(state: &mut State, open: &mut Vec<u64>, input: &mut Unstructured<'_>) -> Result<()> {
    let call = match input.int_in_range(0..=3u8)? {
        0 => Call::Ping,
        1 => Call::Shutdown,
        _ => Call::Exec(Box::new(ExecParams {
            stdin: input.arbitrary()?,
            ..ExecParams::default()
        })),
    };
    open.push(state.call(&call).expect("it fits a frame"));
    Ok(())
}

fn believe(
    state: &mut State,
    open: &mut Vec<u64>,
    happenings: Vec<Happening>,
    input: &mut Unstructured<'_>,
) -> Result<()> {
    for happening in happenings {
        let ended = match happening {
            Happening::Hello(hello) => {
                assert!(!hello.runtime.contains(char::is_control));
                continue;
            }
            Happening::Event { call, .. } | Happening::OutputEnd { call, .. } => {
                assert!(open.contains(&call));
                continue;
            }
            Happening::Output {
                call,
                output,
                bytes,
            } => {
                assert!(open.contains(&call) && !bytes.is_empty());
                match rarely(input)? {
                    true => state.stop(call, output),
                    false => state.taken(call, output, bytes.len()),
                }
                continue;
            }
            Happening::Failed { call, error } => {
                assert!(!error.message.contains(char::is_control));
                call
            }
            Happening::Reply { call, .. } => call,
        };
        let at = open.iter().position(|&id| id == ended);
        open.swap_remove(at.expect("an open call ends, once"));
    }
    Ok(())
}

fn run(input: &mut Unstructured<'_>) -> Result<()> {
    let mut state = State::new();
    let mut runtime = Runtime::default();
    let mut open = Vec::new();
    let mut ours = Decoder::new();
    let mut greeting = Frame::new(Kind::Hello, 0, br#"{"runtime":"0","methods":[]}"#.to_vec());
    if rarely(input)? {
        greeting.payload = input.arbitrary()?;
        greeting.payload.truncate(MAX_PAYLOAD_LEN);
    }
    let mut bytes = greeting.encode();
    for _ in 0..200 {
        let mut happenings = Vec::new();
        let result = state.receive(&bytes, &mut happenings);
        believe(&mut state, &mut open, happenings, input)?;
        if result.is_err() || input.is_empty() {
            return Ok(());
        }
        if open.len() < 8 && input.arbitrary()? {
            call(&mut state, &mut open, input)?;
        }
        if let Some(&id) = open.first() {
            if let Some(room) = state.stdin_room(id) {
                let len = room.min(usize::from(input.arbitrary::<u8>()?));
                state.stdin(id, &vec![0; len], rarely(input)?);
            }
            if rarely(input)? {
                state.stop(id, *input.choose(&[Output::Stdout, Output::Stderr, Output::Data])?);
            }
        }
        ours.feed(state.unsent());
        state.sent(state.unsent().len());
        while ours
            .next_frame()
            .expect("the client sends frames")
            .is_some()
        {}
        assert_eq!(ours.pending(), 0);
        bytes = frame(&mut runtime, input)?;
    }
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    // An input that is used up is no finding.
    let _ = run(&mut Unstructured::new(data));
});
