//! The zero page: `struct boot_params` with the e820 memory map, and the seed of the guest's random
//! numbers that it points to.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

use super::kernel::BootError;
use super::{COMMAND_LINE, HIGH_RAM, MP_TABLE, RNG_SEED, ZERO_PAGE};

/// e820 types (Linux, arch/x86/include/asm/e820/types.h).
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// `boot_params` as bytes.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct ZeroPage(boot_params);

// SAFETY: `boot_params` is the kernel's packed structure of integers and arrays of them, without
// padding; every bit pattern is valid.
unsafe impl ByteValued for ZeroPage {}

fn e820(memory: &GuestMemoryMmap) -> Vec<boot_e820_entry> {
    let entry = |addr, end: u64, kind| boot_e820_entry {
        addr,
        size: end - addr,
        r#type: kind,
    };
    let mut map = vec![
        entry(0, MP_TABLE, E820_RAM),
        entry(MP_TABLE, HIGH_RAM, E820_RESERVED),
    ];
    for region in memory.iter() {
        let start = region.start_addr().0;
        map.push(entry(start.max(HIGH_RAM), start + region.len(), E820_RAM));
    }
    map
}

/// SETUP_RNG_SEED (Linux, arch/x86/include/uapi/asm/setup_data.h).
const SETUP_RNG_SEED: u32 = 9;
/// As much as the kernel's generator holds.
const SEED_LEN: usize = 32;

/// Writes a `struct setup_data` with a fresh seed: the guest has good random numbers from its first
/// instruction, and need not stir what little it has again and again. The kernel wipes it.
fn write_seed(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    let mut seed = [0; SEED_LEN];
    let mut filled = 0;
    while filled < SEED_LEN {
        match getrandom(&mut seed[filled..], GetRandomFlags::empty()) {
            Ok(len) => filled += len,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(BootError::Random(errno.into())),
        }
    }
    let mut data = Vec::with_capacity(16 + SEED_LEN);
    data.extend_from_slice(&0_u64.to_le_bytes()); // no next one
    data.extend_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    data.extend_from_slice(&(SEED_LEN as u32).to_le_bytes());
    data.extend_from_slice(&seed);
    memory
        .write_slice(&data, GuestAddress(RNG_SEED))
        .map_err(BootError::Memory)
}

/// Writes the zero page. `initramfs` is its address and length; `command_line_len` is in bytes.
pub(super) fn write(
    memory: &GuestMemoryMmap,
    initramfs: Option<(u64, u64)>,
    command_line_len: u32,
) -> Result<(), BootError> {
    write_seed(memory)?;
    let mut page = ZeroPage::default();
    let params = &mut page.0;
    // boot.rst: boot_flag, header magic, "other" loader.
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = 0x5372_6448;
    params.hdr.type_of_loader = 0xff;
    params.hdr.kernel_alignment = 0x100_0000;
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    params.hdr.cmdline_size = command_line_len;
    params.hdr.setup_data = RNG_SEED;
    if let Some((start, len)) = initramfs {
        // Both fit: the initramfs lies below 3 GiB.
        params.hdr.ramdisk_image = start as u32;
        params.hdr.ramdisk_size = len as u32;
    }
    let map = e820(memory);
    params.e820_entries = map.len() as u8;
    params.e820_table[..map.len()].copy_from_slice(&map);
    memory
        .write_obj(page, GuestAddress(ZERO_PAGE))
        .map_err(BootError::Memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(memory_mib: u64) -> Vec<(u64, u64, u32)> {
        e820(&crate::memory::create(memory_mib).unwrap())
            .iter()
            .map(|entry| {
                let boot_e820_entry { addr, size, r#type } = *entry;
                (addr, addr + size, r#type)
            })
            .collect()
    }

    #[test]
    fn no_two_guests_begin_with_the_same_seed() {
        let seed = || {
            let memory = crate::memory::create(64).unwrap();
            write(&memory, None, 1).unwrap();
            let page: ZeroPage = memory.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
            let mut data = [0; 16 + SEED_LEN];
            memory
                .read_slice(&mut data, GuestAddress(page.0.hdr.setup_data))
                .unwrap();
            assert_eq!(
                data[..16],
                [0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 32, 0, 0, 0]
            );
            data[16..].to_vec()
        };
        assert_ne!(seed(), seed());
    }

    #[test]
    fn the_memory_map_names_all_ram_and_not_the_hole() {
        assert_eq!(
            plain(128),
            [
                (0, MP_TABLE, E820_RAM),
                (MP_TABLE, HIGH_RAM, E820_RESERVED),
                (HIGH_RAM, 128 << 20, E820_RAM)
            ]
        );
        assert_eq!(
            plain(4096)[2..],
            [(HIGH_RAM, 3 << 30, E820_RAM), (4 << 30, 5 << 30, E820_RAM)]
        );
    }
}
