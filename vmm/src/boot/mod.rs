//! From files to a guest that is about to run its first instruction: the Linux 64-bit boot protocol
//! (Linux, Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").
//!
//! What lies where below 1 MiB:
//!
//! ```text
//!  0x00500 GDT        0x07000 boot_params ("zero page")   0x09000 page tables (3 pages)
//!  0x0c000 seed for random numbers   0x20000 command line (up to 4 KiB)   0x9fc00 MP table
//! ```
//! The kernel goes where its ELF headers say (16 MiB), the initramfs to the end of low memory.

mod kernel;
mod mptable;
mod params;
mod registers;
mod transfer;

pub use kernel::{BootError, Loaded, load};
pub use registers::{RegisterError, set_up as set_up_registers};

/// Where the MP table, and with it the reserved memory below 1 MiB, begins.
const MP_TABLE: u64 = 0x9fc00;
/// Where RAM goes on after the reserved megabyte.
const HIGH_RAM: u64 = 0x10_0000;
const ZERO_PAGE: u64 = 0x7000;
const GDT: u64 = 0x500;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORY: u64 = 0xb000;
const RNG_SEED: u64 = 0xc000;
const BOOT_STACK: u64 = 0x8ff0;
const COMMAND_LINE: u64 = 0x20000;
/// COMMAND_LINE_SIZE of x86 is 2048; a longer one is cut by the kernel, so it is refused here.
const COMMAND_LINE_MAX: usize = 2048;

/// The interrupt lines of the IOAPIC, 0 to 23.
pub const IRQ_LINES: u32 = 24;
/// Physical addresses of the interrupt controllers, as KVM has them.
const LAPIC_ADDRESS: u32 = 0xfee0_0000;
const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
