//! A guest's request, taken apart and rebuilt.
//!
//! [`parse`] checks the bytes, goes through the wire's table and keeps a body that lacks only its
//! model and its output limit. [`Request::finish`] writes these two, when the budget has said how much
//! output there may be.

use crate::json::{self, Kind, Raw};
use crate::rules::{Breach, Owned, Rebuild, chat, messages, responses};

/// One of the four routes that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wire {
    /// `/v1/messages`
    Messages,
    /// `/v1/messages/count_tokens`
    CountTokens,
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/responses`
    Responses,
}

impl Wire {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Messages,
        Self::CountTokens,
        Self::Chat,
        Self::Responses,
    ];

    /// The path, here and at the provider.
    #[must_use]
    pub fn path(self) -> &'static str {
        match self {
            Self::Messages => "/v1/messages",
            Self::CountTokens => "/v1/messages/count_tokens",
            Self::Chat => "/v1/chat/completions",
            Self::Responses => "/v1/responses",
        }
    }

    /// Its name in the record.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Messages => "messages",
            Self::CountTokens => "count_tokens",
            Self::Chat => "chat",
            Self::Responses => "responses",
        }
    }

    /// Whether errors have Anthropic's form.
    #[must_use]
    pub fn is_anthropic(self) -> bool {
        matches!(self, Self::Messages | Self::CountTokens)
    }

    /// The wire of an exact path: no query, no other spelling.
    #[must_use]
    pub fn of_path(path: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|wire| wire.path() == path)
    }
}

/// A request that the rules allow.
#[derive(Debug)]
pub struct Request {
    /// The route.
    pub wire: Wire,
    /// The model as the guest names it.
    pub model: String,
    /// Whether the answer is to be streamed.
    pub stream: bool,
    /// Whether the guest wants usage at the end of a chat stream; we always do.
    pub usage_wanted: bool,
    /// The output limit that the guest gives.
    pub max_output: Option<u64>,
    /// Provider-side tools that were left out.
    pub withheld: Vec<String>,
    /// Bytes of the body that are not base64.
    pub text_bytes: u64,
    /// Images and documents in base64.
    pub base64_values: u64,
    /// Their bytes.
    pub base64_bytes: u64,
    /// The same for the same request, whatever its limit becomes.
    pub digest: blake3::Hash,
    body: Vec<u8>,
}

/// Checks and rebuilds a body.
///
/// # Errors
/// What no rule allows.
pub fn parse(wire: Wire, bytes: &[u8]) -> Result<Request, Breach> {
    let raw = json::check(bytes).map_err(|error| Breach {
        path: String::new(),
        what: format!("the body is not JSON that is accepted here: {error}"),
    })?;
    let mut rebuild = Rebuild::default();
    let table = match wire {
        Wire::Messages => messages::MESSAGES,
        Wire::CountTokens => messages::COUNT_TOKENS,
        Wire::Chat => chat::CHAT,
        Wire::Responses => responses::RESPONSES,
    };
    let owned = rebuild.open(raw, table)?;
    let model = own_text(&owned, "model")?.ok_or_else(|| breach("model", "is missing"))?;
    let stream = own_bool(&owned, "stream")?.unwrap_or(false);
    if own_bool(&owned, "background")?.unwrap_or(false) {
        return Err(breach(
            "background",
            "must be false: nothing runs on at the provider",
        ));
    }
    if own_number(&owned, "n")?.is_some_and(|n| n != 1) {
        return Err(breach("n", "must be 1"));
    }
    let limits = ["max_tokens", "max_completion_tokens", "max_output_tokens"];
    let mut max_output = None;
    for name in limits {
        let Some(limit) = own_number(&owned, name)? else {
            continue;
        };
        if max_output.replace(limit).is_some() {
            return Err(breach(name, "is a second limit of output: give one"));
        }
        if limit == 0 {
            return Err(breach(name, "must be at least 1"));
        }
    }
    let usage_wanted = usage_wanted(&owned)?;
    let text_bytes = rebuild.body.len() - rebuild.base64_bytes;
    let mut hasher = blake3::Hasher::new();
    hasher.update(wire.path().as_bytes());
    for part in [model.as_bytes(), &rebuild.body] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.update(&[u8::from(stream), u8::from(usage_wanted)]);
    hasher.update(&max_output.unwrap_or(0).to_le_bytes());
    Ok(Request {
        wire,
        model,
        stream,
        usage_wanted,
        max_output,
        withheld: rebuild.withheld,
        text_bytes: text_bytes as u64,
        base64_values: rebuild.base64_values as u64,
        base64_bytes: rebuild.base64_bytes as u64,
        digest: hasher.finalize(),
        body: rebuild.body,
    })
}

/// Tokens that a provider may add to the guest's text: what wraps messages and describes tools.
const ADDED_TOKENS: u64 = 4096;

impl Request {
    /// As many tokens as the input may have. `most` is the most that the model takes, if that is
    /// known.
    ///
    /// No token is shorter than a byte, so for text this is an upper bound. How many an image or a
    /// document has is not in its bytes: with `most` they count as all of it, without it this is an
    /// estimate of some thousand each.
    #[must_use]
    pub fn input_tokens_at_most(&self, most: Option<u64>) -> u64 {
        let text = self.text_bytes + ADDED_TOKENS;
        match most {
            Some(most) if self.base64_values > 0 => most,
            Some(most) => text.min(most),
            None => text + self.base64_values * 4000 + self.base64_bytes / 64,
        }
    }

    /// The body for the provider: with its name of the model, and with the output that there may be.
    /// `chat_limit` is what the provider calls that limit in a chat, whatever the guest called it: a
    /// name that the provider does not know would be no limit.
    #[must_use]
    pub fn finish(&mut self, model: &str, max_output: u64, chat_limit: &'static str) -> Vec<u8> {
        let mut rebuild = Rebuild {
            body: std::mem::take(&mut self.body),
            ..Rebuild::default()
        };
        // A required field is always before these.
        let first = &mut false;
        rebuild.key("model", first);
        rebuild.string(model);
        if self.wire != Wire::CountTokens {
            let limit = match self.wire {
                Wire::Messages | Wire::CountTokens => "max_tokens",
                Wire::Chat => chat_limit,
                Wire::Responses => "max_output_tokens",
            };
            rebuild.key(limit, first);
            rebuild
                .body
                .extend_from_slice(max_output.to_string().as_bytes());
            if self.stream {
                rebuild.key("stream", first);
                rebuild.body.extend_from_slice(b"true");
            }
        }
        if self.wire == Wire::Chat && self.stream {
            rebuild.key("stream_options", first);
            rebuild.body.extend_from_slice(b"{\"include_usage\":true}");
        }
        if self.wire == Wire::Responses {
            rebuild.key("store", first);
            rebuild.body.extend_from_slice(b"false");
        }
        rebuild.body.push(b'}');
        rebuild.body
    }
}

fn breach(path: &str, what: &str) -> Breach {
    Breach {
        path: path.to_owned(),
        what: what.to_owned(),
    }
}

fn own<'a>(owned: &Owned<'a>, name: &str, wanted: Kind) -> Result<Option<Raw<'a>>, Breach> {
    let Some((_, raw)) = owned.iter().find(|(own, _)| *own == name) else {
        return Ok(None);
    };
    let kind = json::kind(raw);
    if kind == wanted {
        Ok(Some(raw))
    } else {
        Err(breach(name, &format!("is {kind}, not {wanted}")))
    }
}

fn own_text(owned: &Owned<'_>, name: &str) -> Result<Option<String>, Breach> {
    match own(owned, name, Kind::Text)? {
        None => Ok(None),
        Some(raw) => Ok(Some(json::text(raw)?.into_owned())),
    }
}

fn own_bool(owned: &Owned<'_>, name: &str) -> Result<Option<bool>, Breach> {
    Ok(own(owned, name, Kind::Bool)?.map(|raw| raw.get() == "true"))
}

fn own_number(owned: &Owned<'_>, name: &str) -> Result<Option<u64>, Breach> {
    match own(owned, name, Kind::Number)? {
        None => Ok(None),
        Some(raw) => raw
            .get()
            .parse()
            .map(Some)
            .map_err(|_| breach(name, "is not a whole number above 0")),
    }
}

/// Whether `stream_options` asks for usage; it has no other field here.
fn usage_wanted(owned: &Owned<'_>) -> Result<bool, Breach> {
    let Some(raw) = own(owned, "stream_options", Kind::Object)? else {
        return Ok(false);
    };
    let mut wanted = false;
    for (name, value) in json::fields(raw)? {
        match (&*name, json::kind(value)) {
            ("include_usage", Kind::Bool) => wanted = value.get() == "true",
            ("include_usage", Kind::Null) | ("include_obfuscation", _) => {}
            _ => {
                return Err(breach(
                    "stream_options",
                    "may have include_usage, and nothing else",
                ));
            }
        }
    }
    Ok(wanted)
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
