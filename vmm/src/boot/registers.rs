//! The state in which the 64-bit boot protocol wants vCPU 0: long mode, flat segments, the first
//! GiB mapped one to one, RSI at the zero page.

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::{BOOT_STACK, GDT, Loaded, PAGE_DIRECTORY, PDPT, PML4, ZERO_PAGE};

/// Why a vCPU cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// KVM refused.
    #[error("KVM refuses the boot values of the {what}")]
    Kvm {
        /// Which registers.
        what: &'static str,
        /// KVM's word.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The tables do not fit into guest memory.
    #[error("guest memory")]
    Memory(#[source] GuestMemoryError),
}

/// Sets up vCPU `index`: the first gets the boot state, the others what they have after reset, as
/// the guest starts them with INIT and SIPI.
///
/// # Errors
/// [`RegisterError`].
pub fn set_up(
    vcpu: &VcpuFd,
    index: u32,
    memory: &GuestMemoryMmap,
    loaded: Loaded,
) -> Result<(), RegisterError> {
    set_msrs(vcpu)?;
    set_lapic(vcpu)?;
    if index > 0 {
        return Ok(());
    }
    let kvm = |what| move |source| RegisterError::Kvm { what, source };
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..kvm_fpu::default()
    };
    vcpu.set_fpu(&fpu).map_err(kvm("FPU"))?;
    let regs = kvm_regs {
        rflags: 2,
        rip: loaded.entry.0,
        rsp: BOOT_STACK,
        rbp: BOOT_STACK,
        rsi: ZERO_PAGE,
        ..kvm_regs::default()
    };
    vcpu.set_regs(&regs).map_err(kvm("general registers"))?;
    write_tables(memory).map_err(RegisterError::Memory)?;
    set_segments(vcpu).map_err(kvm("segments"))
}

/// Only what differs from reset: each MSR costs.
fn set_msrs(vcpu: &VcpuFd) -> Result<(), RegisterError> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    };
    let msrs = Msrs::from_entries(&[
        entry(0x1a0, 1),           // IA32_MISC_ENABLE: fast strings
        entry(0x2ff, 1 << 11 | 6), // IA32_MTRR_DEF_TYPE: on, write-back
    ])
    .expect("two entries are below the limit");
    let what = "model-specific registers";
    match vcpu.set_msrs(&msrs) {
        Ok(2) => Ok(()),
        Ok(_) => Err(RegisterError::Kvm {
            what,
            source: kvm_ioctls::Error::new(libc::EINVAL),
        }),
        Err(source) => Err(RegisterError::Kvm { what, source }),
    }
}

/// LINT0 takes external interrupts, LINT1 the NMI, as the MP table says.
fn set_lapic(vcpu: &VcpuFd) -> Result<(), RegisterError> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const MODE_EXT_INT: u32 = 7;
    const MODE_NMI: u32 = 4;
    let kvm = |source| RegisterError::Kvm {
        what: "local APIC",
        source,
    };
    let mut lapic = vcpu.get_lapic().map_err(kvm)?;
    for (offset, mode) in [(LVT_LINT0, MODE_EXT_INT), (LVT_LINT1, MODE_NMI)] {
        let bytes = [
            lapic.regs[offset],
            lapic.regs[offset + 1],
            lapic.regs[offset + 2],
            lapic.regs[offset + 3],
        ];
        let value = u32::from_le_bytes(bytes.map(|byte| byte as u8));
        let value = (value & !0x700) | mode << 8;
        for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
            lapic.regs[offset + i] = byte as _;
        }
    }
    vcpu.set_lapic(&lapic).map_err(kvm)
}

/// A flat 64-bit code segment, a flat data segment and a TSS, as GDT entries (SDM 3A, 3.4.5).
const GDT_ENTRIES: [u64; 4] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x008f_8b00_0000_ffff,
];

/// The register form of GDT entry `index`.
fn segment(index: usize) -> kvm_segment {
    let entry = GDT_ENTRIES[index];
    let bits = |shift: u32, mask: u64| (entry >> shift & mask) as u8;
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: (index * 8) as u16,
        type_: bits(40, 0xf),
        s: bits(44, 1),
        dpl: bits(45, 3),
        present: bits(47, 1),
        avl: bits(52, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: bits(55, 1),
        unusable: 0,
        padding: 0,
    }
}

fn write_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE_PAGE: u64 = 1 << 7;
    for (i, entry) in GDT_ENTRIES.iter().enumerate() {
        memory.write_obj(*entry, GuestAddress(GDT + i as u64 * 8))?;
    }
    memory.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    memory.write_obj(PAGE_DIRECTORY | PRESENT_WRITABLE, GuestAddress(PDPT))?;
    let mut directory = [0_u8; 4096];
    for (i, entry) in directory.chunks_exact_mut(8).enumerate() {
        let entry_value = ((i as u64) << 21) | LARGE_PAGE | PRESENT_WRITABLE;
        entry.copy_from_slice(&entry_value.to_le_bytes());
    }
    memory.write_slice(&directory, GuestAddress(PAGE_DIRECTORY))
}

fn set_segments(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    const CR0_PE: u64 = 1;
    const CR0_PG: u64 = 1 << 31;
    const CR0_ET: u64 = 1 << 4;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
    let mut sregs = vcpu.get_sregs()?;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (GDT_ENTRIES.len() * 8 - 1) as u16;
    sregs.cs = segment(1);
    sregs.ds = segment(2);
    sregs.es = segment(2);
    sregs.fs = segment(2);
    sregs.gs = segment(2);
    sregs.ss = segment(2);
    sregs.tr = segment(3);
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME_LMA;
    vcpu.set_sregs(&sregs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_segments_are_flat_and_of_the_right_kind() {
        let code = segment(1);
        assert_eq!(
            (code.selector, code.type_, code.l, code.db, code.g, code.s),
            (8, 0xb, 1, 0, 1, 1)
        );
        let data = segment(2);
        assert_eq!((data.selector, data.type_, data.l, data.db), (16, 3, 0, 1));
        let task = segment(3);
        assert_eq!((task.selector, task.type_, task.s), (24, 0xb, 0));
    }
}
