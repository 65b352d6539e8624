//! A warm shell: a VMM's process made ahead, with a VM, its vCPUs and memory slots, that waits for a generation
//! to start from.
//!
//! ```text
//!   Shell::make (by vCPUs and memory) -- the owner's message --> Configured::with_shell -> … -> Machine
//!                    `---- its owner is gone: it ends
//! ```
//!
//! Its memory is a reservation of addresses: KVM has its slots, and nothing is there. A generation's layers are
//! mapped over it. What a shell has made does not depend on the generation, so that nothing of one is in it.

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use ratoon_vmm_api::HostClass;
use vm_memory::GuestMemoryMmap;

use crate::memory;
use crate::start::{StartError, make_vcpus, open_kvm};

/// A VM that waits for its state.
pub struct Shell {
    pub(crate) kvm: Kvm,
    pub(crate) vm: VmFd,
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) vcpus: Vec<VcpuFd>,
    pub(crate) memory_mib: u64,
}

impl Shell {
    /// Makes one.
    ///
    /// # Errors
    /// No KVM, no permission, no memory.
    pub fn make(vcpus: u32, memory_mib: u64) -> Result<Self, StartError> {
        let class = HostClass::detect();
        let kvm = open_kvm()?;
        let memory = memory::reserve(memory_mib)?;
        let vm = kvm.create_vm().map_err(crate::start::kvm_step("a VM"))?;
        memory::register(&vm, &memory)?;
        let vcpus = make_vcpus(&vm, class, vcpus)?;
        Ok(Self {
            kvm,
            vm,
            memory,
            vcpus,
            memory_mib,
        })
    }
}
