//! JSON that may stand in a request: the bridge refuses keys that are there twice, great depth, lone surrogates.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// How deep a value may be: the bridge allows 64 to the whole request.
const MAX_DEPTH: usize = 48;

/// The text as JSON that may be sent on as it is; none if it is not.
pub fn strict(text: &str) -> Result<Box<RawValue>, String> {
    let mut from = serde_json::Deserializer::from_str(text);
    Checked(0)
        .deserialize(&mut from)
        .and_then(|()| from.end())
        .map_err(|error| error.to_string())?;
    RawValue::from_string(text.trim().to_owned()).map_err(|error| error.to_string())
}

/// Appends a string as JSON.
pub fn quote(text: &str, out: &mut String) {
    // A string always has a JSON form.
    out.push_str(&serde_json::to_string(text).unwrap_or_default());
}

/// A string as JSON.
pub fn quoted(text: &str) -> String {
    let mut out = String::new();
    quote(text, &mut out);
    out
}

/// JSON that we wrote ourselves.
pub fn raw(text: String) -> Box<RawValue> {
    // What cannot be parsed is a mistake of ours, and the model sees it as null.
    RawValue::from_string(text).unwrap_or_else(|_| RawValue::NULL.to_owned())
}

/// The fields of an object, in order, each value as it is written.
pub fn fields(object: &str) -> serde_json::Result<Vec<(String, Box<RawValue>)>> {
    struct Fields;
    impl<'de> Visitor<'de> for Fields {
        type Value = Vec<(String, Box<RawValue>)>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut fields = Vec::new();
            while let Some(field) = map.next_entry()? {
                fields.push(field);
            }
            Ok(fields)
        }
    }
    let mut from = serde_json::Deserializer::from_str(object);
    serde::Deserializer::deserialize_map(&mut from, Fields)
}

struct Checked(usize);

impl<'de> DeserializeSeed<'de> for Checked {
    type Value = ();
    fn deserialize<D: serde::Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        if self.0 > MAX_DEPTH {
            return Err(D::Error::custom("it is too deep"));
        }
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Checked {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
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

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while items.next_element_seed(Checked(self.0 + 1))?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<(), A::Error> {
        let mut names = BTreeSet::new();
        while let Some(name) = fields.next_key::<String>()? {
            if names.contains(&name) {
                return Err(A::Error::custom(format!("the key {name:?} is there twice")));
            }
            names.insert(name);
            fields.next_value_seed(Checked(self.0 + 1))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_keeps_its_bytes() {
        let text = r#"{"b": 1.50, "a":["\u00fc", 1e3 ]}"#;
        assert_eq!(strict(text).expect("JSON").get(), text);
    }

    #[test]
    fn what_the_bridge_refuses_is_refused() {
        for text in [
            "",
            "{",
            "{} x",
            r#"{"a":1,"a":2}"#,
            r#"{"a":1,"\u0061":2}"#,
            r#""\ud800""#,
            r#"{"command":"\d"}"#,
            &"[".repeat(100),
            "1e999",
        ] {
            assert!(strict(text).is_err(), "{text}");
        }
    }
}
