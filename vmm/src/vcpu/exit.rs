//! One VM exit. Each is hostile input: a guest program can cause most of them at will.

use kvm_ioctls::{VcpuExit, VcpuFd};
use ratoon_vmm_api::Outcome;

use crate::bus::Bus;
use crate::host::fallback;

/// What to do after an exit.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum After {
    /// Enter the guest again.
    GoOn,
    /// A signal or `immediate_exit` ended KVM_RUN.
    Interrupted,
}

/// Why a vCPU, and with it the VM, cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The guest ended the VM.
    #[error("{0}")]
    Ended(Outcome),
    /// KVM_RUN failed.
    #[error("KVM cannot run the guest at rip {rip:#x}")]
    Run {
        /// Where the guest was.
        rip: u64,
        /// KVM's word.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Three faults in a row.
    #[error("the guest's processor shut down after a triple fault at rip {rip:#x}")]
    TripleFault {
        /// Where the guest was.
        rip: u64,
    },
    /// The emulator lacks an instruction and so do we.
    #[error("KVM cannot emulate the guest's instruction {bytes} at rip {rip:#x}")]
    Instruction {
        /// Where the guest was.
        rip: u64,
        /// The instruction's bytes, in hex.
        bytes: String,
    },
    /// The CPU refused the guest's state.
    #[error("the processor refuses the guest's state (hardware reason {reason:#x})")]
    Entry {
        /// The hardware's number.
        reason: u64,
    },
    /// An exit that no guest of ours should cause.
    #[error("unexpected exit from the guest at rip {rip:#x}: {exit}")]
    Unexpected {
        /// Where the guest was.
        rip: u64,
        /// KVM's name of it.
        exit: String,
    },
}

/// Enters the guest and handles the exit.
pub(super) fn run_once(vcpu: &mut VcpuFd, bus: &Bus) -> Result<After, VcpuError> {
    let unexpected = match vcpu.run() {
        Ok(VcpuExit::IoOut(port, data)) => {
            return match bus.port_write(port, data) {
                Some(outcome) => Err(VcpuError::Ended(outcome)),
                None => Ok(After::GoOn),
            };
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            bus.port_read(port, data);
            return Ok(After::GoOn);
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            bus.mmio_write(address, data);
            return Ok(After::GoOn);
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            bus.mmio_read(address, data);
            return Ok(After::GoOn);
        }
        Ok(VcpuExit::Intr) => return Ok(After::Interrupted),
        Ok(VcpuExit::Shutdown) => return Err(VcpuError::TripleFault { rip: rip(vcpu) }),
        Ok(VcpuExit::FailEntry(reason, _)) => return Err(VcpuError::Entry { reason }),
        Ok(VcpuExit::InternalError) => return internal_error(vcpu),
        Ok(other) => format!("{other:?}"),
        Err(error) if error.errno() == libc::EINTR => return Ok(After::Interrupted),
        Err(error) if error.errno() == libc::EAGAIN => return Ok(After::GoOn),
        Err(source) => {
            return Err(VcpuError::Run {
                rip: rip(vcpu),
                source,
            });
        }
    };
    Err(VcpuError::Unexpected {
        rip: rip(vcpu),
        exit: unexpected,
    })
}

fn rip(vcpu: &VcpuFd) -> u64 {
    vcpu.get_regs().map_or(0, |regs| regs.rip)
}

fn internal_error(vcpu: &mut VcpuFd) -> Result<After, VcpuError> {
    let Some(bytes) = fallback::failed_instruction(vcpu) else {
        return Err(VcpuError::Unexpected {
            rip: rip(vcpu),
            exit: "KVM internal error".into(),
        });
    };
    match fallback::decode(&bytes) {
        Some(found) => {
            fallback::apply(vcpu, found).map_err(|source| VcpuError::Run {
                rip: rip(vcpu),
                source,
            })?;
            Ok(After::GoOn)
        }
        None => Err(VcpuError::Instruction {
            rip: rip(vcpu),
            bytes: bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
        }),
    }
}
