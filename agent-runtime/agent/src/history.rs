//! The conversation, in a form that is always valid: what is a call has one result, in the turn behind it.

use std::collections::BTreeSet;

use serde_json::value::RawValue;

use crate::wire::{By, Call};

/// What was said so far.
#[derive(Debug, Default)]
pub struct History {
    /// In order; two of the same kind never stand together.
    pub turns: Vec<Turn>,
    /// The ids of all calls.
    pub ids: Ids,
}

/// A turn.
#[derive(Debug)]
pub enum Turn {
    /// Ours.
    User(Vec<Part>),
    /// The model's, as its provider wrote it.
    Model(Vec<Box<RawValue>>),
}

/// A part of a turn of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Words.
    Text(String),
    /// What became of a call.
    Result {
        /// The call.
        id: String,
        /// What the model is shown.
        output: String,
        /// Whether it is told that it failed.
        error: bool,
        /// The call was one with free input.
        custom: bool,
    },
}

impl History {
    /// Adds a part of ours. Results come before words: they are added first.
    pub fn push(&mut self, part: Part) {
        match self.turns.last_mut() {
            Some(Turn::User(parts)) => parts.push(part),
            _ => self.turns.push(Turn::User(vec![part])),
        }
    }

    /// Adds an answer.
    pub fn answer(&mut self, raw: Vec<Box<RawValue>>) {
        match self.turns.last_mut() {
            Some(Turn::Model(before)) => before.extend(raw),
            _ if raw.is_empty() => {}
            _ => self.turns.push(Turn::Model(raw)),
        }
    }

    /// Adds a call's result.
    pub fn result(&mut self, call: &Call, output: String, error: bool) {
        let part = match call.by {
            By::Text => Part::Text(format!(
                "Result of {}:\n<tool_response>\n{output}\n</tool_response>",
                call.name
            )),
            by => Part::Result {
                id: call.id.clone(),
                output,
                error,
                custom: by == By::Custom,
            },
        };
        self.push(part);
    }
}

/// The ids of calls: each is there once, whatever a model says.
#[derive(Debug, Default)]
pub struct Ids {
    used: BTreeSet<String>,
}

impl Ids {
    /// The id itself, or, when it was there or is empty, one that is new.
    pub fn unique(&mut self, given: &str) -> String {
        let given = if given.is_empty() { "call" } else { given };
        let mut id = given.to_owned();
        let mut number = 2;
        while !self.used.insert(id.clone()) {
            id = format!("{given}_{number}");
            number += 1;
        }
        id
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_there_once() {
        let mut ids = Ids::default();
        let made: Vec<String> = ["a", "a", "", "", "a_2", "a"]
            .map(|id| ids.unique(id))
            .into();
        assert_eq!(made, ["a", "a_2", "call", "call_2", "a_2_2", "a_3"]);
    }

    #[test]
    fn turns_of_one_kind_are_one_turn() {
        let mut history = History::default();
        history.push(Part::Text("a".into()));
        history.push(Part::Text("b".into()));
        history.answer(Vec::new());
        history.push(Part::Text("c".into()));
        assert_eq!(history.turns.len(), 1);
    }
}
