//! Notices that a model goes round in a circle: the same calls again, or two kinds of calls in turn.

use crate::wire::Call;

/// What the last answers called.
#[derive(Debug, Default)]
pub struct Repetition {
    last: Vec<String>,
}

/// What is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Noticed {
    /// Nothing.
    Nothing,
    /// It may be done this once, and not again.
    LastTime,
    /// It has been done too often.
    TooOften,
}

impl Repetition {
    /// Takes an answer's calls; `most` is how often they may come.
    pub fn take(&mut self, calls: &[Call], most: u32) -> Noticed {
        let most = most.max(1) as usize;
        if calls.is_empty() || calls.iter().all(is_poll) {
            self.last.clear();
            return Noticed::Nothing;
        }
        self.last.push(print(calls));
        let keep = 2 * most + 2;
        if self.last.len() > keep {
            self.last.drain(..self.last.len() - keep);
        }
        let newest = self.last.len() - 1;
        let same = self.last[..newest]
            .iter()
            .rev()
            .take_while(|print| **print == self.last[newest])
            .count()
            + 1;
        let rounds = match newest.checked_sub(1).map(|at| &self.last[at]) {
            Some(other) if *other != self.last[newest] => {
                let pair = [&self.last[newest], other];
                self.last
                    .iter()
                    .rev()
                    .enumerate()
                    .take_while(|(at, print)| *print == pair[at % 2])
                    .count()
            }
            _ => 0,
        };
        if same > most || rounds > 2 * most {
            Noticed::TooOften
        } else if most > 1 && (same == most || rounds == 2 * most) {
            Noticed::LastTime
        } else {
            Noticed::Nothing
        }
    }
}

/// Looking again whether a process has said something is how one waits.
fn is_poll(call: &Call) -> bool {
    call.name == "write_stdin"
        && call.arguments.as_ref().is_ok_and(|raw| {
            serde_json::from_str::<serde_json::Value>(raw.get())
                .is_ok_and(|value| value["chars"].as_str().unwrap_or("").is_empty())
        })
}

fn print(calls: &[Call]) -> String {
    let mut print = String::new();
    for call in calls {
        // Through a value: spaces and the order of keys make no other call.
        let arguments = match &call.arguments {
            Ok(raw) => serde_json::from_str::<serde_json::Value>(raw.get())
                .map_or_else(|_| raw.get().to_owned(), |value| value.to_string()),
            Err(_) => call.text.clone(),
        };
        print.push_str(&format!("{}\0{arguments}\0", call.name));
    }
    print
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::By;

    fn call(name: &str, text: &str) -> Call {
        Call {
            id: String::new(),
            name: name.into(),
            text: text.into(),
            arguments: crate::json::strict(text),
            by: By::Function,
        }
    }

    fn run(names: &[&str], most: u32) -> Vec<Noticed> {
        let mut repetition = Repetition::default();
        names
            .iter()
            .map(|name| repetition.take(&[call(name, "{}")], most))
            .collect()
    }

    use Noticed::{LastTime, Nothing, TooOften};

    #[test]
    fn the_same_calls_may_come_so_often() {
        assert_eq!(run(&["a"; 4], 3), [Nothing, Nothing, LastTime, TooOften]);
        assert_eq!(
            run(&["a", "a", "b", "a", "a"], 3),
            [Nothing; 5],
            "others come between"
        );
        assert_eq!(run(&["a", "a"], 1), [Nothing, TooOften]);
    }

    #[test]
    fn two_in_turn_are_a_circle() {
        let noticed = run(&["a", "b", "a", "b", "a"], 2);
        assert_eq!(noticed, [Nothing, Nothing, Nothing, LastTime, TooOften]);
    }

    #[test]
    fn spaces_and_the_order_of_keys_make_no_other_call() {
        let mut repetition = Repetition::default();
        repetition.take(&[call("a", r#"{"x":1,"y":2}"#)], 1);
        let noticed = repetition.take(&[call("a", r#"{ "y": 2, "x": 1 }"#)], 1);
        assert_eq!(noticed, TooOften);
    }

    #[test]
    fn waiting_for_a_process_is_no_circle() {
        let mut repetition = Repetition::default();
        for _ in 0..20 {
            let poll = call("write_stdin", r#"{"session_id":1,"chars":""}"#);
            assert_eq!(repetition.take(&[poll], 2), Nothing);
        }
    }
}
