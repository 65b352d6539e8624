//! `ratoon agent log`, `ratoon audit verify`: the bridge's record, read and checked.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ratoon_bridge_api::amount::Amount;
use ratoon_bridge_api::audit::{self, AuditError};
use ratoon_bridge_api::record::{Entry, branch_file, run_dir};
use ratoon_engine::Engine;
use serde_json::json;

use super::show;
use crate::failure::Failure;
use crate::output;

/// Print the record of a run: what was asked of models, what it cost, what was refused.
#[derive(clap::Args)]
pub struct Args {
    /// The run's id, the beginning of it, its machine's name, or the folder of a record.
    #[arg(value_name = "RUN")]
    run: String,
    /// Only this branch.
    #[arg(long)]
    branch: Option<String>,
    /// Print the lines as they are recorded (JSON), the branch added.
    #[arg(long)]
    json: bool,
}

/// Check what was recorded.
#[derive(clap::Subcommand)]
pub enum AuditCommand {
    /// Check every line and body of a run's record against the hashes in it, and against the last lines'
    /// hashes that were kept when its machines went.
    Verify {
        /// The run's id, the beginning of it, its machine's name, or the folder of a record.
        #[arg(value_name = "RUN")]
        run: String,
        /// A hash that was kept elsewhere, as BRANCH=HASH: it must be in the record.
        #[arg(long = "head", value_name = "BRANCH=HASH", value_parser = head)]
        heads: Vec<(String, String)>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

fn head(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((branch, hash)) if !branch.is_empty() && hash.len() == 64 => {
            Ok((branch.to_owned(), hash.to_owned()))
        }
        _ => Err("write BRANCH=HASH, the hash as 64 digits".to_owned()),
    }
}

/// The folder of a record, and the heads that were kept.
fn record(engine: &Engine, text: &str) -> Result<(PathBuf, Vec<(String, String)>), Failure> {
    match super::find(engine, text) {
        Ok(run) => Ok((
            run_dir(&run.records, &run.id),
            engine.runs().kept_heads(&run.id),
        )),
        Err(_) if text.contains('/') && Path::new(text).is_dir() => Ok((text.into(), Vec::new())),
        Err(failure) => Err(failure),
    }
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    let (folder, _) = record(engine, &args.run)?;
    let mut lines = Vec::new();
    for name in audit::branch_names(&folder)? {
        if args.branch.as_ref().is_some_and(|wanted| *wanted != name) {
            continue;
        }
        let branch = audit::read_branch(&branch_file(&folder, &name))?;
        let of = |(line, hash)| (name.clone(), line, hash);
        lines.extend(branch.lines.into_iter().map(of));
    }
    if lines.is_empty() {
        return Err(Failure::new(format!(
            "there is no such record in {}",
            folder.display()
        )));
    }
    lines.sort_by_key(|(name, line, _)| (line.time_ms, name.clone(), line.seq));
    let begun = lines.first().map_or(0, |(_, line, _)| line.time_ms);
    for (branch, line, hash) in &lines {
        if args.json {
            let mut value = serde_json::to_value(line)?;
            value["branch"] = json!(branch);
            value["hash"] = json!(hash);
            output::line(&value.to_string())?;
            continue;
        }
        let seconds = line.time_ms.saturating_sub(begun) as f64 / 1000.0;
        let told = show::clean(&told(&line.entry));
        output::line(&format!("{seconds:9.3}  {branch:<10}  {told}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn amount(amount: &Amount) -> String {
    let mut text = format!("{} in, {} out", amount.input_tokens, amount.output_tokens);
    if amount.cost_microusd > 0 {
        text += &format!(
            ", ${}.{:06}",
            amount.cost_microusd / 1_000_000,
            amount.cost_microusd % 1_000_000
        );
    }
    text
}

/// A line for people. What a guest or a provider says is in it.
fn told(entry: &Entry) -> String {
    match entry {
        Entry::Begin {
            branch,
            parent,
            budget,
            ..
        } => {
            let from = parent.as_ref().map_or_else(String::new, |parent| {
                format!(" from line {} of {}", parent.seq + 1, parent.branch)
            });
            let budget = serde_json::to_string(budget).unwrap_or_default();
            format!("branch {branch} begins{from}; budget {budget}")
        }
        Entry::Vm { vm } => format!("machine {vm} works on it"),
        Entry::Token { vm, id, ttl_s } => format!("token {id}… for {vm}, {ttl_s} s"),
        Entry::Call {
            call,
            wire,
            provider,
            model,
            step,
            request,
            withheld,
            reserved,
            ..
        } => {
            let step = step.as_ref().map_or_else(String::new, |step| {
                format!(" (step {}.{})", step.step, step.attempt)
            });
            let withheld = match withheld.is_empty() {
                true => String::new(),
                false => format!("; withheld: {}", withheld.join(", ")),
            };
            format!(
                "call {call}{step}: {wire} {provider}/{model}, {} bytes, up to {}{withheld}; body {}",
                request.len,
                amount(reserved),
                request.hash
            )
        }
        Entry::Answer {
            call,
            ending,
            status,
            body,
            charged,
            cached_tokens,
            attempts,
            total_us,
            ..
        } => {
            let ending = serde_json::to_value(ending).unwrap_or_default();
            format!(
                "answer to {call}: {} ({status}), {} ms, {} ({cached_tokens} cached), sent {attempts} times; body {}",
                ending.as_str().unwrap_or_default(),
                total_us / 1000,
                amount(charged),
                body.hash
            )
        }
        Entry::Replay { call, .. } => format!("the answer to {call} is given again"),
        Entry::Refused { code, message, .. } => format!("refused ({code}): {message}"),
        Entry::VmGone {
            vm,
            refusals_untold,
        } => match refusals_untold {
            0 => format!("machine {vm} has gone"),
            more => format!("machine {vm} has gone; {more} more refusals"),
        },
        Entry::Rest { ms } => format!("it stood still: {ms} ms that do not count"),
        Entry::Torn { bytes } => format!("{bytes} bytes of a cut line were taken away"),
    }
}

pub fn audit(engine: &Engine, command: &AuditCommand) -> Result<ExitCode, Failure> {
    let AuditCommand::Verify { run, heads, json } = command;
    let (folder, mut kept) = record(engine, run)?;
    kept.extend(heads.iter().cloned());
    let report = match audit::verify_run(&folder, &kept) {
        Ok(report) => report,
        Err(error @ AuditError::Io { .. }) => return Err(error.into()),
        Err(error) => return Err(Failure::from(error).code(1)),
    };
    if *json {
        let branches: Vec<_> = report
            .branches
            .iter()
            .map(|(branch, (lines, head))| json!({"branch": branch, "lines": lines, "head": head}))
            .collect();
        output::json(&json!({
            "branches": branches, "bodies": report.bodies, "kept_heads": kept.len(),
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    for (branch, (lines, head)) in &report.branches {
        output::line(&format!("{branch}\t{lines} lines\t{head}"))?;
    }
    output::line(&format!(
        "{} bodies and {} kept heads; all as written",
        report.bodies,
        kept.len()
    ))?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_a_branch_and_a_hash() {
        let hash = "0".repeat(64);
        assert_eq!(
            head(&format!("main={hash}")),
            Ok(("main".into(), hash.clone()))
        );
        for odd in ["main", "main=", "=00", &format!("={hash}")] {
            assert!(head(odd).is_err(), "{odd}");
        }
    }

    #[test]
    fn money_is_told_in_dollars() {
        let used = Amount {
            calls: 1,
            input_tokens: 10,
            output_tokens: 3,
            cost_microusd: 1_000_075,
        };
        assert_eq!(amount(&used), "10 in, 3 out, $1.000075");
    }
}
