//! The transport's registers in any order, with a device behind them that echoes.
//!
//! Rules: no panic; the status is one that the specification knows; the device is called only
//! between activation and reset; a reset always gives a device that can be probed.

#![no_main]

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use ratoon_devices::virtio::mmio::{register, status};
use ratoon_devices::virtio::testing::{Call, Echo, MockDriver};
use ratoon_fuzz::{address, poke_register, rarely, send_chain};

/// A probe; rarely a queue is set up again with one register wrong, or a step is left out.
fn probe(driver: &mut MockDriver, input: &mut Unstructured<'_>) -> Result<()> {
    let mut features = driver.offered();
    if rarely(input)? {
        features = input.arbitrary()?;
    }
    driver.negotiate(features);
    for queue in 0..2 {
        if rarely(input)? {
            continue;
        }
        driver.set_up_queue(queue);
        if rarely(input)? {
            driver.write32(register::QUEUE_READY, 0);
            break_queue(driver, input)?;
            driver.write32(register::QUEUE_READY, 1);
        }
    }
    if !rarely(input)? {
        driver.add_status(status::DRIVER_OK);
    }
    Ok(())
}

/// Rewrites one register of the selected queue.
fn break_queue(driver: &mut MockDriver, input: &mut Unstructured<'_>) -> Result<()> {
    let offset = *input.choose(&[
        register::QUEUE_DESC_LOW,
        register::QUEUE_DRIVER_LOW,
        register::QUEUE_DEVICE_LOW,
        register::QUEUE_NUM,
    ])?;
    if offset == register::QUEUE_NUM {
        driver.write32(
            offset,
            *input.choose(&[0, 1, 2, 3, 64, 65, 128, 1 << 16, u32::MAX])?,
        );
    } else {
        let mut address = address(input)?;
        if input.arbitrary()? {
            address &= !0xf;
        }
        driver.write32(offset, address as u32);
        driver.write32(offset + 4, (address >> 32) as u32);
    }
    Ok(())
}

fn step(driver: &mut MockDriver, input: &mut Unstructured<'_>) -> Result<()> {
    match input.int_in_range(0..=11u8)? {
        0 => driver.reset(),
        1 | 2 => probe(driver, input)?,
        3 => driver.set_up_queue(input.int_in_range(0..=1)?),
        4 => {
            let bit = *input.choose(&[1, 2, 4, 8, 64, 128])?;
            driver.add_status(bit);
        }
        5 => break_queue(driver, input)?,
        6 => driver.write32(register::QUEUE_READY, input.int_in_range(0..=2)?),
        7 | 8 => {
            let queue = input.int_in_range(0..=1)?;
            send_chain(driver, input, queue, &[8], &[16])?;
        }
        9 => driver.kick(input.int_in_range(0..=2)?),
        10 => driver.transport.kick(input.int_in_range(0..=2)?),
        _ => poke_register(driver, input)?,
    }
    Ok(())
}

fn run(mut input: Unstructured<'_>) -> Result<()> {
    let device = Echo::default();
    let calls = device.calls();
    let mut driver = MockDriver::new(device);
    if input.arbitrary()? {
        probe(&mut driver, &mut input)?;
    }
    while !input.is_empty() {
        step(&mut driver, &mut input)?;
        let value = driver.status();
        assert!(
            matches!(
                value & !(status::DEVICE_NEEDS_RESET | status::FAILED),
                0 | 1 | 3 | 11 | 15
            ),
            "status {value:#x}"
        );
        assert_eq!(
            value & status::DEVICE_NEEDS_RESET != 0,
            driver.transport.needs_reset()
        );
        assert_eq!(
            driver.transport.needs_reset(),
            driver.transport.failure().is_some()
        );
    }
    driver.probe(0);
    assert_eq!(
        driver.status(),
        15,
        "a reset always gives a device that can be probed"
    );

    let mut active = false;
    for call in calls.lock().expect("one thread").iter() {
        match call {
            Call::Activate(_) => {
                assert!(!active, "activated twice");
                active = true;
            }
            Call::Reset => active = false,
            Call::Queue(_) | Call::Host => assert!(active, "called while not active"),
        }
    }
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    // Running out of input is the usual end.
    let _ = run(Unstructured::new(data));
});
