//! What the engine reads of the bridge's configuration: models, wires, where runs are recorded.
//!
//! The bridge itself is stricter (`bridge/src/config.rs`) and has the last word; here unknown members are skipped.
//! There is no key in it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ratoon_bridge_api::control::MAX_TOKEN_TTL_S;
use ratoon_protocol::Wire;
use serde::Deserialize;

use super::BridgeError;

/// The longest configuration, in bytes.
const MAX_LEN: usize = 1 << 20;
/// The wires by which an agent can call a model, the preferred first.
const WIRES: [(&str, Wire); 3] = [
    ("messages", Wire::Messages),
    ("responses", Wire::Responses),
    ("chat", Wire::Chat),
];

/// A configuration, as far as the engine needs it.
#[derive(Debug, Clone)]
pub struct BridgeConfig {
    /// Its file, absolute.
    pub path: PathBuf,
    /// BLAKE3 of the file, in hexadecimal.
    pub digest: String,
    /// Where runs are recorded, absolute.
    pub records: PathBuf,
    token_life: Duration,
    providers: Vec<Provider>,
}

#[derive(Debug, Clone, Deserialize)]
struct Form {
    records: PathBuf,
    providers: Vec<Provider>,
    #[serde(default)]
    limits: Limits,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct Limits {
    token_s: Option<u32>,
}

#[derive(Debug, Clone, Deserialize)]
struct Provider {
    name: String,
    wires: Vec<String>,
    models: Vec<Model>,
    #[serde(default)]
    key: serde_json::Value,
}

#[derive(Debug, Clone, Deserialize)]
struct Model {
    id: String,
    max_output_tokens: u64,
    #[serde(default)]
    price: Option<serde_json::Value>,
}

/// A model of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// Its provider.
    pub provider: String,
    /// Its name, as the bridge knows it.
    pub model: String,
    /// How it is called.
    pub wire: Wire,
    /// The most tokens of an answer.
    pub max_output_tokens: u32,
    /// Whether money can be counted.
    pub has_price: bool,
}

impl BridgeConfig {
    /// `named`, or `ratoon/bridge.json` below `$XDG_CONFIG_HOME` (`~/.config`).
    ///
    /// # Errors
    /// [`BridgeError::NoConfig`], [`BridgeError::Config`].
    pub fn find(named: Option<&Path>) -> Result<Self, BridgeError> {
        match named {
            Some(path) => Self::read(path),
            None => Self::read(&default_path()),
        }
    }

    /// Reads this file.
    ///
    /// # Errors
    /// See [`BridgeConfig::find`].
    pub fn read(path: &Path) -> Result<Self, BridgeError> {
        let missing = |source| BridgeError::NoConfig {
            path: path.to_owned(),
            source,
        };
        let bytes = std::fs::read(path).map_err(missing)?;
        if bytes.len() > MAX_LEN {
            return Err(missing(std::io::ErrorKind::FileTooLarge.into()));
        }
        let path = std::path::absolute(path).map_err(missing)?;
        Self::parse(&path, &bytes)
    }

    fn parse(path: &Path, bytes: &[u8]) -> Result<Self, BridgeError> {
        let form: Form = serde_json::from_slice(bytes).map_err(|source| BridgeError::Config {
            path: path.to_owned(),
            source,
        })?;
        // The bridge runs in `/`.
        if !form.records.is_absolute() {
            return Err(BridgeError::Records {
                path: path.to_owned(),
                records: form.records,
            });
        }
        Ok(Self {
            path: path.to_owned(),
            digest: blake3::hash(bytes).to_hex().to_string(),
            records: form.records,
            token_life: Duration::from_secs(
                form.limits
                    .token_s
                    .map_or(MAX_TOKEN_TTL_S, |life| life.min(MAX_TOKEN_TTL_S))
                    .into(),
            ),
            providers: form.providers,
        })
    }

    /// How long a token lives.
    pub(super) fn token_life(&self) -> Duration {
        self.token_life
    }

    /// The model that is called so: `PROVIDER/NAME`.
    ///
    /// # Errors
    /// [`BridgeError::Model`], with those that there are.
    pub fn model(&self, wanted: &str) -> Result<Chosen, BridgeError> {
        let found = wanted.split_once('/').and_then(|(provider, id)| {
            let (index, provider) = self
                .providers
                .iter()
                .enumerate()
                .find(|(_, it)| it.name == provider)?;
            let model = provider.models.iter().find(|model| model.id == id)?;
            // The bridge takes the first provider that has the model on a wire.
            let is_ours = |wire: &str| {
                let has = |it: &Provider| {
                    it.wires.iter().any(|have| have == wire) && it.models.iter().any(|m| m.id == id)
                };
                self.providers.iter().position(has) == Some(index)
            };
            let (_, wire) = WIRES.into_iter().find(|(name, _)| is_ours(name))?;
            Some(Chosen {
                provider: provider.name.clone(),
                model: model.id.clone(),
                wire,
                max_output_tokens: u32::try_from(model.max_output_tokens).unwrap_or(u32::MAX),
                has_price: model.price.as_ref().is_some_and(|price| !price.is_null()),
            })
        });
        found.ok_or_else(|| BridgeError::Model {
            wanted: wanted.to_owned(),
            path: self.path.clone(),
            known: self.models(),
        })
    }

    /// All models, as `PROVIDER/NAME`.
    pub fn models(&self) -> Vec<String> {
        let of = |provider: &Provider| {
            let name = provider.name.clone();
            let models = provider.models.clone().into_iter();
            models.map(move |model| format!("{name}/{}", model.id))
        };
        self.providers.iter().flat_map(of).collect()
    }

    /// The descriptors from which it takes keys.
    pub(super) fn key_descriptors(&self) -> Vec<i32> {
        let keys = self.providers.iter().map(|provider| &provider.key["fd"]);
        let numbers = keys.filter_map(|fd| i32::try_from(fd.as_i64()?).ok());
        numbers.filter(|fd| *fd > 2).collect()
    }
}

/// Where the configuration is when none is named.
fn default_path() -> PathBuf {
    let absolute = |name: &str| {
        let path = std::env::var_os(name).map(PathBuf::from);
        path.filter(|path| path.is_absolute())
    };
    absolute("XDG_CONFIG_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".config")))
        .unwrap_or_else(|| PathBuf::from("/etc"))
        .join("ratoon/bridge.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> Result<BridgeConfig, BridgeError> {
        BridgeConfig::parse(Path::new("/etc/bridge.json"), json.as_bytes())
    }

    const TWO: &str = r#"{"records": "/r", "limits": {}, "providers": [
        {"name": "a", "base_url": "u", "key": {"fd": 3}, "wires": ["chat", "messages"],
         "models": [{"id": "x", "max_output_tokens": 9, "price": {}}, {"id": "v/y", "max_output_tokens": 9}]},
        {"name": "b", "base_url": "u", "key": "none", "wires": ["chat", "responses"],
         "models": [{"id": "x", "max_output_tokens": 8}]}]}"#;

    #[test]
    fn a_model_is_found_by_its_provider_and_the_wire_is_one_on_which_the_bridge_finds_that_one() {
        let config = config(TWO).unwrap();
        let first = config.model("a/x").unwrap();
        assert_eq!((first.wire, first.has_price), (Wire::Messages, true));
        let second = config.model("b/x").unwrap();
        assert_eq!(
            (second.wire, second.max_output_tokens),
            (Wire::Responses, 8)
        );
        assert_eq!(config.model("a/v/y").unwrap().model, "v/y");
        assert_eq!(config.key_descriptors(), [3]);
    }

    #[test]
    fn a_model_that_is_not_there_is_told_with_those_that_are() {
        let config = config(TWO).unwrap();
        for wanted in ["x", "a/z", "c/x", ""] {
            let error = config.model(wanted).unwrap_err().to_string();
            assert!(error.contains("a/x, a/v/y, b/x"), "{error}");
            assert!(error.contains("/etc/bridge.json"), "{error}");
        }
    }

    #[test]
    fn what_is_no_configuration_is_named() {
        let error = config("{").unwrap_err();
        assert!(matches!(error, BridgeError::Config { .. }), "{error}");
        let error = config(r#"{"records": "r", "providers": []}"#).unwrap_err();
        assert!(error.to_string().contains("absolute"), "{error}");
    }
}
