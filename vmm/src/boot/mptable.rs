//! The MP table: how a guest without ACPI learns of its processors and interrupt lines.
//! Layout: Intel MultiProcessor Specification 1.4, chapter 4.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::{IOAPIC_ADDRESS, IRQ_LINES, LAPIC_ADDRESS, MP_TABLE};

/// Length of the floating pointer structure, in bytes.
const POINTER_LEN: u64 = 16;
/// Entry types (4.3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
/// Interrupt types (4.3.4).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
/// Version of both kinds of APIC, as KVM emulates them.
const APIC_VERSION: u8 = 0x14;

fn with_checksum(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[at] = sum.wrapping_neg();
    bytes
}

fn pointer() -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend_from_slice(&((MP_TABLE + POINTER_LEN) as u32).to_le_bytes());
    // length in 16 bytes, revision 1.4, checksum, features: a table is present, no PIC mode
    bytes.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]);
    with_checksum(bytes, 10)
}

fn table(vcpus: u32) -> Vec<u8> {
    let ioapic_id = vcpus as u8;
    let mut entries = Vec::new();
    let mut count = 0_u16;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..vcpus as u8 {
        let flags = if id == 0 { 3 } else { 1 }; // enabled, bootstrap processor
        // signature (family 6) and features (APIC, FPU) are not read by Linux
        let mut entry = vec![PROCESSOR, id, APIC_VERSION, flags, 0, 6, 0, 0];
        entry.extend_from_slice(&0x201_u32.to_le_bytes());
        entry.extend_from_slice(&[0; 8]);
        add(&entry);
    }
    add(&[BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a0, a1, a2, a3] = IOAPIC_ADDRESS.to_le_bytes();
    add(&[IOAPIC, ioapic_id, APIC_VERSION, 1, a0, a1, a2, a3]);
    for line in 0..IRQ_LINES as u8 {
        // polarity and trigger as the bus has them: active high, edge
        add(&[IO_INTERRUPT, INT, 0, 0, 0, line, ioapic_id, line]);
    }
    add(&[LOCAL_INTERRUPT, EXT_INT, 0, 0, 0, 0, 0, 0]);
    add(&[LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, 0xff, 1]);

    let mut bytes = b"PCMP".to_vec();
    bytes.extend_from_slice(&(44 + entries.len() as u16).to_le_bytes());
    bytes.extend_from_slice(&[4, 0]); // revision 1.4, checksum
    bytes.extend_from_slice(b"RATOON  MICROVM     ");
    bytes.extend_from_slice(&[0; 6]); // no OEM table
    bytes.extend_from_slice(&count.to_le_bytes());
    bytes.extend_from_slice(&LAPIC_ADDRESS.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]); // no extended table
    bytes.extend_from_slice(&entries);
    with_checksum(bytes, 7)
}

/// Writes the floating pointer and, right behind it, the table.
pub(super) fn write(memory: &GuestMemoryMmap, vcpus: u32) -> Result<(), GuestMemoryError> {
    memory.write_slice(&pointer(), GuestAddress(MP_TABLE))?;
    memory.write_slice(&table(vcpus), GuestAddress(MP_TABLE + POINTER_LEN))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn pointer_and_table_sum_to_zero_and_say_their_length() {
        assert_eq!((pointer().len(), sum(&pointer())), (16, 0));
        for vcpus in [1, 2, 32] {
            let table = table(vcpus);
            assert_eq!(sum(&table), 0);
            assert_eq!(
                usize::from(u16::from_le_bytes([table[4], table[5]])),
                table.len()
            );
            let entries = u32::from(u16::from_le_bytes([table[34], table[35]]));
            assert_eq!(entries, vcpus + 1 + 1 + IRQ_LINES + 2);
        }
    }

    #[test]
    fn the_largest_table_stays_below_one_mebibyte() {
        assert!(MP_TABLE + POINTER_LEN + table(32).len() as u64 <= 0xa0000 + 0x10000);
        // and within the EBDA kibibyte plus what e820 reserves
        assert!(table(32).len() < 1 << 10, "{}", table(32).len());
    }
}
