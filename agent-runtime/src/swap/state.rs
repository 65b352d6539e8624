//! What one runtime hands to the next: its state, in a file in memory.
//!
//! ```text
//!   8 bytes "RATOONRS" | u32 version | u64 length | 32 bytes BLAKE3 | JSON of so many bytes
//! ```
//!
//! (Integers are little-endian.) The JSON is the server's own structs, each described where it lives;
//! descriptors are in it by number (`"$fd"`) and stay open through execve.
//!
//! **Versions.** A member that is added may be null (an `Option`), and what a newer runtime adds an older one does
//! not have to know: neither takes a new version. What is removed, or means something else, does; a
//! runtime says by [`OLDEST_VERSION`] how far back it reads, and refuses all else by number.
//!
//! How it fails: [`StateError`], before anything that the state names is touched.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::RawFd;

use serde_json::Value;

use super::forms::FD_KEY;

/// The version that this runtime writes.
pub const VERSION: u32 = 1;

/// The oldest version that it reads.
pub const OLDEST_VERSION: u32 = 1;

/// The longest state, in bytes.
pub const MAX_LEN: usize = 64 << 20;

const MAGIC: [u8; 8] = *b"RATOONRS";
const HEADER_LEN: usize = 52;

/// Why a state is refused.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file, or something else of the system.
    #[error("cannot {0}")]
    System(&'static str, #[source] io::Error),
    /// No state at all.
    #[error("this is no runtime's state")]
    NotAState,
    /// Of a runtime that is too old or too new.
    #[error(
        "the state has version {0}, and this runtime reads {OLDEST_VERSION} to {VERSION}: \
         only a runtime that reads it can take over"
    )]
    Version(u32),
    /// More than there may be.
    #[error("a state of {0} bytes is longer than {MAX_LEN}")]
    TooLong(usize),
    /// Not as it was written.
    #[error("the state is damaged")]
    Damaged,
    /// Not what this runtime understands.
    #[error("the state does not fit this runtime: `{member}` is not {wanted}")]
    Form {
        /// The innermost member with a name.
        member: &'static str,
        /// What it should be.
        wanted: String,
    },
    /// It is not JSON.
    #[error("the state is no JSON")]
    Json(#[from] serde_json::Error),
    /// A descriptor is not open.
    #[error("descriptor {fd} of the state")]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It contradicts itself.
    #[error("the state is wrong: {0}")]
    Wrong(&'static str),
}

/// The file's bytes.
///
/// # Errors
/// [`StateError::TooLong`].
pub fn encode(state: &Value) -> Result<Vec<u8>, StateError> {
    let mut bytes = vec![0; HEADER_LEN];
    serde_json::to_writer(&mut bytes, state)?;
    let len = bytes.len() - HEADER_LEN;
    if len > MAX_LEN {
        return Err(StateError::TooLong(len));
    }
    let digest = blake3::hash(&bytes[HEADER_LEN..]);
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..20].copy_from_slice(&(len as u64).to_le_bytes());
    bytes[20..HEADER_LEN].copy_from_slice(digest.as_bytes());
    Ok(bytes)
}

/// The state in a file's bytes.
///
/// # Errors
/// [`StateError`].
pub fn decode(bytes: &[u8]) -> Result<Value, StateError> {
    let (header, json) = bytes
        .split_at_checked(HEADER_LEN)
        .ok_or(StateError::NotAState)?;
    let (magic, rest) = header.split_first_chunk().ok_or(StateError::NotAState)?;
    let (version, rest) = rest.split_first_chunk().ok_or(StateError::NotAState)?;
    let (len, digest) = rest.split_first_chunk().ok_or(StateError::NotAState)?;
    if *magic != MAGIC {
        return Err(StateError::NotAState);
    }
    let version = u32::from_le_bytes(*version);
    if !(OLDEST_VERSION..=VERSION).contains(&version) {
        return Err(StateError::Version(version));
    }
    if json.len() > MAX_LEN {
        return Err(StateError::TooLong(json.len()));
    }
    let fits = u64::from_le_bytes(*len) == json.len() as u64;
    if !fits || blake3::hash(json).as_bytes() != digest {
        return Err(StateError::Damaged);
    }
    Ok(serde_json::from_slice(json)?)
}

/// All descriptors that the state names.
///
/// # Errors
/// [`StateError::Wrong`]: something is named so that cannot be one of them.
pub fn descriptors(state: &Value) -> Result<BTreeSet<RawFd>, StateError> {
    let mut found = BTreeSet::new();
    let mut todo = vec![state];
    while let Some(value) = todo.pop() {
        match value {
            Value::Array(values) => todo.extend(values),
            Value::Object(members) => match members.get(FD_KEY) {
                Some(fd) => {
                    let fd = fd.as_i64().and_then(|fd| RawFd::try_from(fd).ok());
                    let fd = fd.filter(|fd| *fd > 2);
                    found.insert(fd.ok_or(StateError::Wrong("a number is no descriptor's"))?);
                }
                None => todo.extend(members.values()),
            },
            _ => {}
        }
    }
    Ok(found)
}

/// Names this descriptor in place of each: for a rehearsal, which has none of them.
pub fn stand_in(state: &mut Value, fd: RawFd) {
    let mut todo = vec![state];
    while let Some(value) = todo.pop() {
        match value {
            Value::Array(values) => todo.extend(values),
            Value::Object(members) => match members.get_mut(FD_KEY) {
                Some(named) => *named = fd.into(),
                None => todo.extend(members.values_mut()),
            },
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sample() -> Vec<u8> {
        encode(&json!({"a": [{"$fd": 7}, {"b": {"$fd": 9}}, null], "c": 1})).unwrap()
    }

    #[test]
    fn a_state_comes_back_with_the_descriptors_that_it_names() {
        let mut state = decode(&sample()).unwrap();
        let found = descriptors(&state).unwrap();
        assert_eq!(found.into_iter().collect::<Vec<_>>(), [7, 9]);
        stand_in(&mut state, 3);
        assert_eq!(state["a"], json!([{"$fd": 3}, {"b": {"$fd": 3}}, null]));
    }

    #[test]
    fn the_header_is_pinned() {
        let bytes = sample();
        assert_eq!(&bytes[..12], b"RATOONRS\x01\0\0\0");
        assert_eq!(bytes[12..20], (bytes.len() as u64 - 52).to_le_bytes());
    }

    #[test]
    fn each_wrong_part_of_a_state_is_refused_for_what_it_is() {
        let spoiled = |at: usize| {
            let mut bytes = sample();
            bytes[at] ^= 0x40;
            decode(&bytes).unwrap_err()
        };
        assert!(matches!(spoiled(0), StateError::NotAState));
        assert!(matches!(spoiled(8), StateError::Version(0x41)));
        for at in 12..sample().len() {
            assert!(matches!(spoiled(at), StateError::Damaged), "byte {at}");
        }
        for len in 0..sample().len() {
            let error = decode(&sample()[..len]).unwrap_err();
            let fits = matches!(error, StateError::NotAState | StateError::Damaged);
            assert!(fits, "{len} bytes: {error}");
        }
        let error = decode(&[sample(), b"x".to_vec()].concat()).unwrap_err();
        assert!(matches!(error, StateError::Damaged));
    }

    #[test]
    fn standard_streams_and_odd_numbers_are_no_descriptors_of_a_state() {
        for fd in [
            json!(2),
            json!(-1),
            json!(1_u64 << 40),
            json!("7"),
            json!(null),
        ] {
            let error = descriptors(&json!([{ "$fd": fd }])).unwrap_err();
            assert!(matches!(error, StateError::Wrong(_)), "{error}");
        }
    }
}
