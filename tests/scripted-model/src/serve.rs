//! HTTP: takes a request, finds its turn, answers or breaks.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::BodyExt as _;
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};

use crate::answer::{self, Wire};
use crate::check;
use crate::script::{Fault, Turn};
use crate::{Memory, Seen, lock};

/// It was meant to break.
#[derive(Debug, thiserror::Error)]
#[error("broken as the script says")]
struct Broken;

/// A body whose pieces come from a task.
struct Pieces(mpsc::Receiver<Result<Bytes, Broken>>);

impl Body for Pieces {
    type Data = Bytes;
    type Error = Broken;
    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        self.0
            .poll_recv(context)
            .map(|piece| piece.map(|piece| piece.map(Frame::data)))
    }
}

pub(crate) async fn until(
    listener: std::net::TcpListener,
    memory: Arc<Mutex<Memory>>,
    mut end: oneshot::Receiver<()>,
) {
    let Ok(listener) = TcpListener::from_std(listener) else {
        return;
    };
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(_) => continue,
            },
            _ = &mut end => return,
        };
        // Small events must not wait for each other.
        let _ = stream.set_nodelay(true);
        let memory = memory.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| handle(memory.clone(), request));
            // A client that goes is none of our business.
            let _ = http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn handle(
    memory: Arc<Mutex<Memory>>,
    request: Request<Incoming>,
) -> Result<Response<Pieces>, Broken> {
    let (parts, body) = request.into_parts();
    let bytes = body.collect().await.map_err(|_| Broken)?.to_bytes();
    let seen = Seen {
        path: parts.uri.to_string(),
        headers: parts
            .headers
            .iter()
            .map(|(name, value)| {
                let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
                (name.as_str().to_owned(), value)
            })
            .collect(),
        body: serde_json::from_slice(&bytes).unwrap_or(Value::Null),
        bytes: bytes.to_vec(),
    };
    let Some(wire) = Wire::of_path(&seen.path).filter(|_| parts.method == hyper::Method::POST)
    else {
        let wrong = format!("{} {} is no route", parts.method, seen.path);
        lock(&memory).violations.push(wrong);
        return Ok(plain(404, &json!({"error": {"message": "no such route"}})));
    };
    let (turn, whole) = {
        let mut memory = lock(&memory);
        let wrong = check::violations(wire, &seen, memory.script.key.as_deref());
        let number = memory.seen.len();
        memory.violations.extend(
            wrong
                .iter()
                .map(|wrong| format!("request {number}: {wrong}")),
        );
        let turn = memory.turn(wire, &seen);
        let Some(turn) = turn else {
            memory
                .violations
                .push(format!("request {number}: the script has no turn for it"));
            memory.seen.push(seen);
            return Ok(plain(
                500,
                &json!({"error": {"message": "the script is over"}}),
            ));
        };
        let mut ids = memory.ids;
        let whole: Vec<String> = if seen.body["stream"] == true {
            answer::events(wire, &turn, &seen.body, &mut ids)
        } else {
            vec![answer::document(wire, &turn, &seen.body["model"], &mut ids).to_string()]
        };
        memory.ids = ids;
        memory.seen.push(seen.clone());
        (turn, whole)
    };
    if let Some(response) = head_fault(turn.fault.as_ref(), &seen).await {
        return response;
    }
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(say(whole, turn.fault.clone(), wire, sender));
    let streamed = seen.body["stream"] == true;
    let mut response = Response::builder().header(
        "content-type",
        match (&turn.fault, streamed) {
            (Some(Fault::Html), _) => "text/html",
            (_, true) => "text/event-stream; charset=utf-8",
            (_, false) => "application/json",
        },
    );
    response = response
        .header("set-cookie", "session=1")
        .header("request-id", "req_1");
    if turn.fault == Some(Fault::Encoded) {
        response = response.header("content-encoding", "gzip");
    }
    response.body(Pieces(receiver)).map_err(|_| Broken)
}

/// A fault that shows before the body.
async fn head_fault(
    fault: Option<&Fault>,
    seen: &Seen,
) -> Option<Result<Response<Pieces>, Broken>> {
    match fault? {
        Fault::Status {
            status,
            retry_after,
            message,
        } => {
            let credential = seen
                .headers
                .iter()
                .find(|(name, _)| name == "x-api-key" || name == "authorization")
                .map_or("", |(_, value)| value);
            let message = message.replace("{credential}", credential);
            let kind = if *status == 529 {
                "overloaded_error"
            } else {
                "rate_limit_error"
            };
            let mut response = plain(
                *status,
                &json!({"type": "error", "error": {"type": kind, "message": message}}),
            );
            if let Some(value) = retry_after.as_deref().and_then(|text| text.parse().ok()) {
                response.headers_mut().insert("retry-after", value);
            }
            Some(Ok(response))
        }
        Fault::Redirect { to } => {
            let mut response = plain(307, &Value::Null);
            let to = to.parse().ok()?;
            response.headers_mut().insert("location", to);
            Some(Ok(response))
        }
        Fault::HangUp => Some(Err(Broken)),
        Fault::Late { ms } => {
            tokio::time::sleep(Duration::from_millis(*ms)).await;
            None
        }
        _ => None,
    }
}

/// Says the answer, or breaks in its middle.
async fn say(
    mut whole: Vec<String>,
    fault: Option<Fault>,
    wire: Wire,
    to: mpsc::Sender<Result<Bytes, Broken>>,
) {
    let piece = |text: &[u8]| Ok(Bytes::copy_from_slice(text));
    match fault {
        Some(Fault::Cut { after_bytes }) => {
            let all = whole.concat();
            let part = &all.as_bytes()[..after_bytes.min(all.len())];
            let _ = to.send(piece(part)).await;
            // What was sent shall arrive before the connection breaks.
            tokio::time::sleep(Duration::from_millis(20)).await;
            let _ = to.send(Err(Broken)).await;
        }
        Some(Fault::Drip { bytes, pause_ms }) => {
            for part in whole.concat().as_bytes().chunks(bytes.max(1)) {
                if to.send(piece(part)).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(pause_ms)).await;
            }
        }
        Some(Fault::Endless) => {
            // Again and again one from the middle.
            let again = whole.swap_remove(whole.len() / 2);
            while to.send(piece(again.as_bytes())).await.is_ok() {}
        }
        fault => {
            match fault {
                Some(Fault::NoEnd) => drop(whole.pop()),
                Some(Fault::ErrorEvent) => {
                    whole.truncate(whole.len() / 2);
                    whole.push(answer::error_event(wire));
                }
                _ => {}
            }
            for event in whole {
                if to.send(piece(event.as_bytes())).await.is_err() {
                    return;
                }
            }
        }
    }
}

fn plain(status: u16, body: &Value) -> Response<Pieces> {
    let (sender, receiver) = mpsc::channel(1);
    // The one place of an empty channel is free.
    let _ = sender.try_send(Ok(Bytes::from(body.to_string())));
    let mut response = Response::new(Pieces(receiver));
    *response.status_mut() =
        hyper::StatusCode::from_u16(status).unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(
        "content-type",
        hyper::header::HeaderValue::from_static("application/json"),
    );
    response
}

impl Memory {
    /// The first turn that fits and is not used up.
    fn turn(&mut self, wire: Wire, seen: &Seen) -> Option<Turn> {
        if wire == Wire::CountTokens {
            return Some(Turn::text("x"));
        }
        let answers = answers(&seen.body);
        let text = String::from_utf8_lossy(&seen.bytes);
        let fits = |(index, turn): &(usize, &Turn)| {
            !self.used[*index]
                && turn.at.is_none_or(|at| at == answers)
                && turn.when.as_ref().is_none_or(|when| text.contains(when))
        };
        let (index, turn) = self.script.turns.iter().enumerate().find(fits)?;
        let turn = turn.clone();
        self.used[index] = !turn.repeat;
        Some(turn)
    }
}

/// How many answers of the model are in the conversation.
fn answers(body: &Value) -> usize {
    let messages = body["messages"].as_array().into_iter().flatten();
    let said = messages
        .filter(|message| message["role"] == "assistant")
        .count();
    // In Responses an answer is a row of items; what comes from us ends it.
    let mut rows = 0;
    let mut within = false;
    for item in body["input"].as_array().into_iter().flatten() {
        let kind = item["type"].as_str().unwrap_or("message");
        let by_model =
            item["role"] == "assistant" || kind == "reasoning" || kind.ends_with("_call");
        rows += usize::from(by_model && !within);
        within = by_model;
    }
    said + rows
}
