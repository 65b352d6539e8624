//! One call: reserve, record, send, relay, settle.
//!
//! ```text
//! allowed -> reserved and recorded -> sent (again, before the first byte) -> relayed -> settled
//!    |               |                           |                             |
//!  refused        refused                 error, settled                cut, settled
//! ```
//!
//! From the reservation on a call is a task of its own that ends by settling, whoever hangs up. What
//! is not known to be less counts as all that was reserved: a stream that broke off may have been
//! paid for to its end.

use std::io::Read as _;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http_body_util::Either;
use hyper::Response;
use hyper::body::{Bytes, Frame};
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use ratoon_bridge_api::amount::Amount;
use ratoon_bridge_api::record::{Body, Ending, Entry, Hash, Step};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use crate::bridge::{Bridge, Vm};
use crate::budget::Short;
use crate::config::{HostLimits, Model, Price};
use crate::record::{Answered, State, now_ms};
use crate::refusal::{Code, Refusal};
use crate::relay;
use crate::request::Wire;
use crate::server::{Answer, Asked};
use crate::upstream::Passed;

/// Pieces of an answer that wait for the guest.
const AHEAD: usize = 2;
/// Fewer output tokens than these are no answer: when less is left, the budget is used up.
const LEAST_OUTPUT: u64 = 16;
const REPLAY_PIECE: usize = 16 * 1024;

/// An answer's bytes on their way to the guest. Unless its sender says that it is whole, its end
/// breaks the connection: a guest never takes a part for all, however the call ended.
#[derive(Debug)]
pub struct Outgoing {
    pieces: mpsc::Receiver<Bytes>,
    whole: Arc<AtomicBool>,
    ended: bool,
}

/// The answer cannot be completed.
#[derive(Debug, thiserror::Error)]
#[error("the answer broke off")]
pub struct Broken;

impl hyper::body::Body for Outgoing {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let Poll::Ready(piece) = self.pieces.poll_recv(context) else {
            return Poll::Pending;
        };
        Poll::Ready(match piece {
            Some(piece) => Some(Ok(Frame::data(piece))),
            None if self.ended || self.whole.load(Ordering::Acquire) => None,
            None => {
                self.ended = true;
                Some(Err(Broken))
            }
        })
    }
}

/// The guest's end of a call.
#[derive(Debug)]
pub(crate) struct ToGuest {
    pieces: mpsc::Sender<Bytes>,
    whole: Arc<AtomicBool>,
}

impl ToGuest {
    /// Gives a piece; false when the guest has gone.
    pub(crate) async fn give(&self, piece: Bytes) -> bool {
        self.pieces.send(piece).await.is_ok()
    }

    /// Waits until the guest has gone.
    pub(crate) async fn closed(&self) {
        self.pieces.closed().await;
    }

    /// Ends the answer well.
    pub(crate) fn end(self) {
        self.whole.store(true, Ordering::Release);
    }
}

/// How the answer's head comes back from the call's task.
pub(crate) type HeadSender = oneshot::Sender<Result<Answer, Refusal>>;

/// A call that is recorded and on its way.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) bridge: Arc<Bridge>,
    pub(crate) vm: Arc<Vm>,
    pub(crate) number: u64,
    pub(crate) provider: usize,
    pub(crate) wire: Wire,
    pub(crate) stream: bool,
    pub(crate) hide_usage: bool,
    pub(crate) withheld: Vec<String>,
    pub(crate) passed: Passed,
    pub(crate) since: Instant,
    /// How long it may take in all.
    pub(crate) most: Duration,
    step: Option<Step>,
    price: Option<Price>,
    reserved: Amount,
}

/// What became of a call.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) ending: Ending,
    pub(crate) status: u16,
    pub(crate) media_type: &'static str,
    pub(crate) body: Option<Body>,
    pub(crate) usage: crate::scan::Usage,
    /// Whether nothing can have been paid for.
    pub(crate) free: bool,
    pub(crate) attempts: u32,
    pub(crate) first_byte: Duration,
    pub(crate) after: After,
}

/// What the guest gets when the call is settled: whoever has an answer's end may rely on its record.
#[derive(Debug)]
pub(crate) enum After {
    /// Nothing: it has gone.
    Nothing,
    /// An answer that was not begun.
    Head(HeadSender, Box<Answer>),
    /// The end of the stream, and whether it is a whole one.
    End(ToGuest, bool),
}

/// Makes a call; gives the answer when its head is there.
///
/// # Errors
/// What the guest is told instead.
pub async fn call(bridge: &Arc<Bridge>, vm: &Arc<Vm>, asked: Asked) -> Result<Answer, Refusal> {
    let Asked {
        mut request,
        step,
        passed,
        places,
        memory,
        since,
    } = asked;
    let wire = request.wire;
    let allowed = vm
        .models
        .as_ref()
        .is_none_or(|models| models.contains(&request.model));
    let Some((provider, model)) = bridge.config.find(wire, &request.model).filter(|_| allowed)
    else {
        let name = crate::rules::shown(&request.model);
        return Err(Refusal::new(
            Code::Model,
            format!("the model \"{name}\" may not be used here, on this route"),
        ));
    };
    let digest = Hash(request.digest.to_hex().to_string());
    let (call, body) = {
        let mut state = vm.run.state();
        // Under the lock: what has begun before the VM went is ended with it, and nothing after.
        if *vm.gone.borrow() {
            return Err(Refusal::new(Code::Removed, "this machine is being removed"));
        }
        if let Some(step) = &step
            && let Some(stored) = state.step(&vm.branch, step)
        {
            if stored.digest != digest {
                return Err(again("was another request"));
            }
            return match stored.answer {
                Answered::NotYet => Err(again("is still on its way")),
                Answered::Never => Err(again("ended without a whole answer")),
                Answered::Whole { media_type, body } => {
                    drop(state);
                    let stored = (stored.call, media_type, body);
                    replay(bridge, vm, stored, places)
                }
            };
        }
        let left = state.times.left(&vm.branch, now_ms());
        let left = left.map_err(|over| Refusal::new(Code::Time, over.to_string()))?;
        let (output, reserved) = reserve(&mut state, &vm.branch, &request, model)?;
        let upstream_name = model.upstream.as_deref().unwrap_or(&model.id);
        let chat_limit = bridge.config.providers[provider].chat_limit.name();
        let usage_wanted = request.usage_wanted;
        let body = request.finish(upstream_name, output, chat_limit);
        let begun = vm
            .run
            .store(&format!("{}.request", vm.branch), &body)
            .and_then(|stored| {
                vm.run
                    .begin_call(&mut state, &vm.branch, |number| Entry::Call {
                        call: number,
                        vm: vm.id.clone(),
                        wire: wire.name().to_owned(),
                        provider: bridge.config.providers[provider].name.clone(),
                        model: request.model.clone(),
                        step: step.clone(),
                        digest,
                        request: stored,
                        withheld: request.withheld.clone(),
                        reserved,
                    })
            });
        let number = match begun {
            Ok(number) => number,
            Err(error) => {
                state.tree.settle(&vm.branch, reserved, Amount::default());
                tracing::error!(vm = vm.id, "the record cannot be written: {error}");
                return Err(unrecorded(&error));
            }
        };
        let call = Call {
            bridge: bridge.clone(),
            vm: vm.clone(),
            number,
            provider,
            wire,
            stream: request.stream,
            hide_usage: wire == Wire::Chat && !usage_wanted,
            withheld: std::mem::take(&mut request.withheld),
            passed,
            since,
            most: HostLimits::seconds(bridge.config.limits.call_s).min(left),
            step,
            price: model.price,
            reserved,
        };
        (call, Bytes::from(body))
    };
    let (head_sender, head) = oneshot::channel();
    tokio::spawn(async move {
        let outcome = relay::run(&call, body, memory, head_sender).await;
        let after = call.settle(outcome);
        drop(places);
        match after {
            // If it has gone there is nobody to tell.
            After::Head(to_guest, answer) => drop(to_guest.send(Ok(*answer))),
            After::End(pieces, true) => pieces.end(),
            After::End(_, false) | After::Nothing => {}
        }
    });
    head.await
        .unwrap_or_else(|_| Err(Refusal::new(Code::Removed, "the call was ended")))
}

pub(crate) fn unrecorded(error: &std::io::Error) -> Refusal {
    let why = match error.kind() {
        std::io::ErrorKind::QuotaExceeded => {
            "the record of this run is as large as the host allows"
        }
        _ => "the host cannot write the record",
    };
    Refusal::new(
        Code::Record,
        format!("{why}, and without it there are no calls"),
    )
}

fn again(what: &str) -> Refusal {
    Refusal::new(
        Code::Step,
        format!("this attempt of this step {what}; count the attempt up for a new call"),
    )
}

/// Puts aside what the call may use at most, and says how much output that is.
fn reserve(
    state: &mut State,
    branch: &str,
    request: &crate::request::Request,
    model: &Model,
) -> Result<(u64, Amount), Refusal> {
    if request.wire == Wire::CountTokens {
        // Providers count for nothing.
        let one = Amount {
            calls: 1,
            ..Amount::default()
        };
        return match state.tree.reserve(branch, one) {
            Ok(()) => Ok((0, one)),
            Err(short) => Err(too_little(&short)),
        };
    }
    if model.price.is_none() && state.tree.counts_money(branch) {
        return Err(Refusal::new(
            Code::Model,
            "the budget counts money, and this model has no price in the host's configuration",
        ));
    }
    let wanted = request
        .max_output
        .unwrap_or(model.max_output_tokens)
        .min(model.max_output_tokens);
    let input = request.input_tokens_at_most(model.max_input_tokens);
    let left = state.tree.left(branch);
    let mut output = wanted.min(left.output_tokens);
    if let Some(price) = model.price
        && left.cost_microusd < u64::MAX
        && price.output > 0
    {
        let rest = left.cost_microusd.saturating_sub(cost(&price, input, 0));
        let affordable = u128::from(rest) * 1_000_000 / u128::from(price.output);
        output = output.min(u64::try_from(affordable).unwrap_or(u64::MAX));
    }
    output = output.max(LEAST_OUTPUT.min(wanted));
    let reserved = Amount {
        calls: 1,
        input_tokens: input,
        output_tokens: output,
        cost_microusd: model.price.map_or(0, |price| cost(&price, input, output)),
    };
    match state.tree.reserve(branch, reserved) {
        Ok(()) => Ok((output, reserved)),
        Err(short) => Err(too_little(&short)),
    }
}

fn too_little(short: &Short) -> Refusal {
    let code = if short.for_now {
        Code::Busy
    } else {
        Code::Budget
    };
    Refusal::new(code, short.to_string())
}

/// At its dearest.
fn cost(price: &Price, input: u64, output: u64) -> u64 {
    Price {
        input: price.dearest_input(),
        ..*price
    }
    .of(input, 0, 0, output)
}

/// Gives a stored answer again. It keeps its places as a call does, and no longer than one.
fn replay(
    bridge: &Bridge,
    vm: &Arc<Vm>,
    (call, media_type, body): (u64, String, Body),
    places: [OwnedSemaphorePermit; 2],
) -> Result<Answer, Refusal> {
    let gone = |error: std::io::Error| {
        tracing::error!(vm = vm.id, "a stored answer cannot be given: {error}");
        unrecorded(&error)
    };
    let mut file = vm.run.open_body(&body).map_err(gone)?;
    let len = file.metadata().map_err(gone)?.len();
    if len != body.len {
        let what = format!("it has {len} bytes, not {}", body.len);
        return Err(gone(std::io::Error::other(what)));
    }
    let entry = Entry::Replay {
        call,
        vm: vm.id.clone(),
    };
    vm.run.append(&vm.branch, entry).map_err(gone)?;
    let (to_guest, pieces) = outgoing();
    let most = HostLimits::seconds(bridge.config.limits.call_s);
    tokio::spawn(async move {
        let giving = async {
            loop {
                let mut piece = vec![0; REPLAY_PIECE];
                match file.read(&mut piece) {
                    Ok(0) => return true,
                    Ok(len) => piece.truncate(len),
                    Err(_) => return false,
                }
                if !to_guest.give(piece.into()).await {
                    return false;
                }
            }
        };
        let given = tokio::time::timeout(most, giving).await;
        drop(places);
        if given == Ok(true) {
            to_guest.end();
        }
    });
    let media_type = if media_type == relay::EVENTS {
        relay::EVENTS
    } else {
        relay::JSON
    };
    let mut response = head(200, media_type, call, &[]);
    response
        .headers_mut()
        .insert("x-ratoon-replayed", HeaderValue::from_static("1"));
    Ok(response.map(|()| Either::Right(pieces)))
}

/// A head with our headers.
pub(crate) fn head(
    status: u16,
    media_type: &'static str,
    call: u64,
    withheld: &[String],
) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() =
        hyper::StatusCode::from_u16(status).unwrap_or(hyper::StatusCode::BAD_GATEWAY);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    headers.insert("x-ratoon-call", HeaderValue::from(call));
    if !withheld.is_empty()
        && let Ok(names) = HeaderValue::from_str(&withheld.join(","))
    {
        headers.insert(HeaderName::from_static("x-ratoon-withheld"), names);
    }
    response
}

/// A stream to the guest.
pub(crate) fn outgoing() -> (ToGuest, Outgoing) {
    let (sender, receiver) = mpsc::channel(AHEAD);
    let whole = Arc::new(AtomicBool::new(false));
    let to_guest = ToGuest {
        pieces: sender,
        whole: whole.clone(),
    };
    let outgoing = Outgoing {
        pieces: receiver,
        whole,
        ended: false,
    };
    (to_guest, outgoing)
}

impl Call {
    /// What the call cost: never less than may have been paid.
    fn charge(&self, outcome: &Outcome) -> Amount {
        let one = Amount {
            calls: 1,
            ..Amount::default()
        };
        if outcome.free || self.wire == Wire::CountTokens {
            return one;
        }
        let usage = &outcome.usage;
        let input = usage.all_input();
        let output = usage.output.filter(|_| outcome.ending == Ending::Complete);
        let cost_microusd = match (self.price, input, output) {
            (None, _, _) => 0,
            (Some(price), Some(input), output) => price.of(
                input
                    .saturating_sub(usage.cached)
                    .saturating_sub(usage.cache_written),
                usage.cached,
                usage.cache_written,
                output.unwrap_or(self.reserved.output_tokens),
            ),
            (Some(_), None, _) => self.reserved.cost_microusd,
        };
        Amount {
            input_tokens: input.unwrap_or(self.reserved.input_tokens),
            output_tokens: output.unwrap_or(self.reserved.output_tokens),
            cost_microusd,
            ..one
        }
    }

    fn settle(&self, outcome: Outcome) -> After {
        let charged = self.charge(&outcome);
        let body = outcome.body.unwrap_or_else(Body::empty);
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let entry = Entry::Answer {
            call: self.number,
            ending: outcome.ending,
            status: outcome.status,
            media_type: outcome.media_type.to_owned(),
            body,
            charged,
            cached_tokens: outcome.usage.cached,
            attempts: outcome.attempts,
            first_byte_us: micros(outcome.first_byte),
            total_us: micros(self.since.elapsed()),
        };
        let run = &self.vm.run;
        let written = run.end_call(&self.vm.branch, self.step.as_ref(), self.reserved, entry);
        if let Err(error) = written {
            tracing::error!(vm = self.vm.id, "the record cannot be written: {error}");
        }
        outcome.after
    }
}
