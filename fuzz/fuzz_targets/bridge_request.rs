//! A guest's request bodies: mostly valid ones with single rules broken, and bytes as they come.
//!
//! Rules: no panic; what comes out is allowed by the same rules, and taken apart again it comes out
//! the same: so it has no key twice and nothing that a rule refuses or leaves out.

#![no_main]

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use ratoon_bridge::request::{Wire, parse};
use ratoon_fuzz::rarely;

const NAMES: [&str; 32] = [
    "model",
    "messages",
    "input",
    "role",
    "content",
    "type",
    "text",
    "max_tokens",
    "stream",
    "n",
    "tools",
    "name",
    "input_schema",
    "function",
    "parameters",
    "tool_calls",
    "id",
    "call_id",
    "source",
    "media_type",
    "data",
    "url",
    "image_url",
    "file_id",
    "arguments",
    "output",
    "stream_options",
    "include_usage",
    "environment",
    "mcp_servers",
    "tool_use_id",
    "\\u0074ype",
];
const WORDS: [&str; 28] = [
    "user",
    "assistant",
    "tool",
    "text",
    "m",
    "image",
    "base64",
    "url",
    "tool_use",
    "tool_result",
    "function",
    "custom",
    "bash_20250124",
    "web_search_20250305",
    "message",
    "function_call",
    "function_call_output",
    "input_text",
    "image_url",
    "data:image/png;base64,AA==",
    "http://example.invalid/",
    "item_reference",
    "shell",
    "local",
    "container_auto",
    "mcp",
    "\\ud83e\\udd4a",
    "\\ud800",
];

fn value(input: &mut Unstructured<'_>, depth: u32, out: &mut String) -> Result<()> {
    match input.int_in_range(0..=if depth == 0 { 4 } else { 9_u8 })? {
        0 => out.push_str("null"),
        1 => out.push_str(if input.arbitrary()? { "true" } else { "false" }),
        2 => out.push_str(&input.arbitrary::<u16>()?.to_string()),
        3 | 4 => {
            out.push('"');
            out.push_str(input.choose(&WORDS)?);
            out.push('"');
        }
        5 | 6 => {
            out.push('[');
            for index in 0..input.int_in_range(0..=3_u8)? {
                if index > 0 {
                    out.push(',');
                }
                value(input, depth - 1, out)?;
            }
            out.push(']');
        }
        _ => {
            out.push('{');
            for index in 0..input.int_in_range(0..=5_u8)? {
                if index > 0 {
                    out.push(',');
                }
                field(input, depth - 1, out)?;
            }
            out.push('}');
        }
    }
    Ok(())
}

fn field(input: &mut Unstructured<'_>, depth: u32, out: &mut String) -> Result<()> {
    out.push('"');
    out.push_str(input.choose(&NAMES)?);
    out.push_str("\":");
    value(input, depth, out)
}

/// A document that a wire's table mostly allows, with more fields and rarely a wrong byte.
fn document(input: &mut Unstructured<'_>, wire: Wire) -> Result<Vec<u8>> {
    let mut out = String::from("{\"model\":\"m\"");
    out.push_str(match wire {
        Wire::Responses => ",\"input\":[{\"role\":\"user\",\"content\":[",
        _ => ",\"messages\":[{\"role\":\"user\",\"content\":[",
    });
    for index in 0..input.int_in_range(0..=3_u8)? {
        if index > 0 {
            out.push(',');
        }
        if rarely(input)? {
            value(input, 3, &mut out)?;
        } else {
            let kind = if wire == Wire::Responses {
                "input_text"
            } else {
                "text"
            };
            out.push_str(&format!("{{\"type\":\"{kind}\",\"text\":\"x\"}}"));
        }
    }
    out.push_str("]}]");
    for _ in 0..input.int_in_range(0..=4_u8)? {
        out.push(',');
        field(input, 4, &mut out)?;
    }
    out.push('}');
    let mut bytes = out.into_bytes();
    if rarely(input)? {
        let place = input.int_in_range(0..=bytes.len() - 1)?;
        bytes[place] = input.arbitrary()?;
    }
    Ok(bytes)
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Unstructured::new(bytes);
    let Ok(choice) = input.int_in_range(0..=15_u8) else {
        return;
    };
    let wire = Wire::ALL[usize::from(choice % 4)];
    let body = if choice >= 12 {
        input.take_rest().to_vec()
    } else {
        match document(&mut input, wire) {
            Ok(body) => body,
            Err(_) => return,
        }
    };
    let Ok(mut request) = parse(wire, &body) else {
        return;
    };
    let sent = request.finish("m", 5, "max_completion_tokens");
    let mut again = parse(wire, &sent).expect("what goes out is allowed to go out");
    let twice = again.finish("m", 5, "max_completion_tokens");
    assert_eq!(sent, twice);
});
