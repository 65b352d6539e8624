//! Random interleavings of host programs and a guest: every byte arrives, in order, once; nobody
//! exceeds the other's credit; nobody stands still.

use super::guest::RX_BUFFER;
use super::*;
use crate::vsock::connection::BUF_ALLOC;

/// xorshift64*: the same interleaving for the same seed.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % sides
    }
}

const GUEST_ALLOC: u32 = 20_000;

/// Both ends of one connection, and what each should have got.
struct Pair {
    host: Option<UnixStream>,
    host_port: u32,
    guest_port: u32,
    // To the guest.
    host_wrote: Vec<u8>,
    guest_got: Vec<u8>,
    guest_buffered: u32,
    guest_taken: u32,
    // To the host.
    guest_wrote: Vec<u8>,
    host_got: Vec<u8>,
    device_alloc: u32,
    device_taken: u32,
    host_closed: bool,
    guest_closed: bool,
    /// The device said that no more comes.
    told: bool,
    reset: bool,
}

impl Pair {
    fn header(&self, op: Op, len: usize) -> Header {
        Header {
            len: len as u32,
            buf_alloc: GUEST_ALLOC,
            fwd_cnt: self.guest_taken,
            ..header(op, self.guest_port, self.host_port)
        }
    }

    fn device_credit(&self) -> usize {
        (self.device_alloc - (self.guest_wrote.len() as u32 - self.device_taken)) as usize
    }
}

fn deliver(guest: &mut Guest, pairs: &mut [Pair]) {
    while let Some(packet) = guest.inbox.pop_front() {
        let ports = (packet.header.src_port, packet.header.dst_port);
        let pair = pairs
            .iter_mut()
            .find(|pair| (pair.host_port, pair.guest_port) == ports)
            .expect("a packet of a connection");
        if pair.reset {
            // The answer to what the guest had under way.
            assert_eq!(packet.op(), Some(Op::Reset), "after a reset");
            continue;
        }
        let header = packet.header;
        if packet.op() != Some(Op::Reset) {
            assert_eq!(header.buf_alloc, BUF_ALLOC);
            pair.device_alloc = header.buf_alloc;
            pair.device_taken = header.fwd_cnt;
        }
        match packet.op() {
            Some(Op::Data) => {
                assert!(!pair.told, "data after the end");
                assert!(header.len <= RX_BUFFER);
                pair.guest_buffered += header.len;
                assert!(pair.guest_buffered <= GUEST_ALLOC, "beyond the credit");
                pair.guest_got.extend(packet.data);
            }
            Some(Op::Shutdown) => {
                pair.told |= header.flags & NO_SEND != 0;
                assert!(pair.host_closed);
            }
            Some(Op::Reset) => pair.reset = true,
            Some(Op::CreditRequest) => {
                let update = pair.header(Op::CreditUpdate, 0);
                if guest.may_queue() {
                    guest.send(update, &[], &[]);
                }
            }
            Some(Op::CreditUpdate) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// The guest's program reads `len` bytes; its kernel tells the device.
fn guest_reads(guest: &mut Guest, pair: &mut Pair, len: u32) {
    if pair.reset {
        // What has come can still be read, and nobody is told.
        pair.guest_buffered = 0;
    }
    let len = len.min(pair.guest_buffered);
    if len > 0 && guest.may_queue() {
        pair.guest_buffered -= len;
        pair.guest_taken += len;
        let update = pair.header(Op::CreditUpdate, 0);
        guest.send(update, &[], &[]);
    }
}

fn interleave(seed: u64, features: u64) {
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut guest = Guest::with_features(features);
    let mut pairs = Vec::new();
    for index in 0..1 + dice.roll(5) {
        let guest_port = 1000 + index as u32;
        let (host, host_port) = if dice.roll(2) == 0 {
            opened(&mut guest, guest_port)
        } else {
            let host_port = 50 + index as u32;
            (accepted(&mut guest, guest_port, host_port), host_port)
        };
        pairs.push(Pair {
            host: Some(host),
            host_port,
            guest_port,
            host_wrote: Vec::new(),
            guest_got: Vec::new(),
            guest_buffered: 0,
            guest_taken: 0,
            guest_wrote: Vec::new(),
            host_got: Vec::new(),
            device_alloc: BUF_ALLOC,
            device_taken: 0,
            host_closed: false,
            guest_closed: false,
            told: false,
            reset: false,
        });
    }
    // Their credit in these answers was larger than what the guest keeps to from here on.
    for pair in &pairs {
        guest.send(pair.header(Op::CreditUpdate, 0), &[], &[]);
    }
    guest.settle();
    let steps = 600;
    for step in 0..steps {
        let which = dice.roll(pairs.len());
        let pair = &mut pairs[which];
        match dice.roll(12) {
            0..=2 => {
                let len = 1 + dice.roll(40_000);
                let from = pair.host_wrote.len() * 31 + which;
                let bytes: Vec<u8> = (0..len).map(|i| (from + i * 7) as u8).collect();
                if let (Some(host), false) = (&pair.host, pair.host_closed) {
                    let done = write_some(host, &bytes);
                    pair.host_wrote.extend(&bytes[..done]);
                }
            }
            3..=5 => {
                let len = (1 + dice.roll(60_000)).min(pair.device_credit());
                if len > 0 && !pair.guest_closed && guest.may_queue() {
                    let from = pair.guest_wrote.len() * 13 + which;
                    let bytes: Vec<u8> = (0..len).map(|i| (from + i * 3) as u8).collect();
                    let cuts = [dice.roll(60), 60 + dice.roll(30_000)];
                    let header = pair.header(Op::Data, len);
                    if dice.roll(3) == 0 {
                        guest.queue(header, &bytes, &cuts);
                    } else {
                        guest.send(header, &bytes, &cuts);
                    }
                    pair.guest_wrote.extend(bytes);
                }
            }
            6 | 7 => {
                if let Some(host) = &pair.host {
                    let mut some = vec![0; 1 + dice.roll(100_000)];
                    if let Ok(len) = (&*host).read(&mut some) {
                        pair.host_got.extend(&some[..len]);
                    }
                }
            }
            8 => guest_reads(&mut guest, pair, dice.roll(30_000) as u32),
            9 => {
                guest.step();
                deliver(&mut guest, &mut pairs);
            }
            10 => {
                guest.refills = !guest.refills;
                if guest.refills {
                    guest.refill(64);
                }
            }
            // Late, each half closes.
            _ if step > steps / 2 && dice.roll(4) == 0 => {
                if dice.roll(2) == 0 {
                    if let Some(host) = &pair.host {
                        host.shutdown(std::net::Shutdown::Write).unwrap();
                        pair.host_closed = true;
                    }
                } else if !pair.guest_closed && guest.may_queue() {
                    pair.guest_closed = true;
                    let shutdown = Header {
                        flags: NO_SEND,
                        ..pair.header(Op::Shutdown, 0)
                    };
                    guest.send(shutdown, &[], &[]);
                }
            }
            _ => {}
        }
    }
    // Now everybody takes what there is, and everything must come.
    guest.refills = true;
    guest.refill(64);
    guest.flush();
    for round in 0.. {
        guest.settle();
        deliver(&mut guest, &mut pairs);
        let mut moved = false;
        for pair in &mut pairs {
            if let Some(host) = &pair.host {
                let some = read_some(host);
                moved |= !some.is_empty();
                pair.host_got.extend(some);
            }
            moved |= pair.guest_buffered > 0;
            let all = pair.guest_buffered;
            guest_reads(&mut guest, pair, all);
        }
        // One more round without anything moving, for what the last reads set free.
        if !moved && !guest.step() {
            break;
        }
        assert!(round < 10_000, "seed {seed}: never at rest");
    }
    for (index, pair) in pairs.iter().enumerate() {
        let at = format!("seed {seed}, connection {index}");
        assert!(pair.guest_got == pair.host_wrote, "{at}: to the guest");
        assert!(pair.host_got == pair.guest_wrote, "{at}: to the host");
        assert_eq!(pair.told, pair.host_closed, "{at}: the host's end");
        let both = pair.host_closed && pair.guest_closed;
        assert_eq!(pair.reset, both, "{at}: over");
        let host = pair.host.as_ref().expect("a stream");
        assert_eq!(ended(host), pair.guest_closed, "{at}: the guest's end");
    }
    assert_eq!(guest.failure(), None);
    let open = pairs.iter().filter(|pair| !pair.reset).count();
    assert_eq!(guest.counter("open"), open as u64);
}

#[test]
fn every_byte_arrives_in_order_whatever_the_interleaving() {
    for seed in 0..12 {
        interleave(seed, 1 << 29);
    }
}

#[test]
fn every_byte_arrives_in_order_without_event_indices_too() {
    for seed in 1000..1006 {
        interleave(seed, 0);
    }
}
