//! Writing to standard output: tables for people, JSON for programs. A reader that went away
//! (`ratoon ps | head -1`) ends the command without a word.

use std::io::{IsTerminal, Write};

use serde::Serialize;

use crate::failure::Failure;

/// Writes bytes to standard output.
pub fn write(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .map_err(|error| {
            if error.kind() == std::io::ErrorKind::BrokenPipe {
                Failure::silent(0)
            } else {
                Failure::new(format!("writing to standard output: {error}"))
            }
        })
}

/// Writes one line.
pub fn line(text: &str) -> Result<(), Failure> {
    write(format!("{text}\n").as_bytes())
}

/// Writes a value as indented JSON.
pub fn json(value: &impl Serialize) -> Result<(), Failure> {
    line(&serde_json::to_string_pretty(value)?)
}

/// Whether a person reads standard output.
pub fn is_terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// Whether a person reads standard error.
pub fn errors_go_to_a_terminal() -> bool {
    std::io::stderr().is_terminal()
}

/// Columns, each as wide as its longest cell, two spaces apart.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let format = |cells: &mut dyn Iterator<Item = &str>| {
        let line: String = cells
            .zip(&widths)
            .map(|(cell, &width)| format!("{cell:width$}  "))
            .collect();
        line.trim_end().to_owned() + "\n"
    };
    let mut text = format(&mut head.iter().copied());
    for row in rows {
        text += &format(&mut row.iter().map(String::as_str));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_longest_cell() {
        let rows = [
            vec!["a".to_owned(), "longer".to_owned(), "x".to_owned()],
            vec!["é".to_owned(), "b".to_owned(), String::new()],
        ];
        assert_eq!(
            table(&["ID", "NAME", "Z"], &rows),
            "ID  NAME    Z\na   longer  x\né   b\n"
        );
    }
}
