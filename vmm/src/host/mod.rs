//! What kind of KVM this host has, and all that is special about hosts without hardware
//! virtualization (`docs/host-without-vt.md`). Chosen once at start
//! ([`HostClass::detect`]); on hardware nothing here acts.
//!
//! On an *emulated* host (KVM's `kvm_pvm`) guest user code runs on the CPU and guest kernel code in
//! KVM's instruction emulator. Three things follow: [`boot_args`] keeps the guest kernel off
//! instructions that the emulator lacks, [`fallback`] carries out the few that still come, and
//! [`mod@slice`] lets a vCPU run long enough to get on.

pub mod fallback;
pub mod slice;

pub use ratoon_vmm_api::HostClass;

/// Kernel arguments that this kind of host needs, empty on hardware.
///
/// CPUID cannot hide these features on `kvm_pvm` (it forces the host's values), and the kernel
/// patches itself with their instructions, which the emulator lacks. `emulated_kernel` is our own
/// kernel's (docs/kernel.md); others ignore it. `noreplace-smp` leaves out the rewriting of all lock
/// prefixes on one processor, the blacklist many sysfs files: millions of instructions each.
/// `tick_stretch` (our kernel's too) makes a busy vCPU tick every 40 ms: a tick costs 2800 instructions.
/// `lazy_fair_server` (ours, too) keeps a timer of the scheduler's from waking an idle guest a second after each piece of work.
/// `no-kvmapf` saves 4000 at each restore, which else wakes all that wait for a page of the host's.
pub fn boot_args(class: HostClass) -> &'static str {
    match class {
        HostClass::Hardware => "",
        HostClass::Emulated => {
            "emulated_kernel tick_stretch=4 lazy_fair_server noreplace-smp no-kvmapf noxsave nofsgsbase noinvpcid nopcid nopku \
             clearcpuid=smap,smep,umip,popcnt,erms,fsrm,fsrs,rdrand,rdseed,xsaves,serialize,\
             movdiri,movdir64b,clwb,clflushopt,rdtscp,rdpid,cx16,waitpkg \
             nf_conntrack.hashsize=512 initcall_blacklist=slab_late_init,param_sysfs_builtin_init"
        }
    }
}

/// The bits of KVM's feature leaf (CPUID 0x4000_0001, EAX) that the guest may see. A hypercall on an
/// emulated host is patched and tried again for ever, so what rests on one is hidden: PV_UNHALT (7),
/// PV_SEND_IPI (11), PV_SCHED_YIELD (13).
pub fn kvm_features(class: HostClass, features: u32) -> u32 {
    match class {
        HostClass::Hardware => features,
        HostClass::Emulated => features & !(1 << 7 | 1 << 11 | 1 << 13),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_gets_no_workaround() {
        assert_eq!(boot_args(HostClass::Hardware), "");
        assert_eq!(kvm_features(HostClass::Hardware, u32::MAX), u32::MAX);
        assert!(!boot_args(HostClass::Emulated).contains("  "));
    }
}
