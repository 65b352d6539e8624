//! Strict JSON: what is refused here cannot mean one thing to us and another to a provider.
//!
//! [`check`] walks a whole document once: UTF-8, no key twice in an object, bounded depth and number
//! of values, no lone surrogate, no number out of range, nothing behind the end. After that,
//! [`fields`] and [`items`] open one level at a time and leave what is below as the bytes it came as:
//! so whatever is passed on is passed on byte-exact, and memory stays near the document's own size.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// The deepest nesting.
pub const MAX_DEPTH: u32 = 64;
/// The most values in a document, keys not counted.
pub const MAX_VALUES: u32 = 400_000;

/// A value as its bytes.
pub type Raw<'a> = &'a RawValue;

/// Checks a whole document.
///
/// # Errors
/// What is wrong with it, and where.
pub fn check(bytes: &[u8]) -> Result<Raw<'_>, serde_json::Error> {
    let text = std::str::from_utf8(bytes).map_err(serde_json::Error::custom)?;
    let mut left = MAX_VALUES;
    let mut document = serde_json::Deserializer::from_str(text);
    Strict {
        depth: MAX_DEPTH,
        left: &mut left,
    }
    .deserialize(&mut document)?;
    document.end()?;
    serde_json::from_str(text)
}

/// The fields of an object, in order.
///
/// # Errors
/// When it is none, or has a key twice.
pub fn fields(raw: Raw<'_>) -> Result<Vec<(Cow<'_, str>, Raw<'_>)>, serde_json::Error> {
    serde_json::from_str::<Fields<'_>>(raw.get()).map(|fields| fields.0)
}

/// The items of an array.
///
/// # Errors
/// When it is none.
pub fn items(raw: Raw<'_>) -> Result<Vec<Raw<'_>>, serde_json::Error> {
    serde_json::from_str(raw.get())
}

/// The text of a string.
///
/// # Errors
/// When it is none.
pub fn text(raw: Raw<'_>) -> Result<Cow<'_, str>, serde_json::Error> {
    serde_json::from_str::<Text<'_>>(raw.get()).map(|text| text.0)
}

/// What kind of value it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `null`
    Null,
    /// `true` or `false`
    Bool,
    /// A number.
    Number,
    /// A string.
    Text,
    /// An array.
    List,
    /// An object.
    Object,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Null => "null",
            Self::Bool => "a boolean",
            Self::Number => "a number",
            Self::Text => "a string",
            Self::List => "an array",
            Self::Object => "an object",
        })
    }
}

/// What kind of value it is.
#[must_use]
pub fn kind(raw: Raw<'_>) -> Kind {
    match raw.get().as_bytes().first() {
        Some(b'n') => Kind::Null,
        Some(b't' | b'f') => Kind::Bool,
        Some(b'"') => Kind::Text,
        Some(b'[') => Kind::List,
        Some(b'{') => Kind::Object,
        _ => Kind::Number,
    }
}

struct Fields<'a>(Vec<(Cow<'a, str>, Raw<'a>)>);

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Seen;
        impl<'de> Visitor<'de> for Seen {
            type Value = Fields<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields: Vec<(Cow<'de, str>, Raw<'de>)> = Vec::new();
                while let Some((Text(key), value)) = map.next_entry()? {
                    fields.push((key, value));
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Seen)
    }
}

#[derive(PartialEq, Eq, Hash)]
struct Text<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Seen;
        impl<'de> Visitor<'de> for Seen {
            type Value = Text<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Borrowed(text)))
            }
            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(Seen)
    }
}

/// Goes through a value and keeps nothing of it.
struct Strict<'a> {
    depth: u32,
    left: &'a mut u32,
}

impl Strict<'_> {
    fn below(&mut self) -> Strict<'_> {
        Strict {
            depth: self.depth - 1,
            left: self.left,
        }
    }

    fn deep_enough<E: serde::de::Error>(&self) -> Result<(), E> {
        if self.depth == 0 {
            return Err(E::custom(format!("nested deeper than {MAX_DEPTH}")));
        }
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        let Some(left) = self.left.checked_sub(1) else {
            return Err(D::Error::custom(format!(
                "more than {MAX_VALUES} values in one document"
            )));
        };
        *self.left = left;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }
    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }
    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }
    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }
    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }
    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
        self.deep_enough()?;
        while list.next_element_seed(self.below())?.is_some() {}
        Ok(())
    }
    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        self.deep_enough()?;
        let mut keys: HashSet<Text<'de>> = HashSet::new();
        while let Some(key) = map.next_key::<Text<'de>>()? {
            if keys.contains(&key) {
                return Err(A::Error::custom(format!(
                    "the key {:?} is there twice",
                    crate::rules::shown(&key.0)
                )));
            }
            keys.insert(key);
            map.next_value_seed(self.below())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(document: &str) -> String {
        check(document.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn a_key_twice_is_refused_at_any_depth_and_in_any_spelling() {
        for document in [
            r#"{"a":1,"a":2}"#,
            r#"[{"x":{"a":1,"b":2,"a":3}}]"#,
            r#"{"a":1,"\u0061":2}"#,
        ] {
            assert!(refusal(document).contains("the key \"a\" is there twice"));
        }
        check(br#"{"a":{"a":1},"b":{"a":1}}"#).expect("each object has its own keys");
    }

    #[test]
    fn what_is_not_one_json_document_is_refused() {
        for document in [
            "",
            "{",
            "{}x",
            "{} {}",
            "{'a':1}",
            "[1,]",
            "NaN",
            "1e999",
            "\u{feff}{}",
            "{\"a\":01}",
            r#""\ud800""#,
            "// x\n{}",
            "\"a\nb\"",
        ] {
            assert!(check(document.as_bytes()).is_err(), "{document}");
        }
        assert!(check(b"\"\xff\"").is_err());
    }

    #[test]
    fn depth_is_bounded() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        check(nested(64).as_bytes()).expect("the deepest");
        assert!(refusal(&nested(65)).contains("nested deeper than 64"));
        assert!(refusal(&nested(100_000)).contains("nested deeper"));
        assert!(refusal(&"{\"a\":".repeat(65)).contains("nested deeper"));
    }

    #[test]
    fn the_number_of_values_is_bounded() {
        let list = |values: u32| format!("[{}0]", "0,".repeat(values as usize - 2));
        check(list(MAX_VALUES).as_bytes()).expect("the most");
        assert!(refusal(&list(MAX_VALUES + 1)).contains("more than 400000 values"));
    }

    #[test]
    fn a_value_keeps_its_bytes() {
        let raw = check(br#" {"a": 1.0e0 , "b\n":[ 1,2 ]} "#).expect("valid");
        let fields = fields(raw).expect("an object");
        assert_eq!(fields[0].1.get(), "1.0e0");
        assert_eq!(fields[1].0, "b\n");
        assert_eq!(fields[1].1.get(), "[ 1,2 ]");
    }
}
