//! One step's call of the model: asked, streamed, and asked again where that is sensible.
//!
//! ```text
//!  no connection, or "come back later" ----> the same attempt again, after a pause
//!  the provider failed, or broke off -----> the next attempt (`x-ratoon-attempt`), after a pause
//!  401 `token` --------------------------> the token is read again: the machine may have just woken
//!  402 ----------------------------------> Budget;   any other refusal: Model
//! ```
//!
//! All of it is bounded: tries, the pauses together, and the run's own time. An attempt that the bridge has
//! recorded is never sent again as itself unless the connection broke: then the bridge gives a stored answer, or
//! says that there is none.

use std::time::Duration;

use ratoon_protocol::Wire;

use crate::bridge::{Bridge, Broken};
use crate::clock::{self, Moment};
use crate::events::Events;
use crate::history::Ids;
use crate::http::{self, AnswerError};
use crate::sse;
use crate::stop::{self, Stop};
use crate::wire::{Delta, Reading, Said, StreamError, path};

/// How often a step is tried in all.
const MAX_TRIES: u32 = 12;
/// How often it is asked again after an answer that broke off: each may have been paid for.
const MAX_BROKEN: u32 = 2;
/// How long is waited between tries in all.
const MAX_PAUSES: Duration = Duration::from_secs(180);
/// How long a token may be missing or old.
const TOKEN: Duration = Duration::from_secs(30);
/// The most bytes of a stream.
const MAX_STREAM_BYTES: usize = 64 << 20;
const MAX_ERROR_BYTES: usize = 64 << 10;

/// How the bridge is asked.
#[derive(Debug)]
pub struct Caller<'a> {
    /// Where it is.
    pub bridge: &'a Bridge,
    /// Which API.
    pub wire: Wire,
    /// Ends it.
    pub stop: &'a Stop,
    /// Where pieces and notices go.
    pub events: &'a Events,
}

/// An answer and how it came.
#[derive(Debug)]
pub struct Answered {
    /// What it is.
    pub said: Said,
    /// From the request to the first byte of the answer.
    pub first: Duration,
    /// To its end.
    pub all: Duration,
    /// It is a stored one.
    pub replayed: bool,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// It is to end now.
    #[error("cancelled")]
    Stopped,
    /// The run's time is over.
    #[error("the run's time is over")]
    Over,
    /// All is spent.
    #[error("{0}")]
    Budget(String),
    /// The provider has no reasoning in encrypted form.
    #[error("{0}")]
    NoEncryption(String),
    /// Nobody can be reached, or it is refused for good.
    #[error("{0}")]
    Model(String),
}

/// How one try ended.
enum Tried {
    Answered(Box<Answered>),
    /// For good.
    Failed(CallError),
    /// To be tried again.
    Again {
        why: String,
        pause: Option<Duration>,
        attempt: Next,
    },
    /// The token is not good.
    Token(String),
}

/// Which attempt the next try is.
enum Next {
    /// The bridge has not seen this one, or can say what became of it.
    Same,
    /// This one is recorded and has no answer.
    New,
    /// As `New`, and it may have been paid for.
    Broken,
}

impl Caller<'_> {
    /// Asks until there is an answer.
    pub fn call(
        &self,
        body: &str,
        step: u32,
        until: Moment,
        ids: &mut Ids,
        on: &mut dyn FnMut(Delta<'_>),
    ) -> Result<Answered, CallError> {
        let (mut attempt, mut tries, mut broken) = (0u32, 0u32, 0u32);
        let mut paused = Duration::ZERO;
        let mut without_token: Option<Moment> = None;
        loop {
            if self.stop.is_set() {
                return Err(CallError::Stopped);
            }
            if clock::now() >= until {
                return Err(CallError::Over);
            }
            let token = self.bridge.token();
            let tried = match &token {
                Ok(token) => self.try_once(body, step, attempt, token, until, ids, on),
                Err(why) => Tried::Token(why.clone()),
            };
            match tried {
                Tried::Answered(answered) => return Ok(*answered),
                Tried::Failed(error) => return Err(error),
                Tried::Token(why) => {
                    let since = *without_token.get_or_insert_with(clock::now);
                    if clock::now().saturating_sub(since) > TOKEN {
                        return Err(CallError::Model(format!("there is no good token: {why}")));
                    }
                    stop::sleep(Duration::from_millis(100), self.stop);
                }
                Tried::Again {
                    why,
                    pause,
                    attempt: next,
                } => {
                    without_token = None;
                    tries += 1;
                    broken += u32::from(matches!(next, Next::Broken));
                    attempt += u32::from(!matches!(next, Next::Same));
                    let pause = pause
                        .unwrap_or_default()
                        .max(spread(backoff(tries), token.as_deref().unwrap_or("")));
                    paused += pause;
                    if tries >= MAX_TRIES || broken > MAX_BROKEN || paused > MAX_PAUSES {
                        return Err(CallError::Model(why));
                    }
                    self.events
                        .notice(format!("{why}; it is asked again (try {})", tries + 1));
                    stop::sleep(pause.min(until.saturating_sub(clock::now())), self.stop);
                }
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "one caller")]
    fn try_once(
        &self,
        body: &str,
        step: u32,
        attempt: u32,
        token: &str,
        until: Moment,
        ids: &mut Ids,
        on: &mut dyn FnMut(Delta<'_>),
    ) -> Tried {
        let since = clock::now();
        let connection = match self.bridge.connect(self.stop) {
            Ok(connection) => connection,
            Err(error) => return Self::not_answered(error.into(), until, Next::Same),
        };
        let head = format!(
            "POST {} HTTP/1.1\r\nhost: bridge\r\nconnection: close\r\ncontent-type: application/json\r\n\
             accept: text/event-stream\r\nx-ratoon-token: {token}\r\nx-ratoon-step: {step}\r\n\
             x-ratoon-attempt: {attempt}\r\ncontent-length: {}\r\n\r\n",
            path(self.wire),
            body.len()
        );
        let asked = http::ask(connection, &head, body.as_bytes(), Some(until), self.stop);
        let mut answer = match asked {
            Ok(answer) => answer,
            Err(error) => return Self::not_answered(error, until, Next::Same),
        };
        if answer.status != 200 {
            let text = answer.text(MAX_ERROR_BYTES, Some(until), self.stop);
            return refused(&answer, &text);
        }
        if !answer
            .header("content-type")
            .is_some_and(|kind| kind.starts_with("text/event-stream"))
        {
            let why = "the model's provider does not stream".into();
            return Tried::Failed(CallError::Model(why));
        }
        let replayed = answer.header("x-ratoon-replayed").is_some();
        let mut first = None;
        let mut bytes = 0;
        let mut events = sse::Events::default();
        let mut reading = Reading::new(self.wire);
        // To the very end: only then has the bridge settled what it costs.
        loop {
            let piece = match answer.piece(Some(until), self.stop) {
                Ok(Some(piece)) => piece,
                Ok(None) => break,
                Err(_) if reading.is_whole() => break,
                Err(error) => return Self::not_answered(error, until, Next::Same),
            };
            first.get_or_insert_with(clock::now);
            bytes += piece.len();
            if bytes > MAX_STREAM_BYTES {
                return Tried::Failed(CallError::Model(StreamError::TooLong.to_string()));
            }
            let datas = match events.push(&piece) {
                Ok(datas) => datas,
                Err(error) => return Tried::Failed(CallError::Model(error.to_string())),
            };
            for data in datas {
                match reading.event(&data, on) {
                    Ok(()) => {}
                    Err(error @ StreamError::Told(_)) => {
                        return Tried::Again {
                            why: format!("the answer ended with an error: {error}"),
                            pause: None,
                            attempt: Next::Broken,
                        };
                    }
                    Err(error) => return Tried::Failed(CallError::Model(error.to_string())),
                }
            }
        }
        if !reading.is_whole() {
            return Tried::Again {
                why: "the answer broke off".into(),
                pause: None,
                attempt: Next::Broken,
            };
        }
        let all = clock::now().saturating_sub(since);
        match reading.finish(ids) {
            Ok(said) => Tried::Answered(Box::new(Answered {
                said,
                first: first.map_or(all, |first| first.saturating_sub(since)),
                all,
                replayed,
            })),
            Err(error) => Tried::Failed(CallError::Model(error.to_string())),
        }
    }

    fn not_answered(error: AnswerError, until: Moment, attempt: Next) -> Tried {
        match error {
            AnswerError::Broken(Broken::Stopped) => Tried::Failed(CallError::Stopped),
            AnswerError::Broken(Broken::Over) if clock::now() >= until => {
                Tried::Failed(CallError::Over)
            }
            AnswerError::Malformed(error) => Tried::Failed(CallError::Model(error.to_string())),
            error => Tried::Again {
                why: match error {
                    AnswerError::Broken(error) => error.to_string(),
                    other => other.to_string(),
                },
                pause: None,
                attempt,
            },
        }
    }
}

/// What is to be done about a status that is not 200.
fn refused(answer: &http::Answer, text: &str) -> Tried {
    let status = answer.status;
    let code = answer.header("x-ratoon-error").unwrap_or("");
    let message = message(text).unwrap_or_else(|| format!("HTTP {status}"));
    let recorded = answer.header("x-ratoon-call").is_some();
    let pause = answer
        .header("retry-after")
        .and_then(|text| text.trim().parse::<f64>().ok())
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let next = || if recorded { Next::New } else { Next::Same };
    let should = answer.header("x-should-retry");
    match (code, status) {
        ("token", _) => Tried::Token(message),
        ("budget", _) => Tried::Failed(CallError::Budget(message)),
        ("time", _) => Tried::Failed(CallError::Over),
        // This attempt has no answer to give: another one may.
        ("step", _) => Tried::Again {
            why: message,
            pause: Some(Duration::from_millis(100)),
            attempt: Next::New,
        },
        // The provider broke off, or was too slow, before the first byte.
        ("cut" | "timed_out", _) => Tried::Again {
            why: message,
            pause,
            attempt: Next::Broken,
        },
        ("", 400) if message.to_lowercase().contains("encrypted") => {
            Tried::Failed(CallError::NoEncryption(message))
        }
        ("", 408 | 409 | 429 | 500..=599) if should != Some("false") => Tried::Again {
            why: format!("the model's provider says {status}: {message}"),
            pause,
            attempt: next(),
        },
        (code, _) if !code.is_empty() && should != Some("false") => Tried::Again {
            why: message,
            pause,
            attempt: next(),
        },
        _ => Tried::Failed(CallError::Model(message)),
    }
}

/// The words of an error, in either vendor's form.
fn message(text: &str) -> Option<String> {
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    let error = &value["error"];
    error["message"]
        .as_str()
        .or_else(|| error.as_str())
        .map(|text| text.chars().take(2000).collect())
}

/// Half a second, then twice as long each time, up to half a minute.
fn backoff(tries: u32) -> Duration {
    Duration::from_millis(500 << tries.saturating_sub(1).min(6)).min(Duration::from_secs(30))
}

/// A little shorter, by what a machine has of its own: siblings of a fork do not come back all at once.
fn spread(pause: Duration, token: &str) -> Duration {
    let sum: u32 = token.bytes().map(u32::from).sum();
    pause.mul_f64(1.0 - f64::from(sum % 32) / 128.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errors_words_are_found_in_either_form() {
        let anthropic = r#"{"type":"error","error":{"type":"x","message":"no"}}"#;
        assert_eq!(message(anthropic).as_deref(), Some("no"));
        assert_eq!(message(r#"{"error":"no"}"#).as_deref(), Some("no"));
        assert_eq!(message("<html>"), None);
    }

    #[test]
    fn pauses_grow_and_are_bounded() {
        assert_eq!(backoff(1), Duration::from_millis(500));
        assert_eq!(backoff(2), Duration::from_secs(1));
        assert_eq!(backoff(100), Duration::from_secs(30));
        let spread = spread(Duration::from_secs(4), "rtn_abc");
        assert!(spread <= Duration::from_secs(4) && spread > Duration::from_secs(3));
    }
}
