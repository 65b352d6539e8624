//! A connection that breaks at any byte, against the runtime's own session: nothing is lost,
//! repeated or run twice.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use ratoon_client::state::{Happening, Output, State};
use ratoon_protocol::{Call, Event, ExecParams, SessionReply};
use ratoon_runtime::session::{Action, Output as Out, Session};

const ID: &str = "0123456789abcdef";

/// The runtime: its exec calls echo their input and end at a `.` (or at the input's end).
struct Peer {
    /// The session that has a name, once there is one.
    kept: Option<Session>,
    /// A connection that has not said its session's name.
    fresh: Option<Session>,
    runs: BTreeMap<u64, u32>,
}

impl Peer {
    fn new() -> Self {
        Self {
            kept: None,
            fresh: Some(Session::new(0)),
            runs: BTreeMap::new(),
        }
    }

    fn live(&mut self) -> &mut Session {
        self.fresh.as_mut().or(self.kept.as_mut()).unwrap()
    }

    fn lose(&mut self) {
        if let Some(kept) = &mut self.kept {
            kept.detach();
        }
        self.fresh = Some(Session::new(0));
    }

    fn receive(&mut self, bytes: &[u8]) {
        let mut actions = Vec::new();
        self.live().receive(bytes, &mut actions).unwrap();
        while !actions.is_empty() {
            for action in std::mem::take(&mut actions) {
                self.act(action);
            }
            self.live().receive(&[], &mut actions).unwrap();
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Begin {
                call,
                request: Call::Session(params),
            } => {
                let mut fresh = self.fresh.take().unwrap();
                match &mut self.kept {
                    None => {
                        fresh.name();
                        fresh.reply(call, &SessionReply::default());
                        self.kept = Some(fresh);
                    }
                    Some(kept) => {
                        let calls = kept.resume(&mut fresh, call, &params.have).unwrap();
                        let resumed = true;
                        kept.reply(call, &SessionReply { resumed, calls });
                        kept.say_again();
                    }
                }
            }
            Action::Begin { call, request } => {
                *self.runs.entry(call).or_default() += 1;
                match request {
                    Call::Exec(_) => self.live().event(call, &Event::Started { pid: 7 }),
                    _ => self.live().reply(call, &"pong"),
                }
            }
            Action::Stdin { call, bytes, end } => {
                let session = self.live();
                session.stdin_taken(call, bytes.len() as u64);
                assert!(session.room(call, Out::Stdout) >= bytes.len());
                session.output(call, Out::Stdout, &bytes);
                if end || bytes.contains(&b'.') {
                    session.reply(call, &"done");
                }
            }
            Action::StopOutput { .. } => {}
        }
    }
}

/// What the client saw, and how many bytes went over the wire.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    output: BTreeMap<u64, Vec<u8>>,
    started: u32,
    replies: u32,
    wire: usize,
}

/// Plays the script; each connection breaks after so many bytes, one after the other, the last never.
/// What came is taken every `pace` steps, so that some of it waits when a connection breaks.
fn play(cuts: &[usize], pace: u32) -> (Seen, Peer) {
    let (mut client, mut peer) = (State::named(ID, None).unwrap(), Peer::new());
    let (mut seen, mut cuts) = (Seen::default(), cuts.iter().copied());
    let mut left = cuts.next().unwrap_or(usize::MAX);
    let cat = Call::Exec(Box::new(ExecParams {
        argv: vec!["cat".into()],
        stdin: true,
        ..ExecParams::default()
    }));
    let (mut ids, mut waiting) = (Vec::new(), Vec::new());
    for step in 0..2000u32 {
        match step {
            0 | 2 => ids.push(client.call(&cat).unwrap()),
            4..44 if step % 5 == 0 => drop(client.call(&Call::Ping).unwrap()),
            4..44 => {
                let call = ids[step as usize % 2];
                client.stdin(call, format!("{step}\n").as_bytes(), false);
            }
            44 | 45 => client.stdin(ids[step as usize % 2], b".", false),
            _ => {}
        }
        // One byte count for both ways: a break may fall between any two.
        let up = client.unsent().len().min(left);
        peer.receive(&client.unsent()[..up]);
        client.sent(up);
        left -= up;
        let down = peer.live().unsent().len().min(left);
        let bytes = peer.live().unsent()[..down].to_vec();
        peer.live().sent(down);
        left -= down;
        seen.wire += up + down;
        let mut happenings = Vec::new();
        client.receive(&bytes, &mut happenings).unwrap();
        for happening in happenings {
            match happening {
                Happening::Output {
                    call,
                    output,
                    bytes,
                } => {
                    assert_eq!(output, Output::Stdout);
                    waiting.push((call, bytes.len()));
                    seen.output.entry(call).or_default().extend(bytes);
                }
                Happening::Event { .. } => seen.started += 1,
                Happening::Reply { .. } => seen.replies += 1,
                Happening::Hello(_) | Happening::OutputEnd { .. } => {}
                Happening::Failed { error, .. } => panic!("{error}"),
            }
        }
        if step % pace == 0 {
            for (call, len) in waiting.drain(..) {
                client.taken(call, Output::Stdout, len);
            }
        }
        if left == 0 {
            left = cuts.next().unwrap_or(usize::MAX);
            peer.lose();
            client.reconnect().unwrap();
        }
        if seen.replies == 10 && step > 50 {
            return (seen, peer);
        }
    }
    panic!("it never ended: {seen:?}");
}

fn check(cuts: &[usize], pace: u32) {
    let (seen, peer) = play(cuts, pace);
    let texts: Vec<_> = seen.output.values().cloned().collect();
    let expected = |parity| {
        let mut text: String = (4..44)
            .filter(|step| step % 5 != 0 && step % 2 == parity)
            .map(|step| format!("{step}\n"))
            .collect();
        text.push('.');
        text.into_bytes()
    };
    assert_eq!(texts, [expected(0), expected(1)], "cuts {cuts:?}");
    assert_eq!((seen.started, seen.replies), (2, 10), "cuts {cuts:?}");
    assert_eq!(peer.runs.len(), 10, "cuts {cuts:?}");
    assert!(peer.runs.values().all(|&runs| runs == 1), "cuts {cuts:?}");
}

#[test]
fn a_break_at_any_byte_loses_repeats_and_reruns_nothing() {
    let (whole, _) = play(&[], 1);
    for cut in 1..=whole.wire {
        check(&[cut], 1);
        check(&[cut], 7);
    }
}

#[test]
fn many_breaks_in_a_row_lose_repeat_and_rerun_nothing() {
    let (whole, _) = play(&[], 1);
    for first in (1..whole.wire).step_by(37) {
        for next in [1, 30, 700, 1100, 1300, 1600] {
            for pace in [1, 9, 1000] {
                check(&[first, next, next / 2 + 600, next], pace);
            }
        }
    }
}
