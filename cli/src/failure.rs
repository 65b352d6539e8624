//! How a command fails: one message, each cause on a line of its own, then what helps.
//!
//! ```text
//! error: the VM ended before the runtime in it answered
//!   caused by: the guest's kernel panicked
//! the console's last lines:
//!   | Kernel panic - not syncing: ...
//! hint: ...
//! ```

use std::error::Error;
use std::process::ExitCode;

/// The exit code of Ratoon's own failures; any other but 2 (usage) is the command's.
pub const FAILED: u8 = 125;

/// A failed command.
#[derive(Debug)]
pub struct Failure {
    /// What went wrong, outermost first.
    messages: Vec<String>,
    /// The guest's last words.
    console: Vec<String>,
    hints: Vec<String>,
    code: u8,
    /// The reader of our output went away: nothing to tell.
    quiet: bool,
}

impl Failure {
    /// A failure in our own words.
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            messages: vec![message.into()],
            console: Vec::new(),
            hints: Vec::new(),
            code: FAILED,
            quiet: false,
        }
    }

    /// Ends with this code and says nothing.
    pub fn silent(code: u8) -> Self {
        Self {
            quiet: true,
            code,
            ..Self::new("")
        }
    }

    /// Adds what helps; the same hint is given once.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        let hint = hint.into();
        if !self.hints.contains(&hint) {
            self.hints.push(hint);
        }
        self
    }

    /// Adds the guest's last words.
    pub fn console(mut self, lines: &[String]) -> Self {
        self.console = lines.to_vec();
        self
    }

    /// Sets the exit code.
    pub fn code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// The text for standard error.
    pub fn words(&self) -> String {
        let text = self.render();
        text.trim().trim_start_matches("error: ").to_owned()
    }

    /// All of it.
    pub fn render(&self) -> String {
        let mut text = String::new();
        for (index, message) in self.messages.iter().enumerate() {
            let label = if index == 0 { "error" } else { "  caused by" };
            text += &format!("{label}: {message}\n");
        }
        if !self.console.is_empty() {
            text += "the console's last lines:\n";
            for line in &self.console {
                text += &format!("  | {line}\n");
            }
        }
        for hint in &self.hints {
            text += &format!("hint: {hint}\n");
        }
        text
    }

    /// Prints the failure, unless it is silent.
    pub fn report(&self) -> ExitCode {
        use std::io::Write;
        if !self.quiet {
            // With standard error closed there is nobody to tell.
            let _ = std::io::stderr().write_all(self.render().as_bytes());
        }
        ExitCode::from(self.code)
    }
}

impl<E: Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        let messages = chain(&error).map(ToString::to_string).collect();
        let mut failure = Self::new("");
        failure.messages = messages;
        // A message that a wrapper passes on unchanged is told once.
        failure.messages.dedup();
        let denied = chain(&error)
            .filter_map(|error| error.downcast_ref::<std::io::Error>())
            .any(|error| error.kind() == std::io::ErrorKind::PermissionDenied);
        if denied {
            failure = failure.hint("`ratoon doctor` checks permissions and says how to mend them");
        }
        failure
    }
}

/// An error and all its causes.
fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    let mut next = Some(error);
    std::iter::from_fn(move || {
        let error = next?;
        next = error.source();
        Some(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn each_cause_has_a_line_and_hints_come_last() {
        let failure = Failure::from(Outer(std::io::ErrorKind::PermissionDenied.into()))
            .console(&["last words".into()])
            .hint("try this")
            .hint("try this");
        assert_eq!(
            failure.render(),
            "error: outer\n  caused by: permission denied\nthe console's last lines:\n  | last \
             words\nhint: `ratoon doctor` checks permissions and says how to mend them\nhint: try \
             this\n"
        );
    }
}
