//! virtio-rng's requests: chains of any shape.
//!
//! Rules: no panic; a reset revives; no request gets more than the cap.

#![no_main]

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use ratoon_devices::rng::{MAX_REQUEST_BYTES, Rng};
use ratoon_devices::virtio::testing::MockDriver;
use ratoon_fuzz::{kick_or_else, rarely, send_chain};

fn run(mut input: Unstructured<'_>) -> Result<()> {
    let mut driver = MockDriver::new(Rng::new());
    let features = input.arbitrary()?;
    driver.probe(features);
    while !input.is_empty() {
        let count = input.int_in_range(0..=3usize)?;
        let mut writable = Vec::new();
        for _ in 0..=count {
            let large = rarely(&mut input)?;
            writable.push(input.int_in_range(1..=if large { 200_000 } else { 300 })?);
        }
        let readable: &[u32] = if rarely(&mut input)? { &[4] } else { &[] };
        send_chain(&mut driver, &mut input, 0, readable, &writable)?;
        if rarely(&mut input)? {
            // Several requests at one kick.
            continue;
        }
        kick_or_else(&mut driver, &mut input, 0, features)?;
        driver.run_kicks();
        let bytes = counter(&driver, "bytes");
        assert!(bytes <= counter(&driver, "requests") * MAX_REQUEST_BYTES);
    }
    Ok(())
}

fn counter(driver: &MockDriver, name: &str) -> u64 {
    let all = driver.transport.counters();
    all.iter()
        .find(|(n, _)| *n == name)
        .map_or(0, |(_, value)| *value)
}

fuzz_target!(|data: &[u8]| {
    // Running out of input is the usual end.
    let _ = run(Unstructured::new(data));
});
