//! What kind of KVM a host has, and how that is seen.

use std::path::Path;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What kind of KVM the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HostClass {
    /// VT-x or AMD-V.
    Hardware,
    /// Guest kernels run in KVM's instruction emulator (`kvm_pvm`): slow, and worked around.
    Emulated,
}

impl HostClass {
    /// Looks at this host: to be done once, at start.
    pub fn detect() -> Self {
        let cpuinfo = || std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self::of(Path::new("/sys/module"), cpuinfo)
    }

    /// The modules decide; with another build of KVM the processor's flags do.
    fn of(modules: &Path, cpuinfo: impl FnOnce() -> String) -> Self {
        if modules.join("kvm_pvm").exists() {
            return Self::Emulated;
        }
        if modules.join("kvm_intel").exists() || modules.join("kvm_amd").exists() {
            return Self::Hardware;
        }
        let cpuinfo = cpuinfo();
        let mut lines = cpuinfo.lines();
        let flags = lines.find(|line| line.starts_with("flags"));
        let is_extension = |flag: &str| flag == "vmx" || flag == "svm";
        match flags {
            Some(flags) if !flags.split_ascii_whitespace().any(is_extension) => Self::Emulated,
            _ => Self::Hardware,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kvm_module_decides_the_class() {
        let dir = tempfile::tempdir().unwrap();
        let unread = || unreachable!("the modules decide");
        std::fs::create_dir(dir.path().join("kvm_intel")).unwrap();
        assert_eq!(HostClass::of(dir.path(), unread), HostClass::Hardware);
        std::fs::create_dir(dir.path().join("kvm_pvm")).unwrap();
        assert_eq!(HostClass::of(dir.path(), unread), HostClass::Emulated);
    }

    #[test]
    fn without_a_module_the_processor_decides() {
        let dir = tempfile::tempdir().unwrap();
        let of = |cpuinfo: &str| HostClass::of(dir.path(), || cpuinfo.to_owned());
        assert_eq!(of("flags\t\t: fpu vmx sse\n"), HostClass::Hardware);
        assert_eq!(of("flags\t\t: fpu svm\n"), HostClass::Hardware);
        assert_eq!(of("flags\t\t: fpu vmxish sse\n"), HostClass::Emulated);
        // It says nothing: no workaround where none may be needed.
        assert_eq!(of(""), HostClass::Hardware);
    }
}
