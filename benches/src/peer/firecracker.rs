//! Firecracker: a configuration file to boot, its API to save and to load.
//!
//! Its console is its standard output. It has no throw-away layer: its disk is a copy. Built from source
//! without its default seccomp filters it has less to do than as released: docs/benchmarks.md.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use super::http::ask;
use super::{Ability, Adapter, Guest, Place};

#[derive(Debug)]
struct Firecracker {
    program: PathBuf,
    patience: Duration,
}

/// Firecracker in `program`, whose API has so long for an answer.
pub fn adapter(program: PathBuf, patience: Duration) -> Box<dyn Adapter> {
    Box::new(Firecracker { program, patience })
}

impl Firecracker {
    fn command(&self, at: &Place) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--api-sock").arg(at.api());
        command.args(["--id", "bench", "--level", "Error"]);
        command
    }

    fn put(&self, at: &Place, method: &str, path: &str, body: serde_json::Value) -> Result<()> {
        ask(&at.api(), method, path, &body.to_string(), self.patience).map(drop)
    }
}

impl Adapter for Firecracker {
    fn name(&self) -> &'static str {
        "firecracker"
    }

    fn cannot(&self, _: Ability) -> Option<String> {
        None
    }

    fn boot(&self, guest: &Guest<'_>, at: &Place) -> Result<Command> {
        let config = json!({
            "boot-source": {
                "kernel_image_path": guest.parts.kernel,
                "initrd_path": guest.parts.initramfs,
                "boot_args": guest.words,
            },
            "drives": [{
                "drive_id": "root",
                "path_on_host": guest.disk,
                "is_root_device": false,
                "is_read_only": false,
            }],
            "machine-config": { "vcpu_count": 1, "mem_size_mib": guest.memory_mib },
            "vsock": { "guest_cid": 3, "uds_path": at.vsock() },
            "entropy": {},
        });
        let file = at.file("config.json");
        std::fs::write(&file, config.to_string()).context("its configuration")?;
        let mut command = self.command(at);
        command.arg("--config-file").arg(file);
        Ok(command)
    }

    fn save(&self, at: &Place) -> Result<()> {
        self.put(at, "PATCH", "/vm", json!({ "state": "Paused" }))?;
        let saved = at.saved();
        let files = json!({
            "snapshot_type": "Full",
            "snapshot_path": saved.join("state"),
            "mem_file_path": saved.join("memory"),
        });
        self.put(at, "PUT", "/snapshot/create", files)
    }

    fn restore(&self, at: &Place) -> Result<Command> {
        Ok(self.command(at))
    }

    fn resume(&self, at: &Place) -> Result<()> {
        let saved = at.saved();
        let what = json!({
            "snapshot_path": saved.join("state"),
            "mem_backend": { "backend_type": "File", "backend_path": saved.join("memory") },
            "resume_vm": true,
        });
        self.put(at, "PUT", "/snapshot/load", what)
    }
}
