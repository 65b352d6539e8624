//! A VM's tokens: random, minutes long, known here by their hash alone.
//!
//! A token is good on the socket of the VM that it was minted for, and nowhere else. At most
//! [`MOST`] are live at once: while one is renewed, calls with the one before go on.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ratoon_bridge_api::control::Token;
use subtle::ConstantTimeEq as _;

/// The most live tokens of a VM.
pub const MOST: usize = 4;
/// The header that carries it.
pub const HEADER: &str = "x-ratoon-token";

const PREFIX: &str = "rtn_";

/// The live tokens of one VM.
#[derive(Debug, Default)]
pub struct Tokens(Vec<(blake3::Hash, Instant)>);

impl Tokens {
    /// Makes one; also gives the digits by which the record knows it.
    ///
    /// # Errors
    /// When the system has no random numbers.
    pub fn mint(
        &mut self,
        now: Instant,
        ttl: Duration,
        revoke_older: bool,
    ) -> std::io::Result<(Token, String)> {
        let mut random = [0_u8; 32];
        getrandom::fill(&mut random).map_err(|error| std::io::Error::other(error.to_string()))?;
        let token = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(random));
        let hash = blake3::hash(token.as_bytes());
        self.0.retain(|(_, until)| !revoke_older && *until > now);
        if self.0.len() == MOST {
            self.0.remove(0);
        }
        self.0.push((hash, now + ttl));
        Ok((Token(token), hash.to_hex()[..12].to_owned()))
    }

    /// Whether `given` is a live one. The time it takes does not depend on what was given.
    #[must_use]
    pub fn accept(&self, given: &[u8], now: Instant) -> bool {
        let given = blake3::hash(given);
        let mut accepted = subtle::Choice::from(0);
        for (hash, until) in &self.0 {
            let live = subtle::Choice::from(u8::from(*until > now));
            accepted |= hash.as_bytes().ct_eq(given.as_bytes()) & live;
        }
        accepted.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn a_token_lives_until_it_expires() {
        let (mut tokens, now) = (Tokens::default(), Instant::now());
        let (token, _) = tokens.mint(now, MINUTE, false).expect("random");
        assert!(tokens.accept(token.0.as_bytes(), now));
        assert!(tokens.accept(token.0.as_bytes(), now + MINUTE - Duration::from_nanos(1)));
        assert!(!tokens.accept(token.0.as_bytes(), now + MINUTE));
        for other in ["", "rtn_", &token.0[..10], &format!("{}a", token.0)] {
            assert!(!tokens.accept(other.as_bytes(), now), "{other}");
        }
        assert!(!Tokens::default().accept(token.0.as_bytes(), now));
    }

    #[test]
    fn a_wake_ends_older_tokens_and_a_renewal_does_not() {
        let (mut tokens, now) = (Tokens::default(), Instant::now());
        let (first, _) = tokens.mint(now, MINUTE, false).expect("random");
        let (second, _) = tokens.mint(now, MINUTE, false).expect("random");
        assert!(tokens.accept(first.0.as_bytes(), now) && first != second);
        let (third, _) = tokens.mint(now, MINUTE, true).expect("random");
        assert!(!tokens.accept(first.0.as_bytes(), now));
        assert!(!tokens.accept(second.0.as_bytes(), now));
        assert!(tokens.accept(third.0.as_bytes(), now));
        for _ in 0..MOST {
            tokens.mint(now, MINUTE, false).expect("random");
        }
        assert!(!tokens.accept(third.0.as_bytes(), now), "the oldest goes");
    }
}
