//! The tables, one rule at a time.

use super::*;
use crate::json::check;

fn rebuilt(table: &[Field], body: &str) -> Result<String, String> {
    let raw = check(body.as_bytes()).expect("JSON");
    let mut rebuild = Rebuild::default();
    rebuild
        .open(raw, table)
        .map_err(|breach| breach.to_string())?;
    rebuild.body.push(b'}');
    Ok(String::from_utf8(rebuild.body).expect("UTF-8"))
}

#[test]
fn what_is_allowed_keeps_its_bytes() {
    let body = concat!(
        r#"{"messages":[{"role":"assistant","content":[{"type":"thinking","thinking":"h\u00fcm","signature":"s=="},"#,
        r#"{"type":"tool_use","id":"a","name":"bash","input":{"b": 1.0e0, "a":[ "\u0041" ]}}]},"#,
        r#"{"role":"user","content":[{"type":"tool_result","tool_use_id":"a","content":"ok","is_error":false}]}],"#,
        r#""tools":[{"type":"bash_20250124","name":"bash"},{"name":"f","input_schema":{"type":"object","default":{"url":"http://x"}}}],"#,
        r#""temperature":0.50,"cache_control":{"type":"ephemeral","ttl":"5m"}}"#
    );
    assert_eq!(rebuilt(messages::MESSAGES, body).as_deref(), Ok(body));
}

#[test]
fn fields_that_mean_nothing_here_are_left_out() {
    let body =
        r#"{"messages":[],"metadata":{"user_id":"x"},"service_tier":"priority","system":null}"#;
    assert_eq!(
        rebuilt(messages::MESSAGES, body).as_deref(),
        Ok(r#"{"messages":[]}"#)
    );
    let body = r#"{"input":[{"type":"reasoning","id":"rs_1","summary":[],"encrypted_content":"e"},{"type":"function_call","id":"fc_1","call_id":"a","name":"f","arguments":"{}"}]}"#;
    assert_eq!(
        rebuilt(responses::RESPONSES, body).as_deref(),
        Ok(
            r#"{"input":[{"type":"reasoning","summary":[],"encrypted_content":"e"},{"type":"function_call","call_id":"a","name":"f","arguments":"{}"}]}"#
        )
    );
    // What OpenAI's SDK for Node adds to an answer, and gives back with it.
    let body = r#"{"messages":[{"role":"assistant","content":"x","parsed":null,"tool_calls":[{"id":"a","type":"function","function":{"name":"f","arguments":"{}","parsed_arguments":{}}}]}]}"#;
    assert_eq!(
        rebuilt(chat::CHAT, body).as_deref(),
        Ok(
            r#"{"messages":[{"role":"assistant","content":"x","tool_calls":[{"type":"function","id":"a","function":{"name":"f","arguments":"{}"}}]}]}"#
        )
    );
    let body = r#"{"input":[{"type":"message","role":"assistant","content":[{"type":"output_text","text":"x","parsed":{"a":1}}]},{"type":"function_call","call_id":"a","name":"f","arguments":"{}","parsed_arguments":{}}]}"#;
    assert_eq!(
        rebuilt(responses::RESPONSES, body).as_deref(),
        Ok(
            r#"{"input":[{"type":"message","role":"assistant","content":[{"type":"output_text","text":"x"}]},{"type":"function_call","call_id":"a","name":"f","arguments":"{}"}]}"#
        )
    );
}

#[test]
fn what_codex_sends_is_taken_without_the_providers_own_tools() {
    let body = concat!(
        r#"{"input":[{"type":"additional_tools","id":"at_1","role":"developer","tools":[{"type":"web_search","external_web_access":true},"#,
        r#"{"type":"namespace","name":"n","description":"","tools":[{"type":"custom","name":"exec","format":{"type":"grammar"}},{"type":"mcp","server_url":"http://x"},{"type":"function","name":"g","strict":false,"parameters":{}}]}]},"#,
        r#"{"type":"function_call","call_id":"a","name":"g","namespace":"n","arguments":"{}"}],"#,
        r#""tools":[{"type":"tool_search","execution":"client","parameters":{}},{"type":"function","name":"f","strict":false}],"#,
        r#""reasoning":{"summary":"auto","context":"all_turns"},"include":["reasoning.encrypted_content"],"#,
        r#""client_metadata":{"session_id":"s"},"prompt_cache_key":"s"}"#
    );
    let raw = check(body.as_bytes()).expect("JSON");
    let mut rebuild = Rebuild::default();
    rebuild.open(raw, responses::RESPONSES).expect("allowed");
    assert_eq!(
        String::from_utf8_lossy(&rebuild.body),
        concat!(
            r#"{"input":[{"type":"additional_tools","role":"developer","tools":["#,
            r#"{"type":"namespace","name":"n","description":"","tools":[{"type":"custom","name":"exec","format":{"type":"grammar"}},{"type":"function","name":"g","strict":false,"parameters":{}}]}]},"#,
            r#"{"type":"function_call","call_id":"a","name":"g","namespace":"n","arguments":"{}"}],"#,
            r#""tools":[{"type":"function","name":"f","strict":false}],"#,
            r#""reasoning":{"summary":"auto","context":"all_turns"},"include":["reasoning.encrypted_content"]"#
        )
    );
    assert_eq!(rebuild.withheld, ["web_search", "mcp", "tool_search"]);
    // Groups of which nothing is left go, too.
    let body = concat!(
        r#"{"input":[{"type":"additional_tools","role":"developer","tools":[{"type":"web_search"}]},"#,
        r#"{"type":"function_call_output","call_id":"a","output":"x"}],"#,
        r#""tools":[{"type":"namespace","name":"n","tools":[{"type":"mcp","server_url":"http://x"}]},{"type":"function","name":"f"}]}"#
    );
    assert_eq!(
        rebuilt(responses::RESPONSES, body).as_deref(),
        Ok(concat!(
            r#"{"input":[{"type":"function_call_output","call_id":"a","output":"x"}],"#,
            r#""tools":[{"type":"function","name":"f"}]}"#
        ))
    );
    for (tool, told) in [
        (
            r#"{"type":"namespace","name":"n","tools":[{"type":"namespace","name":"m","tools":[]}]}"#,
            "tools[0].tools[0].type: \"namespace\" is none that may be sent",
        ),
        (
            r#"{"type":"namespace","name":"n","tools":[{"type":"shell","environment":{"type":"container_auto"}}]}"#,
            "tools[0].tools[0].type: \"shell\" is none that may be sent",
        ),
        (
            r#"{"type":"namespace","name":"n","server_url":"http://x","tools":[]}"#,
            "tools[0]: the field \"server_url\" is none that may be sent",
        ),
    ] {
        let body = format!(r#"{{"input":"x","tools":[{tool}]}}"#);
        assert_eq!(
            rebuilt(responses::RESPONSES, &body)
                .as_ref()
                .map_err(String::as_str),
            Err(told)
        );
    }
}

#[test]
fn a_breach_is_told_with_its_place() {
    for (table, body, told) in [
        (
            messages::MESSAGES,
            r#"{"messages":[{"role":"tool","content":"x"}]}"#,
            "messages[0].role: is \"tool\"; allowed: user, assistant, system",
        ),
        (
            messages::MESSAGES,
            r#"{"messages":[{"role":"user","content":[{"type":"image","source":{"type":"file","file_id":"f"}}]}]}"#,
            "messages[0].content[0].source.type: \"file\" is none that may be sent",
        ),
        (
            messages::MESSAGES,
            r#"{"messages":[{"role":"user","content":[{"text":"x"}]}]}"#,
            "messages[0].content[0].type: is missing",
        ),
        (
            messages::MESSAGES,
            r#"{"messages":[{"role":"user","content":7}]}"#,
            "messages[0].content: cannot be a number",
        ),
        (
            messages::MESSAGES,
            r#"{"messages":[],"tools":[{"type":"bash_20250124x","name":"b"}]}"#,
            "tools[0].type: \"bash_20250124x\" is none that may be sent",
        ),
        (
            messages::MESSAGES,
            r#"{"messages":[],"tools":[{"type":"custom","name":"f","input_schema":{},"allowed_callers":[]}]}"#,
            "tools[0]: the field \"allowed_callers\" is none that may be sent",
        ),
        (
            chat::CHAT,
            r#"{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"https://x/y.png"}}]}]}"#,
            "messages[0].content[0].image_url.url: is a URL that the provider would fetch; only data:TYPE;base64,… is allowed",
        ),
        (
            chat::CHAT,
            r#"{"messages":[{"role":"user","content":[{"type":"file","file":{"file_id":"f"}}]}]}"#,
            "messages[0].content[0].file.file_id: a file at the provider cannot be used here",
        ),
        (
            messages::MESSAGES,
            r#"{"messages":[],"cache_control":{"type":"ephemeral","ttl":"1h"}}"#,
            "cache_control.ttl: is \"1h\"; allowed: 5m",
        ),
        (
            chat::CHAT,
            r#"{"messages":[],"modalities":["audio"]}"#,
            "modalities[0]: is \"audio\"; allowed: text",
        ),
        (
            responses::RESPONSES,
            r#"{"input":"x","tools":[{"type":"shell","environment":{"type":"container_auto"}}]}"#,
            "tools[0].environment.type: \"container_auto\" is none that may be sent",
        ),
        (
            responses::RESPONSES,
            r#"{"input":"x","include":["web_search_call.results"]}"#,
            "include[0]: is \"web_search_call.results\"; allowed: reasoning.encrypted_content, message.output_text.logprobs",
        ),
        (
            responses::RESPONSES,
            r#"{"input":[{"role":"user","content":[{"type":"input_file","file_url":"http://x"}]}]}"#,
            "input[0].content[0].file_url: the provider does not fetch for a guest",
        ),
    ] {
        assert_eq!(
            rebuilt(table, body).as_ref().map_err(String::as_str),
            Err(told)
        );
    }
}

#[test]
fn a_guests_own_words_are_quoted_shortly() {
    let long = "x".repeat(1 << 20);
    let told = rebuilt(
        messages::MESSAGES,
        &format!(r#"{{"messages":[],"{long}":1}}"#),
    )
    .unwrap_err();
    assert_eq!(
        told,
        format!("the field {:?} is none that may be sent", &long[..64])
    );
    let told = check(format!(r#"{{"{long}":1,"{long}":1}}"#).as_bytes()).unwrap_err();
    assert!(told.to_string().len() < 200, "{told}");
}

#[test]
fn tools_of_the_providers_are_left_out_of_the_list() {
    let tools = r#"{"messages":[],"tools":[{"type":"web_search_20250305","name":"w","max_uses":9},{"name":"f","input_schema":{}},{"type":"code_execution_20250825","name":"c"}]}"#;
    let raw = check(tools.as_bytes()).expect("JSON");
    let mut rebuild = Rebuild::default();
    rebuild.open(raw, messages::MESSAGES).expect("allowed");
    assert_eq!(
        String::from_utf8_lossy(&rebuild.body),
        r#"{"messages":[],"tools":[{"name":"f","input_schema":{}}]"#
    );
    assert_eq!(
        rebuild.withheld,
        ["web_search_20250305", "code_execution_20250825"]
    );
}

#[test]
fn data_urls_are_base64_and_nothing_else() {
    let url = |url: &str| {
        let body = format!(
            r#"{{"messages":[{{"role":"user","content":[{{"type":"image_url","image_url":{{"url":"{url}"}}}}]}}]}}"#
        );
        rebuilt(chat::CHAT, &body).is_ok()
    };
    assert!(url("data:image/png;base64,AAAA"));
    for bad in [
        "data:,x",
        "data:image/png;base64,http://x",
        "DATA:x;base64,AA",
        "file:///x",
        "data:a b;base64,AA",
        " data:x;base64,AA",
    ] {
        assert!(!url(bad), "{bad}");
    }
}

/// Of the tables: each name once, so that a rule is not hidden by another.
#[test]
fn no_table_names_a_field_twice() {
    fn table(fields: &[Field]) {
        for (index, field) in fields.iter().enumerate() {
            assert!(
                !fields[..index].iter().any(|other| other.name == field.name),
                "{}",
                field.name
            );
            if let Rule::Keep(inner) | Rule::Need(inner) = &field.rule {
                shape(inner);
            }
        }
    }
    fn shape(of: &Shape) {
        match of {
            Shape::List(inner) => shape(inner),
            Shape::Object(fields) => table(fields),
            Shape::Either(shapes) => shapes.iter().for_each(shape),
            Shape::Union(union) => {
                for (tag, fields) in union.variants {
                    assert!(!fields.iter().any(|field| field.name == union.tag), "{tag}");
                    table(fields);
                }
            }
            _ => {}
        }
    }
    for fields in [
        messages::MESSAGES,
        messages::COUNT_TOKENS,
        chat::CHAT,
        responses::RESPONSES,
    ] {
        table(fields);
    }
}
