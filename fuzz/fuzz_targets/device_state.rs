//! Saved states of every device that nobody saved: a working device's with members broken, or the
//! input as it is.
//!
//! Rules: no panic; a state is refused, or continued by a device that a few kicks do not kill and
//! that can be saved and continued again; a reset revives it.

#![no_main]

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use ratoon_devices::balloon::{Balloon, Reclaim};
use ratoon_devices::block::{Block, RawFile};
use ratoon_devices::legacy::{Serial, SerialState};
use ratoon_devices::net::{self, Net};
use ratoon_devices::rng::Rng;
use ratoon_devices::virtio::Device;
use ratoon_devices::virtio::mmio::MmioTransport;
use ratoon_devices::virtio::state::TransportState;
use ratoon_devices::virtio::testing::{Echo, MockDriver};
use ratoon_devices::vsock::{CONTROL_PORT, Vsock};
use ratoon_fuzz::{address, kick_or_else, rarely, send_chain};
use serde_json::Value;
use tempfile::TempDir;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Checksums and segmentation, joined buffers, event-idx: what a driver may want.
const WANTED: u64 = u64::MAX;
const CID: u32 = 42;

struct Wire(UnixDatagram);

impl net::Backend for Wire {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Takes no memory back.
struct Nobody;

impl Reclaim for Nobody {
    fn reclaim(&self, _: &GuestMemoryMmap, _: GuestAddress, len: u64) -> std::io::Result<u64> {
        Ok(len)
    }
}

/// Where devices of one input have their sockets and disks.
struct Place {
    dir: TempDir,
    made: u32,
}

impl Place {
    fn new() -> Self {
        let dir = TempDir::new_in("/dev/shm").expect("a folder in memory");
        std::fs::write(dir.path().join("disk"), [0x5a; 64 << 10]).expect("a disk in memory");
        Self { dir, made: 0 }
    }

    /// A new device of the kind, and the socket's path if it is a socket device.
    fn device(&mut self, kind: u8) -> Box<dyn Device> {
        self.made += 1;
        match kind {
            0 => Box::new(Echo::default()),
            1 => Box::new(Rng::new()),
            2 => {
                let (_, wire) = UnixDatagram::pair().expect("a socket pair");
                wire.set_nonblocking(true).expect("a socket");
                Box::new(Net::new(Box::new(Wire(wire)), [2, 0, 0, 0, 0, 1]))
            }
            3 => {
                // Each has the disk alone, as each child has a layer.
                let disk = self.dir.path().join(format!("disk-{}", self.made));
                std::fs::copy(self.dir.path().join("disk"), &disk).expect("a copy in memory");
                let backend = RawFile::open(&disk, false).expect("a disk in memory");
                Box::new(Block::new("disk", Box::new(backend), false))
            }
            4 => Box::new(Balloon::new(Arc::new(Nobody))),
            _ => Box::new(Vsock::new(CID, &self.socket()).expect("a socket in memory")),
        }
    }

    /// The newest device's socket.
    fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join(format!("v{}", self.made))
    }
}

/// A listener for a device's control connection, and those that came.
fn listen(socket: &Path) -> Option<UnixListener> {
    let mut path = socket.as_os_str().to_owned();
    path.push(format!("_{CONTROL_PORT}"));
    let listener = UnixListener::bind(path).ok()?;
    listener.set_nonblocking(true).ok()?;
    Some(listener)
}

/// A packet of the guest without data on its control connection, or one near it.
fn packet(input: &mut Unstructured<'_>, op: u16) -> Result<Vec<u8>> {
    let mut header = Vec::new();
    header.extend(u64::from(CID).to_le_bytes());
    header.extend(2_u64.to_le_bytes());
    let guest_port = 5000 + u32::from(input.int_in_range(0..=3u8)?);
    header.extend(guest_port.to_le_bytes());
    header.extend(CONTROL_PORT.to_le_bytes());
    header.extend(0_u32.to_le_bytes());
    header.extend(1_u16.to_le_bytes());
    header.extend(op.to_le_bytes());
    header.extend(0_u32.to_le_bytes());
    header.extend(input.arbitrary::<u16>()?.to_le_bytes());
    header.extend([0; 2]);
    header.extend(input.arbitrary::<u16>()?.to_le_bytes());
    header.extend([0; 2]);
    Ok(header)
}

/// Some requests, most of them sound, and a kick of each queue.
fn work(driver: &mut MockDriver, input: &mut Unstructured<'_>, kind: u8) -> Result<()> {
    let queues = driver.transport.queue_eventfds().len();
    for queue in 0..queues {
        for _ in 0..input.int_in_range(0..=2u8)? {
            match (kind, queue) {
                (5, 1) => {
                    let op = input.int_in_range(1..=7u16)?;
                    let packet = packet(input, op)?;
                    ratoon_fuzz::send_bytes(driver, input, queue, &[&packet], &[])?;
                }
                (1, _) | (2, 0) | (4 | 5, _) => {
                    ratoon_fuzz::send_bytes(driver, input, queue, &[], &[4096])?;
                }
                (2, _) => send_chain(driver, input, queue, &[12, 60], &[])?,
                _ => send_chain(driver, input, queue, &[16], &[512, 1])?,
            }
        }
        kick_or_else(driver, input, queue, WANTED)?;
    }
    Ok(())
}

/// Breaks one member somewhere in `value`.
fn spoil(value: &mut Value, input: &mut Unstructured<'_>) -> Result<()> {
    match value {
        Value::Object(members) if !members.is_empty() => {
            let index = input.int_in_range(0..=members.len() - 1)?;
            if rarely(input)? {
                let name = members.keys().nth(index).cloned().unwrap_or_default();
                members.remove(&name);
            } else if let Some(member) = members.values_mut().nth(index) {
                spoil(member, input)?;
            }
        }
        Value::Array(entries) if !entries.is_empty() && !rarely(input)? => {
            let index = input.int_in_range(0..=entries.len() - 1)?;
            if rarely(input)? {
                entries.remove(index);
            } else {
                spoil(&mut entries[index], input)?;
            }
        }
        Value::Array(entries) => {
            let entry = entries.first().cloned().unwrap_or(Value::from(7));
            let count = *input.choose(&[1, 3, 70, 5000])?;
            entries.extend(std::iter::repeat_n(entry, count));
        }
        Value::Bool(truth) => *truth = !*truth,
        Value::Null => *value = Value::from("a reason"),
        Value::String(text) => *text = text.repeat(*input.choose(&[0, 2, 200])?),
        other => {
            let before = other.as_u64().unwrap_or_default();
            *other = Value::from(match input.int_in_range(0..=6u8)? {
                0 => address(input)?,
                1 => address(input)? & !0xf,
                2 => *input.choose(&[0, 1, 3, 64, 65, 255, 32768, 65535, 1 << 31])?,
                3 => before ^ 1 << input.int_in_range(0..=63u32)?,
                4 => before.wrapping_add(1),
                5 => before.wrapping_sub(1),
                _ => u64::from(input.arbitrary::<u16>()?),
            });
        }
    }
    Ok(())
}

fn serial(input: &mut Unstructured<'_>) -> Result<()> {
    let Ok(mut serial) = Serial::discard() else {
        return Ok(());
    };
    let mut value = serde_json::to_value(serial.save()).expect("plain data");
    for _ in 0..input.int_in_range(0..=8u8)? {
        spoil(&mut value, input)?;
    }
    let Ok(state) = serde_json::from_value::<SerialState>(value) else {
        return Ok(());
    };
    serial = match serial.restored(&state) {
        Ok(serial) => serial,
        Err(_) => return Ok(()),
    };
    while !input.is_empty() {
        serial.write(input.arbitrary()?, input.arbitrary()?);
        serial.read(input.arbitrary()?);
    }
    Ok(())
}

/// `kind`'s device in the place of the driver's, from `state`; false when it is refused.
fn restore(place: &mut Place, kind: u8, driver: &mut MockDriver, state: &TransportState) -> bool {
    let device = place.device(kind);
    let listener = listen(&place.socket());
    let Ok(transport) = MmioTransport::restore(driver.memory().clone(), device, state) else {
        return false;
    };
    driver.transport = transport;
    let program = listener.and_then(|listener| listener.accept().ok());
    if let Some((program, _)) = program {
        speak(&program);
    }
    true
}

/// What an engine does on a connection that it finds.
fn speak(mut program: &UnixStream) {
    use std::io::{Read, Write};
    let _ = program.set_nonblocking(true);
    let _ = program.write(b"wake");
    let _ = program.read(&mut [0; 4096]);
}

fn run(mut input: Unstructured<'_>) -> Result<()> {
    let kind = input.int_in_range(0..=6u8)?;
    if kind == 6 {
        return serial(&mut input);
    }
    let mut place = Place::new();
    let first = place.device(kind);
    let _listener = listen(&place.socket());
    let mut driver = MockDriver::new_boxed(first);
    if !rarely(&mut input)? {
        driver.probe(WANTED);
        work(&mut driver, &mut input, kind)?;
    }
    for _ in 0..3 {
        let mut value = serde_json::to_value(driver.transport.save()).expect("plain data");
        for _ in 0..input.int_in_range(0..=3u8)? {
            spoil(&mut value, &mut input)?;
        }
        let Ok(state) = serde_json::from_value::<TransportState>(value) else {
            continue;
        };
        if restore(&mut place, kind, &mut driver, &state) {
            for _ in 0..64 {
                if !driver.run_kicks() {
                    break;
                }
                driver.transport.host_event();
            }
            work(&mut driver, &mut input, kind)?;
        }
    }
    driver.probe(WANTED);
    assert!(!driver.transport.needs_reset(), "a reset revives");
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    // As it is, mostly for corpora of real states.
    if let Ok(state) = serde_json::from_slice::<TransportState>(data) {
        let mut place = Place::new();
        for kind in 0..=5 {
            let device = place.device(kind);
            let mut driver = MockDriver::new_boxed(device);
            restore(&mut place, kind, &mut driver, &state);
            driver.run_kicks();
        }
    }
    // Running out of input is the usual end.
    let _ = run(Unstructured::new(data));
});
