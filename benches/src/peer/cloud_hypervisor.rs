//! Cloud Hypervisor: arguments to boot, its API to save and to go on.
//!
//! Its devices are on PCI, which our guest kernel is built without: with the same kernel for all its
//! machine finds no disk, and says so.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use super::http::ask;
use super::{Ability, Adapter, Guest, Place};

#[derive(Debug)]
struct CloudHypervisor {
    program: PathBuf,
    patience: Duration,
}

/// Cloud Hypervisor in `program`, whose API has so long for an answer.
pub fn adapter(program: PathBuf, patience: Duration) -> Box<dyn Adapter> {
    Box::new(CloudHypervisor { program, patience })
}

impl CloudHypervisor {
    fn command(&self, at: &Place) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("--api-socket")
            .arg(format!("path={}", at.api().display()));
        command
    }

    fn put(&self, at: &Place, path: &str, body: &str) -> Result<()> {
        ask(&at.api(), "PUT", path, body, self.patience).map(drop)
    }
}

impl Adapter for CloudHypervisor {
    fn name(&self) -> &'static str {
        "cloud-hypervisor"
    }

    fn cannot(&self, _: Ability) -> Option<String> {
        None
    }

    fn boot(&self, guest: &Guest<'_>, at: &Place) -> Result<Command> {
        let mut command = self.command(at);
        command
            .arg("--kernel")
            .arg(&guest.parts.kernel)
            .arg("--initramfs")
            .arg(&guest.parts.initramfs)
            .arg("--cmdline")
            .arg(&guest.words)
            .arg("--disk")
            .arg(format!("path={},image_type=raw", guest.disk.display()))
            .args(["--cpus", "boot=1", "--memory"])
            .arg(format!("size={}M", guest.memory_mib))
            .arg("--vsock")
            .arg(format!("cid=3,socket={}", at.vsock().display()))
            .args(["--rng", "src=/dev/urandom", "--console", "off", "--serial"])
            .arg(format!("file={}", at.serial().display()));
        Ok(command)
    }

    fn save(&self, at: &Place) -> Result<()> {
        self.put(at, "/api/v1/vm.pause", "")?;
        let target = json!({ "destination_url": format!("file://{}", at.saved().display()) });
        self.put(at, "/api/v1/vm.snapshot", &target.to_string())
    }

    fn restore(&self, at: &Place) -> Result<Command> {
        Ok(self.command(at))
    }

    fn resume(&self, at: &Place) -> Result<()> {
        let source = json!({
            "source_url": format!("file://{}", at.saved().display()),
            "prefault": false,
        });
        self.put(at, "/api/v1/vm.restore", &source.to_string())?;
        self.put(at, "/api/v1/vm.resume", "")
    }
}
