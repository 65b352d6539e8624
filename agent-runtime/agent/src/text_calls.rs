//! Calls in an answer's text, as small models make them: in `<tool_call>` or a fence of JSON.
//!
//! ```text
//! <tool_call>{"name": "bash", "arguments": {"command": "ls"}}</tool_call>
//! ```

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::history::Ids;
use crate::json;
use crate::wire::{By, Call};

/// The most calls of one text.
const MAX_CALLS: usize = 16;

#[derive(Debug, Deserialize)]
struct Written {
    name: String,
    #[serde(alias = "parameters", alias = "input")]
    arguments: Box<RawValue>,
}

/// The calls of a text, or what is wrong with one that was meant to be a call.
pub fn find(text: &str, tools: &[&str], ids: &mut Ids) -> Result<Vec<Call>, String> {
    let tagged = between(text, "<tool_call>", "</tool_call>");
    if !tagged.is_empty() {
        return tagged
            .into_iter()
            .map(|inner| call(inner, ids))
            .collect::<Result<_, _>>();
    }
    let mut found = Vec::new();
    for fence in ["```json", "```tool_call", "```\n{"] {
        for inner in between(text, fence, "```") {
            let brace = if fence.ends_with('{') { "{" } else { "" };
            let inner = format!("{brace}{inner}");
            // Any other JSON is the model's own matter.
            if let Ok(made) = call(&inner, &mut Ids::default())
                && tools.contains(&made.name.as_str())
            {
                found.push(Call {
                    id: ids.unique("text"),
                    ..made
                });
            }
        }
    }
    // Nothing but the call.
    if found.is_empty()
        && text.trim_start().starts_with('{')
        && let Ok(made) = call(text, &mut Ids::default())
        && tools.contains(&made.name.as_str())
    {
        found.push(Call {
            id: ids.unique("text"),
            ..made
        });
    }
    found.truncate(MAX_CALLS);
    Ok(found)
}

fn between<'a>(text: &'a str, open: &str, close: &str) -> Vec<&'a str> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(open)
        && found.len() < MAX_CALLS
    {
        rest = &rest[at + open.len()..];
        // A model that stops at the end of its call says no more.
        let end = rest.find(close).unwrap_or(rest.len());
        found.push(&rest[..end]);
        rest = &rest[end..];
        rest = rest.strip_prefix(close).unwrap_or(rest);
    }
    found
}

fn call(text: &str, ids: &mut Ids) -> Result<Call, String> {
    let checked = json::strict(text)?;
    let written: Written =
        serde_json::from_str(checked.get()).map_err(|error| error.to_string())?;
    // Some write the arguments as a string of JSON.
    let arguments = match serde_json::from_str::<String>(written.arguments.get()) {
        Ok(inner) => json::strict(&inner)?,
        Err(_) => written.arguments,
    };
    if !arguments.get().starts_with('{') {
        return Err("the arguments are no object".into());
    }
    Ok(Call {
        id: ids.unique("text"),
        name: written.name,
        text: arguments.get().to_owned(),
        arguments: Ok(arguments),
        by: By::Text,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Result<Vec<(String, String)>, String> {
        let calls = find(text, &["bash"], &mut Ids::default())?;
        Ok(calls
            .into_iter()
            .map(|call| (call.name, call.text))
            .collect())
    }

    #[test]
    fn a_call_may_be_written_in_several_ways() {
        let wanted = vec![("bash".to_owned(), r#"{"command":"ls"}"#.to_owned())];
        for text in [
            r#"I look. <tool_call>{"name":"bash","arguments":{"command":"ls"}}</tool_call>"#,
            r#"<tool_call>
{"name":"bash","arguments":{"command":"ls"}}"#,
            "```json\n{\"name\":\"bash\",\"arguments\":{\"command\":\"ls\"}}\n```",
            "```\n{\"name\":\"bash\",\"parameters\":{\"command\":\"ls\"}}\n```",
            r#"{"name":"bash","arguments":"{\"command\":\"ls\"}"}"#,
        ] {
            assert_eq!(names(text), Ok(wanted.clone()), "{text}");
        }
    }

    #[test]
    fn what_is_no_call_is_left_alone() {
        for text in [
            "It is done.",
            "```json\n{\"a\":1}\n```",
            "```json\n{\"name\":\"rm\",\"arguments\":{}}\n```",
        ] {
            assert_eq!(names(text), Ok(Vec::new()), "{text}");
        }
    }

    #[test]
    fn a_call_that_is_wrong_is_told() {
        let text = r#"<tool_call>{"name":"bash","arguments":{"command":"\d"}}</tool_call>"#;
        assert!(names(text).expect_err("an error").contains("escape"));
    }
}
