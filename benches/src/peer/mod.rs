//! Other engines beside ours in the same run: `--peer firecracker=PATH`.
//!
//! ```text
//!   scenario -- Peers (who still takes part) -- Adapter (how one VMM is driven) -- Place (one machine's files)
//!                                                  `- http.rs (its API)
//! ```
//!
//! All get the same kernel, disk and runtime, which speaks vsock: so what "answered" means is the same for
//! all. A peer without vsock here has the runtime's line on the console in its place (R3').
//!
//! How it fails: a peer that crashes, hangs, refuses or cannot do a thing is n/a for it from then on, with
//! its last words; never a figure that was not measured, and never the end of the run.

mod alarm;
mod cloud_hypervisor;
mod firecracker;
mod http;
mod place;
mod qemu;
mod saved;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use ratoon_vmm::host;
use ratoon_vmm_api::HostClass;

pub use place::{Place, Running};
pub use saved::{SavedPeers, Woken, wake};

use crate::interrupt::is_stopped;
use crate::machine::Parts;
use crate::record::Text;
use crate::samples::Samples;

/// What a scenario asks of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ability {
    /// A machine that boots.
    Boot,
    /// Calls of its runtime.
    Calls,
    /// A saved machine that goes on in a new process.
    Restore,
}

/// The machine that a peer is to boot: one vCPU, the image's disk, a console, random numbers.
#[derive(Debug)]
pub struct Guest<'p> {
    /// Kernel, initramfs, disk.
    pub parts: &'p Parts,
    /// Guest memory.
    pub memory_mib: u64,
    /// The kernel's words.
    pub words: String,
    /// Its own copy of the disk, for who has no throw-away layer.
    pub disk: PathBuf,
}

/// How one VMM is driven.
pub trait Adapter: Debug + Sync {
    /// As results name it.
    fn name(&self) -> &'static str;

    /// Why it cannot do that here.
    fn cannot(&self, ability: Ability) -> Option<String>;

    /// Whether the runtime can be spoken to.
    fn has_vsock(&self) -> bool {
        self.cannot(Ability::Calls).is_none()
    }

    /// Whether it writes to the disk that it is given.
    fn needs_own_disk(&self) -> bool {
        true
    }

    /// The process that boots `guest`, with its files in `at`.
    ///
    /// # Errors
    /// When a file cannot be written.
    fn boot(&self, guest: &Guest<'_>, at: &Place) -> Result<Command>;

    /// Stops the machine that runs in `at`, and writes it to [`Place::saved`].
    ///
    /// # Errors
    /// What it answers.
    fn save(&self, at: &Place) -> Result<()>;

    /// The process that will go on from what was saved in `at`.
    ///
    /// # Errors
    /// When a file cannot be written.
    fn restore(&self, at: &Place) -> Result<Command>;

    /// Makes that process load and run it; returns when it says that the machine runs.
    ///
    /// # Errors
    /// What it answers.
    fn resume(&self, at: &Place) -> Result<()>;
}

/// The kernel's words for peers: ours without pvpanic, whose device they do not have. They add their
/// own virtio-mmio devices.
fn words() -> String {
    let class = host::boot_args(HostClass::detect());
    format!(
        "console=ttyS0 quiet reboot=k panic=-1 8250.nr_uarts=1 tsc=reliable no_timer_check \
         random.trust_cpu=on {class} ratoon.ready=console"
    )
}

impl<'p> Guest<'p> {
    /// A machine of so much memory for `peer`, with a disk of its own in `at` if it writes to it.
    ///
    /// # Errors
    /// When the disk cannot be copied.
    pub fn of(peer: &dyn Adapter, parts: &'p Parts, memory_mib: u64, at: &Place) -> Result<Self> {
        let disk = match peer.needs_own_disk() {
            true => at.copy_disk(&parts.disk)?,
            false => parts.disk.clone(),
        };
        Ok(Self {
            parts,
            memory_mib,
            words: words(),
            disk,
        })
    }
}

/// The adapters of these programs, by the names of [`crate::machine::Parts::peers`]; their APIs may take so long.
pub fn adapters(programs: &BTreeMap<String, PathBuf>, patience: Duration) -> Vec<Box<dyn Adapter>> {
    let adapter = |(name, program): (&String, &PathBuf)| {
        let program = std::path::absolute(program).unwrap_or_else(|_| program.clone());
        match name.as_str() {
            "firecracker" => Some(firecracker::adapter(program, patience)),
            "cloud-hypervisor" => Some(cloud_hypervisor::adapter(program, patience)),
            "qemu" => Some(qemu::adapter(program)),
            _ => None,
        }
    };
    programs.iter().filter_map(adapter).collect()
}

/// The peers that take part in one scenario, as long as they can.
pub struct Peers<'p> {
    scenario: &'static str,
    standing: Vec<&'p dyn Adapter>,
}

impl<'p> Peers<'p> {
    /// All that can do that; of the others it is noted why not.
    ///
    /// # Errors
    /// When that cannot be written.
    pub fn of(
        all: &'p [Box<dyn Adapter>],
        scenario: &'static str,
        ability: Ability,
        samples: &mut Samples,
    ) -> Result<Self> {
        let mut standing: Vec<&dyn Adapter> = Vec::new();
        for peer in all {
            match peer.cannot(ability) {
                None => standing.push(peer.as_ref()),
                Some(why) => samples.missing(scenario, peer.name(), why)?,
            }
        }
        Ok(Self { scenario, standing })
    }

    /// Ours, and those that are still there.
    pub fn names_with_ours(&self) -> Vec<&'static str> {
        let theirs = self.standing.iter().map(|peer| peer.name());
        std::iter::once("ratoon").chain(theirs).collect()
    }

    /// Lets one do something. If it fails it is n/a from then on, with its words.
    ///
    /// # Errors
    /// Not the peer's: an interrupt, or a sample that cannot be written.
    pub fn attempt<T>(
        &mut self,
        name: &str,
        samples: &mut Samples,
        work: impl FnOnce(&'p dyn Adapter) -> Result<T>,
    ) -> Result<Option<T>> {
        let Some(index) = self.standing.iter().position(|peer| peer.name() == name) else {
            return Ok(None);
        };
        match work(self.standing[index]) {
            Ok(done) => Ok(Some(done)),
            Err(error) if is_stopped() => Err(error),
            Err(error) => {
                let name: Text = self.standing.remove(index).name().into();
                samples.missing(self.scenario, name, format!("{error:#}"))?;
                Ok(None)
            }
        }
    }
}

/// Ours and the peers' names in the order of this round: each is first in turn.
pub fn order<'n>(names: &[&'n str], round: usize) -> Vec<&'n str> {
    let mut order = names.to_vec();
    let len = order.len().max(1);
    order.rotate_left(round % len);
    order
}
