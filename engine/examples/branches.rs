//! Tries several ideas at once in children of one machine and keeps the one whose test passes.
//!
//! `cargo run --release -p ratoon-engine --example branches`, with the image `debian` and Ratoon's programs
//! where `RATOON_VMM`, `RATOON_RUNTIME` and `RATOON_PAGER` say. The puzzle: which number below 1000 leaves
//! remainders 2, 6 and 10 when divided by 7, 11 and 13? Each branch searches another part; the machine that
//! found it goes on in place of the one that was forked.

use std::error::Error;

use ratoon_engine::dirs::Dirs;
use ratoon_engine::fork::ForkSpec;
use ratoon_engine::runtime::{ExecIo, RuntimeClient};
use ratoon_engine::vm::Vm;
use ratoon_engine::{Engine, RunSpec};
use ratoon_protocol::ExecParams;

const BRANCHES: u32 = 4;

const SEARCH: &str = "
n=$((RATOON_CHILD * 250)); end=$((n + 250))
while [ $n -lt $end ]; do
    if [ $((n % 7)) = 2 ] && [ $((n % 11)) = 6 ] && [ $((n % 13)) = 10 ]; then
        echo $n > /srv/answer
        exit 0
    fi
    n=$((n + 1))
done
exit 1
";

fn main() -> Result<(), Box<dyn Error>> {
    let engine = Engine::open(Dirs::from_env()?)?;
    println!("{}", solve(&engine)?);
    Ok(())
}

/// Returns the answer, read in the machine that found it.
pub fn solve(engine: &Engine) -> Result<String, Box<dyn Error>> {
    // Half-way through a task …
    let spec = RunSpec {
        name: Some("task".into()),
        detached: true,
        ..RunSpec::new("debian")
    };
    let mut task = engine.start(&spec, None)?.vm;
    // … there are several ways to go on.
    let ideas = ForkSpec {
        detached: true,
        ..ForkSpec::new(BRANCHES)
    };
    let mut client = task.runtime()?;
    let forked = engine.fork_with(task.dir(), &mut client, &ideas, None)?;
    drop(client);
    task.detach();
    let children: Vec<Vm> = forked.children.into_iter().collect::<Result<_, _>>()?;
    let tried: Vec<_> = std::thread::scope(|scope| {
        let tried = children
            .into_iter()
            .map(|child| scope.spawn(move || try_one(child).map_err(|error| error.to_string())));
        let tried: Vec<_> = tried.collect();
        tried.into_iter().map(|thread| thread.join()).collect()
    });
    for branch in tried {
        let branch = branch.map_err(|_| "a branch has panicked")??;
        // Dropped, a machine ends.
        let Some((child, answer)) = branch else {
            continue;
        };
        let id = child.record().id.clone();
        child.detach();
        let committed = engine.commit(&engine.store().find(&id)?)?;
        assert_eq!(committed.name.as_deref(), Some("task"));
        let task = engine.store().find("task")?;
        ratoon_engine::vm::life::remove(engine.store(), &task, true)?;
        return Ok(answer);
    }
    Err("no branch has found it".into())
}

/// The machine and its answer, if it has found one.
fn try_one(mut child: Vm) -> Result<Option<(Vm, String)>, Box<dyn Error>> {
    let mut client = child.runtime()?;
    let (passed, _) = shell(&mut client, SEARCH)?;
    if !passed {
        return Ok(None);
    }
    let (_, answer) = shell(&mut client, "cat /srv/answer")?;
    Ok(Some((child, answer.trim().to_owned())))
}

/// Whether it ended well, and what it printed.
fn shell(client: &mut RuntimeClient, script: &str) -> Result<(bool, String), Box<dyn Error>> {
    let params = ExecParams {
        shell: Some(script.into()),
        ..ExecParams::default()
    };
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let io = ExecIo {
        stdin: None,
        stdout: &mut out,
        stderr: &mut err,
    };
    let report = client.exec(&params, io)?;
    Ok((report.status.shell_code() == 0, String::from_utf8(out)?))
}
