//! `ratoon`: micro virtual machines from the command line. Thin over `ratoon-engine`.
//!
//! Standard output has the command's own output or the answer that was asked for, standard error
//! all else. Exit codes: the command's own; 2 for wrong usage; 124 when `--timeout` passed; 125
//! when Ratoon failed; 126 and 127 when the command could not be run or found.

mod commands;
mod doctor;
mod failure;
mod guest;
mod interrupt;
mod output;
mod progress;
mod units;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ratoon_engine::Engine;
use ratoon_engine::dirs::Dirs;

use commands::{
    agent, bench, code, cp, exec, family, fork, forward, image, kill, logs, ps, rm, run, snapshot,
    snapshots, stop, top,
};
use failure::Failure;

/// Run commands in micro virtual machines.
#[derive(Parser)]
#[command(name = "ratoon", version, max_term_width = 100)]
#[command(after_help = "Examples:
  ratoon doctor
  ratoon image build debian
  ratoon run --image debian -- python3 -c 'print(6 * 7)'
  ratoon run -d --name web --memory 1G
  ratoon exec web -- uname -a
  ratoon shell web
  ratoon cp notes.txt web:/srv/
  ratoon code web -c 'print(6 * 7)'
  ratoon forward web 8080
  ratoon ps
  ratoon snapshot web ready && ratoon restore ready --name second
  ratoon fork web -n 8 -- sh -c 'echo I am child $RATOON_CHILD'
  ratoon agent run --model anthropic/sonnet --dir . 'make the tests pass'
  ratoon stop web && ratoon rm web

Files: ~/.local/state/ratoon (VMs; XDG_STATE_HOME), ~/.cache/ratoon (images, kernel; XDG_CACHE_HOME)
Exit codes: the command's own; 2 wrong usage; 124 --timeout passed; 125 ratoon failed;
126, 127 the command could not be run or found; 128 + N ended by signal N.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(Box<run::Args>),
    Exec(exec::Args),
    Shell(exec::ShellArgs),
    Cp(cp::Args),
    Code(code::Args),
    Forward(forward::Args),
    Top(top::Args),
    Ps(ps::Args),
    Logs(logs::Args),
    Stop(stop::Args),
    Kill(kill::Args),
    Pause(snapshot::VmsArgs),
    /// Let a paused VM go on.
    Resume(snapshot::VmsArgs),
    Snapshot(snapshot::Args),
    Restore(snapshot::RestoreArgs),
    Fork(Box<fork::Args>),
    Tree(family::TreeArgs),
    Commit(family::CommitArgs),
    Rollback(family::RollbackArgs),
    Diff(family::DiffArgs),
    Suspend(snapshot::SuspendArgs),
    Snapshots(snapshots::Args),
    Rm(rm::Args),
    #[command(subcommand)]
    Agent(agent::Command),
    #[command(subcommand)]
    Audit(agent::AuditCommand),
    #[command(subcommand)]
    Image(image::Command),
    Bench(bench::Args),
    Doctor(doctor::Args),
}

fn main() -> ExitCode {
    match dispatch(Cli::parse().command) {
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}

fn dispatch(command: Command) -> Result<ExitCode, Failure> {
    if let Command::Bench(args) = &command {
        return bench::run(args);
    }
    let dirs = Dirs::from_env()?;
    // The doctor must be able to tell what is wrong with the directories.
    if let Command::Doctor(args) = &command {
        return doctor::run(args, &dirs);
    }
    let engine = Engine::open(dirs)?;
    match command {
        Command::Run(args) => run::run(&engine, &args),
        Command::Exec(args) => exec::run(&engine, &args),
        Command::Shell(args) => exec::shell(&engine, &args),
        Command::Cp(args) => cp::run(&engine, &args),
        Command::Code(args) => code::run(&engine, &args),
        Command::Forward(args) => forward::run(&engine, &args),
        Command::Top(args) => top::run(&engine, &args),
        Command::Ps(args) => ps::run(&engine, &args),
        Command::Logs(args) => logs::run(&engine, &args),
        Command::Stop(args) => stop::run(&engine, &args),
        Command::Kill(args) => kill::run(&engine, &args),
        Command::Pause(args) => snapshot::pause(&engine, &args),
        Command::Resume(args) => snapshot::resume(&engine, &args),
        Command::Snapshot(args) => snapshot::run(&engine, &args),
        Command::Restore(args) => snapshot::restore(&engine, &args),
        Command::Fork(args) => fork::run(&engine, &args),
        Command::Tree(args) => family::tree(&engine, &args),
        Command::Commit(args) => family::commit(&engine, &args),
        Command::Rollback(args) => family::rollback(&engine, &args),
        Command::Diff(args) => family::compare(&engine, &args),
        Command::Suspend(args) => snapshot::suspend(&engine, &args),
        Command::Snapshots(args) => snapshots::run(&engine, &args),
        Command::Rm(args) => rm::run(&engine, &args),
        Command::Agent(command) => agent::run(&engine, command),
        Command::Audit(command) => agent::audit(&engine, &command),
        Command::Image(command) => image::run(&engine, command),
        Command::Bench(args) => bench::run(&args),
        Command::Doctor(args) => doctor::run(&args, engine.dirs()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// What `ratoon` with these words is to do.
    fn parsed(words: &[&str]) -> Result<Command, clap::Error> {
        let words = ["ratoon"].iter().chain(words);
        Cli::try_parse_from(words).map(|cli| cli.command)
    }

    #[test]
    fn what_follows_two_dashes_is_the_command_untouched() {
        match parsed(&["run", "--image", "x", "--", "sh", "-c", "--net"]).ok() {
            Some(Command::Run(args)) => assert_eq!(args.command, ["sh", "-c", "--net"]),
            _ => panic!("not a run"),
        }
    }

    #[test]
    fn exec_needs_no_dashes_before_a_command_that_begins_with_none() {
        for (words, command) in [
            (&["-u", "nobody", "vm", "ls", "-u"][..], &["ls", "-u"][..]),
            (&["vm", "-u", "nobody", "--", "-u"], &["-u"]),
            (&["vm", "sh", "--", "--help"], &["sh", "--", "--help"]),
        ] {
            match parsed(&[&["exec"], words].concat()).ok() {
                Some(Command::Exec(args)) => assert_eq!(args.command, command),
                _ => panic!("not an exec: {words:?}"),
            }
        }
        let error = parsed(&["exec", "vm", "--tt", "ls"]).err();
        assert_eq!(error.map(|error| error.exit_code()), Some(2));
    }

    #[test]
    fn what_follows_bench_is_the_harness_s_untouched() {
        for words in [
            &["--quick", "start"][..],
            &["--help"],
            &["compare", "a", "b"],
        ] {
            match parsed(&[&["bench"], words].concat()).ok() {
                Some(Command::Bench(args)) => assert_eq!(args.args, words),
                _ => panic!("not a bench"),
            }
        }
    }

    #[test]
    fn a_command_without_two_dashes_is_wrong_usage() {
        let error = parsed(&["run", "ls"]).err().map(|e| e.exit_code());
        assert_eq!(error, Some(2));
    }
}
