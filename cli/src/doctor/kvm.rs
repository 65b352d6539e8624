//! Checks of KVM: the device, its permissions, its version, its kind, the capabilities we use.

use std::path::Path;

use kvm_ioctls::{Cap, Kvm};
use ratoon_vmm_api::HostClass;

use super::Finding;

const CHECK: &str = "kvm";
/// The API version that has been frozen since Linux 2.6.22 (Documentation/virt/kvm/api.rst).
const API_VERSION: i32 = 12;

/// Without these no VM can be built (Documentation/virt/kvm/api.rst).
const NEEDED: [(Cap, &str); 6] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

pub(super) fn check() -> Vec<Finding> {
    if !Path::new("/dev/kvm").exists() {
        return vec![Finding::fail(
            CHECK,
            "/dev/kvm does not exist",
            "switch virtualization on in the firmware and `modprobe kvm_intel` or `kvm_amd`; in a \
             VM, ask for nested virtualization; in a container, pass /dev/kvm through",
        )];
    }
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            let error = std::io::Error::from(error);
            let mend = if error.kind() == std::io::ErrorKind::PermissionDenied {
                "join the group that owns it: `sudo usermod -aG kvm $USER`, then log in again"
            } else {
                "see `dmesg | grep -i kvm`; another hypervisor may hold the CPU's extensions"
            };
            return vec![Finding::fail(
                CHECK,
                format!("/dev/kvm cannot be opened: {error}"),
                mend,
            )];
        }
    };
    let mut findings = vec![version(&kvm)];
    findings.push(capabilities(&kvm));
    findings.push(kind());
    findings
}

fn version(kvm: &Kvm) -> Finding {
    match kvm.get_api_version() {
        API_VERSION => Finding::ok(CHECK, format!("/dev/kvm, API version {API_VERSION}")),
        other => Finding::fail(
            CHECK,
            format!("API version {other}"),
            format!("a host kernel with KVM API version {API_VERSION} (any since 2.6.22)"),
        ),
    }
}

fn capabilities(kvm: &Kvm) -> Finding {
    let missing: Vec<_> = NEEDED
        .iter()
        .filter(|(cap, _)| !kvm.check_extension(*cap))
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() {
        Finding::ok("kvm features", "all that are needed")
    } else {
        Finding::fail(
            "kvm features",
            format!("missing: {}", missing.join(", ")),
            "a newer host kernel (5.10 or later)",
        )
    }
}

fn kind() -> Finding {
    if HostClass::detect() == HostClass::Hardware {
        Finding::ok("kvm kind", "hardware virtualization")
    } else {
        Finding::warn(
            "kvm kind",
            "no hardware virtualization (kvm_pvm): guest programs run at full speed, the guest's \
             kernel about a thousand times slower; booting takes some 10 s",
            "a host with VT-x or AMD-V; nothing needs to be set here",
        )
    }
}
