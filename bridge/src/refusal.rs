//! Errors as a guest sees them: in the form of the API that it speaks.
//!
//! Each has a status, and a code of ours in `x-ratoon-error`, by which a loop names its ending. None
//! tells a path, an address or a key of the host.

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// No such route.
    Route,
    /// Not POST.
    Method,
    /// No token, or not a live one of this VM.
    Token,
    /// The body is larger than allowed.
    TooLarge,
    /// The body did not come in time.
    Slow,
    /// A rule forbids the body, or a header.
    Rule,
    /// The model is not on the list.
    Model,
    /// The budget is used up.
    Budget,
    /// The run's time is over.
    Time,
    /// Too many calls at once.
    Busy,
    /// The same step again, but not the same request; or it is still on its way or was cut off.
    Step,
    /// The record cannot be written.
    Record,
    /// The provider cannot be reached, or broke off before it answered.
    Unreachable,
    /// The provider said nothing for too long.
    TimedOut,
    /// The provider refused the host's key.
    Credential,
    /// The provider answered with what is passed on to nobody: a redirect, an encoding.
    Strange,
    /// The answer ended before its end.
    Cut,
    /// The answer is larger than allowed.
    AnswerTooLarge,
    /// The VM is being removed.
    Removed,
}

impl Code {
    /// Our name, HTTP status, Anthropic's type, OpenAI's type.
    fn row(self) -> (&'static str, u16, &'static str, &'static str) {
        const INVALID: &str = "invalid_request_error";
        match self {
            Self::Route => ("route", 404, "not_found_error", INVALID),
            Self::Method => ("method", 405, INVALID, INVALID),
            Self::Token => ("token", 401, "authentication_error", INVALID),
            Self::TooLarge => ("too_large", 413, "request_too_large", INVALID),
            Self::Slow => ("slow", 408, INVALID, INVALID),
            Self::Rule => ("rule", 400, INVALID, INVALID),
            Self::Model => ("model", 403, "permission_error", INVALID),
            Self::Budget => ("budget", 402, "billing_error", "insufficient_quota"),
            Self::Time => ("time", 402, "billing_error", "insufficient_quota"),
            Self::Busy => ("busy", 429, "rate_limit_error", "rate_limit_error"),
            Self::Step => ("step", 409, INVALID, INVALID),
            Self::Record => ("record", 503, "api_error", "server_error"),
            Self::Unreachable => ("unreachable", 502, "api_error", "server_error"),
            Self::TimedOut => ("timed_out", 504, "timeout_error", "server_error"),
            Self::Credential => ("credential", 401, "authentication_error", INVALID),
            Self::Strange => ("strange", 502, "api_error", "server_error"),
            Self::Cut => ("cut", 502, "api_error", "server_error"),
            Self::AnswerTooLarge => ("answer_too_large", 502, "api_error", "server_error"),
            Self::Removed => ("removed", 503, "api_error", "server_error"),
        }
    }

    /// Its name in `x-ratoon-error` and in the record.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.row().0
    }

    /// The HTTP status.
    #[must_use]
    pub fn status(self) -> u16 {
        self.row().1
    }

    /// Whether an SDK may try by itself again: when nothing was paid and the cause may pass.
    fn may_try_again(self) -> bool {
        matches!(self, Self::Busy | Self::Unreachable | Self::Slow)
    }
}

/// An error that a guest is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What kind.
    pub code: Code,
    /// What is wrong and what to do.
    pub message: String,
    /// When to try again, in seconds.
    pub retry_after_s: Option<u32>,
}

/// The longest message: some of it is a guest's text, and each is recorded.
const MAX_MESSAGE_BYTES: usize = 1024;

impl Refusal {
    /// An error; a message that is too long is cut.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        let mut message = message.into();
        message.truncate(message.floor_char_boundary(MAX_MESSAGE_BYTES));
        Self {
            code,
            message,
            retry_after_s: (code == Code::Busy).then_some(1),
        }
    }

    /// Its body in the API's own form.
    #[must_use]
    pub fn body(&self, anthropic: bool) -> Vec<u8> {
        let (name, _, anthropic_type, openai_type) = self.code.row();
        let value = if anthropic {
            serde_json::json!({
                "type": "error",
                "error": {"type": anthropic_type, "message": self.message},
            })
        } else {
            serde_json::json!({
                "error": {
                    "message": self.message, "type": openai_type, "param": null,
                    "code": if self.code == Code::Budget { "insufficient_quota" } else { name },
                },
            })
        };
        value.to_string().into_bytes()
    }

    /// As an event at the end of a stream that has begun.
    #[must_use]
    pub fn event(&self, anthropic: bool) -> Vec<u8> {
        let mut event = Vec::new();
        if anthropic {
            event.extend_from_slice(b"event: error\n");
        }
        event.extend_from_slice(b"data: ");
        event.extend_from_slice(&self.body(anthropic));
        event.extend_from_slice(b"\n\n");
        event
    }

    /// As an answer.
    ///
    /// # Panics
    /// Never: all statuses are valid.
    #[must_use]
    pub fn response(&self, anthropic: bool) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(Bytes::from(self.body(anthropic))));
        *response.status_mut() =
            StatusCode::from_u16(self.code.status()).unwrap_or(StatusCode::BAD_GATEWAY);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert("x-ratoon-error", HeaderValue::from_static(self.code.name()));
        if !self.code.may_try_again() {
            // Both vendors' SDKs heed this.
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if let Some(seconds) = self.retry_after_s {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.code == Code::Method {
            headers.insert(ALLOW, HeaderValue::from_static("POST"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_cut_between_two_characters() {
        let refusal = Refusal::new(Code::Rule, "é".repeat(600) + "x");
        assert_eq!(refusal.message, "é".repeat(512));
        let refusal = Refusal::new(Code::Rule, "x".to_owned() + &"é".repeat(600));
        assert_eq!(refusal.message.len(), 1023);
    }
}
