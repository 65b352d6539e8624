//! HTTP/1.1 for one VM: accepts, checks, reads the request, hands the call over.
//!
//! The order of the checks is the order of their cost: who connects, how often, which route, which
//! token, how large; only then is a byte of the body read. Whoever is slow is cut off.

use std::convert::Infallible;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use http_body_util::{BodyExt as _, Either, Full};
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::header::{HeaderMap, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use ratoon_bridge_api::record::Step;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::bridge::{Bridge, Vm};
use crate::call::{self, Outgoing};
use crate::config::HostLimits;
use crate::refusal::{Code, Refusal};
use crate::request::{self, Wire};
use crate::token;
use crate::upstream::Passed;

/// Connections of one VM at once: more than its calls, so that idle ones may stay open.
const MOST_CONNECTIONS: usize = 64;
/// Bodies up to this length take less time than another thread's start.
const PARSED_HERE_BYTES: usize = 32 * 1024;
const STEP: &str = "x-ratoon-step";
const ATTEMPT: &str = "x-ratoon-attempt";
/// Betas that change how a call is answered, and grant nothing.
const BETAS: &[&str] = &[
    "effort-",
    "fine-grained-tool-streaming-",
    "interleaved-thinking-",
    "output-128k-",
    "prompt-caching-",
    "structured-outputs-",
    "token-counting-",
    "token-efficient-tools-",
];

/// What is answered: a short text, or a stream.
pub type Answer = Response<Either<Full<Bytes>, Outgoing>>;

/// Serves a VM until it is removed.
pub async fn serve(bridge: Arc<Bridge>, vm: Arc<Vm>, listener: UnixListener) {
    let connections = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut gone = vm.gone.subscribe();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = gone.wait_for(|gone| *gone) => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, as a rule: they come back when connections end.
                tracing::warn!(vm = vm.id, "no connection accepted: {error}");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        if !may_connect(&stream, &bridge) {
            tracing::warn!(vm = vm.id, "a connection of another user was refused");
            continue;
        }
        let Ok(of_vm) = connections.clone().try_acquire_owned() else {
            continue;
        };
        let Ok(of_all) = bridge.connections.clone().try_acquire_owned() else {
            // A guest may do this as often as it likes: no line in the log for each.
            tracing::debug!(vm = vm.id, "too many connections: one was refused");
            continue;
        };
        let (bridge, vm) = (bridge.clone(), vm.clone());
        tokio::spawn(async move {
            let mut gone = vm.gone.subscribe();
            let connection = connection(bridge, vm, stream);
            tokio::select! {
                () = connection => {}
                _ = gone.wait_for(|gone| *gone) => {}
            }
            drop((of_vm, of_all));
        });
    }
}

fn may_connect(stream: &UnixStream, bridge: &Bridge) -> bool {
    stream.peer_cred().is_ok_and(|peer| {
        peer.uid() == bridge.owner || bridge.config.peer_uids.contains(&peer.uid())
    })
}

async fn connection(bridge: Arc<Bridge>, vm: Arc<Vm>, stream: UnixStream) {
    let timeout = HostLimits::seconds(bridge.config.limits.request_s);
    let service = service_fn(|request| {
        let (bridge, vm) = (bridge.clone(), vm.clone());
        async move { Ok::<_, Infallible>(answer(&bridge, &vm, request).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(timeout)
        .max_buf_size(64 * 1024)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!("a guest's connection ended: {error}");
    }
}

async fn answer(bridge: &Arc<Bridge>, vm: &Arc<Vm>, request: Request<Incoming>) -> Answer {
    let path = request.uri().path();
    let anthropic = path.starts_with("/v1/messages");
    let answered = match asked(bridge, vm, request).await {
        Ok(asked) => call::call(bridge, vm, asked).await,
        Err(refusal) => Err(refusal),
    };
    answered.unwrap_or_else(|refusal| {
        let refusal = Refusal {
            message: bridge.masker.mask_text(&refusal.message),
            ..refusal
        };
        vm.refused(&refusal);
        refusal.response(anthropic).map(Either::Left)
    })
}

/// A request that may become a call.
#[derive(Debug)]
pub struct Asked {
    /// The request, rebuilt.
    pub request: request::Request,
    /// What makes a repetition recognisable.
    pub step: Option<Step>,
    /// Headers that may go on.
    pub passed: Passed,
    /// Its place among the VM's calls, and among all.
    pub places: [OwnedSemaphorePermit; 2],
    /// Its share of the memory for bodies, until the answer begins.
    pub memory: Vec<OwnedSemaphorePermit>,
    /// When its last byte had come.
    pub since: Instant,
}

async fn asked(
    bridge: &Arc<Bridge>,
    vm: &Arc<Vm>,
    request: Request<Incoming>,
) -> Result<Asked, Refusal> {
    let limits = &bridge.config.limits;
    if !vm.may_ask(limits.vm_requests_a_minute) {
        return Err(Refusal {
            retry_after_s: Some(60),
            ..Refusal::new(Code::Busy, "too many requests in a minute; wait")
        });
    }
    let target = request.uri();
    let wire = Wire::of_path(target.path()).filter(|wire| {
        // The one query that the vendors' programs have; nothing of it goes on.
        let is_known = |query| wire.is_anthropic() && query == "beta=true";
        target.authority().is_none() && target.query().is_none_or(is_known)
    });
    let Some(wire) = wire else {
        let routes = Wire::ALL.map(Wire::path).join(", ");
        return Err(Refusal::new(
            Code::Route,
            format!("there is no such route here; there are POST {routes}, without a query"),
        ));
    };
    if request.method() != Method::POST {
        return Err(Refusal::new(Code::Method, "only POST is allowed here"));
    }
    let headers = request.headers();
    let token = only(headers, token::HEADER)?.map_or(&b""[..], HeaderValue::as_bytes);
    live(vm, token)?;
    let token = token.to_vec();
    if only(headers, "content-encoding")?.is_some_and(|encoding| encoding != "identity") {
        return Err(Refusal::new(
            Code::Rule,
            "content-encoding is not allowed here",
        ));
    }
    let step = step(headers)?;
    let passed = passed(headers, wire)?;
    let most = limits.body_bytes as usize;
    let too_large = || {
        Refusal::new(
            Code::TooLarge,
            format!("the body is over {most} bytes long"),
        )
    };
    if request.body().size_hint().lower() > most as u64 {
        return Err(too_large());
    }
    let busy = |what: &str| Refusal::new(Code::Busy, format!("too many {what} at once; wait"));
    let places = [
        vm.calls
            .clone()
            .try_acquire_owned()
            .map_err(|_| busy("calls of this machine"))?,
        bridge
            .calls
            .clone()
            .try_acquire_owned()
            .map_err(|_| busy("calls"))?,
    ];
    let mut held: Vec<OwnedSemaphorePermit> = Vec::new();
    let reading = async {
        let mut bytes = Vec::new();
        let mut body = request.into_body();
        while let Some(frame) = body.frame().await {
            let frame =
                frame.map_err(|_| Refusal::new(Code::Rule, "the body ended before its end"))?;
            let Ok(piece) = frame.into_data() else {
                continue;
            };
            if bytes.len() + piece.len() > most {
                return Err(too_large());
            }
            let before = bytes.len().div_ceil(1024);
            bytes.extend_from_slice(&piece);
            let more = (bytes.len().div_ceil(1024) - before) as u32;
            // A permit for each frame would be more memory than it counts.
            if more == 0 {
                continue;
            }
            for memory in [&vm.bodies, &bridge.bodies] {
                held.push(
                    memory
                        .clone()
                        .try_acquire_many_owned(more)
                        .map_err(|_| busy("large requests"))?,
                );
            }
        }
        Ok(bytes)
    };
    let bytes = tokio::time::timeout(HostLimits::seconds(limits.request_s), reading)
        .await
        .unwrap_or_else(|_| Err(Refusal::new(Code::Slow, "the body came too slowly")))?;
    let since = Instant::now();
    let request;
    (request, held) = parse(vm, wire, bytes, held).await?;
    // It may have been revoked while the body came.
    live(vm, &token)?;
    Ok(Asked {
        request,
        step,
        passed,
        places,
        memory: held,
        since,
    })
}

/// Takes a body apart: a large one beside this thread, which all VMs share, and one a VM at a time.
async fn parse(
    vm: &Vm,
    wire: Wire,
    bytes: Vec<u8>,
    held: Vec<OwnedSemaphorePermit>,
) -> Result<(request::Request, Vec<OwnedSemaphorePermit>), Refusal> {
    let told = |breach: crate::rules::Breach| Refusal::new(Code::Rule, breach.to_string());
    if bytes.len() <= PARSED_HERE_BYTES {
        return Ok((request::parse(wire, &bytes).map_err(told)?, held));
    }
    let ended = || Refusal::new(Code::Removed, "the call was ended");
    let turn = vm.parsing.clone().acquire_owned().await;
    let turn = turn.map_err(|_| ended())?;
    // Memory and turn are held until it is done, also when nobody waits for it any more.
    let parsing = tokio::task::spawn_blocking(move || {
        let parsed = request::parse(wire, &bytes);
        drop((bytes, turn));
        (parsed, held)
    });
    let (parsed, held) = parsing.await.map_err(|_| ended())?;
    Ok((parsed.map_err(told)?, held))
}

/// Refuses a token that is none of the VM's, or no longer.
fn live(vm: &Vm, token: &[u8]) -> Result<(), Refusal> {
    let tokens = vm.tokens.lock().unwrap_or_else(PoisonError::into_inner);
    if tokens.accept(token, Instant::now()) {
        return Ok(());
    }
    Err(Refusal::new(
        Code::Token,
        format!("{} is missing, unknown here or expired", token::HEADER),
    ))
}

/// A header that may be there once.
fn only<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a HeaderValue>, Refusal> {
    let mut all = headers.get_all(name).iter();
    let first = all.next();
    if all.next().is_some() {
        return Err(Refusal::new(Code::Rule, format!("{name} is there twice")));
    }
    Ok(first)
}

fn step(headers: &HeaderMap) -> Result<Option<Step>, Refusal> {
    let number = |name: &str| -> Result<Option<u64>, Refusal> {
        only(headers, name)?
            .map(|value| {
                value
                    .to_str()
                    .ok()
                    .filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))
                    .and_then(|text| text.parse().ok())
                    .ok_or_else(|| Refusal::new(Code::Rule, format!("{name} is no number")))
            })
            .transpose()
    };
    let attempt = u32::try_from(number(ATTEMPT)?.unwrap_or(0))
        .map_err(|_| Refusal::new(Code::Rule, format!("{ATTEMPT} is too large")))?;
    Ok(number(STEP)?.map(|step| Step { step, attempt }))
}

/// The guest's headers that may go on; all others, and so each credential, stay here.
fn passed(headers: &HeaderMap, wire: Wire) -> Result<Passed, Refusal> {
    let mut passed = Passed::default();
    if !wire.is_anthropic() {
        return Ok(passed);
    }
    if let Some(version) = only(headers, "anthropic-version")? {
        let date = version.as_bytes();
        let is_date = date.len() == 10
            && date.iter().enumerate().all(|(at, byte)| match at {
                4 | 7 => *byte == b'-',
                _ => byte.is_ascii_digit(),
            });
        if !is_date {
            return Err(Refusal::new(Code::Rule, "anthropic-version is no date"));
        }
        passed.version = Some(version.clone());
    }
    let betas: Vec<&str> = headers
        .get_all("anthropic-beta")
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|beta| BETAS.iter().any(|known| beta.starts_with(known)))
        .filter(|beta| beta.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'))
        .collect();
    if !betas.is_empty() {
        passed.beta = HeaderValue::from_str(&betas.join(",")).ok();
    }
    Ok(passed)
}
