//! What is done with an answer: its calls are run one after the other, and each gets its result.

use std::time::Duration;

use ratoon_protocol::{AgentEvent, Ending, Profile};
use serde_json::Value;

use super::{Agent, Ended, cancelled};
use crate::call::Answered;
use crate::clock::{self, Moment, ms};
use crate::history::Part;
use crate::repetition::Noticed;
use crate::text_calls;
use crate::tools::{Finish, Outcome, Tool, Tools};
use crate::wire::{Call, End, Said};

/// Answers that their limit of tokens cut, one after the other, until it is given up.
const MAX_CUT: u32 = 3;

impl Agent {
    pub fn answered(
        &mut self,
        answered: Answered,
        step: u32,
        own: Duration,
        came: Moment,
    ) -> Result<(), Ended> {
        let Answered {
            said,
            first,
            all,
            replayed,
        } = answered;
        let usage = said.usage;
        self.usage.input += usage.input;
        self.usage.cached += usage.cached;
        self.usage.output += usage.output;
        let Said {
            raw,
            text,
            mut calls,
            end,
            ..
        } = said;
        self.history.answer(raw);
        let mut wrong = None;
        if calls.is_empty() && self.task.profile == Profile::Minimal {
            let names = Tools::names(self.task.profile);
            match text_calls::find(&text, &names, &mut self.history.ids) {
                Ok(found) => calls = found,
                Err(why) => wrong = Some(why),
            }
        }
        let parsed: Vec<(Call, Result<Tool, String>)> = calls
            .into_iter()
            .map(|call| {
                let tool = self.tools.parse(&call);
                (call, tool)
            })
            .collect();
        self.events.say(&AgentEvent::Answered {
            step,
            usage,
            first_ms: ms(first),
            ms: ms(all),
            own_ms: ms(own + clock::now().saturating_sub(came)),
            replayed,
        });
        self.idle_since = came;
        match end {
            End::Refusal => {
                self.not_run(parsed, "Not run: the answer ended with a refusal.");
                return Err((Ending::Refused, text));
            }
            End::Context => {
                self.not_run(parsed, "Not run: the conversation is too long.");
                let why = "the conversation is longer than the model can read";
                return Err((Ending::Model, why.into()));
            }
            End::Length | End::Done => {}
        }
        if parsed.is_empty() {
            return self.no_calls(end, text, wrong);
        }
        self.calls(parsed, end)
    }

    /// An answer without calls: the end, as a rule.
    fn no_calls(&mut self, end: End, text: String, wrong: Option<String>) -> Result<(), Ended> {
        let words = if end == End::Length {
            self.cut()?;
            format!(
                "Your answer was cut off at its limit of {} tokens. Go on, in smaller pieces.",
                self.task.max_tokens
            )
        } else if let Some(why) = wrong {
            self.format_error(&why)?;
            format!("Your tool call is not right: {why}. Nothing was run. Write it again.")
        } else if text.trim().is_empty() {
            self.format_error("the answer was empty")?;
            "Your answer was empty. Call a tool, or say that you are done.".into()
        } else {
            return Err((Ending::Finished, text));
        };
        self.history.push(Part::Text(words));
        Ok(())
    }

    fn cut(&mut self) -> Result<(), Ended> {
        self.cut += 1;
        let limit = self.task.max_tokens;
        self.events
            .notice(format!("the answer was cut at {limit} tokens"));
        if self.cut >= MAX_CUT {
            let why = format!("the answer was cut at its limit of {limit} tokens {MAX_CUT} times");
            return Err((Ending::Refused, why));
        }
        Ok(())
    }

    fn format_error(&mut self, why: &str) -> Result<(), Ended> {
        self.format_errors += 1;
        self.events.notice(format!("no valid call: {why}"));
        if self.format_errors >= self.task.limits.format_errors.max(1) {
            let text = format!(
                "{} answers one after the other were no valid call: {why}",
                self.format_errors
            );
            return Err((Ending::Format, text));
        }
        Ok(())
    }

    fn calls(&mut self, parsed: Vec<(Call, Result<Tool, String>)>, end: End) -> Result<(), Ended> {
        let plain: Vec<Call> = parsed.iter().map(|(call, _)| call.clone()).collect();
        let noticed = self.repetition.take(&plain, self.task.limits.repeats);
        let first_wrong = parsed.iter().find_map(|(_, tool)| tool.as_ref().err());
        let all_wrong = parsed.iter().all(|(_, tool)| tool.is_err());
        let format = match (first_wrong.cloned(), all_wrong, end) {
            // Arguments that the limit cut are no mistake of the model's form.
            (Some(_), true, End::Length) => self.cut(),
            (Some(why), true, _) => self.format_error(&why),
            _ => {
                self.format_errors = 0;
                self.cut = 0;
                Ok(())
            }
        };
        if noticed == Noticed::TooOften && format.is_ok() {
            self.not_run(parsed, "Not run: the same calls came too often.");
            let why = "the model made the same calls again and again";
            return Err((Ending::Repetition, why.into()));
        }
        let mut ended = format.err();
        let count = parsed.len();
        for (index, (call, tool)) in parsed.into_iter().enumerate() {
            self.say_call(&call);
            let since = clock::now();
            let mut outcome = match (&ended, tool) {
                (_, Err(why)) => wrong_call(why, end),
                (None, Ok(tool)) => self.tool(&tool),
                (Some((Ending::Cancelled, _)), Ok(_)) => not_run("Not run: cancelled."),
                (Some(_), Ok(_)) => not_run("Not run: the run ended before."),
            };
            if noticed == Noticed::LastTime && index + 1 == count {
                outcome.output.push_str("\n[You have made these same calls several times. Once more ends the run: do something else, or say that you are done.]");
            }
            let finish = outcome.finish.take();
            self.say_result(call, outcome, clock::now().saturating_sub(since));
            if ended.is_none() {
                ended = self.after_tool(finish);
            }
        }
        self.idle_since = clock::now();
        ended.map_or(Ok(()), Err)
    }

    fn tool(&mut self, tool: &Tool) -> Outcome {
        let limits = &self.task.limits;
        let since = clock::now();
        let until = self
            .until()
            .min(since.saturating_add(Duration::from_millis(limits.tool_ms)));
        let output_bytes = limits.output_bytes;
        let outcome = self.tools.run(tool, output_bytes, until, &self.stop);
        self.working += clock::now().saturating_sub(since);
        outcome
    }

    fn after_tool(&self, finish: Option<Finish>) -> Option<Ended> {
        if self.stop.is_set() {
            return Some(cancelled());
        }
        if let Some(finish) = finish {
            let ending = if finish.success {
                Ending::Finished
            } else {
                Ending::GaveUp
            };
            return Some((ending, finish.summary));
        }
        self.left().is_zero().then(|| self.time())
    }

    /// Gives each call a result without running it.
    fn not_run(&mut self, parsed: Vec<(Call, Result<Tool, String>)>, why: &str) {
        for (call, _) in parsed {
            self.say_call(&call);
            self.say_result(call, not_run(why), Duration::ZERO);
        }
    }

    fn say_call(&self, call: &Call) {
        let arguments = match &call.arguments {
            Ok(raw) => serde_json::from_str(raw.get()).unwrap_or(Value::Null),
            Err(_) => Value::String(call.text.clone()),
        };
        self.events.say(&AgentEvent::ToolCall {
            id: call.id.clone(),
            tool: call.name.clone(),
            arguments,
        });
    }

    fn say_result(&mut self, call: Call, outcome: Outcome, time: Duration) {
        self.events.say(&AgentEvent::ToolResult {
            id: call.id.clone(),
            error: outcome.error,
            output: outcome.output.clone(),
            file: outcome.file,
            ms: u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
        });
        self.history.result(&call, outcome.output, outcome.error);
    }
}

fn not_run(why: &str) -> Outcome {
    Outcome {
        output: why.into(),
        error: true,
        ..Outcome::default()
    }
}

fn wrong_call(why: String, end: End) -> Outcome {
    let why = if end == End::Length {
        format!("{why} Your answer was cut off at its limit of tokens: make smaller calls.")
    } else {
        why
    };
    not_run(&why)
}
