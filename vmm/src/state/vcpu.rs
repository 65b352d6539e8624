//! One vCPU's state, taken while its thread holds it between two instructions.
//!
//! The order of reading and writing is KVM's wish (Documentation/virt/kvm/api.rst): pending events
//! are read after all that may create them, and written last; the local APIC's timer before the
//! deadline that it waits for.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::StateError;

/// IA32_TSC_DEADLINE: written after the local APIC and all other MSRs.
const TSC_DEADLINE: u32 = 0x6e0;
/// Most MSRs that a state may have.
const MAX_MSRS: usize = 1024;

/// One vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// What the guest was told of its processor.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: Box<kvm_lapic_state>,
    /// Number and value.
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
}

fn step(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Kvm { what, source }
}

impl VcpuState {
    /// Reads all of it. `msrs` are the numbers of those that this host has.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn save(vcpu: &VcpuFd, msrs: &[u32]) -> Result<Self, StateError> {
        let mp_state = vcpu.get_mp_state().map_err(step("run state"))?;
        let regs = vcpu.get_regs().map_err(step("general registers"))?;
        let sregs = vcpu.get_sregs().map_err(step("special registers"))?;
        let xsave = vcpu.get_xsave().map_err(step("FPU"))?;
        let xcrs = vcpu.get_xcrs().map_err(step("XCRs"))?;
        let debug = vcpu.get_debug_regs().map_err(step("debug registers"))?;
        let lapic = vcpu.get_lapic().map_err(step("local APIC"))?;
        let cpuid = vcpu
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(step("CPUID"))?;
        let msrs = read_msrs(vcpu, msrs)?;
        let events = vcpu.get_vcpu_events().map_err(step("pending events"))?;
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
            mp_state,
            regs,
            sregs,
            xsave: Box::new(xsave),
            xcrs,
            debug,
            lapic: Box::new(lapic),
            msrs,
            events,
        })
    }

    /// Its CPUID in KVM's form.
    ///
    /// # Errors
    /// More entries than KVM takes.
    pub fn cpuid(&self) -> Result<CpuId, StateError> {
        CpuId::from_entries(&self.cpuid).map_err(|_| StateError::Damaged("the list of CPUID"))
    }

    /// Writes all of it into a vCPU that has its CPUID and has never run.
    ///
    /// # Errors
    /// When KVM refuses, or the state cannot be one that was saved.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), StateError> {
        vcpu.set_mp_state(self.mp_state)
            .map_err(step("run state"))?;
        vcpu.set_regs(&self.regs)
            .map_err(step("general registers"))?;
        vcpu.set_sregs(&self.sregs)
            .map_err(step("special registers"))?;
        // SAFETY: without the permission for dynamic features, which we never ask for, the kernel
        // reads no more than the 4096 bytes of a `kvm_xsave`.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(step("FPU"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(step("XCRs"))?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(step("debug registers"))?;
        vcpu.set_lapic(&self.lapic).map_err(step("local APIC"))?;
        self.write_msrs(vcpu)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(step("pending events"))
    }

    /// Only those that differ: each one costs.
    fn write_msrs(&self, vcpu: &VcpuFd) -> Result<(), StateError> {
        if self.msrs.len() > MAX_MSRS {
            return Err(StateError::Damaged("the list of MSRs"));
        }
        let numbers: Vec<u32> = self.msrs.iter().map(|(number, _)| *number).collect();
        let fresh = read_msrs(vcpu, &numbers)?;
        let mut differing: Vec<_> = self
            .msrs
            .iter()
            .filter(|msr| !fresh.contains(msr))
            .map(|&(index, data)| kvm_msr_entry {
                index,
                data,
                ..kvm_msr_entry::default()
            })
            .collect();
        differing.sort_by_key(|entry| entry.index == TSC_DEADLINE);
        let msrs =
            Msrs::from_entries(&differing).map_err(|_| StateError::Damaged("the list of MSRs"))?;
        let written = vcpu
            .set_msrs(&msrs)
            .map_err(step("model-specific registers"))?;
        match differing.get(written) {
            None => Ok(()),
            Some(entry) => Err(StateError::Msr(entry.index)),
        }
    }
}

/// Reads those of `numbers` that can be read.
fn read_msrs(vcpu: &VcpuFd, numbers: &[u32]) -> Result<Vec<(u32, u64)>, StateError> {
    let mut values = Vec::with_capacity(numbers.len());
    let mut rest = numbers;
    while !rest.is_empty() {
        let entries: Vec<_> = rest
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..kvm_msr_entry::default()
            })
            .collect();
        let mut msrs =
            Msrs::from_entries(&entries).map_err(|_| StateError::Damaged("the list of MSRs"))?;
        let read = vcpu
            .get_msrs(&mut msrs)
            .map_err(step("model-specific registers"))?;
        values.extend(
            msrs.as_slice()[..read]
                .iter()
                .map(|entry| (entry.index, entry.data)),
        );
        // KVM stops at the first that this guest does not have.
        rest = rest.get(read + 1..).unwrap_or_default();
    }
    Ok(values)
}
