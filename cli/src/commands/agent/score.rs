//! What a user's own command says about a machine: a number.

use std::io::{self, Write};
use std::time::Duration;

use ratoon_client::blocking::{Client, ExecIo};
use ratoon_protocol::ExecParams;

use super::show;
use super::work::DIRECTORY;
use crate::guest;

/// So much of its output is kept, in bytes: the end.
const KEPT: usize = 64 << 10;
/// Words of it that are told when it fails, in characters.
const TOLD: usize = 120;

/// The end of an output.
#[derive(Debug, Default)]
struct End(Vec<u8>);

impl Write for End {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        let surplus = self.0.len().saturating_sub(KEPT);
        self.0.drain(..surplus);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs the command in the directory that was worked on: the last number that it prints, if it ends with 0.
pub fn score(
    client: &mut Client,
    command: &str,
    branch: &str,
    within: Duration,
) -> Result<f64, String> {
    let params = ExecParams {
        shell: Some(command.to_owned()),
        cwd: Some(DIRECTORY.into()),
        env: vec![("RATOON_BRANCH".into(), branch.into())],
        timeout_ms: Some(u64::try_from(within.as_millis()).unwrap_or(u64::MAX)),
        ..ExecParams::default()
    };
    let (mut out, mut err) = (End::default(), End::default());
    let io = ExecIo {
        stdin: None,
        stdout: &mut out,
        stderr: &mut err,
    };
    let report = client
        .exec(&params, io)
        .map_err(|error| told(&guest::failure(error, "the scorer does not run").render()))?;
    if report.timed_out {
        return Err(format!("the scorer took over {} s", within.as_secs()));
    }
    let code = report.status.shell_code();
    if code != 0 {
        let words = told(&String::from_utf8_lossy(&err.0));
        return Err(format!("the scorer ended with {code}: {words}"));
    }
    last_number(&String::from_utf8_lossy(&out.0))
        .ok_or_else(|| "the scorer ended with 0 and printed no number".to_owned())
}

/// The last words of a text, on one line.
fn told(text: &str) -> String {
    let line = text.lines().rev().find(|line| !line.trim().is_empty());
    let text = show::clean(line.unwrap_or_default().trim_start_matches("error: "));
    text.chars().take(TOLD).collect()
}

fn last_number(text: &str) -> Option<f64> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '+' | '-' | '_');
    let words = text.split(|c| !is_part(c)).rev();
    words
        .filter_map(|word| word.trim_end_matches('.').parse::<f64>().ok())
        .find(|number| number.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_number_that_is_printed_counts() {
        for (text, number) in [
            ("12", Some(12.0)),
            ("passed: 3 of 4\nscore=0.75.\n", Some(0.75)),
            ("99%", Some(99.0)),
            ("-1e3 points", Some(-1000.0)),
            ("v2 nan inf test_3", None),
            ("", None),
        ] {
            assert_eq!(last_number(text), number, "{text}");
        }
    }

    #[test]
    fn only_the_end_of_much_output_is_kept() {
        let mut end = End::default();
        end.write_all(&vec![b'1'; 3 * KEPT]).unwrap();
        end.write_all(b" 7").unwrap();
        assert_eq!(end.0.len(), KEPT);
        assert_eq!(last_number(&String::from_utf8_lossy(&end.0)), Some(7.0));
    }
}
