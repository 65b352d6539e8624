//! Looks after the bridge and a VM's token while a command is attached to the agent in it.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Bridge, BridgeConfig, Keys};
use crate::vm::record::VmDir;

/// How often it is looked whether the bridge lives.
const LOOK: Duration = Duration::from_secs(2);

/// Looks after it until it is dropped: a bridge that died is started again, and tokens are renewed before they expire.
#[derive(Debug)]
pub struct Keeper {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Looks after these VMs. `tell` is told what a user should know.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn start(
        bridge: Bridge,
        config: BridgeConfig,
        keys: Arc<Keys>,
        vms: Vec<VmDir>,
        tell: impl Fn(String) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (end, ended) = mpsc::channel();
        // Half of their time.
        let renew = config.token_life() / 2;
        let keep = move || {
            let mut renewed = Instant::now();
            let mut failed = false;
            while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(LOOK.min(renew)) {
                if bridge.running().is_none() {
                    match bridge.ensure_any(&config, &keys) {
                        Ok(()) => tell("the bridge had ended, and was started again".into()),
                        // Told once; it is tried again.
                        Err(error) if !failed => {
                            tell(format!("the bridge has ended: {error}"));
                            failed = true;
                            continue;
                        }
                        Err(_) => continue,
                    }
                    failed = false;
                    // All have new ones.
                    renewed = Instant::now();
                }
                if renewed.elapsed() >= renew {
                    for dir in &vms {
                        if let Err(error) = bridge.renew_token(dir) {
                            tell(format!("VM {} has no new token: {error}", dir.id()));
                        }
                    }
                    renewed = Instant::now();
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("bridge-keeper".into())
            .spawn(keep)?;
        Ok(Self {
            end: Some(end),
            thread: Some(thread),
        })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // Its panic is shown by itself.
            let _ = thread.join();
        }
    }
}
