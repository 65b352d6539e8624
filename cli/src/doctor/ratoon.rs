//! Checks of Ratoon's own parts: programs, guest kernel, images, and the tools that make images.

use std::io::Read;
use std::path::Path;

use ratoon_engine::dirs::Dirs;
use ratoon_engine::image::ImageStore;
use ratoon_engine::{Engine, Programs};

use super::Finding;

pub(super) fn check(dirs: &Dirs) -> Vec<Finding> {
    let engine = Engine::new(dirs.clone(), Programs::beside_this_executable());
    let programs = engine.programs();
    vec![
        program("ratoon-vmm", "RATOON_VMM", &programs.vmm),
        program("ratoon-runtime", "RATOON_RUNTIME", &programs.runtime),
        program("ratoon-pager", "RATOON_PAGER", &programs.pager),
        for_agents("ratoon-bridge", "RATOON_BRIDGE", &programs.bridge),
        for_agents("ratoon-agent", "RATOON_AGENT", &programs.agent),
        kernel(&engine.kernel(None)),
        image(dirs),
        tools(),
    ]
}

fn program(check: &'static str, variable: &str, path: &Path) -> Finding {
    if path.is_file() {
        Finding::ok(check, path.display().to_string())
    } else {
        Finding::fail(
            check,
            format!("{} is not there", path.display()),
            format!("`cargo build --release`, or set {variable} to where it is"),
        )
    }
}

/// What `ratoon agent` needs, and nothing else does.
fn for_agents(check: &'static str, variable: &str, path: &Path) -> Finding {
    if path.is_file() {
        Finding::ok(check, path.display().to_string())
    } else {
        Finding::warn(
            check,
            format!("{} is not there: `ratoon agent` needs it", path.display()),
            format!("`cargo build --release`, or set {variable} to where it is"),
        )
    }
}

fn kernel(path: &Path) -> Finding {
    const CHECK: &str = "guest kernel";
    let mut magic = [0; 4];
    match std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic)) {
        Ok(()) if magic == *b"\x7fELF" => Finding::ok(CHECK, path.display().to_string()),
        Ok(()) => Finding::fail(
            CHECK,
            format!("{} is not an uncompressed ELF vmlinux", path.display()),
            "`guest-kernel/build` makes one",
        ),
        Err(error) => Finding::fail(
            CHECK,
            format!("{}: {error}", path.display()),
            "`guest-kernel/build` makes one; RATOON_KERNEL names another",
        ),
    }
}

fn image(dirs: &Dirs) -> Finding {
    const CHECK: &str = "images";
    const MEND: &str = "`ratoon image build debian` makes one";
    if !dirs.cache().join("images").is_dir() {
        return Finding::warn(CHECK, "none yet", MEND);
    }
    match ImageStore::open(dirs.cache()).and_then(|store| store.list()) {
        Ok(images) if images.is_empty() => Finding::warn(CHECK, "none yet", MEND),
        Ok(images) => {
            let names: Vec<_> = images.into_iter().flat_map(|image| image.names).collect();
            Finding::ok(CHECK, names.join(", "))
        }
        Err(error) => Finding::warn(CHECK, error.to_string(), MEND),
    }
}

fn tools() -> Finding {
    const CHECK: &str = "image tools";
    const TOOLS: [(&str, &str); 4] = [
        ("mmdebstrap", "mmdebstrap"),
        ("mke2fs", "e2fsprogs"),
        ("debugfs", "e2fsprogs"),
        ("e2fsck", "e2fsprogs"),
    ];
    let missing: Vec<_> = TOOLS.iter().filter(|(tool, _)| !in_path(tool)).collect();
    if missing.is_empty() {
        return Finding::ok(CHECK, "mmdebstrap, mke2fs, debugfs, e2fsck");
    }
    let tools: Vec<_> = missing.iter().map(|(tool, _)| *tool).collect();
    let mut packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    packages.dedup();
    Finding::warn(
        CHECK,
        format!("missing, so images cannot be made: {}", tools.join(", ")),
        format!("`sudo apt install {}`", packages.join(" ")),
    )
}

/// Tools of e2fsprogs are often in a directory that only root has in PATH.
fn in_path(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|dir| dir.join(tool).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn a_compressed_kernel_is_told_from_an_elf() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("k");
        assert_eq!(kernel(&path).level, Level::Fail);
        std::fs::write(&path, b"MZ\0\0 a bzImage").unwrap();
        assert!(kernel(&path).seen.contains("not an uncompressed ELF"));
        std::fs::write(&path, b"\x7fELF").unwrap();
        assert_eq!(kernel(&path).level, Level::Ok);
    }

    #[test]
    fn a_missing_program_names_its_variable() {
        let finding = program("ratoon-vmm", "RATOON_VMM", Path::new("/nonexistent"));
        assert_eq!(finding.level, Level::Fail);
        assert!(finding.mend.unwrap().contains("RATOON_VMM"));
    }
}
