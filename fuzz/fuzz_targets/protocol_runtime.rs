//! A client of the runtime that is mostly right and rarely not, against the runtime's connection
//! state machine, with processes replaced by the fuzzer's whims.
//!
//! Rules: no panic; memory stays bounded; output frames are in order, within the window and before
//! their end; each call is answered at most once (as long as the client counts right); after a violation the last frame is an error for
//! call 0.

#![no_main]

use std::collections::{BTreeMap, BTreeSet};

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use ratoon_fuzz::rarely;
use ratoon_protocol::{
    Call, Decoder, ErrorCode, ErrorReply, Event, Frame, Have, Kind, MAX_OPEN_CALLS,
    MAX_PAYLOAD_LEN, STREAM_WINDOW,
};
use ratoon_runtime::session::{Action, OUT_LIMIT, Output, Session};

/// What a client sees of one output.
#[derive(Default)]
struct Seen {
    received: u64,
    acked: u64,
    ended: bool,
}

#[derive(Default)]
struct Client {
    decoder: Decoder,
    /// Open calls: outputs, and how much input was sent.
    calls: BTreeMap<u64, ([Seen; 3], u64)>,
    /// The processes that run, as the server would have them.
    running: Vec<u64>,
    last: Option<(Kind, u64)>,
    /// Its session has a name: ends are repeated until they are confirmed.
    named: bool,
    /// It has said something that it did not mean: what it counts on is no rule any more.
    confused: bool,
    /// All ids that it has used.
    begun: BTreeSet<u64>,
    /// It has lost its connection once.
    was_cut: bool,
}

impl Client {
    fn read(&mut self, bytes: &[u8]) {
        self.decoder.feed(bytes);
        while let Some(frame) = self.decoder.next_frame().expect("the runtime sends frames") {
            self.last = Some((frame.kind, frame.call));
            if self.confused {
                continue;
            }
            let index = match frame.kind {
                Kind::Stdout => 0,
                Kind::Stderr => 1,
                Kind::Data => 2,
                Kind::Reply | Kind::Error if frame.call != 0 => {
                    let was_open = self.calls.remove(&frame.call).is_some();
                    assert!(was_open || self.named, "answered once");
                    continue;
                }
                _ => continue,
            };
            let Some((seen, _)) = self.calls.get_mut(&frame.call) else {
                assert!(self.named, "output of an open call");
                continue;
            };
            let seen = &mut seen[index];
            assert!(!seen.ended && frame.offset == seen.received);
            seen.received += frame.payload.len() as u64;
            seen.ended = frame.end;
            assert!(seen.received - seen.acked <= STREAM_WINDOW);
        }
    }
}

fn frame(client: &mut Client, input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut id = u64::from(input.int_in_range(1..=8u8)?);
    if rarely(input)? {
        id = input.arbitrary()?;
    }
    let mut frame = match input.int_in_range(0..=5u8)? {
        0 | 1 => {
            let text = match input.int_in_range(0..=7u8)? {
                6 => r#"{"method":"file.write","params":{"path":"/x"}}"#.into(),
                7 => r#"{"method":"code.run","params":{"code":"1"}}"#.into(),
                0 => r#"{"method":"ping"}"#.into(),
                1 => r#"{"method":"exec","params":{"argv":["x"],"stdin":true}}"#.into(),
                2 => r#"{"method":"exec","params":{"argv":["x"]}}"#.into(),
                3 => {
                    let signal: i8 = input.arbitrary()?;
                    format!(r#"{{"method":"signal","params":{{"call":{id},"signal":{signal}}}}}"#)
                }
                4 => r#"{"method":"shutdown"}"#.into(),
                _ => input.arbitrary::<String>()?,
            };
            // A client that is right chooses an id that is free.
            // In a named session an end that was not confirmed keeps its call open.
            while client.calls.contains_key(&id) || client.named && client.begun.contains(&id) {
                if rarely(input)? {
                    client.confused = true;
                    break;
                }
                id = id.wrapping_add(1);
            }
            Frame::new(Kind::Call, id, text.into_bytes())
        }
        2 | 3 => {
            let len = match rarely(input)? {
                true => MAX_PAYLOAD_LEN,
                false => usize::from(input.arbitrary::<u8>()?),
            };
            let offset = client.calls.get_mut(&id).map_or(0, |(_, sent)| {
                *sent += len as u64;
                *sent - len as u64
            });
            Frame {
                kind: Kind::Stdin,
                call: id,
                offset,
                end: rarely(input)?,
                payload: vec![0; len],
            }
        }
        _ => {
            let index = input.int_in_range(0..=2)?;
            let kind = [Kind::Stdout, Kind::Stderr, Kind::Data][index];
            let seen = client.calls.get_mut(&id).map(|(seen, _)| &mut seen[index]);
            let offset = seen.map_or(0, |seen| {
                seen.acked = seen.received;
                seen.acked
            });
            match rarely(input)? {
                true => Frame::ack_and_stop(id, kind, offset),
                false => Frame::ack(id, kind, offset),
            }
        }
    };
    if rarely(input)? {
        frame.offset = input.arbitrary()?;
        client.confused = true;
    }
    let mut bytes = frame.encode();
    if rarely(input)? {
        let at = input.choose_index(bytes.len())?;
        bytes[at] = input.arbitrary()?;
        client.confused = true;
    }
    if frame.kind == Kind::Call {
        client.calls.entry(frame.call).or_default();
        client.begun.insert(frame.call);
    }
    Ok(bytes)
}

fn obey(
    session: &mut Session,
    client: &mut Client,
    actions: Vec<Action>,
    input: &mut Unstructured<'_>,
) -> Result<()> {
    for action in actions {
        match action {
            Action::Begin { call, request } => match request {
                Call::Session(_) => {
                    session.name();
                    session.reply(call, &());
                }
                Call::Ping => session.reply(call, &1),
                Call::Signal(_) | Call::Shutdown => session.reply(call, &()),
                _ if rarely(input)? => {
                    session.fail(call, &ErrorReply::new(ErrorCode::NotFound, "x"));
                }
                _ => {
                    session.event(call, &Event::Started { pid: 1 });
                    client.running.push(call);
                }
            },
            Action::Stdin { call, bytes, .. } => match rarely(input)? {
                true => session.stdin_closed(call),
                false => session.stdin_taken(call, bytes.len() as u64),
            },
            Action::StopOutput { call, output } => session.output_ended(call, output),
        }
    }
    Ok(())
}

fn work(session: &mut Session, client: &mut Client, input: &mut Unstructured<'_>) -> Result<()> {
    if client.running.is_empty() {
        return Ok(());
    }
    let at = input.choose_index(client.running.len())?;
    let call = client.running[at];
    let output = *input.choose(&Output::ALL)?;
    match input.int_in_range(0..=9u8)? {
        0 => {
            session.reply(call, &0);
            client.running.swap_remove(at);
        }
        1 => session.output_ended(call, output),
        _ => {
            let room = session.room(call, output);
            if room > 0 {
                let len = input.int_in_range(1..=room)?;
                session.output(call, output, &vec![0; len]);
            }
        }
    }
    Ok(())
}

/// The connection is lost, and taken up again with what the client has.
fn cut(session: &mut Session, client: &mut Client) {
    client.was_cut = true;
    session.detach();
    client.decoder = Decoder::new();
    let have: Vec<Have> = client
        .calls
        .iter()
        .map(|(&call, (seen, _))| Have {
            call,
            outputs: [seen[0].received, seen[1].received, seen[2].received],
        })
        .collect();
    let mut newcomer = Session::new(0);
    let len = newcomer.unsent().len();
    newcomer.sent(len);
    match session.resume(&mut newcomer, u64::MAX, &have) {
        Ok(inputs) => {
            for input in inputs {
                if let Some((_, sent)) = client.calls.get_mut(&input.call) {
                    *sent = input.stdin;
                }
            }
            for (seen, _) in client.calls.values_mut() {
                for seen in seen {
                    seen.acked = seen.received;
                    // An end is said again, whether it has come or not.
                    seen.ended = false;
                }
            }
            session.say_again();
        }
        Err(_) => client.confused = true,
    }
}

fn run(input: &mut Unstructured<'_>) -> Result<()> {
    let mut session = Session::new(0);
    let mut client = Client::default();
    client.named = input.arbitrary()?;
    if client.named {
        let name = br#"{"method":"session","params":{"id":"0123456789abcdef"}}"#;
        let frame = Frame::new(Kind::Call, u64::MAX, name.to_vec());
        let mut actions = Vec::new();
        session.receive(&frame.encode(), &mut actions).expect("it is the first");
        obey(&mut session, &mut client, actions, input)?;
        let len = session.unsent().len();
        session.sent(len);
    }
    for _ in 0..200 {
        if input.is_empty() {
            break;
        }
        let mut actions = Vec::new();
        // A real server reads no more while this is false.
        if session.wants_input() {
            let bytes = frame(&mut client, input)?;
            let result = session.receive(&bytes, &mut actions);
            obey(&mut session, &mut client, actions, input)?;
            if let Err(violation) = result {
                session.close(&violation);
                client.read(session.unsent());
                assert_eq!(client.last, Some((Kind::Error, 0)));
                return Ok(());
            }
        }
        work(&mut session, &mut client, input)?;
        if client.named && !client.confused && rarely(input)? {
            cut(&mut session, &mut client);
        }
        // What is said again after a loss is at most the windows of the open calls.
        let again = match client.was_cut {
            true => session.open_calls() * 3 * (STREAM_WINDOW as usize + 4096),
            false => 0,
        };
        assert!(session.unsent().len() <= OUT_LIMIT + 2 * (MAX_PAYLOAD_LEN + 4096) + again);
        assert!(session.open_calls() <= MAX_OPEN_CALLS);
        if input.arbitrary()? {
            let len = session.unsent().len();
            let len = match rarely(input)? {
                true => input.int_in_range(0..=len)?,
                false => len,
            };
            let bytes = session.unsent()[..len].to_vec();
            session.sent(len);
            client.read(&bytes);
        }
    }
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    // An input that is used up is no finding.
    let _ = run(&mut Unstructured::new(data));
});
