//! Instructions of guest kernels that KVM's emulator lacks, carried out here.
//!
//! KVM reports them as KVM_EXIT_INTERNAL_ERROR, suberror 1, with the instruction's bytes (enable
//! KVM_CAP_EXIT_ON_EMULATION_FAILURE). The table is small on purpose: [`crate::host::boot_args`]
//! keeps a kernel off most of them; each entry costs about 1.6 ms on such a host, so none may be
//! on a hot path. Layouts: Intel SDM volume 2; `struct kvm_run`, `emulation_failure`.

use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, kvm_regs,
};
use kvm_ioctls::VcpuFd;

/// What to do instead of an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// Nothing: go on after `len` bytes. For `fwait` (no x87 exception is pending in a kernel that
    /// has just saved the FPU state) and `stac`/`clac` (the kernel runs with SMAP off).
    Skip {
        /// Instruction length in bytes.
        len: u64,
    },
    /// Raise #BP after one byte: `int3`.
    Breakpoint,
    /// Count the set bits of a register into another: `popcnt`.
    CountBits {
        /// Instruction length in bytes.
        len: u64,
        /// Destination, 0 (rax) to 15 (r15).
        to: u8,
        /// Source, likewise.
        from: u8,
        /// 64-bit operands, else 32-bit.
        wide: bool,
    },
}

/// The instruction at the start of `bytes`, if the table has it.
pub fn decode(bytes: &[u8]) -> Option<Fallback> {
    match *bytes {
        [0xcc, ..] => Some(Fallback::Breakpoint),
        [0x9b, ..] => Some(Fallback::Skip { len: 1 }),
        // clac (ca), stac (cb)
        [0x0f, 0x01, 0xca | 0xcb, ..] => Some(Fallback::Skip { len: 3 }),
        // popcnt r, r: F3 [REX] 0F B8 /r with a register operand
        [0xf3, 0x0f, 0xb8, modrm, ..] if modrm >= 0xc0 => Some(popcnt(4, 0, modrm)),
        [0xf3, rex @ 0x40..=0x4f, 0x0f, 0xb8, modrm, ..] if modrm >= 0xc0 => {
            Some(popcnt(5, rex, modrm))
        }
        _ => None,
    }
}

fn popcnt(len: u64, rex: u8, modrm: u8) -> Fallback {
    Fallback::CountBits {
        len,
        to: (modrm >> 3 & 7) | (rex >> 2 & 1) << 3,
        from: (modrm & 7) | (rex & 1) << 3,
        wide: rex & 8 != 0,
    }
}

/// The bytes of the instruction that the emulator refused, if the last exit is such a failure.
pub fn failed_instruction(vcpu: &mut VcpuFd) -> Option<Vec<u8>> {
    let run = vcpu.get_kvm_run();
    // SAFETY: the caller has seen KVM_EXIT_INTERNAL_ERROR, for which the kernel fills this member
    // of the union; it is plain integers, valid whatever their bits.
    let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
    let has_bytes =
        failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
    if failure.suberror != KVM_INTERNAL_ERROR_EMULATION || failure.ndata == 0 || !has_bytes {
        return None;
    }
    // SAFETY: as above; the union has one member.
    let insn = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
    let len = usize::from(insn.insn_size).min(insn.insn_bytes.len());
    Some(insn.insn_bytes[..len].to_vec())
}

/// Carries `fallback` out on a stopped vCPU.
///
/// # Errors
/// KVM's, when registers or events cannot be set.
pub fn apply(vcpu: &VcpuFd, fallback: Fallback) -> Result<(), kvm_ioctls::Error> {
    let mut regs = vcpu.get_regs()?;
    match fallback {
        Fallback::Skip { len } => regs.rip = regs.rip.wrapping_add(len),
        Fallback::Breakpoint => {
            regs.rip = regs.rip.wrapping_add(1);
            let mut events = vcpu.get_vcpu_events()?;
            events.exception.injected = 1;
            events.exception.nr = 3;
            events.exception.has_error_code = 0;
            vcpu.set_vcpu_events(&events)?;
        }
        Fallback::CountBits {
            len,
            to,
            from,
            wide,
        } => count_bits(&mut regs, len, to, from, wide),
    }
    vcpu.set_regs(&regs)
}

fn count_bits(regs: &mut kvm_regs, len: u64, to: u8, from: u8, wide: bool) {
    let value = *register(regs, from);
    let value = if wide { value } else { value & 0xffff_ffff };
    *register(regs, to) = u64::from(value.count_ones());
    // OF, SF, AF, CF and PF are cleared; ZF says that the source was zero.
    const ARITHMETIC_FLAGS: u64 = 0x8d5;
    const ZF: u64 = 0x40;
    regs.rflags &= !ARITHMETIC_FLAGS;
    if value == 0 {
        regs.rflags |= ZF;
    }
    regs.rip = regs.rip.wrapping_add(len);
}

/// A general register by its number in an instruction's encoding.
fn register(regs: &mut kvm_regs, number: u8) -> &mut u64 {
    match number & 15 {
        0 => &mut regs.rax,
        1 => &mut regs.rcx,
        2 => &mut regs.rdx,
        3 => &mut regs.rbx,
        4 => &mut regs.rsp,
        5 => &mut regs.rbp,
        6 => &mut regs.rsi,
        7 => &mut regs.rdi,
        8 => &mut regs.r8,
        9 => &mut regs.r9,
        10 => &mut regs.r10,
        11 => &mut regs.r11,
        12 => &mut regs.r12,
        13 => &mut regs.r13,
        14 => &mut regs.r14,
        _ => &mut regs.r15,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_knows_its_instructions_and_no_other() {
        assert_eq!(decode(&[0xcc]), Some(Fallback::Breakpoint));
        assert_eq!(decode(&[0x9b, 0xdd]), Some(Fallback::Skip { len: 1 }));
        assert_eq!(decode(&[0x0f, 0x01, 0xcb]), Some(Fallback::Skip { len: 3 }));
        // popcnt rax, rdi (F3 48 0F B8 C7), as arch_hweight64 has it
        assert_eq!(
            decode(&[0xf3, 0x48, 0x0f, 0xb8, 0xc7]),
            Some(Fallback::CountBits {
                len: 5,
                to: 0,
                from: 7,
                wide: true
            })
        );
        // popcnt eax, edi
        assert_eq!(
            decode(&[0xf3, 0x0f, 0xb8, 0xc7]),
            Some(Fallback::CountBits {
                len: 4,
                to: 0,
                from: 7,
                wide: false
            })
        );
        // popcnt rax, [rdi]: a memory operand is not in the table
        assert_eq!(decode(&[0xf3, 0x48, 0x0f, 0xb8, 0x07]), None);
        assert_eq!(decode(&[]), None);
        assert_eq!(decode(&[0x90]), None);
    }

    #[test]
    fn counting_bits_sets_the_result_and_the_flags() {
        let mut regs = kvm_regs {
            rdi: 0xff00_0000_0001,
            rflags: 0x8d7,
            rip: 100,
            ..kvm_regs::default()
        };
        count_bits(&mut regs, 5, 0, 7, true);
        assert_eq!((regs.rax, regs.rip, regs.rflags), (9, 105, 0x2));
        count_bits(&mut regs, 4, 8, 7, false);
        assert_eq!(regs.r8, 1);
        regs.rdi = 0;
        count_bits(&mut regs, 4, 0, 7, false);
        assert_eq!((regs.rax, regs.rflags), (0, 0x42));
    }
}
