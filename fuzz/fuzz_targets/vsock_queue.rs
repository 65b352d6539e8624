//! virtio-vsock's three queues and its sockets: a guest that mostly keeps the protocol, and host
//! programs that connect, write, read, half-close and vanish.
//!
//! Rules: no panic; a reset revives; the device comes to rest; no more connections than there may
//! be. While no ring is broken: the device does not need a reset, bytes arrive without a gap both
//! ways, and the device sends no more than the guest's credit.

#![no_main]

use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use ratoon_devices::virtio::testing::{BUFFERS, MockDriver};
use ratoon_devices::vsock::{HOST_CID, MAX_CONNECTIONS, Vsock};
use ratoon_fuzz::{kick_or_else, rarely, send_bytes};
use tempfile::TempDir;

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const HEADER_BYTES: usize = 44;
const CID: u32 = 3;
/// What the guest says that it takes, in bytes.
const CREDIT: u32 = 8192;
/// Chains under way at most, each way; each has a place of its own in memory. The receive queue has
/// 64 descriptors, and a chain two.
const SLOTS: u64 = 32;
const RX_SLOT: u64 = 0x2_0000;
const TX_BASE: u64 = BUFFERS + SLOTS * RX_SLOT;
const TX_SLOT: u64 = 0x1_0000;
/// Ports of the host; programs listen on all but the last.
const HOST_PORTS: [u32; 3] = [50, 51, 52];
const GUEST_PORTS: [u32; 3] = [1000, 1001, 1002];
/// The first port that the device gives to a host program's connection.
const FIRST_GIVEN: u32 = 1 << 30;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// `struct virtio_vsock_hdr`, those of its fields that vary.
#[derive(Debug, Clone, Copy)]
struct Header {
    src_cid: u64,
    dst_cid: u64,
    host_port: u32,
    guest_port: u32,
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Header {
    /// As the guest sends it.
    fn encode(&self) -> Vec<u8> {
        [
            &self.src_cid.to_le_bytes()[..],
            &self.dst_cid.to_le_bytes(),
            &self.guest_port.to_le_bytes(),
            &self.host_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ]
        .concat()
    }

    /// As the guest gets it.
    fn parse(bytes: &[u8]) -> Self {
        let number = |from: usize, len: usize| {
            let part = bytes[from..from + len].iter().rev();
            part.fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
        };
        Self {
            src_cid: number(0, 8),
            dst_cid: number(8, 8),
            host_port: number(16, 4) as u32,
            guest_port: number(20, 4) as u32,
            len: number(24, 4) as u32,
            kind: number(28, 2) as u16,
            op: number(30, 2) as u16,
            flags: number(32, 4) as u32,
            buf_alloc: number(36, 4) as u32,
            fwd_cnt: number(40, 4) as u32,
        }
    }
}

/// The guest's wish to connect; `ports` are the host's and its own.
fn request((host_port, guest_port): (u32, u32)) -> Header {
    Header {
        src_cid: u64::from(CID),
        dst_cid: HOST_CID,
        host_port,
        guest_port,
        len: 0,
        kind: 1,
        op: REQUEST,
        flags: 0,
        buf_alloc: CREDIT,
        fwd_cnt: 0,
    }
}

/// A run of bytes that count up, so that a gap shows.
#[derive(Debug, Default, Clone, Copy)]
struct Count(Option<u8>);

impl Count {
    fn make(&mut self, len: usize) -> Vec<u8> {
        let from = self.0.unwrap_or_default();
        self.0 = Some(from.wrapping_add(len as u8));
        (0..len).map(|i| from.wrapping_add(i as u8)).collect()
    }

    fn check(&mut self, bytes: &[u8]) {
        for byte in bytes {
            assert!(self.0.is_none_or(|next| next == *byte), "a gap");
            self.0 = Some(byte.wrapping_add(1));
        }
    }
}

/// A connection as the guest sees it.
#[derive(Debug, Default, Clone, Copy)]
struct Connection {
    got: Count,
    got_len: u32,
    /// What the device was told of `got_len`.
    told: u32,
    /// Its credit was not told truly.
    lies: bool,
    wrote: Count,
    wrote_len: u32,
    device_alloc: u32,
    device_taken: u32,
}

/// A host program's stream.
struct Program {
    stream: UnixStream,
    /// What is still to come of `OK <port>`.
    in_line: bool,
    wrote: Count,
    got: Count,
}

struct World {
    driver: MockDriver,
    dir: TempDir,
    listeners: Vec<UnixListener>,
    features: u64,
    /// Rings are never broken, so that contents can be checked.
    honest: bool,
    /// A header said more than its chain holds: the one way to break an honest ring.
    cheated: bool,
    given: VecDeque<[(u64, u32); 2]>,
    next_rx: u64,
    next_tx: u64,
    sent: u64,
    connections: HashMap<(u32, u32), Connection>,
    programs: Vec<Program>,
}

impl World {
    fn new(input: &mut Unstructured<'_>) -> Result<Self> {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("v");
        let device = Vsock::new(CID, &socket).expect("a socket");
        let listeners = HOST_PORTS[..2].iter().map(|port| {
            let path = dir.path().join(format!("v_{port}"));
            let listener = UnixListener::bind(path).expect("a socket");
            listener.set_nonblocking(true).expect("a socket");
            listener
        });
        let mut world = Self {
            driver: MockDriver::new(device),
            listeners: listeners.collect(),
            dir,
            features: input.arbitrary()?,
            honest: input.ratio(2, 3)?,
            cheated: false,
            given: VecDeque::new(),
            next_rx: 0,
            next_tx: 0,
            sent: 0,
            connections: HashMap::new(),
            programs: Vec::new(),
        };
        world.driver.probe(world.features);
        Ok(world)
    }

    /// Begins anew after a reset of the device, which has closed all its streams.
    fn forget(&mut self) {
        for program in &self.programs {
            let mut bytes = vec![0; 64 << 10];
            let open = loop {
                match (&program.stream).read(&mut bytes) {
                    Ok(0) => break false,
                    Ok(_) => {}
                    Err(error) => break error.kind() == ErrorKind::WouldBlock,
                }
            };
            // Those that were not accepted yet are still to come.
            assert!(!open || program.in_line, "a reset closes every stream");
        }
        self.cheated = false;
        self.given.clear();
        self.sent = 0;
        self.connections.clear();
        self.programs.clear();
        for listener in &self.listeners {
            while listener.accept().is_ok() {}
        }
    }

    fn probe(&mut self) {
        self.driver.probe(self.features);
        assert!(!self.driver.transport.needs_reset(), "a reset revives");
        self.forget();
    }

    // ---- the guest ----

    fn give(&mut self, input: &mut Unstructured<'_>, lens: &[u32]) -> Result<()> {
        if !self.honest {
            return send_bytes(&mut self.driver, input, RX, &[], lens);
        }
        if self.given.len() as u64 == SLOTS {
            return Ok(());
        }
        let at = BUFFERS + self.next_rx * RX_SLOT;
        self.next_rx = (self.next_rx + 1) % SLOTS;
        let mut parts = [(at, lens[0]), (0, 0)];
        let mut chain = vec![(at, lens[0], true)];
        if let Some(len) = lens.get(1) {
            parts[1] = (at + RX_SLOT / 2, *len);
            chain.push((parts[1].0, *len, true));
        }
        let head = self.driver.lay_chain(RX, &chain);
        self.driver.offer(RX, head);
        self.given.push_back(parts);
        Ok(())
    }

    fn send(&mut self, input: &mut Unstructured<'_>, header: Header, data: &[u8]) -> Result<()> {
        let bytes = [header.encode(), data.to_vec()].concat();
        let cut = input.int_in_range(1..=bytes.len() - 1)?;
        let (head, rest) = bytes.split_at(cut);
        if !self.honest {
            return send_bytes(&mut self.driver, input, TX, &[head, rest], &[]);
        }
        let at = TX_BASE + self.next_tx * TX_SLOT;
        self.next_tx = (self.next_tx + 1) % SLOTS;
        let second = at + TX_SLOT / 2;
        self.driver.write_memory(at, head);
        self.driver.write_memory(second, rest);
        let chain = [
            (at, head.len() as u32, false),
            (second, rest.len() as u32, false),
        ];
        let head = self.driver.lay_chain(TX, &chain);
        self.driver.offer(TX, head);
        self.sent += 1;
        self.cheated |= u64::from(header.len) > data.len() as u64;
        Ok(())
    }

    /// Whether there is a place for another packet, after what has come was taken.
    fn may_send(&mut self) -> bool {
        self.collect();
        self.sent < SLOTS
    }

    fn kick(&mut self, input: &mut Unstructured<'_>, queue: usize) -> Result<()> {
        if self.honest {
            self.driver.kick(queue);
            self.driver.take_interrupt();
        } else {
            kick_or_else(&mut self.driver, input, queue, self.features)?;
        }
        self.collect();
        Ok(())
    }

    /// Takes what the device has used. True when there was something.
    fn collect(&mut self) -> bool {
        let done = self.driver.used(TX).len();
        let filled = self.driver.used(RX);
        let any = done > 0 || !filled.is_empty();
        if self.honest {
            self.sent -= done as u64;
            for used in filled {
                let parts = self.given.pop_front().expect("a buffer that was given");
                let mut bytes = Vec::new();
                for (at, len) in parts {
                    let len = (len as usize).min(used.len_bytes as usize - bytes.len());
                    bytes.extend(self.driver.read_memory(at, len));
                }
                assert_eq!(bytes.len(), used.len_bytes as usize);
                self.packet(&bytes);
            }
        }
        if self.driver.transport.needs_reset() {
            let why = self.driver.transport.failure();
            assert!(!self.honest || self.cheated, "{why:?}");
            self.probe();
        }
        any
    }

    /// A packet that came.
    fn packet(&mut self, bytes: &[u8]) {
        let header = Header::parse(bytes);
        assert_eq!(
            header.len as usize,
            bytes.len() - HEADER_BYTES,
            "{header:?}"
        );
        assert_eq!(header.dst_cid, u64::from(CID));
        let ports = (header.host_port, header.guest_port);
        match header.op {
            REQUEST | RESPONSE => {
                let old = self.connections.get(&ports);
                let wrote = old.map(|old| old.wrote).unwrap_or_default();
                let new = Connection {
                    wrote,
                    ..Connection::default()
                };
                self.connections.insert(ports, new);
            }
            RESET => {
                self.connections.remove(&ports);
                return;
            }
            SHUTDOWN | CREDIT_UPDATE | CREDIT_REQUEST | DATA => {}
            other => panic!("the device sent operation {other}"),
        }
        let Some(connection) = self.connections.get_mut(&ports) else {
            return;
        };
        connection.device_alloc = header.buf_alloc;
        connection.device_taken = header.fwd_cnt;
        if header.op == DATA {
            assert!(header.len > 0);
            connection.got.check(&bytes[HEADER_BYTES..]);
            connection.got_len = connection.got_len.wrapping_add(header.len);
            let untold = connection.got_len.wrapping_sub(connection.told);
            assert!(connection.lies || untold <= CREDIT, "beyond the credit");
        }
    }

    /// One packet of the guest.
    fn guest(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        if !self.may_send() {
            return Ok(());
        }
        let mut known: Vec<_> = self.connections.keys().copied().collect();
        known.sort_unstable();
        let ports = if known.is_empty() || rarely(input)? {
            (
                *input.choose(&[50, 51, 52, FIRST_GIVEN, FIRST_GIVEN + 1])?,
                *input.choose(&GUEST_PORTS)?,
            )
        } else {
            *input.choose(&known)?
        };
        let connection = self.connections.entry(ports).or_default();
        let op = *input.choose(&[
            RESPONSE,
            RESPONSE,
            DATA,
            DATA,
            DATA,
            DATA,
            CREDIT_UPDATE,
            CREDIT_UPDATE,
            CREDIT_REQUEST,
            SHUTDOWN,
            RESET,
            REQUEST,
        ])?;
        let broken = rarely(input)?;
        let mut len = 0;
        // An honest ring's bytes are checked: none may be in a packet that may get lost.
        if op == DATA && !(broken && self.honest) {
            let way = connection.wrote_len.wrapping_sub(connection.device_taken);
            let room = connection.device_alloc.saturating_sub(way);
            let want = *input.choose(&[1, 100, 3000, 30_000])?;
            len = if rarely(input)? { want } else { want.min(room) };
        }
        if matches!(op, CREDIT_UPDATE | RESPONSE | DATA) && input.arbitrary()? {
            connection.told = connection.got_len;
        }
        if op == REQUEST {
            let wrote = connection.wrote;
            *connection = Connection {
                wrote,
                ..Connection::default()
            };
        }
        let mut header = Header {
            len,
            op,
            flags: if op == SHUTDOWN {
                input.int_in_range(0..=3)?
            } else {
                0
            },
            fwd_cnt: connection.told,
            ..request(ports)
        };
        if op == RESET {
            // What is under way may still come.
            connection.got = Count::default();
            connection.lies = true;
        }
        connection.wrote_len = connection.wrote_len.wrapping_add(len);
        let data = connection.wrote.make(len as usize);
        if broken {
            connection.lies = true;
            match input.int_in_range(0..=7u8)? {
                0 => header.src_cid = input.arbitrary()?,
                1 => header.dst_cid = input.arbitrary()?,
                2 => header.kind = input.arbitrary()?,
                3 => header.op = input.int_in_range(0..=9)?,
                4 => header.flags = input.arbitrary()?,
                5 => header.buf_alloc = *input.choose(&[0, 1, u32::MAX])?,
                6 => header.fwd_cnt = input.arbitrary()?,
                _ => header.len = *input.choose(&[0, 1, 1 << 20, u32::MAX])?,
            }
        }
        self.send(input, header, &data)
    }

    /// Data of one connection until its credit is gone: what a slow program does not take.
    fn burst(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let mut known: Vec<_> = self.connections.keys().copied().collect();
        known.sort_unstable();
        if known.is_empty() {
            return Ok(());
        }
        let ports = *input.choose(&known)?;
        for _ in 0..12 {
            if !self.may_send() {
                break;
            }
            let Some(connection) = self.connections.get_mut(&ports) else {
                break;
            };
            let way = connection.wrote_len.wrapping_sub(connection.device_taken);
            let len = connection.device_alloc.saturating_sub(way).min(30_000);
            if len == 0 {
                break;
            }
            connection.wrote_len = connection.wrote_len.wrapping_add(len);
            let data = connection.wrote.make(len as usize);
            let header = Header {
                len,
                op: DATA,
                fwd_cnt: connection.told,
                ..request(ports)
            };
            self.send(input, header, &data)?;
        }
        Ok(())
    }

    // ---- host programs ----

    fn connect(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let Ok(stream) = UnixStream::connect(self.dir.path().join("v")) else {
            return Ok(());
        };
        stream.set_nonblocking(true).expect("a stream");
        let port = *input.choose(&GUEST_PORTS)?;
        let line = match input.int_in_range(0..=9u8)? {
            0 => "CONN".to_owned(),
            1 => "GET / HTTP/1.1\r\n".to_owned(),
            _ => format!("CONNECT {port}\n"),
        };
        let _ = (&stream).write(line.as_bytes());
        if input.ratio(1, 16)? {
            return Ok(());
        }
        self.programs.push(Program {
            stream,
            in_line: true,
            wrote: Count::default(),
            got: Count::default(),
        });
        Ok(())
    }

    fn accept(&mut self, index: usize) {
        if let Ok((stream, _)) = self.listeners[index].accept() {
            stream.set_nonblocking(true).expect("a stream");
            self.programs.push(Program {
                stream,
                in_line: false,
                wrote: Count::default(),
                got: Count::default(),
            });
        }
    }

    fn program(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        if self.programs.is_empty() {
            return Ok(());
        }
        let index = input.int_in_range(0..=self.programs.len() - 1)?;
        let program = &mut self.programs[index];
        match input.int_in_range(0..=9u8)? {
            0..=3 => {
                let len = *input.choose(&[1, 100, 5000, 50_000])?;
                let mut count = program.wrote;
                let bytes = count.make(len);
                if let Ok(len) = (&program.stream).write(&bytes) {
                    program.wrote.make(len);
                }
            }
            4..=7 => {
                let len = *input.choose(&[1, 100, 5000, 300_000])?;
                let mut bytes = vec![0; len];
                let len = (&program.stream).read(&mut bytes).unwrap_or_default();
                let mut bytes = &bytes[..len];
                if program.in_line
                    && let Some(end) = bytes.iter().position(|byte| *byte == b'\n')
                {
                    program.in_line = false;
                    bytes = &bytes[end + 1..];
                }
                if self.honest && !program.in_line {
                    program.got.check(bytes);
                }
            }
            8 => {
                let how = *input.choose(&[Shutdown::Read, Shutdown::Write])?;
                let _ = program.stream.shutdown(how);
            }
            _ => {
                self.programs.swap_remove(index);
            }
        }
        Ok(())
    }

    /// One turn of the event loop. True when something happened.
    fn turn(&mut self) -> bool {
        let kicked = self.driver.run_kicks();
        self.driver.transport.host_event();
        self.driver.take_interrupt();
        self.collect() || kicked
    }

    fn check(&self) {
        let all = self.driver.transport.counters();
        let open = all.iter().find(|(name, _)| *name == "open");
        let open = open.map_or(0, |(_, value)| *value);
        assert!(open <= MAX_CONNECTIONS as u64, "{open} connections");
    }
}

fn run(mut input: Unstructured<'_>) -> Result<()> {
    let mut world = World::new(&mut input)?;
    let world = &mut world;
    let outcome = act(world, &mut input);
    // Whatever it was: given time and buffers, it ends.
    let mut empty = Unstructured::new(&[]);
    for turn in 0.. {
        for _ in 0..SLOTS {
            if !world.honest {
                break;
            }
            world.give(&mut empty, &[4096])?;
        }
        world.driver.kick(RX);
        if !world.turn() {
            break;
        }
        assert!(turn < 10_000, "it never comes to rest");
    }
    world.check();
    outcome
}

fn act(world: &mut World, input: &mut Unstructured<'_>) -> Result<()> {
    while !input.is_empty() {
        match input.int_in_range(0..=16u8)? {
            16 => {
                world.burst(input)?;
                world.kick(input, TX)?;
            }
            0 | 1 => {
                for _ in 0..=input.int_in_range(0..=12u8)? {
                    let lens: &[u32] = match input.int_in_range(0..=4u8)? {
                        0 => &[45],
                        1 => &[44, 4096],
                        2 => &[10, 0x8000],
                        _ => &[4096],
                    };
                    world.give(input, lens)?;
                }
                world.kick(input, RX)?;
            }
            2..=6 => {
                for _ in 0..=input.int_in_range(0..=3u8)? {
                    world.guest(input)?;
                }
                world.kick(input, TX)?;
            }
            7 if world.may_send() => {
                let ports = (*input.choose(&HOST_PORTS)?, *input.choose(&GUEST_PORTS)?);
                world.connections.remove(&ports);
                world.send(input, request(ports), &[])?;
                world.kick(input, TX)?;
            }
            8 => {
                world.connect(input)?;
                world.turn();
            }
            9..=12 => world.program(input)?,
            13 => {
                let index = input.int_in_range(0..=1)?;
                world.accept(index);
            }
            14 => {
                world.turn();
            }
            _ => match input.int_in_range(0..=15u8)? {
                0 => world.probe(),
                1 => {
                    world.driver.send(EVENT, &[], &[8]);
                    world.kick(input, EVENT)?;
                }
                _ => {
                    world.turn();
                }
            },
        }
        world.check();
    }
    Ok(())
}

/// As std does for every program that has a `main` in Rust: a write to a closed stream is an error.
fn ignore_broken_pipes() {
    // SAFETY: no handler, and nothing else in this process sets one.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

fuzz_target!(init: ignore_broken_pipes(), |data: &[u8]| {
    // Running out of input is the usual end.
    let _ = run(Unstructured::new(data));
});
