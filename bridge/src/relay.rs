//! Sends a call to its provider and brings the answer back, piece by piece.
//!
//! Every piece is masked, stored and given to the guest, in this order; nothing grows with the
//! answer. Until the first byte of an answer a call may be sent again: when no connection came about,
//! or the provider said 429 or 529. After that never: it may be paid for twice.

use std::time::Duration;

use http_body_util::{BodyExt as _, Either, Full};
use hyper::Response;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName, RETRY_AFTER};
use ratoon_bridge_api::record::Ending;
use tokio::sync::OwnedSemaphorePermit;

use crate::call::{After, Call, HeadSender, Outcome, ToGuest, head, outgoing, unrecorded};
use crate::config::HostLimits;
use crate::mask::Masking;
use crate::record::{Spool, answer_label};
use crate::refusal::{Code, Refusal};
use crate::scan::{Scan, Usage};
use crate::sse::Events;
use crate::upstream::{Begun, SendError};

/// A stream's media type.
pub(crate) const EVENTS: &str = "text/event-stream";
/// Any other answer's.
pub(crate) const JSON: &str = "application/json";
/// The most of a provider's error that is read.
const MAX_ERROR_BYTES: usize = 64 * 1024;

/// Runs a call to its end. The head, or what is told instead, goes to `to_guest`.
pub(crate) async fn run(
    call: &Call,
    body: Bytes,
    memory: Vec<OwnedSemaphorePermit>,
    mut to_guest: HeadSender,
) -> Outcome {
    let mut outcome = Outcome {
        ending: Ending::Unreachable,
        status: 0,
        media_type: JSON,
        body: None,
        usage: Usage::default(),
        free: false,
        attempts: 0,
        first_byte: Duration::ZERO,
        after: After::Nothing,
    };
    let sent = send(call, &body, &mut to_guest, &mut outcome).await;
    drop((body, memory));
    outcome.first_byte = call.since.elapsed();
    let begun = match sent {
        Ok(begun) => begun,
        Err((ending, refusal)) => {
            outcome.ending = ending;
            finish_refused(call, &mut outcome, to_guest, refusal);
            return outcome;
        }
    };
    let status = begun.response.status();
    if status.is_success() {
        answer(call, begun, to_guest, &mut outcome).await;
    } else {
        provider_error(call, begun, to_guest, &mut outcome).await;
    }
    outcome
}

/// Sends until there is an answer to pass on.
async fn send(
    call: &Call,
    body: &Bytes,
    to_guest: &mut HeadSender,
    outcome: &mut Outcome,
) -> Result<Begun, (Ending, Refusal)> {
    let limits = &call.bridge.config.limits;
    let upstream = &call.bridge.upstreams[call.provider];
    let mut wait_left = HostLimits::seconds(limits.retry_s);
    let first_byte = HostLimits::seconds(limits.first_byte_s);
    loop {
        outcome.attempts += 1;
        let last = outcome.attempts >= limits.attempts;
        let sending = upstream.send(call.wire, call.stream, &call.passed, body.clone());
        let sent = guarded(call, first_byte, to_guest.closed(), sending).await;
        let sent = sent.map_err(|ending| (ending, ended(ending)))?;
        let asked_for = match sent {
            Ok(begun) => {
                let status = begun.response.status().as_u16();
                if last || !matches!(status, 429 | 529) {
                    return Ok(begun);
                }
                let asked_for = retry_after(begun.response.headers());
                if wait(outcome.attempts, asked_for) > wait_left {
                    return Ok(begun);
                }
                asked_for
            }
            Err(SendError::Connect(error)) => {
                tracing::warn!("the provider cannot be reached: {error}");
                if last || wait(outcome.attempts, None) > wait_left {
                    outcome.free = true;
                    let refusal =
                        Refusal::new(Code::Unreachable, "the model's provider cannot be reached");
                    return Err((Ending::Unreachable, refusal));
                }
                None
            }
            Err(SendError::Broken(error)) => {
                tracing::warn!("the provider hung up: {error}");
                let refusal = Refusal {
                    message: "the model's provider hung up before it answered".into(),
                    ..Refusal::new(Code::Cut, "")
                };
                return Err((Ending::Unreachable, refusal));
            }
        };
        let pause = wait(outcome.attempts, asked_for);
        wait_left = wait_left.saturating_sub(pause);
        let slept = guarded(
            call,
            pause * 2,
            to_guest.closed(),
            tokio::time::sleep(pause),
        )
        .await;
        slept.map_err(|ending| {
            outcome.free = true;
            (ending, ended(ending))
        })?;
    }
}

/// Half a second, then twice as long each time, a quarter at random; or what the provider asks for.
fn wait(attempt: u32, asked_for: Option<Duration>) -> Duration {
    let base = Duration::from_millis(500 << attempt.saturating_sub(1).min(6));
    asked_for.unwrap_or_else(|| base.mul_f64(0.75 + fastrand::f64() / 4.0))
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds: f64 = headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

/// Waits for `future`, unless the guest or the VM goes, or the time is over.
async fn guarded<T>(
    call: &Call,
    most: Duration,
    guest_gone: impl Future<Output = ()>,
    future: impl Future<Output = T>,
) -> Result<T, Ending> {
    let mut removed = call.vm.gone.subscribe();
    let most = most.min(call.most.saturating_sub(call.since.elapsed()));
    tokio::select! {
        biased;
        value = future => Ok(value),
        _ = removed.wait_for(|gone| *gone) => Err(Ending::Removed),
        () = guest_gone => Err(gone(call)),
        () = tokio::time::sleep(most) => Err(Ending::TimedOut),
    }
}

/// Nobody listens any more: the guest has hung up, or its VM was removed and its connections with it.
fn gone(call: &Call) -> Ending {
    match *call.vm.gone.borrow() {
        true => Ending::Removed,
        false => Ending::GuestGone,
    }
}

/// What a guest is told of an ending, if it still listens.
fn ended(ending: Ending) -> Refusal {
    match ending {
        Ending::TimedOut => Refusal::new(Code::TimedOut, "the model's provider took too long"),
        Ending::TooLarge => Refusal::new(Code::AnswerTooLarge, "the model's answer is too large"),
        Ending::Removed | Ending::GuestGone => Refusal::new(Code::Removed, "the call was ended"),
        _ => Refusal::new(Code::Cut, "the model's answer broke off before its end"),
    }
}

/// Stores what the guest will be told.
fn finish_refused(call: &Call, outcome: &mut Outcome, to_guest: HeadSender, refusal: Refusal) {
    let anthropic = call.wire.is_anthropic();
    outcome.status = refusal.code.status();
    outcome.body = call
        .vm
        .run
        .store(&call.label(), &refusal.body(anthropic))
        .ok();
    let mut response = refusal.response(anthropic);
    response
        .headers_mut()
        .insert("x-ratoon-call", call.number.into());
    outcome.after = After::Head(to_guest, Box::new(response.map(Either::Left)));
}

/// The provider says no: in its own words, if they are harmless.
async fn provider_error(call: &Call, begun: Begun, to_guest: HeadSender, outcome: &mut Outcome) {
    let status = begun.response.status().as_u16();
    outcome.ending = Ending::ProviderError;
    // Refused before any token was made; after another failure it may have been paid for.
    outcome.free = matches!(status, 400..=499 | 503 | 529);
    match status {
        401 | 403 => {
            let message = format!(
                "the model's provider refused the host's key (HTTP {status}); this is for the host's operator to mend"
            );
            let refusal = Refusal::new(Code::Credential, message);
            return finish_refused(call, outcome, to_guest, refusal);
        }
        300..=399 => {
            let refusal = Refusal::new(
                Code::Strange,
                "the model's provider answered with a redirect, which is not followed",
            );
            return finish_refused(call, outcome, to_guest, refusal);
        }
        _ => {}
    }
    let headers = begun.response.headers().clone();
    let reading = http_body_util::Limited::new(begun.response.into_body(), MAX_ERROR_BYTES);
    let silence = HostLimits::seconds(call.bridge.config.limits.silence_s);
    let read = guarded(call, silence, std::future::pending(), reading.collect()).await;
    let words = match read {
        Ok(Ok(body)) if !headers.contains_key(CONTENT_ENCODING) => body.to_bytes(),
        _ => Bytes::new(),
    };
    let is_error = serde_json::from_slice::<serde_json::Value>(&words)
        .is_ok_and(|value| value.get("error").is_some());
    let words = if is_error {
        Bytes::from(call.bridge.masker.mask(&words))
    } else {
        let message = format!("the model's provider answered with HTTP {status}");
        Refusal::new(Code::Strange, message)
            .body(call.wire.is_anthropic())
            .into()
    };
    outcome.status = status;
    outcome.body = call.vm.run.store(&call.label(), &words).ok();
    let mut response = head(status, JSON, call.number, &[]);
    pass_headers(&headers, &mut response);
    let response = response.map(|()| Either::Left(Full::new(words)));
    outcome.after = After::Head(to_guest, Box::new(response));
}

/// The few headers of a provider's that a guest gets.
fn pass_headers(from: &HeaderMap, to: &mut Response<()>) {
    for name in [
        "retry-after",
        "request-id",
        "x-request-id",
        "x-should-retry",
    ] {
        let name = HeaderName::from_static(name);
        if let Some(value) = from.get(&name).filter(|value| value.len() <= 128) {
            to.headers_mut().insert(name, value.clone());
        }
    }
}

/// Relays an answer.
async fn answer(call: &Call, begun: Begun, to_guest: HeadSender, outcome: &mut Outcome) {
    let (response, sender) = begun.into_parts();
    let (parts, body) = response.into_parts();
    let media_type = parts
        .headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let events = media_type.starts_with(EVENTS);
    let strange = if parts.headers.contains_key(CONTENT_ENCODING) {
        Some("an encoding that nobody asked for")
    } else if !events && !media_type.starts_with(JSON) {
        Some("what is neither JSON nor events")
    } else if events && !call.stream {
        Some("a stream that nobody asked for")
    } else {
        None
    };
    if let Some(what) = strange {
        outcome.ending = Ending::ProviderError;
        let message = format!("the model's provider answered with {what}");
        return finish_refused(
            call,
            outcome,
            to_guest,
            Refusal::new(Code::Strange, message),
        );
    }
    let spool = match call.vm.run.spool(&call.label()) {
        Ok(spool) => spool,
        Err(error) => return finish_refused(call, outcome, to_guest, unrecorded(&error)),
    };
    outcome.status = 200;
    outcome.media_type = if events { EVENTS } else { JSON };
    let mut response = head(200, outcome.media_type, call.number, &call.withheld);
    pass_headers(&parts.headers, &mut response);
    let (pieces, outgoing) = outgoing();
    if to_guest
        .send(Ok(response.map(|()| Either::Right(outgoing))))
        .is_err()
    {
        outcome.ending = gone(call);
        return;
    }
    let mut relay = Relay {
        call,
        reading: if events {
            Reading::Events(Box::new(Events::new(call.hide_usage)))
        } else {
            Reading::Json(Box::default(), Usage::default())
        },
        masking: Masking::default(),
        spool,
        pieces,
        len: 0,
        may_end: false,
    };
    let ending = relay.all(body).await;
    let (ending, whole) = relay.last(ending).await;
    outcome.usage = relay.usage();
    outcome.body = relay.spool.finish().ok();
    outcome.ending = match &outcome.body {
        Some(_) => ending,
        None => Ending::Cut,
    };
    outcome.after = After::End(relay.pieces, relay.may_end && outcome.body.is_some());
    if whole {
        call.bridge.upstreams[call.provider].give_back(sender).await;
    }
}

/// How an answer is read.
#[derive(Debug)]
enum Reading {
    Events(Box<Events>),
    Json(Box<Scan>, Usage),
}

struct Relay<'a> {
    call: &'a Call,
    reading: Reading,
    masking: Masking,
    spool: Spool,
    pieces: ToGuest,
    len: u64,
    /// The guest has got an end that it can tell from a cut.
    may_end: bool,
}

impl Relay<'_> {
    /// Until the provider has said all, or something is wrong.
    async fn all(&mut self, mut body: Incoming) -> Ending {
        let limits = &self.call.bridge.config.limits;
        let silence = HostLimits::seconds(limits.silence_s);
        loop {
            let next = guarded(self.call, silence, self.pieces.closed(), body.frame()).await;
            let piece = match next {
                Err(ending) => return ending,
                Ok(None) => return Ending::Complete,
                Ok(Some(Err(error))) => {
                    tracing::debug!("the provider's answer broke off: {error}");
                    return Ending::Cut;
                }
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(piece) => piece,
                    Err(_) => continue,
                },
            };
            self.len += piece.len() as u64;
            if self.len > limits.answer_bytes {
                return Ending::TooLarge;
            }
            let mut read = Vec::new();
            match &mut self.reading {
                Reading::Events(events) => events.push(&piece, &mut read),
                Reading::Json(scan, usage) => {
                    scan.push(&piece, usage);
                    read.extend_from_slice(&piece);
                }
            }
            let mut sure = Vec::new();
            self.masking
                .push(&self.call.bridge.masker, &read, &mut sure);
            if let Err(ending) = self.give(sure).await {
                return ending;
            }
        }
    }

    /// Stores a piece, then gives it to the guest.
    async fn give(&mut self, piece: Vec<u8>) -> Result<(), Ending> {
        if piece.is_empty() {
            return Ok(());
        }
        if let Err(error) = self.spool.write(&piece) {
            tracing::error!("an answer cannot be stored: {error}");
            return Err(Ending::Cut);
        }
        let call_s = HostLimits::seconds(self.call.bridge.config.limits.call_s);
        let giving = self.pieces.give(piece.into());
        match guarded(self.call, call_s, std::future::pending(), giving).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(gone(self.call)),
            Err(ending) => Err(ending),
        }
    }

    /// Ends the answer towards the guest; says how it ended and whether the connection may be used
    /// again.
    async fn last(&mut self, ending: Ending) -> (Ending, bool) {
        let reached_end = ending == Ending::Complete;
        let ending = match (&self.reading, ending) {
            (Reading::Events(events), Ending::Complete) if events.failed => Ending::ProviderError,
            (Reading::Events(events), Ending::Complete) if !events.ended => Ending::Cut,
            (Reading::Json(scan, _), Ending::Complete) if !scan.is_whole() => Ending::Cut,
            (_, ending) => ending,
        };
        let mut rest = Vec::new();
        self.masking.finish(&mut rest);
        let mut may_follow = false;
        if let Reading::Events(events) = &self.reading {
            may_follow = events.is_between_events();
        }
        let told = !matches!(ending, Ending::Complete | Ending::ProviderError);
        if told && may_follow {
            let event = ended(ending).event(self.call.wire.is_anthropic());
            rest.extend_from_slice(&event);
        }
        // A guest that has gone hears nothing; what it was told is stored all the same.
        if ending == Ending::GuestGone || ending == Ending::Removed {
            let _ = self.spool.write(&rest);
        } else {
            let given = self.give(rest).await.is_ok();
            self.may_end = given && (!told || may_follow);
        }
        (ending, reached_end)
    }

    fn usage(&self) -> Usage {
        match &self.reading {
            Reading::Events(events) => events.usage,
            Reading::Json(_, usage) => *usage,
        }
    }
}

impl Call {
    /// A name for its files while they are written.
    fn label(&self) -> String {
        answer_label(&self.vm.branch, self.number)
    }
}
