//! How what has no form of its own is written into the state: descriptors as `{"$fd": number}`, bytes
//! as hexadecimal digits, moments as microseconds from now.
//!
//! Reading gives a second descriptor beside the one that is named: who refuses a state half way leaves
//! all that it names as it was. How it fails: as any value that is not what its place wants.

use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use serde::de::{Error as _, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::sys;

/// The member by which a descriptor is known in the state.
pub const FD_KEY: &str = "$fd";

/// A descriptor that goes on with the state.
#[derive(Debug)]
pub struct Fd(OwnedFd);

#[derive(Serialize, Deserialize)]
struct Number {
    #[serde(rename = "$fd")]
    fd: RawFd,
}

impl From<OwnedFd> for Fd {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsFd for Fd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Fd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Serialize for Fd {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let fd = self.as_raw_fd();
        Number { fd }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Fd {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Number { fd } = Number::deserialize(deserializer)?;
        let second = sys::duplicate(fd);
        second
            .map(Self)
            .map_err(|error| D::Error::custom(format_args!("descriptor {fd}: {error}")))
    }
}

/// For an `Option<File>`.
pub mod file {
    use super::*;

    pub fn serialize<S: Serializer>(file: &Option<File>, serializer: S) -> Result<S::Ok, S::Error> {
        let number = file.as_ref().map(|file| Number {
            fd: file.as_raw_fd(),
        });
        number.serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<File>, D::Error> {
        let fd = Option::<Fd>::deserialize(deserializer)?;
        Ok(fd.map(|fd| fd.0.into()))
    }
}

/// Bytes, as hexadecimal digits.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Hex(pub Vec<u8>);

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex(&self.0))
    }
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble & 15)]);
    let pairs = bytes.iter().map(|byte| [digit(byte >> 4), digit(*byte)]);
    pairs.flatten().collect()
}

/// What [`hex`] was given; `None` when these are no such digits.
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let pairs = text.as_bytes().chunks(2);
    let bytes = pairs.map(|pair| match *pair {
        [high, low] => Some((digit(high)? << 4 | digit(low)?) as u8),
        _ => None,
    });
    bytes.collect()
}

struct HexDigits;

impl Visitor<'_> for HexDigits {
    type Value = Hex;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("hexadecimal digits, two for each byte")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Hex, E> {
        unhex(text)
            .map(Hex)
            .ok_or_else(|| E::custom("not hexadecimal digits"))
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(HexDigits)
    }
}

/// For a `Vec<u8>` or a `VecDeque<u8>`.
pub mod bytes {
    use super::*;

    pub fn serialize<'b, B, S: Serializer>(bytes: &'b B, serializer: S) -> Result<S::Ok, S::Error>
    where
        &'b B: IntoIterator<Item = &'b u8>,
    {
        Hex(bytes.into_iter().copied().collect()).serialize(serializer)
    }

    pub fn deserialize<'de, B: From<Vec<u8>>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<B, D::Error> {
        Ok(Hex::deserialize(deserializer)?.0.into())
    }
}

/// For an `Option<Vec<u8>>`.
pub mod maybe_bytes {
    use super::*;

    pub fn serialize<S: Serializer>(
        bytes: &Option<Vec<u8>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        bytes.clone().map(Hex).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Vec<u8>>, D::Error> {
        Ok(Option::<Hex>::deserialize(deserializer)?.map(|hex| hex.0))
    }
}

/// For a `[Vec<u8>; 2]`.
pub mod two_bytes {
    use super::*;

    pub fn serialize<S: Serializer>(
        bytes: &[Vec<u8>; 2],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        bytes.clone().map(Hex).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<[Vec<u8>; 2], D::Error> {
        Ok(<[Hex; 2]>::deserialize(deserializer)?.map(|hex| hex.0))
    }
}

fn from_now(at: Instant) -> i64 {
    let now = Instant::now();
    let micros = |span: Duration| i64::try_from(span.as_micros()).unwrap_or(i64::MAX);
    match at.checked_duration_since(now) {
        Some(ahead) => micros(ahead),
        None => -micros(now.saturating_duration_since(at)),
    }
}

fn at(micros: i64) -> Instant {
    let now = Instant::now();
    let span = Duration::from_micros(micros.unsigned_abs());
    let at = match micros {
        0.. => now.checked_add(span),
        _ => now.checked_sub(span),
    };
    at.unwrap_or(now)
}

/// For an `Instant`.
pub mod moment {
    use super::*;

    pub fn serialize<S: Serializer>(at: &Instant, serializer: S) -> Result<S::Ok, S::Error> {
        from_now(*at).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Instant, D::Error> {
        i64::deserialize(deserializer).map(at)
    }
}

/// For an `Option<Instant>`.
pub mod when {
    use super::*;

    pub fn serialize<S: Serializer>(
        at: &Option<Instant>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        at.map(from_now).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Instant>, D::Error> {
        Ok(Option::<i64>::deserialize(deserializer)?.map(at))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use serde_json::json;

    use super::*;

    #[derive(Serialize, Deserialize)]
    struct All {
        fd: Fd,
        #[serde(with = "file")]
        file: Option<File>,
        #[serde(with = "bytes")]
        queue: VecDeque<u8>,
        #[serde(with = "maybe_bytes")]
        frame: Option<Vec<u8>>,
        #[serde(with = "two_bytes")]
        late: [Vec<u8>; 2],
        #[serde(with = "when")]
        due: Option<Instant>,
        #[serde(with = "moment")]
        since: Instant,
    }

    #[test]
    fn each_form_reads_back_as_what_it_was() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let (due, since) = (
            Instant::now() + Duration::from_secs(3600),
            Instant::now() - Duration::from_millis(1),
        );
        let all = All {
            fd: write.into(),
            file: Some(read.into()),
            queue: VecDeque::from(vec![0, 0xff]),
            frame: Some(b"f".to_vec()),
            late: [Vec::new(), b"late".to_vec()],
            due: Some(due),
            since,
        };
        let value = serde_json::to_value(&all).unwrap();
        assert_eq!(value["queue"], "00ff");
        assert_eq!(value["fd"], json!({ FD_KEY: all.fd.as_raw_fd() }));
        let back: All = serde_json::from_value(value).unwrap();
        assert_eq!((back.queue, back.frame), (all.queue, all.frame));
        assert_eq!(back.late, all.late);
        let shift = |a: Instant, b: Instant| a.max(b) - a.min(b);
        assert!(shift(back.due.unwrap(), due) < Duration::from_secs(60));
        assert!(back.since <= Instant::now());
        rustix::io::write(&back.fd, b"x").unwrap();
        let mut byte = [0];
        rustix::io::read(all.file.unwrap(), &mut byte).unwrap();
        assert_eq!(&byte, b"x");
        assert_ne!(back.fd.as_raw_fd(), all.fd.as_raw_fd());
    }

    #[test]
    fn what_is_no_descriptor_or_no_digits_is_refused() {
        let fd = |value| serde_json::from_value::<Fd>(value).unwrap_err().to_string();
        assert_eq!(
            fd(json!({"$fd": 100_000})),
            "descriptor 100000: Bad file descriptor (os error 9)"
        );
        assert!(fd(json!({"$fd": -1})).starts_with("descriptor -1: "));
        for text in ["0", "zz", "0g", "é0"] {
            assert!(
                serde_json::from_value::<Hex>(json!(text)).is_err(),
                "{text}"
            );
        }
    }

    #[test]
    fn a_moment_beyond_all_clocks_is_now() {
        for micros in [i64::MIN, i64::MAX] {
            let _ = at(micros);
        }
    }
}
