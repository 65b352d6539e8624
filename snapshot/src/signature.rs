//! Who vouches for a snapshot: ed25519 over the manifest's canonical bytes.
//!
//! Canonical: the JSON without its top-level member `signature`, no white space, each object's
//! members sorted by the bytes of their names. Members that this Ratoon does not know are in it.
//! As the manifest holds the hash of every other file, the signature covers all of the snapshot.

use std::fmt;
use std::path::Path;

use ed25519_dalek::Signer as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::digest::{hex, unhex};
use crate::error::{Error, Result};

/// Goes before the canonical bytes, so that a signature made for something else is none here.
const CONTEXT: &[u8] = b"ratoon snapshot manifest\0";

/// The half of a key that checks signatures.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey(pub(crate) [u8; 32]);

impl PublicKey {
    /// The 32 bytes of RFC 8032, section 5.1.5.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The same.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, out)
    }
}

impl TryFrom<String> for PublicKey {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        unhex(&text).map(Self)
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> Self {
        key.to_string()
    }
}

/// The half of a key that signs. Wiped when dropped; its debug form shows the public half only.
pub struct SigningKey(pub(crate) ed25519_dalek::SigningKey);

impl SigningKey {
    /// The key of a 32-byte secret (RFC 8032's seed).
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(ed25519_dalek::SigningKey::from_bytes(seed))
    }

    /// The half to hand out.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key().to_bytes())
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "SigningKey(of {})", self.public())
    }
}

/// A manifest's member `signature`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// Who signed.
    pub key: PublicKey,
    /// The 64 bytes of the ed25519 signature, in hexadecimal.
    pub ed25519: String,
}

/// Signs a manifest's bytes, with or without a signature in them.
pub(crate) fn sign(manifest: &[u8], key: &SigningKey, path: &Path) -> Result<Signature> {
    let signature = key.0.sign(&canonical(manifest, path)?);
    Ok(Signature {
        key: key.public(),
        ed25519: hex(&signature.to_bytes()),
    })
}

/// Checks that one of `trusted` signed these manifest bytes.
pub(crate) fn check(
    manifest: &[u8],
    signature: Option<&Signature>,
    trusted: &[PublicKey],
    path: &Path,
) -> Result<()> {
    let Some(signature) = signature else {
        return Err(Error::Unsigned {
            path: path.to_path_buf(),
        });
    };
    if !trusted.contains(&signature.key) {
        return Err(Error::UntrustedKey {
            path: path.to_path_buf(),
            key: signature.key.to_string(),
        });
    }
    let bad = || Error::BadSignature {
        path: path.to_path_buf(),
    };
    let key = ed25519_dalek::VerifyingKey::from_bytes(&signature.key.0).map_err(|_| bad())?;
    let bytes: [u8; 64] = unhex(&signature.ed25519).map_err(|_| bad())?;
    key.verify_strict(
        &canonical(manifest, path)?,
        &ed25519_dalek::Signature::from_bytes(&bytes),
    )
    .map_err(|_| bad())
}

fn canonical(manifest: &[u8], path: &Path) -> Result<Vec<u8>> {
    let mut value: Value = serde_json::from_slice(manifest)
        .map_err(|error| Error::damaged(path, error.to_string()))?;
    if let Some(members) = value.as_object_mut() {
        members.remove("signature");
    }
    let mut bytes = CONTEXT.to_vec();
    write_sorted(&value, &mut bytes);
    Ok(bytes)
}

/// Recursion is bounded by serde_json's own limit of 128 levels.
fn write_sorted(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Object(members) => {
            let mut sorted: Vec<_> = members.iter().collect();
            sorted.sort_by(|a, b| a.0.cmp(b.0));
            out.push(b'{');
            for (place, (name, value)) in sorted.into_iter().enumerate() {
                if place > 0 {
                    out.push(b',');
                }
                out.extend(Value::from(name.as_str()).to_string().bytes());
                out.push(b':');
                write_sorted(value, out);
            }
            out.push(b'}');
        }
        Value::Array(values) => {
            out.push(b'[');
            for (place, value) in values.iter().enumerate() {
                if place > 0 {
                    out.push(b',');
                }
                write_sorted(value, out);
            }
            out.push(b']');
        }
        plain => out.extend(plain.to_string().bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_and_white_space_do_not_matter_and_any_value_does() {
        let path = Path::new("manifest.json");
        let key = SigningKey::from_seed(&[7; 32]);
        let trusted = [key.public()];
        let signature = sign(br#"{"b":[1,{"d":"x","c":null}],"a":2}"#, &key, path).unwrap();
        let same = br#"{ "signature": 3, "a": 2, "b": [1, {"c": null, "d": "x"}] }"#;
        check(same, Some(&signature), &trusted, path).unwrap();
        for other in [
            &br#"{"b":[1,{"d":"x","c":null}],"a":3}"#[..],
            br#"{"b":[1,{"d":"x"}],"a":2}"#,
            br#"{"b":[1,{"d":"x","c":null}],"a":2,"e":0}"#,
        ] {
            match check(other, Some(&signature), &trusted, path) {
                Err(Error::BadSignature { .. }) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn no_signature_and_an_unknown_key_are_refused() {
        let path = Path::new("manifest.json");
        let key = SigningKey::from_seed(&[7; 32]);
        let signature = sign(b"{}", &key, path).unwrap();
        match check(b"{}", None, &[key.public()], path) {
            Err(Error::Unsigned { .. }) => {}
            other => panic!("{other:?}"),
        }
        let other = SigningKey::from_seed(&[8; 32]).public();
        match check(b"{}", Some(&signature), &[other], path) {
            Err(Error::UntrustedKey { key: named, .. }) => {
                assert_eq!(named, key.public().to_string());
            }
            other => panic!("{other:?}"),
        }
    }
}
