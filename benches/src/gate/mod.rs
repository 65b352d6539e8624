//! `ratoon bench gate`: holds counts and memory against a committed baseline.
//!
//! Counts (system calls, instructions, exits, page faults) and memory hardly depend on how busy a
//! host is, so a change of theirs is a change of ours; times do, and are never gated. Counts
//! depend on whether guest kernels run in hardware or are emulated: the baseline has a part for each
//! class of host, and a figure without a baseline is told, not failed. So is one that cannot be
//! measured here.
//!
//! How it fails: with each figure that grew beyond its tolerance, by how much, and where to look.

mod measure;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::stats::number;
use crate::{host, interrupt, setup};

/// The version of the baseline's shape.
const SCHEMA: u32 = 1;
/// No baseline of ours is larger.
const SIZE_MAX_BYTES: u64 = 1 << 20;

/// `ratoon bench gate`.
///
/// # Errors
/// When the baseline cannot be read or written, or a machine does not come up.
pub fn run(path: &Path, renew: bool, image: &str) -> Result<ExitCode> {
    let baseline = if renew && !path.exists() {
        Baseline::empty()
    } else {
        Baseline::read(path)?
    };
    let parts = setup::parts(image, &[])?;
    interrupt::watch_signals()?;
    let measured = measure::measure(&parts)?;
    let host = host::facts_without_noise();
    let (text, open) = check(&baseline, &host.class, &measured);
    print!("{text}");
    if renew {
        let how = format!(
            "{}, commit {}, Linux {}, {}",
            host.date, host.commit, host.kernel, host.cpu
        );
        baseline.renewed(&host.class, &measured, how).write(path)?;
        println!("Renewed: {}", path.display());
        return Ok(ExitCode::SUCCESS);
    }
    Ok(if open {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// How far a figure may grow: the larger of both.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Tolerance {
    /// Percent of the baseline.
    pub percent: f64,
    /// In the figure's unit.
    pub absolute: f64,
}

/// One committed figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Committed {
    /// What it was.
    pub value: f64,
    /// `count`, `KiB`, `ratio`.
    pub unit: String,
    /// How far it may grow.
    pub tolerance: Tolerance,
}

/// The figures of one class of host.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Class {
    /// When, at which commit and on what it was measured.
    pub measured: String,
    /// By name.
    pub figures: BTreeMap<String, Committed>,
}

/// The committed file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    /// [`SCHEMA`].
    pub schema: u32,
    /// By class of host: `emulated`, `hardware`.
    pub classes: BTreeMap<String, Class>,
}

/// A figure as it is now.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Its name.
    pub name: String,
    /// Its unit.
    pub unit: &'static str,
    /// What was measured, or why it could not be.
    pub value: Result<f64, String>,
    /// How far it may grow, if the baseline does not say.
    pub tolerance: Tolerance,
    /// Where to look when it grew.
    pub look: &'static str,
}

/// What a gate says of one figure.
#[derive(Debug, Clone, PartialEq)]
enum Verdict {
    Within,
    Better,
    Worse,
    NoBaseline,
    NotHere(String),
}

impl Baseline {
    /// Reads one.
    ///
    /// # Errors
    /// When it cannot be read, is no baseline, or one of another version.
    pub fn read(path: &Path) -> Result<Self> {
        let name = path.display();
        let how = "run from the repository's root, or name one with --baseline";
        let meta = std::fs::metadata(path).with_context(|| format!("baseline {name} ({how})"))?;
        if meta.len() > SIZE_MAX_BYTES {
            bail!("baseline {name}: {} bytes are too many for one", meta.len());
        }
        let bytes = std::fs::read(path).with_context(|| format!("baseline {name}"))?;
        let again = "not a baseline; `ratoon bench gate --renew` makes one";
        let baseline: Self =
            serde_json::from_slice(&bytes).with_context(|| format!("baseline {name}: {again}"))?;
        if baseline.schema != SCHEMA {
            bail!(
                "baseline {name}: of another version (schema {}, this harness has {SCHEMA}): renew it",
                baseline.schema
            );
        }
        for (class, figures) in &baseline.classes {
            for (figure, it) in &figures.figures {
                let numbers = [it.value, it.tolerance.percent, it.tolerance.absolute];
                if numbers.iter().any(|number| *number < 0.0) {
                    bail!("baseline {name}: {class}: {figure}: a number below zero");
                }
            }
        }
        Ok(baseline)
    }

    /// With the figures of now for this class of host; tolerances that it has are kept.
    pub fn renewed(self, class: &str, measured: &[Measured], how: String) -> Self {
        let mut renewed = self;
        let part = renewed.classes.entry(class.to_owned()).or_default();
        part.measured = how;
        let before = std::mem::take(&mut part.figures);
        for figure in measured {
            let old = before.get(&figure.name);
            let committed = match &figure.value {
                Ok(value) => Committed {
                    value: *value,
                    unit: figure.unit.to_owned(),
                    tolerance: old.map_or(figure.tolerance, |old| old.tolerance),
                },
                // Not to be had on this host: what another one measured stays.
                Err(_) => match old {
                    Some(old) => old.clone(),
                    None => continue,
                },
            };
            part.figures.insert(figure.name.clone(), committed);
        }
        renewed
    }

    /// None yet.
    pub fn empty() -> Self {
        Self {
            schema: SCHEMA,
            classes: BTreeMap::new(),
        }
    }

    /// Writes it.
    ///
    /// # Errors
    /// When that fails.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
    }
}

fn verdict(figure: &Measured, committed: Option<&Committed>) -> Verdict {
    let value = match &figure.value {
        Ok(value) => *value,
        Err(why) => return Verdict::NotHere(why.clone()),
    };
    let Some(committed) = committed else {
        return Verdict::NoBaseline;
    };
    let room =
        (committed.value * committed.tolerance.percent / 100.0).max(committed.tolerance.absolute);
    if value > committed.value + room {
        Verdict::Worse
    } else if value < committed.value - room {
        Verdict::Better
    } else {
        Verdict::Within
    }
}

/// `+12.0 (+4.1 %)`.
fn change(value: f64, before: f64) -> String {
    if before == 0.0 {
        return format!("{:+}", value - before);
    }
    format!(
        "{:+.1} ({:+.1} %)",
        value - before,
        (value / before - 1.0) * 100.0
    )
}

/// What the gate says, and whether it is open.
pub fn check(baseline: &Baseline, class: &str, measured: &[Measured]) -> (String, bool) {
    let none = Class::default();
    let committed = baseline.classes.get(class).unwrap_or(&none);
    let mut out = String::new();
    let (mut worse, mut better, mut unknown) = (0, 0, 0);
    for figure in measured {
        let before = committed.figures.get(&figure.name);
        let value = figure.value.as_ref().copied().unwrap_or_default();
        let was = before.map_or(0.0, |before| before.value);
        let now = format!("{} {}", number(value), figure.unit);
        let _ = match verdict(figure, before) {
            Verdict::Within => writeln!(out, "ok      {}: {now}", figure.name),
            Verdict::Better => {
                better += 1;
                writeln!(
                    out,
                    "better  {}: {now}, was {}: {}",
                    figure.name,
                    number(was),
                    change(value, was)
                )
            }
            Verdict::Worse => {
                worse += 1;
                let tolerance = before.map_or(figure.tolerance, |before| before.tolerance);
                writeln!(
                    out,
                    "WORSE   {}: {now}, was {}: {}; allowed are +{} % or +{} {}\n        look at {}",
                    figure.name,
                    number(was),
                    change(value, was),
                    tolerance.percent,
                    tolerance.absolute,
                    figure.unit,
                    figure.look
                )
            }
            Verdict::NoBaseline => {
                unknown += 1;
                writeln!(out, "new     {}: {now}, no baseline for it", figure.name)
            }
            Verdict::NotHere(why) => writeln!(out, "n/a     {}: {why}", figure.name),
        };
    }
    for name in committed.figures.keys() {
        if !measured.iter().any(|figure| figure.name == *name) {
            let _ = writeln!(
                out,
                "gone    {name}: in the baseline, not measured any more"
            );
        }
    }
    let _ = match (worse, better + unknown) {
        (0, 0) => writeln!(out, "\nThe gate is open: nothing grew."),
        (0, _) => writeln!(
            out,
            "\nThe gate is open: nothing grew. {better} better, {unknown} without a baseline on \
             {class} hosts: `ratoon bench gate --renew` takes the figures of now."
        ),
        (worse, _) => writeln!(
            out,
            "\nThe gate is closed: {worse} grew beyond what is allowed (baseline: {}). If that is \
             meant, `ratoon bench gate --renew`, and say why in the commit.",
            committed.measured
        ),
    };
    (out, worse == 0)
}

#[cfg(test)]
mod tests;
