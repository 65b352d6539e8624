//! One module a command, and what several share.

pub mod agent;
pub mod bench;
pub mod code;
pub mod cp;
pub mod exec;
pub mod family;
pub mod fork;
pub mod forward;
pub mod image;
pub mod kill;
pub mod logs;
pub mod ps;
pub mod rm;
pub mod run;
pub mod snapshot;
pub mod snapshots;
pub mod stop;
pub mod top;
pub mod warm;

use std::process::ExitCode;

use ratoon_engine::Engine;
use ratoon_engine::vm::store::Entry;
use serde::Serialize;

use crate::failure::{FAILED, Failure};
use crate::output;

/// What happened to one of several VMs, for `--json`.
#[derive(Debug, Serialize)]
struct Done<T> {
    vm: String,
    id: Option<String>,
    result: Option<T>,
    error: Option<String>,
}

/// Does the same to several VMs, each named by name, id or prefix. What fails for one does not
/// keep it from the others.
fn for_each<T: Serialize>(
    engine: &Engine,
    names: &[String],
    json: bool,
    action: impl Fn(&Entry) -> Result<T, Failure>,
) -> Result<ExitCode, Failure> {
    let mut all = Vec::new();
    let mut failed = false;
    for name in names {
        let mut id = None;
        let result = engine
            .store()
            .find(name)
            .map_err(Failure::from)
            .and_then(|entry| {
                id = Some(entry.dir.id());
                action(&entry)
            });
        let done = match result {
            Ok(result) => {
                if !json {
                    output::line(name)?;
                }
                Done {
                    vm: name.clone(),
                    id,
                    result: Some(result),
                    error: None,
                }
            }
            Err(failure) => {
                failed = true;
                let text = failure.render();
                if !json {
                    failure.report();
                }
                Done {
                    vm: name.clone(),
                    id,
                    result: None,
                    error: Some(text.trim().trim_start_matches("error: ").to_owned()),
                }
            }
        };
        all.push(done);
    }
    if json {
        output::json(&all)?;
    }
    Ok(if failed {
        ExitCode::from(FAILED)
    } else {
        ExitCode::SUCCESS
    })
}
