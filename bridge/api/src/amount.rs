//! Tokens, money and calls: what a budget limits and what a call costs.
//!
//! Money is in millionths of a US dollar, so that sums are exact. Additions saturate: a sum that
//! does not fit is more than any limit, never less.

use serde::{Deserialize, Serialize};

/// What was, or may be, used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Amount {
    /// Model calls.
    pub calls: u64,
    /// Tokens sent to the model, those read from the provider's cache among them.
    pub input_tokens: u64,
    /// Tokens that the model made.
    pub output_tokens: u64,
    /// Money, in millionths of a US dollar.
    pub cost_microusd: u64,
}

impl Amount {
    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            calls: self.calls.saturating_add(other.calls),
            input_tokens: self.input_tokens.saturating_add(other.input_tokens),
            output_tokens: self.output_tokens.saturating_add(other.output_tokens),
            cost_microusd: self.cost_microusd.saturating_add(other.cost_microusd),
        }
    }

    /// What is left without `other`; nothing is the least.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        Self {
            calls: self.calls.saturating_sub(other.calls),
            input_tokens: self.input_tokens.saturating_sub(other.input_tokens),
            output_tokens: self.output_tokens.saturating_sub(other.output_tokens),
            cost_microusd: self.cost_microusd.saturating_sub(other.cost_microusd),
        }
    }

    /// The smaller of each.
    #[must_use]
    pub fn least(self, other: Self) -> Self {
        Self {
            calls: self.calls.min(other.calls),
            input_tokens: self.input_tokens.min(other.input_tokens),
            output_tokens: self.output_tokens.min(other.output_tokens),
            cost_microusd: self.cost_microusd.min(other.cost_microusd),
        }
    }
}

/// The most that a run, or a branch of it, may use. What is absent has no limit of its own; those of
/// the branches above still hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Model calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calls: Option<u64>,
    /// Tokens sent to the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_tokens: Option<u64>,
    /// Tokens that the model made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_tokens: Option<u64>,
    /// Money, in millionths of a US dollar.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_microusd: Option<u64>,
    /// Milliseconds since the branch began, but for those in which the host had it stand still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wall_ms: Option<u64>,
    /// Milliseconds of calls, added up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_ms: Option<u64>,
}

impl Limits {
    /// Whether nothing is limited.
    #[must_use]
    pub fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }

    /// The limits as an amount, with `u64::MAX` for what has none.
    #[must_use]
    pub fn ceiling(&self) -> Amount {
        Amount {
            calls: self.calls.unwrap_or(u64::MAX),
            input_tokens: self.input_tokens.unwrap_or(u64::MAX),
            output_tokens: self.output_tokens.unwrap_or(u64::MAX),
            cost_microusd: self.cost_microusd.unwrap_or(u64::MAX),
        }
    }
}
