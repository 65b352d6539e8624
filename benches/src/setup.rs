//! What a run is made of: programs, kernel, image and peers, each looked for before anything is
//! measured. It fails with what is missing and how to get it.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ratoon_engine::Programs;
use ratoon_engine::dirs::Dirs;
use ratoon_engine::image::ImageStore;
use ratoon_engine::initramfs;

use crate::machine::Parts;

/// Peers that adapters exist for.
const PEERS: [&str; 3] = ["firecracker", "cloud-hypervisor", "qemu"];

/// `--peer NAME=PATH`.
///
/// # Errors
/// With what is wrong about it.
pub fn peer(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("NAME=PATH is wanted")?;
    if !PEERS.contains(&name) {
        return Err(format!("no peer {name}; there are {}", PEERS.join(", ")));
    }
    let path = PathBuf::from(path);
    if !path.is_file() {
        return Err(format!("{}: no such program", path.display()));
    }
    Ok((name.to_owned(), path))
}

/// A release build has no table of debugging lines; a debug build's figures would mean nothing.
fn release_program(path: PathBuf) -> Result<PathBuf> {
    let bytes = std::fs::read(&path)
        .with_context(|| format!("{}: run `cargo build --release` first", path.display()))?;
    if bytes.windows(12).any(|window| window == b".debug_line\0") {
        bail!(
            "{} is a debug build: run `cargo build --release` and use its programs",
            path.display()
        );
    }
    std::path::absolute(&path).context("the program's path")
}

/// The program of this name on the PATH.
pub fn on_path(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

/// Whether KVM can be opened: told before anything is measured.
fn kvm(device: &Path) -> Result<()> {
    let name = device.display();
    let hint = "`ratoon doctor` says how to mend it";
    let opened = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(device)
        .with_context(|| format!("{name}: {hint}"))?;
    // Documentation/admin-guide/devices.txt: misc device 232.
    if opened.metadata()?.rdev() != rustix::fs::makedev(10, 232) {
        bail!("{name} is not KVM's device: {hint}");
    }
    Ok(())
}

/// Finds what machines are made of.
///
/// # Errors
/// When a program, the kernel, the image or KVM is not there.
pub fn parts(image: &str, peers: &[(String, PathBuf)]) -> Result<Parts> {
    let bin = match std::env::var_os("RATOON_BIN_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => std::env::current_exe()?
            .parent()
            .map(Path::to_owned)
            .unwrap_or_default(),
    };
    let dirs = Dirs::from_env()?;
    let runtime = release_program(bin.join("ratoon-runtime"))?;
    let kernel = dirs.default_kernel();
    if !kernel.is_file() {
        bail!(
            "no guest kernel {}: run guest-kernel/build",
            kernel.display()
        );
    }
    kvm(Path::new("/dev/kvm"))?;
    let mut peers: BTreeMap<String, PathBuf> = peers.iter().cloned().collect();
    if let Some(qemu) = on_path("qemu-system-x86_64") {
        peers.entry("qemu".into()).or_insert(qemu);
    }
    let vmm = release_program(bin.join("ratoon-vmm"))?;
    Ok(Parts {
        programs: Programs {
            vmm: vmm.clone(),
            runtime: runtime.clone(),
            pager: release_program(bin.join("ratoon-pager"))?,
            // Nothing here needs them.
            bridge: bin.join("ratoon-bridge"),
            agent: bin.join("ratoon-agent"),
        },
        cache: dirs.cache().to_owned(),
        image: image.to_owned(),
        vmm,
        kernel,
        initramfs: initramfs::ensure(&runtime, &dirs.cache().join("initramfs"))?,
        disk: ImageStore::open(dirs.cache())?.get(image)?.disk,
        warm: std::sync::Arc::default(),
        saved: std::sync::Arc::default(),
        peers,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_kvm_is_told_from_what_is_missing() {
        let why = |device: &str| format!("{:#}", kvm(Path::new(device)).unwrap_err());
        assert!(why("/no/such/kvm").contains("No such file"));
        assert!(why("/dev/null").contains("/dev/null is not KVM's device"));
        assert!(why("/dev/null").contains("ratoon doctor"));
    }
}
