//! What models are told of the tools: names and arguments that they know from their training.

use ratoon_protocol::{Profile, Wire};

use crate::wire;

/// A tool as a model is told of it.
#[derive(Debug)]
pub struct Spec {
    /// Its name.
    pub name: &'static str,
    description: &'static str,
    schema: &'static str,
    anthropic: bool,
    openai: bool,
    minimal: bool,
    /// The type by which Anthropic's API knows it, without a schema.
    known: Option<&'static str>,
}

const fn spec(name: &'static str, description: &'static str, schema: &'static str) -> Spec {
    Spec {
        name,
        description,
        schema,
        anthropic: false,
        openai: false,
        minimal: false,
        known: None,
    }
}

const BOTH: Spec = Spec {
    anthropic: true,
    openai: true,
    ..spec("", "", "")
};

const SPECS: &[Spec] = &[
    Spec {
        anthropic: true,
        minimal: true,
        known: Some("bash_20250124"),
        ..spec(
            "bash",
            "Runs a command in a shell that stays from call to call: directory and variables are kept. Standard input is empty. Start what runs on with & in the background.",
            r#"{"type":"object","properties":{"command":{"type":"string","description":"The command."},"restart":{"type":"boolean","description":"Starts a new shell instead."}}}"#,
        )
    },
    Spec {
        anthropic: true,
        known: Some("text_editor_20250728"),
        ..spec(
            "str_replace_based_edit_tool",
            "Looks at files and changes them. view shows a file with line numbers (view_range: first and last line, -1 for the end) or a directory; create writes a file; str_replace replaces old_str, which must be in the file exactly once, by new_str; insert adds insert_text behind the line insert_line (0: at the beginning).",
            r#"{"type":"object","properties":{"command":{"type":"string","enum":["view","create","str_replace","insert"]},"path":{"type":"string"},"view_range":{"type":"array","items":{"type":"integer"},"minItems":2,"maxItems":2},"file_text":{"type":"string"},"old_str":{"type":"string"},"new_str":{"type":"string"},"insert_line":{"type":"integer"},"insert_text":{"type":"string"}},"required":["command","path"]}"#,
        )
    },
    Spec {
        openai: true,
        ..spec(
            "exec_command",
            "Runs a command in a shell of its own. Answers with its output when it ends, or after yield_time_ms with a session ID for write_stdin when it still runs.",
            r#"{"type":"object","properties":{"cmd":{"type":"string","description":"The command."},"workdir":{"type":"string","description":"Where it runs; the working directory if not given."},"shell":{"type":"string","description":"The shell; bash if not given."},"tty":{"type":"boolean","description":"Gives it a terminal, and so an input that can be written to."},"yield_time_ms":{"type":"integer","description":"How long to wait for its end; 10000 if not given."},"max_output_tokens":{"type":"integer","description":"How much output to show at most."}},"required":["cmd"]}"#,
        )
    },
    Spec {
        openai: true,
        ..spec(
            "write_stdin",
            "Writes to a command that runs with tty, or, with empty chars, waits for more of any running command's output.",
            r#"{"type":"object","properties":{"session_id":{"type":"integer"},"chars":{"type":"string"},"yield_time_ms":{"type":"integer"},"max_output_tokens":{"type":"integer"}},"required":["session_id"]}"#,
        )
    },
    Spec {
        openai: true,
        ..spec(
            "apply_patch",
            "Changes files by a patch. It begins with \"*** Begin Patch\" and ends with \"*** End Patch\"; between them stand, for each file, \"*** Add File: PATH\" with lines that begin with +, \"*** Delete File: PATH\", or \"*** Update File: PATH\" (then, to rename, \"*** Move to: PATH\") with hunks: \"@@\" (and, if it helps, a line above the place), then lines that begin with a blank (kept), - (taken out) or + (put in), with three kept lines around each change. A patch that does not fit changes nothing.",
            r#"{"type":"object","properties":{"input":{"type":"string","description":"The whole patch."}},"required":["input"]}"#,
        )
    },
    Spec {
        openai: true,
        ..spec(
            "update_plan",
            "Notes the plan: steps, of which at most one is in_progress.",
            r#"{"type":"object","properties":{"explanation":{"type":"string"},"plan":{"type":"array","items":{"type":"object","properties":{"step":{"type":"string"},"status":{"type":"string","enum":["pending","in_progress","completed"]}},"required":["step","status"]}}},"required":["plan"]}"#,
        )
    },
    Spec {
        name: "grep",
        description: "Finds lines by a regular expression, in a file or in all text files below a directory.",
        schema: r#"{"type":"object","properties":{"pattern":{"type":"string"},"path":{"type":"string","description":"File or directory; the working directory if not given."},"glob":{"type":"string","description":"Only files whose names fit, as *.rs or src/**."},"ignore_case":{"type":"boolean"},"files_only":{"type":"boolean"}},"required":["pattern"]}"#,
        ..BOTH
    },
    Spec {
        name: "glob",
        description: "Finds files by name: *, **, ?, [a-z], {a,b}.",
        schema: r#"{"type":"object","properties":{"pattern":{"type":"string"},"path":{"type":"string","description":"Directory; the working directory if not given."}},"required":["pattern"]}"#,
        ..BOTH
    },
    Spec {
        name: "read_file",
        description: "Shows a file, or a part of it, with line numbers.",
        schema: r#"{"type":"object","properties":{"path":{"type":"string"},"offset":{"type":"integer","description":"The first line, from 1."},"limit":{"type":"integer","description":"How many lines; 2000 if not given."}},"required":["path"]}"#,
        ..BOTH
    },
    Spec {
        name: "python",
        description: "Runs Python code in an interpreter that stays from call to call: names are kept. Shows what is printed, and the value of a last expression.",
        schema: r#"{"type":"object","properties":{"code":{"type":"string"}},"required":["code"]}"#,
        ..BOTH
    },
    Spec {
        name: "finish",
        description: "Ends the work: call it when the task is done, or when it cannot be done.",
        schema: r#"{"type":"object","properties":{"summary":{"type":"string","description":"What was done, or why it cannot be."},"success":{"type":"boolean"}},"required":["summary","success"]}"#,
        ..BOTH
    },
];

/// A profile's tools.
pub fn of(profile: Profile) -> impl Iterator<Item = &'static Spec> {
    SPECS.iter().filter(move |spec| match profile {
        Profile::Anthropic => spec.anthropic,
        Profile::Openai => spec.openai,
        Profile::Minimal => spec.minimal,
    })
}

/// A profile's tools in a wire's form: a JSON array.
pub fn json(profile: Profile, wire: Wire) -> String {
    let tools: Vec<String> = of(profile)
        .map(|spec| match (wire, profile, spec.known) {
            (Wire::Messages, Profile::Anthropic, Some(kind)) => {
                format!(r#"{{"type":"{kind}","name":"{}"}}"#, spec.name)
            }
            _ => wire::tool(wire, spec.name, spec.description, spec.schema),
        })
        .collect();
    format!("[{}]", tools.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_tools_are_json_on_all_wires() {
        for profile in [Profile::Anthropic, Profile::Openai, Profile::Minimal] {
            for wire in [Wire::Messages, Wire::Chat, Wire::Responses] {
                let text = json(profile, wire);
                crate::json::strict(&text).expect("JSON");
                let tools: Vec<serde_json::Value> = serde_json::from_str(&text).expect("a list");
                assert_eq!(tools.len(), of(profile).count());
            }
        }
        assert_eq!(of(Profile::Minimal).count(), 1);
    }
}
