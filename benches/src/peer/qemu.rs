//! QEMU's microvm machine, up to the runtime's line on the console.
//!
//! Its vsock device needs vhost in the host's kernel, and is not driven here: what needs a word with the
//! runtime is n/a. It has a throw-away layer over the image (`snapshot=on`).

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use super::{Ability, Adapter, Guest, Place};

const MACHINE: &str = "microvm,x-option-roms=off,pit=on,pic=on,rtc=off,isa-serial=on,acpi=off";

#[derive(Debug)]
struct Qemu {
    program: PathBuf,
}

/// QEMU in `program`.
pub fn adapter(program: PathBuf) -> Box<dyn Adapter> {
    Box::new(Qemu { program })
}

impl Adapter for Qemu {
    fn name(&self) -> &'static str {
        "qemu-microvm"
    }

    fn cannot(&self, ability: Ability) -> Option<String> {
        let why = "its vsock needs the host kernel's vhost, so that nobody can call the runtime \
                   or wake a restored machine";
        match ability {
            Ability::Boot => None,
            Ability::Calls | Ability::Restore => Some(why.into()),
        }
    }

    fn needs_own_disk(&self) -> bool {
        false
    }

    fn boot(&self, guest: &Guest<'_>, at: &Place) -> Result<Command> {
        let mut command = Command::new(&self.program);
        command
            .args(["-M", MACHINE])
            .args(["-accel", "kvm", "-cpu", "host", "-smp", "1", "-m"])
            .arg(guest.memory_mib.to_string())
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-serial"])
            .arg(format!("file:{}", at.serial().display()))
            .arg("-kernel")
            .arg(&guest.parts.kernel)
            .arg("-initrd")
            .arg(&guest.parts.initramfs)
            .args(["-append", &guest.words, "-drive"])
            .arg(format!(
                "file={},format=raw,if=none,id=root,snapshot=on",
                guest.disk.display()
            ))
            .args(["-device", "virtio-blk-device,drive=root"])
            .args(["-device", "virtio-rng-device"]);
        Ok(command)
    }

    fn save(&self, _: &Place) -> Result<()> {
        bail!("QEMU is not driven to save machines")
    }

    fn restore(&self, _: &Place) -> Result<Command> {
        bail!("QEMU is not driven to restore machines")
    }

    fn resume(&self, _: &Place) -> Result<()> {
        bail!("QEMU is not driven to restore machines")
    }
}
