//! Takes the host's secrets out of whatever is stored or given to a guest.
//!
//! A secret is looked for as it is, in base64 (both alphabets, at each of the three places where it
//! can stand in a longer text), URL-encoded, in hexadecimal and as JSON writes it. A stream is masked
//! as it passes: only an end that may be the beginning of a secret is held back.

use std::fmt::Write as _;

use aho_corasick::{AhoCorasick, MatchKind};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use zeroize::Zeroizing;

/// What stands in a secret's place.
pub const MASK: &[u8] = b"[secret]";

/// The secrets that are looked for.
pub struct Masker {
    finder: Option<AhoCorasick>,
    patterns: Vec<Zeroizing<Vec<u8>>>,
    longest: usize,
}

impl std::fmt::Debug for Masker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Masker({} patterns)", self.patterns.len())
    }
}

impl Masker {
    /// Looks for these. A secret of under eight bytes is refused elsewhere: its pieces are in any text.
    ///
    /// # Panics
    /// Never: the number of patterns is bounded by the configuration.
    #[must_use]
    pub fn new(secrets: &[&[u8]]) -> Self {
        let mut patterns: Vec<Zeroizing<Vec<u8>>> =
            secrets.iter().flat_map(|secret| forms(secret)).collect();
        patterns.sort_by(|a, b| a[..].cmp(&b[..]));
        patterns.dedup_by(|a, b| a[..] == b[..]);
        let finder = (!patterns.is_empty()).then(|| {
            AhoCorasick::builder()
                .match_kind(MatchKind::LeftmostLongest)
                .build(patterns.iter().map(|pattern| &pattern[..]))
                .unwrap_or_else(|error| unreachable!("a few short patterns: {error}"))
        });
        let longest = patterns
            .iter()
            .map(|pattern| pattern.len())
            .max()
            .unwrap_or(0);
        Self {
            finder,
            patterns,
            longest,
        }
    }

    /// Masks a whole text.
    #[must_use]
    pub fn mask(&self, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes.len());
        let mut stream = Masking::default();
        stream.push(self, bytes, &mut out);
        stream.finish(&mut out);
        out
    }

    /// Masks a whole text that is UTF-8.
    #[must_use]
    pub fn mask_text(&self, text: &str) -> String {
        String::from_utf8_lossy(&self.mask(text.as_bytes())).into_owned()
    }

    /// How many bytes at the end of `bytes` may be the beginning of a secret.
    fn unsure(&self, bytes: &[u8]) -> usize {
        let most = self.longest.saturating_sub(1).min(bytes.len());
        (1..=most)
            .rev()
            .find(|len| {
                let end = &bytes[bytes.len() - len..];
                self.patterns
                    .iter()
                    .any(|pattern| pattern.len() > *len && pattern.starts_with(end))
            })
            .unwrap_or(0)
    }
}

/// A stream that is being masked.
#[derive(Debug, Default)]
pub struct Masking {
    held: Vec<u8>,
}

impl Masking {
    /// Goes on with `bytes`; appends to `out` what is sure.
    pub fn push(&mut self, masker: &Masker, bytes: &[u8], out: &mut Vec<u8>) {
        let Some(finder) = &masker.finder else {
            out.extend_from_slice(bytes);
            return;
        };
        self.held.extend_from_slice(bytes);
        let mut done = 0;
        for found in finder.find_iter(&self.held) {
            out.extend_from_slice(&self.held[done..found.start()]);
            out.extend_from_slice(MASK);
            done = found.end();
        }
        let sure = self.held.len() - masker.unsure(&self.held[done..]);
        out.extend_from_slice(&self.held[done..sure]);
        self.held.drain(..sure);
    }

    /// Appends what was held back: it was no secret.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        out.append(&mut self.held);
    }
}

/// All forms in which a secret is looked for.
fn forms(secret: &[u8]) -> Vec<Zeroizing<Vec<u8>>> {
    let mut forms = vec![Zeroizing::new(secret.to_vec())];
    for engine in [STANDARD_NO_PAD, URL_SAFE_NO_PAD] {
        for before in 0..3_usize {
            let mut padded = Zeroizing::new(vec![0; before]);
            padded.extend_from_slice(secret);
            // Characters that share bits with what stands before or behind are left out.
            let first = (before * 8).div_ceil(6);
            let last = padded.len() * 8 / 6;
            let encoded = Zeroizing::new(engine.encode(&padded[..]));
            forms.push(Zeroizing::new(encoded.as_bytes()[first..last].to_vec()));
        }
    }
    let mut url = [Zeroizing::new(String::new()), Zeroizing::new(String::new())];
    let mut hex = [Zeroizing::new(String::new()), Zeroizing::new(String::new())];
    for &byte in secret {
        let plain = byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
        for (upper, text) in url.iter_mut().enumerate() {
            // Writing to a string cannot fail.
            let _ = match (plain, upper) {
                (true, _) => {
                    text.push(byte as char);
                    Ok(())
                }
                (false, 0) => write!(text, "%{byte:02x}"),
                (false, _) => write!(text, "%{byte:02X}"),
            };
        }
        let _ = write!(hex[0], "{byte:02x}");
        let _ = write!(hex[1], "{byte:02X}");
    }
    for text in url.iter().chain(&hex) {
        forms.push(Zeroizing::new(text.as_bytes().to_vec()));
    }
    if let Ok(text) = std::str::from_utf8(secret) {
        let quoted = Zeroizing::new(serde_json::Value::from(text).to_string());
        let inner = &quoted.as_bytes()[1..quoted.len() - 1];
        forms.push(Zeroizing::new(inner.to_vec()));
    }
    forms
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::engine::general_purpose::{STANDARD, URL_SAFE};

    const SECRET: &[u8] = b"sk-test/Key+with\"odd~chars_0123";

    fn masked(text: &[u8]) -> String {
        let masker = Masker::new(&[SECRET, b"another-secret"]);
        let whole = masker.mask(text);
        // In any pieces it is the same.
        for size in [1, 2, 3, 7, 30] {
            let (mut stream, mut out) = (Masking::default(), Vec::new());
            for piece in text.chunks(size) {
                stream.push(&masker, piece, &mut out);
            }
            stream.finish(&mut out);
            assert_eq!(out, whole, "pieces of {size}");
        }
        String::from_utf8(whole).expect("text")
    }

    #[test]
    fn a_secret_is_masked_in_each_form() {
        let url: String = SECRET
            .iter()
            .map(|byte| match byte {
                b'/' | b'+' | b'"' => format!("%{byte:02X}"),
                _ => (*byte as char).to_string(),
            })
            .collect();
        let hex: String = SECRET.iter().map(|byte| format!("{byte:02x}")).collect();
        let json = serde_json::Value::from(std::str::from_utf8(SECRET).expect("text")).to_string();
        for form in [
            std::str::from_utf8(SECRET).expect("text").to_owned(),
            url.clone(),
            url.replace("%2F", "%2f").replace("%2B", "%2b"),
            hex.to_uppercase(),
            hex,
            json[1..json.len() - 1].to_owned(),
            "another-secret".into(),
        ] {
            assert_eq!(
                masked(format!("a {form} b").as_bytes()),
                "a [secret] b",
                "{form}"
            );
        }
    }

    #[test]
    fn a_secret_is_masked_wherever_it_stands_in_base64() {
        for before in 0..7 {
            for after in 0..4 {
                let mut text = vec![b'x'; before];
                text.extend_from_slice(SECRET);
                text.extend(std::iter::repeat_n(b'y', after));
                for encoded in [STANDARD.encode(&text), URL_SAFE.encode(&text)] {
                    let out = masked(encoded.as_bytes());
                    assert!(out.contains("[secret]"), "{before} {after} {out}");
                    assert!(out.len() < 8 + 2 * (before + after) + 8, "{out}");
                }
            }
        }
    }

    #[test]
    fn only_a_possible_beginning_is_held_back() {
        let masker = Masker::new(&[SECRET]);
        let (mut stream, mut out) = (Masking::default(), Vec::new());
        stream.push(&masker, b"data: hello sk-te", &mut out);
        assert_eq!(out, b"data: hello ");
        stream.push(&masker, b"a\n\n", &mut out);
        assert_eq!(out, b"data: hello sk-tea\n\n");
    }

    #[test]
    fn without_secrets_nothing_is_masked() {
        assert_eq!(Masker::new(&[]).mask(b"sk-anything"), b"sk-anything");
    }
}
