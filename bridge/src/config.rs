//! The configuration: which providers and models there are, at what price, and the limits.
//!
//! It is JSON and holds no secret; a key comes from a descriptor or from a command's output. A guest
//! has no influence on any of it.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use ratoon_bridge_api::control::MAX_TOKEN_TTL_S;
use serde::Deserialize;

use crate::request::Wire;

/// All of it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where runs are recorded.
    pub records: PathBuf,
    /// The providers.
    pub providers: Vec<Provider>,
    /// What one guest, and all together, may ask of the bridge.
    #[serde(default)]
    pub limits: HostLimits,
    /// Users besides our own whose processes may connect to a VM's socket: that of a jailed VMM. With
    /// any, a VM's socket has mode 0666, and each connection's user decides.
    #[serde(default)]
    pub peer_uids: Vec<u32>,
}

/// A provider, or a server of one's own that speaks the same.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provider {
    /// Its name in the record.
    pub name: String,
    /// Scheme, host and port, and perhaps a path before `/v1`: `https://api.anthropic.com`.
    /// `unix:/path` is a socket.
    pub base_url: String,
    /// Where the key comes from.
    pub key: KeySource,
    /// How the key is sent; from the wire when absent (`x-api-key` for Anthropic's).
    #[serde(default)]
    pub key_header: Option<KeyHeader>,
    /// What it speaks: of `messages`, `chat`, `responses`.
    pub wires: Vec<String>,
    /// The models that guests may use.
    pub models: Vec<Model>,
    /// A file with the certificates to trust in place of the system's.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// What it calls the output limit of a chat.
    #[serde(default)]
    pub chat_limit: ChatLimit,
}

/// Where a key comes from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum KeySource {
    /// An inherited descriptor, read to its end and closed.
    Fd(u32),
    /// What this program writes on its standard output.
    Command(Vec<String>),
    /// None: a server of one's own without one.
    None,
}

/// How a key is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyHeader {
    /// `x-api-key: KEY`
    XApiKey,
    /// `authorization: Bearer KEY`
    Bearer,
}

/// The name of a chat's output limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChatLimit {
    /// The name of today.
    #[default]
    MaxCompletionTokens,
    /// The old one, which some servers alone know.
    MaxTokens,
}

impl ChatLimit {
    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::MaxCompletionTokens => "max_completion_tokens",
            Self::MaxTokens => "max_tokens",
        }
    }
}

/// A model.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// As guests name it.
    pub id: String,
    /// As the provider names it, if otherwise.
    #[serde(default)]
    pub upstream: Option<String>,
    /// The most output tokens of a call.
    pub max_output_tokens: u64,
    /// The most input tokens that it takes: as many are put aside for a call with images or
    /// documents, and never more for any. Without it those are estimated.
    #[serde(default)]
    pub max_input_tokens: Option<u64>,
    /// Its price; a run whose money is limited can use no model without.
    #[serde(default)]
    pub price: Option<Price>,
}

/// In millionths of a US dollar for a million tokens: $3 is 3000000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// Input.
    pub input: u64,
    /// Output.
    pub output: u64,
    /// Input from the provider's cache; as input when absent.
    #[serde(default)]
    pub cached: Option<u64>,
    /// Input that is put there; as input when absent.
    #[serde(default)]
    pub cache_write: Option<u64>,
}

impl Price {
    /// What so many tokens cost, rounded up.
    #[must_use]
    pub fn of(&self, rest: u64, cached: u64, written: u64, output: u64) -> u64 {
        let part = |tokens: u64, price: u64| u128::from(tokens) * u128::from(price);
        let sum = part(rest, self.input)
            + part(cached, self.cached.unwrap_or(self.input))
            + part(written, self.cache_write.unwrap_or(self.input))
            + part(output, self.output);
        u64::try_from(sum.div_ceil(1_000_000)).unwrap_or(u64::MAX)
    }

    /// The price of an input token at its dearest.
    #[must_use]
    pub fn dearest_input(&self) -> u64 {
        self.input
            .max(self.cached.unwrap_or(0))
            .max(self.cache_write.unwrap_or(0))
    }
}

/// What one guest, and all together, may ask of the bridge.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HostLimits {
    /// The largest request body.
    pub body_bytes: u32,
    /// All request bodies of one VM that are held at once.
    pub vm_bodies_bytes: u32,
    /// All request bodies that are held at once.
    pub all_bodies_bytes: u32,
    /// The largest answer.
    pub answer_bytes: u64,
    /// All that is recorded of one run: lines and bodies. A run whose record is full makes no calls.
    pub run_record_bytes: u64,
    /// Calls of one VM that are on their way at once.
    pub vm_calls: u32,
    /// Calls of all VMs.
    pub all_calls: u32,
    /// Connections of all VMs at once, idle ones too; never more than half of the descriptors that
    /// the process may have.
    pub all_connections: u32,
    /// Requests of one VM in a minute.
    pub vm_requests_a_minute: u32,
    /// How long a token lives at most, in seconds, whatever the engine asks for.
    pub token_s: u32,
    /// How long a request may take to come in, in seconds.
    pub request_s: u32,
    /// How long a provider may take to accept a connection.
    pub connect_s: u32,
    /// How long it may take until its answer begins.
    pub first_byte_s: u32,
    /// How long it may say nothing within an answer.
    pub silence_s: u32,
    /// How long a call may take in all.
    pub call_s: u32,
    /// How often a request is sent at most.
    pub attempts: u32,
    /// How long is waited between attempts in all.
    pub retry_s: u32,
}

impl Default for HostLimits {
    fn default() -> Self {
        Self {
            body_bytes: 8 << 20,
            vm_bodies_bytes: 16 << 20,
            all_bodies_bytes: 64 << 20,
            answer_bytes: 64 << 20,
            run_record_bytes: 1 << 30,
            vm_calls: 8,
            all_calls: 256,
            all_connections: 4096,
            vm_requests_a_minute: 600,
            token_s: MAX_TOKEN_TTL_S,
            request_s: 30,
            connect_s: 10,
            first_byte_s: 600,
            silence_s: 300,
            call_s: 1800,
            attempts: 4,
            retry_s: 30,
        }
    }
}

impl HostLimits {
    /// A limit in seconds as a time.
    #[must_use]
    pub fn seconds(seconds: u32) -> Duration {
        Duration::from_secs(seconds.into())
    }
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It is no such JSON.
    #[error("the configuration is not as docs/bridge.md says")]
    Form(#[source] serde_json::Error),
    /// It says what cannot be.
    #[error("the configuration: {0}")]
    Content(String),
}

impl Config {
    /// Reads and checks it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        let config: Self = serde_json::from_slice(bytes).map_err(ConfigError::Form)?;
        config.check().map_err(ConfigError::Content)?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        if self.providers.is_empty() {
            return Err("there is no provider: add one to \"providers\"".into());
        }
        let mut names = BTreeSet::new();
        let mut models = BTreeSet::new();
        for provider in &self.providers {
            let name = &provider.name;
            if !names.insert(name) || name.is_empty() {
                return Err(format!("two providers are named \"{name}\", or none is"));
            }
            if provider.wires.is_empty() {
                return Err(format!("provider \"{name}\" has no wires"));
            }
            for wire in &provider.wires {
                if !["messages", "chat", "responses"].contains(&wire.as_str()) {
                    return Err(format!(
                        "provider \"{name}\" has the wire \"{wire}\"; there are messages, chat and responses"
                    ));
                }
                for model in &provider.models {
                    if !models.insert((wire, &model.id)) {
                        return Err(format!(
                            "model \"{}\" is there twice for {wire}: give one another id",
                            model.id
                        ));
                    }
                }
            }
            if provider.models.is_empty() {
                return Err(format!(
                    "provider \"{name}\" has no models: only those that are named may be used"
                ));
            }
            if provider
                .models
                .iter()
                .any(|model| model.max_output_tokens == 0 || model.max_input_tokens == Some(0))
            {
                return Err(format!(
                    "a model of provider \"{name}\" may make or take no token: max_output_tokens or max_input_tokens is 0"
                ));
            }
            if let KeySource::Command(argv) = &provider.key
                && argv.is_empty()
            {
                return Err(format!(
                    "provider \"{name}\" has an empty command for its key"
                ));
            }
        }
        let limits = &self.limits;
        if [
            limits.attempts,
            limits.vm_calls,
            limits.all_calls,
            limits.all_connections,
            limits.token_s,
        ]
        .contains(&0)
        {
            return Err(
                "limits: attempts, vm_calls, all_calls, all_connections and token_s are at least 1"
                    .into(),
            );
        }
        if limits.body_bytes > limits.vm_bodies_bytes
            || limits.vm_bodies_bytes > limits.all_bodies_bytes
        {
            return Err(
                "limits: body_bytes, vm_bodies_bytes and all_bodies_bytes must grow in this order"
                    .into(),
            );
        }
        Ok(())
    }

    /// The provider and the model that serve `id` on `wire`.
    #[must_use]
    pub fn find(&self, wire: Wire, id: &str) -> Option<(usize, &Model)> {
        let speaks = match wire {
            Wire::Messages | Wire::CountTokens => "messages",
            Wire::Chat => "chat",
            Wire::Responses => "responses",
        };
        self.providers
            .iter()
            .enumerate()
            .filter(|(_, provider)| provider.wires.iter().any(|wire| wire == speaks))
            .find_map(|(index, provider)| {
                let model = provider.models.iter().find(|model| model.id == id)?;
                Some((index, model))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut serde_json::Value)) -> String {
        let mut config = serde_json::json!({
            "records": "/r",
            "providers": [{
                "name": "p", "base_url": "http://127.0.0.1:1", "key": "none",
                "wires": ["chat"], "models": [{"id": "m", "max_output_tokens": 9}],
            }],
        });
        change(&mut config);
        match Config::parse(config.to_string().as_bytes()) {
            Ok(_) => "accepted".into(),
            Err(ConfigError::Form(source)) => source.to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_configuration_is_whole_or_refused() {
        assert_eq!(refused(|_| {}), "accepted");
        assert!(refused(|c| c["key"] = "sk".into()).contains("unknown field `key`"));
        assert!(refused(|c| c["providers"] = serde_json::json!([])).contains("no provider"));
        let provider = |name: &'static str, value: serde_json::Value| {
            refused(move |c| c["providers"][0][name] = value)
        };
        assert!(provider("key", "sk-123".into()).contains("unknown variant"));
        assert!(provider("wires", serde_json::json!(["smtp"])).contains("wire \"smtp\""));
        assert!(provider("models", serde_json::json!([])).contains("no models"));
        assert!(provider("key", serde_json::json!({"command": []})).contains("empty command"));
        assert!(
            refused(|c| c["limits"] = serde_json::json!({"attempts": 0})).contains("at least 1")
        );
    }

    #[test]
    fn money_is_rounded_up() {
        let price = Price {
            input: 3_000_000,
            output: 15_000_000,
            cached: Some(300_000),
            cache_write: None,
        };
        assert_eq!(price.of(1_000_000, 0, 0, 0), 3_000_000);
        assert_eq!(price.of(1, 1, 1, 1), 22);
        assert_eq!(price.of(0, 1, 0, 0), 1);
        assert_eq!(price.of(u64::MAX, 0, 0, u64::MAX), u64::MAX);
        assert_eq!(price.dearest_input(), 3_000_000);
    }
}
