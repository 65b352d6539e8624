//! virtio-balloon's reports: runs of any place and length.
//!
//! Rules: no panic; a reset revives; what is handed over is whole pages in guest memory.

#![no_main]

use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use ratoon_devices::balloon::{Balloon, PAGE_BYTES, REPORTING, Reclaim};
use ratoon_devices::virtio::testing::{BUFFERS, MEMORY_LEN, MockDriver};
use ratoon_fuzz::{kick_or_else, rarely, send_chain};
use vm_memory::{GuestAddress, GuestMemoryMmap};

struct Host;

impl Reclaim for Host {
    fn reclaim(
        &self,
        _memory: &GuestMemoryMmap,
        address: GuestAddress,
        len: u64,
    ) -> std::io::Result<u64> {
        assert!(len > 0 && len % PAGE_BYTES == 0 && address.0 % PAGE_BYTES == 0);
        assert!(address.0 < MEMORY_LEN && len <= MEMORY_LEN - address.0);
        match address.0 / PAGE_BYTES % 7 {
            0 => Err(std::io::ErrorKind::OutOfMemory.into()),
            _ => Ok(len),
        }
    }
}

/// Addresses at which something could tip over.
const EDGES: [u64; 6] = [
    0,
    PAGE_BYTES - 1,
    MEMORY_LEN - PAGE_BYTES,
    MEMORY_LEN - 1,
    MEMORY_LEN,
    u64::MAX,
];

fn run(mut input: Unstructured<'_>) -> Result<()> {
    let mut driver = MockDriver::new(Balloon::new(Arc::new(Host)));
    let features = input.arbitrary()?;
    driver.probe(features);
    while !input.is_empty() {
        if rarely(&mut input)? {
            // The other queues, and chains that break single rules.
            let queue = input.int_in_range(0..=REPORTING)?;
            let readable: &[u32] = if input.arbitrary()? { &[8] } else { &[] };
            let writable: &[u32] = if input.arbitrary()? { &[4096, 12] } else { &[] };
            send_chain(&mut driver, &mut input, queue, readable, writable)?;
            kick_or_else(&mut driver, &mut input, queue, features)?;
            driver.run_kicks();
            continue;
        }
        let count = input.int_in_range(1..=40usize)?;
        let mut runs = Vec::new();
        for _ in 0..count {
            let address = match rarely(&mut input)? {
                true => *input.choose(&EDGES)?,
                false => BUFFERS + input.int_in_range(0..=2000)? * PAGE_BYTES,
            };
            let len = match rarely(&mut input)? {
                true => input.arbitrary()?,
                false => input.int_in_range(1..=64u32)? * PAGE_BYTES as u32,
            };
            runs.push((address, len, !rarely(&mut input)?));
        }
        let head = driver.lay_chain(REPORTING, &runs);
        driver.offer(REPORTING, head);
        if rarely(&mut input)? {
            // Several reports at one kick.
            continue;
        }
        kick_or_else(&mut driver, &mut input, REPORTING, features)?;
        driver.run_kicks();
        let _ = driver.read_config(input.int_in_range(0..=300)?, 8);
    }
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    // Running out of input is the usual end.
    let _ = run(Unstructured::new(data));
});
