//! What became of an agent's children, and which is the best.

use ratoon_engine::agent::Run;
use ratoon_protocol::Ending;
use serde::Serialize;

use super::show;
use crate::failure::{FAILED, Failure};
use crate::output;

/// What became of a child.
#[derive(Debug, Default, Serialize)]
pub struct Outcome {
    /// Its branch.
    pub branch: String,
    /// Its machine, if it started.
    pub vm: Option<String>,
    /// How its agent ended.
    pub ending: Option<Ending>,
    /// Calls of the model.
    pub steps: u32,
    /// What the scorer gave it.
    pub score: Option<f64>,
    /// How many files it has changed.
    pub files: Option<usize>,
    /// What went wrong.
    pub error: Option<String>,
    /// It took its parent's place.
    pub kept: bool,
}

/// The highest score; the first of equals.
pub fn best(outcomes: &[Outcome]) -> Option<usize> {
    let mut best: Option<(usize, f64)> = None;
    for (index, outcome) in outcomes.iter().enumerate() {
        if let Some(score) = outcome.score
            && best.is_none_or(|(_, than)| score > than)
        {
            best = Some((index, score));
        }
    }
    best.map(|(index, _)| index)
}

/// The code of the first child that did not end well.
pub fn code(outcomes: &[Outcome]) -> u8 {
    let of = |outcome: &Outcome| outcome.ending.map_or(FAILED, Ending::code);
    let mut codes = outcomes.iter().map(of);
    codes.find(|code| *code != 0).unwrap_or(0)
}

/// Tells of all of them, as a table or as JSON.
pub fn tell_all(json: bool, run: &Run, outcomes: &[Outcome]) -> Result<(), Failure> {
    if json {
        return output::json(&serde_json::json!({ "run": run.id, "children": outcomes }));
    }
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let row = |outcome: &Outcome| {
        vec![
            outcome.branch.clone(),
            or_none(outcome.vm.clone()),
            or_none(outcome.ending.map(|ending| show::word(ending).to_owned())),
            outcome.steps.to_string(),
            or_none(outcome.files.map(|files| files.to_string())),
            or_none(outcome.score.map(|score| score.to_string())),
            if outcome.kept { "kept" } else { "" }.to_owned(),
        ]
    };
    for outcome in outcomes {
        if let Some(error) = &outcome.error {
            eprintln!("{}: {error}", outcome.branch);
        }
    }
    let rows: Vec<_> = outcomes.iter().map(row).collect();
    let head = ["BRANCH", "VM", "STATUS", "STEPS", "FILES", "SCORE", ""];
    output::write(output::table(&head, &rows).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_score_is_the_best_and_the_first_of_equals() {
        let of = |score| Outcome {
            score,
            ..Outcome::default()
        };
        assert_eq!(
            best(&[of(None), of(Some(1.0)), of(Some(2.0)), of(Some(2.0))]),
            Some(2)
        );
        assert_eq!(best(&[of(Some(-3.0)), of(None)]), Some(0));
        assert_eq!(best(&[of(None)]), None);
    }
}
