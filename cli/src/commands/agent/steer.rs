//! Words for the children of a fork.

use std::path::Path;

use crate::failure::Failure;

/// Between what is said to one child and to the next.
const SEPARATOR: &str = "---";

/// What is said to each child.
pub fn steers(path: Option<&Path>, count: usize) -> Result<Vec<Option<String>>, Failure> {
    let Some(path) = path else {
        return Ok(vec![None; count]);
    };
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::new(format!("reading {}: {error}", path.display())).code(2))?;
    sections(&text, count).map_err(|found| {
        Failure::new(format!(
            "{} has {found} sections for {count} children: give one for each, or one for all",
            path.display()
        ))
        .code(2)
    })
}

/// The sections of a text, one for each; how many there are if that is not so.
fn sections(text: &str, count: usize) -> Result<Vec<Option<String>>, usize> {
    let mut all = vec![String::new()];
    for line in text.lines() {
        match all.last_mut() {
            Some(last) if line.trim_end() != SEPARATOR => {
                last.push_str(line);
                last.push('\n');
            }
            _ => all.push(String::new()),
        }
    }
    let words = |text: &String| Some(text.trim().to_owned()).filter(|text| !text.is_empty());
    match all.as_slice() {
        [one] => Ok(vec![words(one); count]),
        all if all.len() == count => Ok(all.iter().map(words).collect()),
        all => Err(all.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steering_is_for_each_or_for_all() {
        let all = sections("be bold\n", 3).unwrap();
        assert_eq!(all, vec![Some("be bold".to_owned()); 3]);
        let each = sections("one\n---\n\n---\nthree\nlines\n", 3).unwrap();
        assert_eq!(
            each,
            [Some("one".into()), None, Some("three\nlines".into())]
        );
        assert_eq!(sections("one\n---\ntwo", 3), Err(2));
    }
}
