//! An agent's events for people. All of it is the guest's or the model's words: what could move the cursor or turn the
//! direction of text around is taken out.

use std::io::Write;

use ratoon_protocol::{AgentEvent, AgentUsage, Ending};
use serde_json::Value;

/// So many lines of a tool's output are shown.
const LINES: usize = 5;
/// A longer line is cut, in characters.
const WIDTH: usize = 160;

/// Whether a character may not reach a terminal: it controls it, or the order in which text is shown.
fn is_unwanted(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

/// One line of it, without what a terminal would heed.
pub fn clean(text: &str) -> String {
    let blank = |c: char| {
        if matches!(c, '\n' | '\t' | '\r') {
            ' '
        } else {
            c
        }
    };
    let text = text.chars().map(blank);
    text.filter(|c| !is_unwanted(*c)).collect()
}

/// The same, with its lines.
pub fn clean_text(text: &str) -> String {
    let keep = |c: &char| matches!(c, '\n' | '\t') || !is_unwanted(*c);
    text.chars().filter(keep).collect()
}

/// The same, not longer than a line.
fn short(text: &str) -> String {
    let text = clean(text);
    match text.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Writes events to standard error.
#[derive(Debug, Default)]
pub struct Show {
    /// Before each line.
    prefix: String,
    /// The model's words are in the middle of a line.
    in_text: bool,
}

impl Show {
    /// Of one branch of several: whole lines, with its name before them.
    pub fn of(branch: &str) -> Self {
        Self {
            prefix: format!("[{branch}] "),
            in_text: false,
        }
    }

    /// Shows an event.
    pub fn event(&mut self, event: &AgentEvent) {
        // With standard error closed there is nobody to tell.
        let _ = std::io::stderr().write_all(self.render(event).as_bytes());
    }

    /// Shows a line of our own.
    pub fn note(&mut self, text: &str) {
        let text = self.line(&clean(text));
        let _ = std::io::stderr().write_all(text.as_bytes());
    }

    fn line(&mut self, text: &str) -> String {
        let before = if std::mem::take(&mut self.in_text) {
            "\n"
        } else {
            ""
        };
        format!("{before}{}{text}\n", self.prefix)
    }

    fn render(&mut self, event: &AgentEvent) -> String {
        match event {
            AgentEvent::Text { text } if self.prefix.is_empty() => {
                let text = clean_text(text);
                if !text.is_empty() {
                    self.in_text = !text.ends_with('\n');
                }
                text
            }
            AgentEvent::ToolCall {
                tool, arguments, ..
            } => self.line(&format!("* {}: {}", short(tool), told(arguments))),
            AgentEvent::ToolResult {
                error, output, ms, ..
            } => self.result(*error, output, *ms),
            AgentEvent::Notice { text } => self.line(&format!("note: {}", short(text))),
            AgentEvent::Held { step, .. } => self.line(&format!("held before step {step}")),
            AgentEvent::Going { branch } => self.line(&format!("goes on as {}", short(branch))),
            AgentEvent::Ended {
                ending,
                text,
                steps,
                usage,
            } => {
                let mut out = self.line(&ended(*ending, *steps, *usage));
                if !text.is_empty() && !matches!(ending, Ending::Finished) {
                    out += &self.line(&short(text));
                }
                out
            }
            // The words of a branch among others come with its end.
            AgentEvent::Text { .. }
            | AgentEvent::Started { .. }
            | AgentEvent::Step { .. }
            | AgentEvent::Boundary { .. }
            | AgentEvent::Echo { .. }
            | AgentEvent::Thinking { .. }
            | AgentEvent::Answered { .. } => String::new(),
        }
    }

    fn result(&mut self, error: bool, output: &str, ms: u64) -> String {
        let failed = if error { "failed, " } else { "" };
        let mut out = String::new();
        if self.prefix.is_empty() {
            let lines: Vec<&str> = output.lines().collect();
            for line in lines.iter().take(LINES) {
                out += &self.line(&format!("  | {}", short(line)));
            }
            if let Some(more) = lines.len().checked_sub(LINES + 1) {
                out += &self.line(&format!("  | … {} more lines", more + 1));
            }
        }
        if error || self.prefix.is_empty() {
            out += &self.line(&format!("  ({failed}{ms} ms)"));
        }
        out
    }
}

/// How a run ended, in words.
pub fn ended(ending: Ending, steps: u32, usage: AgentUsage) -> String {
    format!(
        "{} after {steps} steps; {} tokens in ({} cached), {} out",
        word(ending),
        usage.input,
        usage.cached,
        usage.output
    )
}

/// An ending in words.
pub fn word(ending: Ending) -> &'static str {
    match ending {
        Ending::Finished => "finished",
        Ending::GaveUp => "gave up",
        Ending::Cancelled => "cancelled",
        Ending::Steps => "out of steps",
        Ending::Time => "out of time",
        Ending::Budget => "out of budget",
        Ending::Format => "ended: no valid tool calls",
        Ending::Repetition => "ended: it repeated itself",
        Ending::Refused => "ended: the model declined or was cut off",
        Ending::Model => "ended: the model cannot be called",
        Ending::Failed => "failed",
    }
}

/// What a tool was called with, on one line: the value itself when there is one alone.
fn told(arguments: &Value) -> String {
    let of = |value: &Value| match value {
        Value::String(text) => short(text),
        other => short(&other.to_string()),
    };
    match arguments {
        Value::Object(members) if members.len() == 1 => {
            members.values().next().map(of).unwrap_or_default()
        }
        Value::Object(members) => {
            let parts = members
                .iter()
                .map(|(key, value)| format!("{key}={}", of(value)));
            short(&parts.collect::<Vec<_>>().join(" "))
        }
        other => of(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_heeds_is_shown() {
        let text = "a\x1b[31mb\u{9b}c\u{202e}d\u{2066}e\r\x07\x7f\nf\tg";
        assert_eq!(clean(text), "a[31mbcde  f g");
        assert_eq!(clean_text(text), "a[31mbcde\nf\tg");
    }

    #[test]
    fn text_comes_as_it_is_and_other_events_have_lines_of_their_own() {
        let mut show = Show::default();
        let text = |text: &str| AgentEvent::Text { text: text.into() };
        assert_eq!(show.render(&text("I lo")), "I lo");
        assert_eq!(show.render(&text("ok.")), "ok.");
        let call = AgentEvent::ToolCall {
            id: "1".into(),
            tool: "bash".into(),
            arguments: serde_json::json!({"command": "make\ntest"}),
        };
        assert_eq!(show.render(&call), "\n* bash: make test\n");
        let result = AgentEvent::ToolResult {
            id: "1".into(),
            error: true,
            output: "1\n2\n3\n4\n5\n6\n7\n".into(),
            file: None,
            ms: 12,
        };
        let shown = show.render(&result);
        assert!(
            shown.ends_with("  | 5\n  | … 2 more lines\n  (failed, 12 ms)\n"),
            "{shown}"
        );
    }

    #[test]
    fn a_branch_among_others_has_its_name_before_each_line() {
        let mut show = Show::of("main.1");
        let text = AgentEvent::Text {
            text: "half a li".into(),
        };
        assert_eq!(show.render(&text), "");
        let held = AgentEvent::Held {
            step: 3,
            nonce: None,
        };
        assert_eq!(show.render(&held), "[main.1] held before step 3\n");
    }

    #[test]
    fn long_lines_are_cut_at_a_character() {
        assert_eq!(short(&"é".repeat(200)).chars().count(), WIDTH + 1);
        assert_eq!(told(&serde_json::json!({"a": 1, "b": "x"})), "a=1 b=x");
    }
}
