//! Why a VM's process ended, as a chain of causes.

use std::fmt;
use std::io::{Read, Seek, SeekFrom};

use ratoon_vmm_api::Outcome;

use super::record::VmDir;
use super::serial::printable;

/// The prefix of the VMM's last line on standard error.
const PREFIX: &str = "ratoon-vmm: ";
/// How much of the VMM's log is searched for that line, in bytes.
const TAIL_LEN: u64 = 16 * 1024;

/// Why a VM's process ended: one message, and what caused it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndCause {
    message: String,
    source: Option<Box<EndCause>>,
}

impl EndCause {
    /// A chain from its messages, outermost first.
    pub fn chain(
        messages: impl IntoIterator<Item = String, IntoIter: DoubleEndedIterator>,
    ) -> Self {
        messages
            .into_iter()
            .rev()
            .fold(None, |source, message| {
                Some(Box::new(Self { message, source }))
            })
            .map_or_else(
                || Self {
                    message: "no reason given".to_owned(),
                    source: None,
                },
                |cause| *cause,
            )
    }

    /// What is known about the end of the VM in `dir`: its exit report, else its log's last word,
    /// else that there is none.
    pub fn of(dir: &VmDir) -> Self {
        if let Some(report) = dir.read_exit_report() {
            return match report.outcome {
                Outcome::Failed { causes } => Self::chain(causes),
                other => Self::chain([other.to_string()]),
            };
        }
        // The kernel kills without a word to anybody.
        let group = dir.read_record().ok().and_then(|record| record.group);
        if let Some(verdict) = group.and_then(|group| group.verdict()) {
            return Self::chain([verdict]);
        }
        match last_word(dir) {
            Some(line) => Self::chain([line]),
            None => Self::chain(["ratoon-vmm ended and left no report: was it killed?".to_owned()]),
        }
    }
}

/// The VMM's own error line, from the end of its log.
fn last_word(dir: &VmDir) -> Option<String> {
    let mut file = std::fs::File::open(dir.vmm_log()).ok()?;
    let len = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(TAIL_LEN)))
        .ok()?;
    let mut bytes = Vec::new();
    file.take(TAIL_LEN).read_to_end(&mut bytes).ok()?;
    let text = printable(&bytes);
    text.lines()
        .rev()
        .find_map(|line| line.strip_prefix(PREFIX))
        .or_else(|| text.lines().rfind(|line| !line.trim().is_empty()))
        .map(|line| line.trim().to_owned())
}

impl fmt::Display for EndCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for EndCause {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|cause| cause as _)
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;

    #[test]
    fn the_report_counts_before_the_log_and_the_log_before_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let dir = VmDir::new(temp.path());
        assert!(EndCause::of(&dir).to_string().contains("left no report"));
        std::fs::write(dir.vmm_log(), "noise\nratoon-vmm: no /dev/kvm\nlater\n").unwrap();
        assert_eq!(EndCause::of(&dir).to_string(), "no /dev/kvm");
        std::fs::write(
            dir.exit_report(),
            r#"{"id":"x","outcome":{"kind":"failed","causes":["outer","inner"]}}"#,
        )
        .unwrap();
        let end = EndCause::of(&dir);
        assert_eq!(end.to_string(), "outer");
        assert_eq!(end.source().unwrap().to_string(), "inner");
    }
}
