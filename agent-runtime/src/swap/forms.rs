//! How each thing is written into the state, and read again.
//!
//! Structs are objects with a member for each field, listed by [`carried!`]; what the protocol knows is
//! as there ([`carried_by_serde!`]). Descriptors are `{"$fd": number}`, bytes hexadecimal digits, moments
//! microseconds from now, durations microseconds. (Not serde's own derives: what these make of forty
//! structs takes more room than the rest of the runtime's code for calls.)
//!
//! Reading gives a second descriptor beside the one that is named: who refuses a state half way leaves
//! all that it names as it was. A member that is not there reads as null, so an `Option` may be added.
//! How it fails: [`StateError::Form`], with the innermost member's name.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::state::StateError;
use crate::sys;

/// The member by which a descriptor is known in the state.
pub const FD_KEY: &str = "$fd";

/// Something that goes from one runtime to the next.
pub trait Carried: Sized {
    /// As it is written.
    fn carry(&self) -> Value;

    /// What was written.
    ///
    /// # Errors
    /// [`StateError::Form`].
    fn arrive(value: Value) -> Result<Self, StateError>;

    /// A slice of these.
    fn carry_all(all: &[Self]) -> Value {
        Value::Array(all.iter().map(Self::carry).collect())
    }

    /// What [`Carried::carry_all`] has written.
    ///
    /// # Errors
    /// As [`Carried::arrive`].
    fn arrive_all(value: Value) -> Result<Vec<Self>, StateError> {
        let values = array(value)?;
        let mut all = Vec::with_capacity(values.len());
        for value in values {
            all.push(Self::arrive(value)?);
        }
        Ok(all)
    }
}

/// The value is not what its place wants.
pub fn wrong(wanted: &'static str) -> StateError {
    StateError::Form {
        member: "",
        wanted: wanted.into(),
    }
}

/// Adds a member.
#[inline(never)]
pub fn put(members: &mut Map<String, Value>, name: &str, value: Value) {
    members.insert(name.to_owned(), value);
}

/// An array's elements.
fn array(value: Value) -> Result<Vec<Value>, StateError> {
    match value {
        Value::Array(all) => Ok(all),
        _ => Err(wrong("an array")),
    }
}

/// An object's members.
///
/// # Errors
/// It is none.
pub fn members(value: Value) -> Result<Map<String, Value>, StateError> {
    match value {
        Value::Object(members) => Ok(members),
        _ => Err(wrong("an object")),
    }
}

/// Takes one member.
///
/// # Errors
/// It is not what its place wants; named, if nothing in it is.
#[inline(never)]
pub fn member<T: Carried>(
    members: &mut Map<String, Value>,
    name: &'static str,
) -> Result<T, StateError> {
    T::arrive(take(members, name)).map_err(|error| named(error, name))
}

#[inline(never)]
fn take(members: &mut Map<String, Value>, name: &str) -> Value {
    members.remove(name).unwrap_or_default()
}

#[inline(never)]
fn named(error: StateError, name: &'static str) -> StateError {
    match error {
        StateError::Form { member: "", wanted } => StateError::Form {
            member: name,
            wanted,
        },
        error => error,
    }
}

/// Makes a struct [`Carried`]: its fields, and behind a semicolon those that begin anew. A field that is
/// in neither list does not compile.
macro_rules! carried {
    ($name:ident { $($field:ident),* $(; $($anew:ident),*)? }) => {
        impl $crate::swap::forms::Carried for $name {
            fn carry(&self) -> serde_json::Value {
                let mut all = serde_json::Map::new();
                $($crate::swap::forms::put(&mut all, stringify!($field), self.$field.carry());)*
                serde_json::Value::Object(all)
            }

            fn arrive(
                value: serde_json::Value,
            ) -> Result<Self, $crate::swap::state::StateError> {
                let mut all = $crate::swap::forms::members(value)?;
                Ok(Self {
                    $($field: $crate::swap::forms::member(&mut all, stringify!($field))?,)*
                    $($($anew: Default::default(),)*)?
                })
            }
        }
    };
}

/// Makes what has a form in the protocol [`Carried`] by that.
macro_rules! carried_by_serde {
    ($name:ident) => {
        impl $crate::swap::forms::Carried for $name {
            fn carry(&self) -> serde_json::Value {
                $crate::swap::forms::by_serde(self)
            }

            fn arrive(value: serde_json::Value) -> Result<Self, $crate::swap::state::StateError> {
                $crate::swap::forms::from_serde(value)
            }
        }
    };
}

pub(crate) use {carried, carried_by_serde};

fn no_form(error: serde_json::Error) -> StateError {
    StateError::Form {
        member: "",
        wanted: error.to_string(),
    }
}

/// See [`carried_by_serde!`]. What has no form, and all of ours has, is null: a rehearsal refuses it.
pub fn by_serde<T: Serialize>(value: &T) -> Value {
    serde_json::to_value(value).unwrap_or_default()
}

/// See [`carried_by_serde!`].
///
/// # Errors
/// As [`Carried::arrive`].
pub fn from_serde<T: DeserializeOwned>(value: Value) -> Result<T, StateError> {
    serde_json::from_value(value).map_err(no_form)
}

impl Carried for bool {
    fn carry(&self) -> Value {
        (*self).into()
    }

    fn arrive(value: Value) -> Result<Self, StateError> {
        value.as_bool().ok_or_else(|| wrong("true or false"))
    }
}

impl Carried for u64 {
    fn carry(&self) -> Value {
        (*self).into()
    }

    fn arrive(value: Value) -> Result<Self, StateError> {
        value.as_u64().ok_or_else(|| wrong("a number"))
    }
}

impl Carried for i64 {
    fn carry(&self) -> Value {
        (*self).into()
    }

    fn arrive(value: Value) -> Result<Self, StateError> {
        value.as_i64().ok_or_else(|| wrong("a number"))
    }
}

macro_rules! carried_as {
    ($($small:ident as $wide:ident),*) => {$(
        impl Carried for $small {
            fn carry(&self) -> Value {
                (*self).into()
            }

            fn arrive(value: Value) -> Result<Self, StateError> {
                Self::try_from($wide::arrive(value)?).map_err(|_| wrong("a smaller number"))
            }
        }
    )*};
}

carried_as!(usize as u64, u32 as u64, i32 as i64);

impl Carried for String {
    fn carry(&self) -> Value {
        self.as_str().into()
    }

    fn arrive(value: Value) -> Result<Self, StateError> {
        match value {
            Value::String(text) => Ok(text),
            _ => Err(wrong("a text")),
        }
    }
}

/// Those of ours are all ASCII.
impl Carried for PathBuf {
    fn carry(&self) -> Value {
        self.to_string_lossy().into_owned().carry()
    }

    fn arrive(value: Value) -> Result<Self, StateError> {
        String::arrive(value).map(Into::into)
    }
}

impl<T: Carried> Carried for Option<T> {
    fn carry(&self) -> Value {
        self.as_ref().map_or(Value::Null, T::carry)
    }

    fn arrive(value: Value) -> Result<Self, StateError> {
        match value {
            Value::Null => Ok(None),
            value => T::arrive(value).map(Some),
        }
    }
}

impl<T: Carried, const N: usize> Carried for [T; N] {
    fn carry(&self) -> Value {
        Value::Array(self.iter().map(T::carry).collect())
    }

    fn arrive(value: Value) -> Result<Self, StateError> {
        let Value::Array(all) = value else {
            return Err(wrong("an array"));
        };
        let all: Result<Vec<T>, _> = all.into_iter().map(T::arrive).collect();
        all?.try_into()
            .map_err(|_| wrong("an array of another length"))
    }
}

impl<A: Carried, B: Carried> Carried for (A, B) {
    fn carry(&self) -> Value {
        Value::Array(vec![self.0.carry(), self.1.carry()])
    }

    fn arrive(value: Value) -> Result<Self, StateError> {
        let [a, b] = <[Value; 2]>::arrive(value)?;
        Ok((A::arrive(a)?, B::arrive(b)?))
    }
}

impl Carried for Value {
    fn carry(&self) -> Value {
        self.clone()
    }

    fn arrive(value: Value) -> Result<Self, StateError> {
        Ok(value)
    }
}

impl<T: Carried> Carried for Vec<T> {
    fn carry(&self) -> Value {
        T::carry_all(self)
    }

    fn arrive(value: Value) -> Result<Self, StateError> {
        T::arrive_all(value)
    }
}

impl<T: Carried> Carried for BTreeMap<u64, T> {
    fn carry(&self) -> Value {
        let mut all = Map::new();
        for (key, value) in self {
            put(&mut all, &key.to_string(), value.carry());
        }
        Value::Object(all)
    }

    fn arrive(value: Value) -> Result<Self, StateError> {
        let mut all = Self::new();
        for (key, value) in members(value)? {
            let key = key
                .parse()
                .map_err(|_| wrong("an object with numbers for names"))?;
            all.insert(key, T::arrive(value)?);
        }
        Ok(all)
    }
}

/// Bytes are only in arrays of their own.
impl Carried for u8 {
    fn carry(&self) -> Value {
        (*self).into()
    }

    fn arrive(value: Value) -> Result<Self, StateError> {
        Self::try_from(u64::arrive(value)?).map_err(|_| wrong("a byte"))
    }

    fn carry_all(all: &[Self]) -> Value {
        hex(all).into()
    }

    fn arrive_all(value: Value) -> Result<Vec<Self>, StateError> {
        let bytes = value.as_str().and_then(unhex);
        bytes.ok_or_else(|| wrong("hexadecimal digits, two for each byte"))
    }
}

impl Carried for VecDeque<u8> {
    fn carry(&self) -> Value {
        self.iter().copied().collect::<Vec<u8>>().carry()
    }

    fn arrive(value: Value) -> Result<Self, StateError> {
        Vec::arrive(value).map(Into::into)
    }
}

/// Lower-case hexadecimal digits.
fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble & 15)]);
    let pairs = bytes.iter().map(|byte| [digit(byte >> 4), digit(*byte)]);
    pairs.flatten().collect()
}

/// What [`hex`] was given; `None` when these are no such digits.
fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let pairs = text.as_bytes().chunks(2);
    let bytes = pairs.map(|pair| match *pair {
        [high, low] => Some((digit(high)? << 4 | digit(low)?) as u8),
        _ => None,
    });
    bytes.collect()
}

impl Carried for Duration {
    fn carry(&self) -> Value {
        u64::try_from(self.as_micros()).unwrap_or(u64::MAX).carry()
    }

    fn arrive(value: Value) -> Result<Self, StateError> {
        u64::arrive(value).map(Self::from_micros)
    }
}

impl Carried for Instant {
    fn carry(&self) -> Value {
        let now = Self::now();
        let micros = |span: Duration| i64::try_from(span.as_micros()).unwrap_or(i64::MAX);
        match self.checked_duration_since(now) {
            Some(ahead) => micros(ahead),
            None => -micros(now.saturating_duration_since(*self)),
        }
        .carry()
    }

    fn arrive(value: Value) -> Result<Self, StateError> {
        let (now, micros) = (Self::now(), i64::arrive(value)?);
        let span = Duration::from_micros(micros.unsigned_abs());
        let at = match micros {
            0.. => now.checked_add(span),
            _ => now.checked_sub(span),
        };
        Ok(at.unwrap_or(now))
    }
}

fn descriptor(fd: RawFd) -> Value {
    let mut all = Map::new();
    put(&mut all, FD_KEY, fd.into());
    Value::Object(all)
}

/// A descriptor that goes on with the state.
#[derive(Debug)]
pub struct Fd(OwnedFd);

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

impl Carried for Fd {
    fn carry(&self) -> Value {
        descriptor(self.as_raw_fd())
    }

    fn arrive(value: Value) -> Result<Self, StateError> {
        let fd: i32 = member(&mut members(value)?, FD_KEY)?;
        let second = sys::duplicate(fd);
        second
            .map(Self)
            .map_err(|error| StateError::Descriptor { fd, source: error })
    }
}

impl Carried for File {
    fn carry(&self) -> Value {
        descriptor(self.as_raw_fd())
    }

    fn arrive(value: Value) -> Result<Self, StateError> {
        Fd::arrive(value).map(|fd| fd.0.into())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    struct All {
        fd: Fd,
        file: Option<File>,
        queue: VecDeque<u8>,
        frame: Option<Vec<u8>>,
        late: [Vec<u8>; 2],
        due: Option<Instant>,
        since: Instant,
        names: Vec<(String, String)>,
        anew: u32,
    }

    carried!(All { fd, file, queue, frame, late, due, since, names; anew });

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
            names: vec![("a".into(), "b".into())],
            anew: 7,
        };
        let value = all.carry();
        assert_eq!(value["queue"], "00ff");
        assert_eq!(value["names"], json!([["a", "b"]]));
        assert_eq!(value["fd"], json!({ FD_KEY: all.fd.as_raw_fd() }));
        let back = All::arrive(value).unwrap();
        assert_eq!((back.queue, back.frame), (all.queue, all.frame));
        assert_eq!((back.late, back.names), (all.late, all.names));
        assert_eq!((all.anew, back.anew), (7, 0));
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
        let fd = |value| Fd::arrive(value).unwrap_err().to_string();
        assert_eq!(
            fd(json!({"$fd": 100_000})),
            "descriptor 100000 of the state"
        );
        assert_eq!(fd(json!({"$fd": -1})), "descriptor -1 of the state");
        assert_eq!(
            fd(json!({"fd": 1})),
            "the state does not fit this runtime: `$fd` is not a number"
        );
        for text in ["0", "zz", "0g", "é0"] {
            assert!(Vec::<u8>::arrive(json!(text)).is_err(), "{text}");
        }
    }

    #[test]
    fn a_moment_beyond_all_clocks_is_now() {
        for micros in [i64::MIN, i64::MAX] {
            Instant::arrive(json!(micros)).unwrap();
        }
    }
}
