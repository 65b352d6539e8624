//! Each peer's warm machine, booted and saved once and restored by every scenario that asks.
//!
//! It is what ours is (`sandbox.rs`): the image, booted, with a Python that has run; its processes are
//! stopped and its runtime expects a wake, so that a restored one is made to be another machine as ours is.
//! What failed once is told again, and not tried again.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use ratoon_engine::runtime::RuntimeClient;
use ratoon_engine::vm::freeze;

use super::{Adapter, Guest, Place, Running};
use crate::clock::monotonic_ns;
use crate::interrupt::is_stopped;
use crate::machine::Parts;
use crate::sandbox::{child, still, warm_up};
use crate::scenario::exec;

/// Saved machines by peer.
#[derive(Debug, Default)]
pub struct SavedPeers(Mutex<BTreeMap<&'static str, Result<Arc<Place>, String>>>);

/// A peer's machine that has been restored and woken.
pub struct Woken<'p> {
    /// Its process.
    pub running: Running<'p>,
    /// A new connection to its runtime.
    pub client: RuntimeClient,
    /// CLOCK_MONOTONIC when its VMM said that it runs, in ns.
    pub running_ns: u64,
    /// When the runtime had answered its wake.
    pub answered_ns: u64,
}

impl SavedPeers {
    /// The one of this peer, of so much memory; made when it is asked for first. All that is asked of it may take
    /// `patience`.
    ///
    /// # Errors
    /// What made it impossible.
    pub fn of(
        &self,
        peer: &dyn Adapter,
        parts: &Parts,
        memory_mib: u64,
        patience: Duration,
    ) -> Result<Arc<Place>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = all.get(peer.name()) {
            return made.clone().map_err(anyhow::Error::msg);
        }
        let made = make(peer, parts, memory_mib, patience).map(Arc::new);
        if is_stopped() {
            return made;
        }
        let kept = made.map_err(|error| format!("{error:#}"));
        all.insert(peer.name(), kept.clone());
        kept.map_err(anyhow::Error::msg)
    }

    /// It could not even boot: nobody is to wait for that again.
    pub fn cannot_boot(&self, peer: &'static str, why: &str) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(peer).or_insert_with(|| Err(why.to_owned()));
    }
}

fn make(peer: &dyn Adapter, parts: &Parts, memory_mib: u64, patience: Duration) -> Result<Place> {
    let place = Place::new(patience)?;
    {
        let guest = Guest::of(peer, parts, memory_mib, &place)?;
        let mut running = place.boot(peer, &guest)?;
        let mut client = running.hello()?.client;
        running.asked(|| warm_up(&mut client))?;
        running.asked(|| {
            // Nothing is left to be written to the disk that all its children have.
            exec(&mut client, &["sync"], &mut io::sink())?;
            still(&mut client)?;
            peer.save(&place).context("saving its machine")
        })?;
    }
    Ok(place)
}

/// Restores a saved machine and wakes it.
///
/// # Errors
/// When the process ends, refuses or hangs, or its runtime does not answer.
pub fn wake<'p>(peer: &dyn Adapter, place: &'p Place) -> Result<Woken<'p>> {
    let (mut running, running_ns) = place.restore(peer)?;
    let mut client = running.connect()?;
    let waking = child()?;
    running.asked(|| Ok(freeze::wake(&mut client, &waking)?))?;
    Ok(Woken {
        running,
        client,
        running_ns,
        answered_ns: monotonic_ns(),
    })
}
