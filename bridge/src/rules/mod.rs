//! Which fields of a request go to a provider: tables, and the code that rebuilds a body from them.
//!
//! A body is never passed on. Each wire has a table of [`Field`]s ([`messages`], [`chat`],
//! [`responses`]); [`Rebuild`] goes through the request and the table together and writes a new body
//! that has only what the table allows. A field or a type that no table names is refused with its
//! path. Free JSON (schemas, a tool's input) and scalars keep their bytes, so that siblings of a fork
//! send the same prefix and share the provider's cache.

pub mod chat;
pub mod messages;
pub mod responses;

use std::fmt;

use crate::json::{self, Kind, Raw};

/// What a value may be.
#[derive(Debug, Clone, Copy)]
pub enum Shape {
    /// `true` or `false`.
    Bool,
    /// A number.
    Number,
    /// A string.
    Text,
    /// Any JSON: it means nothing to the provider but what the model reads.
    Free,
    /// Bytes in base64.
    Base64,
    /// A `data:` URL with base64, and no other URL: the provider must not fetch for a guest.
    DataUrl,
    /// One of these strings.
    Is(&'static [&'static str]),
    /// An array of one shape.
    List(&'static Shape),
    /// An object with these fields.
    Object(&'static [Field]),
    /// An object whose fields depend on one of them.
    Union(&'static Union),
    /// The first that begins with the same kind of value.
    Either(&'static [Shape]),
}

/// An object whose fields depend on one of them.
#[derive(Debug)]
pub struct Union {
    /// Which: `type` or `role`.
    pub tag: &'static str,
    /// What it is taken for when the tag is absent.
    pub absent: Option<&'static str>,
    /// The allowed ones. A `*` at the end of a tag stands for eight digits: a version's date.
    pub variants: &'static [(&'static str, &'static [Field])],
    /// Tags whose objects are left out of a list: tools that would run at the provider. With a `*`
    /// at the end: whatever begins so.
    pub withheld: &'static [&'static str],
}

/// A field and its rule.
#[derive(Debug)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// Its rule.
    pub rule: Rule,
}

/// What becomes of a field.
#[derive(Debug)]
pub enum Rule {
    /// It goes to the provider.
    Keep(Shape),
    /// As `Keep`, and it must be there.
    Need(Shape),
    /// It is accepted and left out.
    Drop,
    /// The wire's own code reads it, and writes what it has to be: see `request.rs`.
    Own,
    /// It is refused for this reason.
    Refuse(&'static str),
}

/// Short for a field that is kept.
pub const fn keep(name: &'static str, shape: Shape) -> Field {
    Field {
        name,
        rule: Rule::Keep(shape),
    }
}

/// Short for a field that must be there.
pub const fn need(name: &'static str, shape: Shape) -> Field {
    Field {
        name,
        rule: Rule::Need(shape),
    }
}

/// Short for a field that is left out.
pub const fn drop(name: &'static str) -> Field {
    Field {
        name,
        rule: Rule::Drop,
    }
}

/// Short for a field of the wire's own.
pub const fn own(name: &'static str) -> Field {
    Field {
        name,
        rule: Rule::Own,
    }
}

/// Short for a field that is refused.
pub const fn refuse(name: &'static str, why: &'static str) -> Field {
    Field {
        name,
        rule: Rule::Refuse(why),
    }
}

/// A value that no rule allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Breach {
    /// Where: `messages[0].content`.
    pub path: String,
    /// What is wrong.
    pub what: String,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() {
            f.write_str(&self.what)
        } else {
            write!(f, "{}: {}", self.path, self.what)
        }
    }
}

impl std::error::Error for Breach {}

impl Breach {
    fn new(what: impl Into<String>) -> Self {
        Self {
            path: String::new(),
            what: what.into(),
        }
    }

    fn below(mut self, step: &str) -> Self {
        let dot = if self.path.is_empty() || self.path.starts_with('[') {
            ""
        } else {
            "."
        };
        self.path = format!("{step}{dot}{}", self.path);
        self
    }
}

impl From<serde_json::Error> for Breach {
    fn from(error: serde_json::Error) -> Self {
        Self::new(error.to_string())
    }
}

/// A body that is being written.
#[derive(Debug, Default)]
pub struct Rebuild {
    /// What is written so far.
    pub body: Vec<u8>,
    /// Of it, bytes in base64: tokens of an image do not grow with its bytes.
    pub base64_bytes: usize,
    /// How many such values there are.
    pub base64_values: usize,
    /// Provider-side tools that were left out.
    pub withheld: Vec<String>,
}

/// Fields that the wire's own code reads.
pub type Owned<'a> = Vec<(&'static str, Raw<'a>)>;

impl Rebuild {
    /// Writes the allowed fields of `raw` as an object without its end, and gives back those of the
    /// wire's own code.
    ///
    /// # Errors
    /// What no rule allows.
    pub fn open<'a>(&mut self, raw: Raw<'a>, table: &[Field]) -> Result<Owned<'a>, Breach> {
        let mut owned = Vec::new();
        self.fields(raw, table, None, &mut owned)?;
        Ok(owned)
    }

    /// Whether it means something still: not when all of a list that it needs was withheld.
    fn fields<'a>(
        &mut self,
        raw: Raw<'a>,
        table: &[Field],
        tag: Option<(&str, &str)>,
        owned: &mut Owned<'a>,
    ) -> Result<bool, Breach> {
        if json::kind(raw) != Kind::Object {
            return Err(Breach::new(format!(
                "is {}, not an object",
                json::kind(raw)
            )));
        }
        let given = json::fields(raw)?;
        self.body.push(b'{');
        let mut first = true;
        let mut means_something = true;
        if let Some((name, value)) = tag {
            self.key(name, &mut first);
            self.string(value);
        }
        for (name, value) in &given {
            if tag.is_some_and(|(tag, _)| tag == name) {
                continue;
            }
            let Some(field) = table.iter().find(|field| field.name == name) else {
                return Err(Breach::new(format!(
                    "the field {:?} is none that may be sent",
                    shown(name)
                )));
            };
            // SDKs write null for what was not set.
            if json::kind(value) == Kind::Null {
                continue;
            }
            match &field.rule {
                Rule::Keep(shape) | Rule::Need(shape) => {
                    let before = (self.body.len(), first, self.withheld.len());
                    self.key(field.name, &mut first);
                    self.value(value, shape)
                        .map_err(|breach| breach.below(field.name))?;
                    // Providers refuse an empty list of tools; none at all is what is meant.
                    if self.withheld.len() > before.2 && self.body.ends_with(b":[]") {
                        self.body.truncate(before.0);
                        first = before.1;
                        means_something &= !matches!(field.rule, Rule::Need(_));
                    }
                }
                Rule::Drop => {}
                Rule::Own => owned.push((field.name, value)),
                Rule::Refuse(why) => return Err(Breach::new(*why).below(field.name)),
            }
        }
        for field in table {
            let there = |(name, value): &(_, Raw<'_>)| {
                *name == field.name && json::kind(value) != Kind::Null
            };
            if matches!(field.rule, Rule::Need(_)) && !given.iter().any(there) {
                return Err(Breach::new("is missing").below(field.name));
            }
        }
        Ok(means_something)
    }

    fn value(&mut self, raw: Raw<'_>, shape: &Shape) -> Result<(), Breach> {
        let kind = json::kind(raw);
        let is = |wanted: Kind| {
            if kind == wanted {
                Ok(())
            } else {
                Err(Breach::new(format!("is {kind}, not {wanted}")))
            }
        };
        match shape {
            Shape::Bool => is(Kind::Bool)?,
            Shape::Number => is(Kind::Number)?,
            Shape::Text => is(Kind::Text)?,
            Shape::Free => {}
            Shape::Base64 => {
                is(Kind::Text)?;
                self.base64(&json::text(raw)?)?;
            }
            Shape::DataUrl => {
                is(Kind::Text)?;
                self.data_url(&json::text(raw)?)?;
            }
            Shape::Is(allowed) => {
                is(Kind::Text)?;
                let text = json::text(raw)?;
                if !allowed.contains(&&*text) {
                    return Err(Breach::new(format!(
                        "is {:?}; allowed: {}",
                        shown(&text),
                        allowed.join(", ")
                    )));
                }
            }
            Shape::List(of) => {
                is(Kind::List)?;
                return self.list(raw, of);
            }
            Shape::Object(table) => {
                let mut owned = Vec::new();
                self.fields(raw, table, None, &mut owned)?;
                self.body.push(b'}');
                return Ok(());
            }
            Shape::Union(union) => return self.union(raw, union).map(|_| ()),
            Shape::Either(shapes) => {
                let Some(shape) = shapes.iter().find(|shape| shape.begins_with(kind)) else {
                    return Err(Breach::new(format!("cannot be {kind}")));
                };
                return self.value(raw, shape);
            }
        }
        self.body.extend_from_slice(raw.get().as_bytes());
        Ok(())
    }

    fn list(&mut self, raw: Raw<'_>, of: &Shape) -> Result<(), Breach> {
        self.body.push(b'[');
        let start = self.body.len();
        for (index, item) in json::items(raw)?.into_iter().enumerate() {
            let before = self.body.len();
            if before > start {
                self.body.push(b',');
            }
            let written = match of {
                Shape::Union(union) => self.union(item, union),
                other => self.value(item, other).map(|()| true),
            }
            .map_err(|breach| breach.below(&format!("[{index}]")))?;
            if !written {
                self.body.truncate(before);
            }
        }
        self.body.push(b']');
        Ok(())
    }

    /// Whether it was written; what is withheld is not.
    fn union(&mut self, raw: Raw<'_>, union: &Union) -> Result<bool, Breach> {
        if json::kind(raw) != Kind::Object {
            return Err(Breach::new(format!(
                "is {}, not an object",
                json::kind(raw)
            )));
        }
        let given = json::fields(raw)?;
        let tag = match given.iter().find(|(name, _)| name == union.tag) {
            Some((_, value)) if json::kind(value) == Kind::Text => json::text(value)?.into_owned(),
            Some((_, value)) => {
                let kind = json::kind(value);
                return Err(Breach::new(format!("is {kind}, not a string")).below(union.tag));
            }
            None => match union.absent {
                Some(absent) => absent.to_owned(),
                None => return Err(Breach::new("is missing").below(union.tag)),
            },
        };
        if union.withheld.iter().any(|pattern| begins(pattern, &tag)) {
            self.withheld.push(shown(&tag));
            return Ok(false);
        }
        let Some((_, table)) = union
            .variants
            .iter()
            .find(|(pattern, _)| matches_dated(pattern, &tag))
        else {
            return Err(
                Breach::new(format!("{:?} is none that may be sent", shown(&tag))).below(union.tag),
            );
        };
        // A tag that was absent stays absent: what is sent is as near to what was given as can be.
        let written = given
            .iter()
            .any(|(name, _)| name == union.tag)
            .then_some((union.tag, tag.as_str()));
        let mut owned = Vec::new();
        let means_something = self.fields(raw, table, written, &mut owned)?;
        self.body.push(b'}');
        Ok(means_something)
    }

    fn base64(&mut self, text: &str) -> Result<(), Breach> {
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || b"+/=-_".contains(&byte);
        if !text.bytes().all(valid) {
            return Err(Breach::new("is not base64"));
        }
        self.base64_bytes += text.len();
        self.base64_values += 1;
        Ok(())
    }

    fn data_url(&mut self, text: &str) -> Result<(), Breach> {
        let parts = text
            .strip_prefix("data:")
            .and_then(|rest| rest.split_once(";base64,"));
        let Some((media_type, data)) = parts else {
            return Err(Breach::new(
                "is a URL that the provider would fetch; only data:TYPE;base64,… is allowed",
            ));
        };
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/.+-".contains(&byte);
        if !media_type.bytes().all(plain) {
            return Err(Breach::new("has a strange media type"));
        }
        self.base64(data)
    }

    /// Writes a key of the table: all are plain words.
    pub fn key(&mut self, name: &str, first: &mut bool) {
        if !std::mem::take(first) {
            self.body.push(b',');
        }
        self.body.push(b'"');
        self.body.extend_from_slice(name.as_bytes());
        self.body.extend_from_slice(b"\":");
    }

    /// Writes a string.
    pub fn string(&mut self, text: &str) {
        let quoted = serde_json::Value::from(text).to_string();
        self.body.extend_from_slice(quoted.as_bytes());
    }
}

impl Shape {
    fn begins_with(&self, kind: Kind) -> bool {
        match self {
            Self::Bool => kind == Kind::Bool,
            Self::Number => kind == Kind::Number,
            Self::Text | Self::Base64 | Self::DataUrl | Self::Is(_) => kind == Kind::Text,
            Self::Free => true,
            Self::List(_) => kind == Kind::List,
            Self::Object(_) | Self::Union(_) => kind == Kind::Object,
            Self::Either(shapes) => shapes.iter().any(|shape| shape.begins_with(kind)),
        }
    }
}

/// `bash_*` matches `bash_20250124`, and nothing else that begins so.
fn matches_dated(pattern: &str, tag: &str) -> bool {
    match pattern.strip_suffix('*') {
        None => pattern == tag,
        Some(prefix) => tag
            .strip_prefix(prefix)
            .is_some_and(|date| date.len() == 8 && date.bytes().all(|byte| byte.is_ascii_digit())),
    }
}

fn begins(pattern: &str, tag: &str) -> bool {
    match pattern.strip_suffix('*') {
        None => pattern == tag,
        Some(prefix) => tag.starts_with(prefix),
    }
}

/// A guest's text for a message: not too much of it.
pub fn shown(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
