//! `ratoon doctor`: whether this host can do what Ratoon needs, and how to mend what is missing.
//!
//! Each check looks at one thing, changes nothing and cannot fail itself: what it cannot find out
//! is its finding.

mod host;
mod kvm;
mod ratoon;

use std::process::ExitCode;

use ratoon_engine::dirs::Dirs;
use serde::Serialize;

use crate::failure::Failure;
use crate::output;

/// Check this host and say how to mend what is missing.
///
/// Exits with 1 when something without which no VM can run is missing.
#[derive(clap::Args)]
pub struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Something will be missing or slow.
    Warn,
    /// No VM can run.
    Fail,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    check: &'static str,
    level: Level,
    /// What was seen.
    seen: String,
    /// How to mend it.
    mend: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, seen: impl Into<String>) -> Self {
        Self {
            check,
            level: Level::Ok,
            seen: seen.into(),
            mend: None,
        }
    }

    fn warn(check: &'static str, seen: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            check,
            level: Level::Warn,
            seen: seen.into(),
            mend: Some(mend.into()),
        }
    }

    fn fail(check: &'static str, seen: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            level: Level::Fail,
            ..Self::warn(check, seen, mend)
        }
    }
}

pub fn run(args: &Args, dirs: &Dirs) -> Result<ExitCode, Failure> {
    let mut findings = kvm::check();
    findings.extend(ratoon::check(dirs));
    findings.extend(host::check(dirs));
    if args.json {
        output::json(&findings)?;
    } else {
        output::write(text(&findings).as_bytes())?;
    }
    let failed = findings.iter().any(|finding| finding.level == Level::Fail);
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let label = match finding.level {
            Level::Ok => "ok  ",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        text += &format!("{label}  {:<14} {}\n", finding.check, finding.seen);
        if let Some(mend) = &finding.mend {
            text += &format!("{:21}-> {mend}\n", "");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_comes_with_how_to_mend_it() {
        let findings = [
            Finding::ok("kvm", "there"),
            Finding::fail("kernel", "missing", "build it"),
        ];
        assert_eq!(
            text(&findings),
            "ok    kvm            there\nFAIL  kernel         missing\n                     -> \
             build it\n"
        );
    }
}
