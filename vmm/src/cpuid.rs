//! What CPUID tells the guest: what KVM supports, with the topology of this VM.
//! Leaves: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use crate::host::{self, HostClass};

/// KVM's own feature leaf (Linux, Documentation/virt/kvm/x86/cpuid.rst).
const KVM_FEATURES: u32 = 0x4000_0001;

/// Whether KVM emulates the local APIC's TSC-deadline timer; its CPUID does not say so by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TscDeadline(pub bool);

/// Adapts KVM's supported CPUID for vCPU `index` of `vcpus`: one package, one thread a core, the
/// APIC id is the index.
pub fn for_vcpu(
    supported: &CpuId,
    index: u32,
    vcpus: u32,
    class: HostClass,
    deadline: TscDeadline,
) -> CpuId {
    const TSC_DEADLINE: u32 = 1 << 24;
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        if entry.function == KVM_FEATURES {
            entry.eax = host::kvm_features(class, entry.eax);
        }
        if entry.function == 1 && deadline.0 {
            entry.ecx |= TSC_DEADLINE;
        }
        adapt(entry, index, vcpus);
    }
    cpuid
}

/// How many bits an APIC id of `vcpus` processors has.
fn id_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

fn adapt(entry: &mut kvm_cpuid_entry2, index: u32, vcpus: u32) {
    const HYPERVISOR: u32 = 1 << 31;
    const HTT: u32 = 1 << 28;
    match (entry.function, entry.index) {
        (1, _) => {
            // EBX: APIC id, logical processors, (CLFLUSH size stays), brand
            entry.ebx = index << 24 | (1 << id_bits(vcpus)) << 16 | (entry.ebx & 0xffff);
            entry.ecx |= HYPERVISOR;
            entry.edx = if vcpus > 1 {
                entry.edx | HTT
            } else {
                entry.edx & !HTT
            };
        }
        // Deterministic cache parameters: no cache is shared below the package, and the package has
        // all cores.
        (4, _) => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { vcpus - 1 } else { 0 };
            let cores = (1_u32 << id_bits(vcpus)) - 1;
            entry.eax = (entry.eax & 0x3fff) | sharing << 14 | cores.min(63) << 26;
        }
        // Power management and performance counters are not ours to give.
        (6 | 0xa, _) => {
            entry.eax = 0;
            entry.ebx = 0;
            entry.ecx = 0;
            entry.edx = 0;
        }
        // Extended topology: level 0 is the thread, level 1 the core, the rest does not exist.
        (0xb | 0x1f, 0) => {
            entry.eax = 0;
            entry.ebx = 1;
            entry.ecx = 1 << 8;
            entry.edx = index;
        }
        (0xb | 0x1f, 1) => {
            entry.eax = id_bits(vcpus);
            entry.ebx = vcpus;
            entry.ecx = 2 << 8 | 1;
            entry.edx = index;
        }
        (0xb | 0x1f, level) => {
            entry.eax = 0;
            entry.ebx = 0;
            entry.ecx = level;
            entry.edx = index;
        }
        // AMD: number of cores and APIC id size
        (0x8000_0008, _) => {
            entry.ecx = (entry.ecx & !0xf0ff) | id_bits(vcpus) << 12 | (vcpus - 1);
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapted(function: u32, subleaf: u32, index: u32, vcpus: u32) -> kvm_cpuid_entry2 {
        let entry = kvm_cpuid_entry2 {
            function,
            index: subleaf,
            ebx: 0x0a0b_0800,
            ..kvm_cpuid_entry2::default()
        };
        let supported = CpuId::from_entries(&[entry]).unwrap();
        for_vcpu(
            &supported,
            index,
            vcpus,
            HostClass::Emulated,
            TscDeadline(true),
        )
        .as_slice()[0]
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_and_the_same_count() {
        let entry = adapted(1, 0, 2, 3);
        assert_eq!(entry.ebx, 0x0204_0800);
        assert_ne!(entry.ecx & 1 << 31, 0);
        assert_ne!(entry.ecx & 1 << 24, 0);
        assert_ne!(entry.edx & 1 << 28, 0);
        assert_eq!(adapted(1, 0, 0, 1).edx & 1 << 28, 0);
    }

    #[test]
    fn an_emulated_guest_is_offered_no_hypercall() {
        let entry = kvm_cpuid_entry2 {
            function: KVM_FEATURES,
            eax: u32::MAX,
            ..kvm_cpuid_entry2::default()
        };
        let supported = CpuId::from_entries(&[entry]).unwrap();
        let eax = |class| for_vcpu(&supported, 0, 1, class, TscDeadline(false)).as_slice()[0].eax;
        assert_eq!(!eax(HostClass::Emulated), 1 << 7 | 1 << 11 | 1 << 13);
        assert_eq!(eax(HostClass::Hardware), u32::MAX);
    }

    #[test]
    fn the_extended_topology_has_two_levels() {
        assert_eq!(adapted(0xb, 0, 5, 32).edx, 5);
        assert_eq!(adapted(0xb, 1, 5, 32).eax, 5);
        assert_eq!(adapted(0xb, 1, 5, 32).ebx, 32);
        assert_eq!(adapted(0x1f, 2, 5, 32).ebx, 0);
    }
}
