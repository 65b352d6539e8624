//! virtio-net's two queues and its wire, which is a datagram socket: it keeps frames apart and cuts
//! those that do not fit, as a tap does.
//!
//! Rules: no panic; a reset revives; a guest gets no frame that the host did not send, and no frame
//! is counted twice.

#![no_main]

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use ratoon_devices::net::{Backend, HEADER_BYTES, Net, RX, TX};
use ratoon_devices::virtio::testing::MockDriver;
use ratoon_fuzz::{kick_or_else, rarely, send_bytes};

struct Wire(UnixDatagram);

impl Backend for Wire {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// VIRTIO_NET_F_CSUM and GUEST_CSUM: without them segmentation is refused.
const CHECKSUMS: u64 = 0b11;

fn run(mut input: Unstructured<'_>) -> Result<()> {
    let (host, guest) = UnixDatagram::pair().expect("a socket pair");
    host.set_nonblocking(true).expect("a socket");
    guest.set_nonblocking(true).expect("a socket");
    let mut driver = MockDriver::new(Net::new(Box::new(Wire(guest)), [2, 0, 0, 0, 0, 1]));
    let features = input.arbitrary::<u64>()? | CHECKSUMS;
    driver.probe(features);
    let mut on_the_wire = 0;
    while !input.is_empty() {
        match input.int_in_range(0..=4u8)? {
            0 | 1 => {
                let count = input.int_in_range(0..=12u8)?;
                for _ in 0..=count {
                    let len = *input.choose(&[1530, 128, 12, 4096, 65_562])?;
                    let head = if input.arbitrary()? { &[12][..] } else { &[] };
                    let lens = [head, &[len]].concat();
                    let readable: &[&[u8]] = if rarely(&mut input)? { &[b"x"] } else { &[] };
                    send_bytes(&mut driver, &mut input, RX, readable, &lens)?;
                }
                kick_or_else(&mut driver, &mut input, RX, features)?;
            }
            2 => {
                let len = HEADER_BYTES + input.int_in_range(0..=200usize)?;
                let mut frame = vec![0; len];
                input.fill_buffer(&mut frame)?;
                let cut = input.int_in_range(1..=len - 1)?;
                let (head, body) = frame.split_at(cut);
                let writable: &[u32] = if rarely(&mut input)? { &[16] } else { &[] };
                send_bytes(&mut driver, &mut input, TX, &[head, body], writable)?;
                kick_or_else(&mut driver, &mut input, TX, features)?;
                while host.recv(&mut [0; 4096]).is_ok() {}
            }
            3 => {
                let len = match input.int_in_range(0..=3u8)? {
                    0 => input.int_in_range(0..=70_000usize)?,
                    _ => HEADER_BYTES + input.int_in_range(0..=1600usize)?,
                };
                if host.send(&vec![0x5a; len]).is_ok() {
                    on_the_wire += 1;
                }
                driver.transport.host_event();
            }
            _ => {
                driver.run_kicks();
                driver.take_interrupt();
            }
        }
        let received = counter(&driver, "rx_frames") + counter(&driver, "rx_dropped");
        assert!(
            received <= on_the_wire,
            "{received} of {on_the_wire} frames"
        );
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
