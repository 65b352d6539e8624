//! What clients are told at the end of a cell and of an interpreter.

use ratoon_protocol::{CodeEnd, CodeError, CodeStatus, ErrorCode, ErrorReply, ExitStatus};

use super::Context;
use crate::code::{Answers, word, zygote};
use crate::spawn::SpawnError;

impl Context {
    pub(super) fn end(&self, status: CodeStatus, error: Option<CodeError>) -> CodeEnd {
        CodeEnd {
            context: self.name.clone(),
            count: self.count,
            status,
            error: error.map(|mut error| {
                clip(&mut error.name, 256);
                clip(&mut error.message, 8 << 10);
                error
            }),
        }
    }

    /// It is gone: tells those who wait for it.
    pub(super) fn conclude(&mut self, answers: &mut impl Answers) {
        let at = self.cell.take().and_then(|cell| cell.at);
        if self.up {
            if let Some(at) = at {
                let error = self
                    .verdict
                    .clone()
                    .unwrap_or_else(|| self.cause_of_death());
                let end = self.end(CodeStatus::Died, Some(error));
                answers.reply(at, &end);
            }
            return;
        }
        for at in [at, self.waiting.take()].into_iter().flatten() {
            answers.fail(at, &self.why_not_up());
        }
    }

    fn cause_of_death(&self) -> CodeError {
        match self.fate {
            Some(ExitStatus::Code(code)) => {
                died(format!("the interpreter exited with status {code}"))
            }
            Some(ExitStatus::Signal(signal)) => {
                died(format!("the interpreter was killed by signal {signal}"))
            }
            None => died("the interpreter is gone"),
        }
    }

    fn why_not_up(&self) -> ErrorReply {
        if let Some(errno) = self.refused {
            let source = std::io::Error::from_raw_os_error(errno);
            let path = self.params.cwd.clone().unwrap_or_default();
            return SpawnError::Directory { path, source }.reply();
        }
        let language = word(self.params.language);
        let mut message = format!("{language} did not start");
        let said = self.outputs[1].as_ref().map(zygote::complaint);
        let said = said.filter(|text| !text.is_empty());
        let why = match (&self.verdict, said) {
            (Some(verdict), _) => verdict.message.clone(),
            (None, Some(said)) => said,
            (None, None) => self.cause_of_death().message,
        };
        message.push_str(": ");
        message.push_str(&why);
        ErrorReply::new(ErrorCode::Failed, message)
    }

    /// Why it does not start, when somebody else knows.
    pub fn blame(&mut self, said: String) {
        if !self.up && self.verdict.is_none() && !said.is_empty() {
            self.verdict = Some(died(said));
        }
    }
}

pub(super) fn died(message: impl Into<String>) -> CodeError {
    CodeError {
        name: "Died".into(),
        message: message.into(),
        traceback: String::new(),
    }
}

fn clip(text: &mut String, most: usize) {
    text.truncate(text.floor_char_boundary(most));
}
