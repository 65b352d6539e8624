//! The network device in a real guest: TCP between a program in the guest and the host, over a tap.
//!
//! The tap is made in a network namespace of the scenario's own, in which its thread and the VMM live: nothing
//! of the host's network is touched, and all of it is gone with the thread. Without the right to make one (root), or
//! without `ip`, the figure is n/a.
//!
//! Peers are not measured: their machines are booted without a network device.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ratoon_protocol::{Call, NetworkSet};
use ratoon_vmm_api::{HostClass, NetConfig};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::Plan;
use super::raw::{self, Load};
use crate::machine::{Parts, Ratoon, Shape, go_on};
use crate::samples::Samples;

const NAME: &str = "net";
const TAP: &str = "ratoon0";
const HOST: &str = "10.99.0.1";
const GUEST: &str = "10.99.0.2/24";
/// How long a guest may take to connect, or for the next bytes.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often who waits for bytes looks up: a connection does not hear that its machine has been killed.
const LOOK: Duration = Duration::from_millis(200);

/// Runs it.
///
/// # Errors
/// When the guest does not come up or its program fails.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    // A MiB is a second of an emulated kernel's work.
    let mib = match HostClass::detect() {
        HostClass::Emulated => 1,
        HostClass::Hardware => 64,
    };
    let load = Load {
        bytes: mib << 20,
        turns: plan.rounds(5, 2),
        trips: if plan.quick { 20 } else { 100 },
    };
    let parts = plan.parts;
    std::thread::scope(|scope| {
        let there = scope.spawn(|| -> Result<()> {
            if let Err(error) = own_network() {
                return samples.missing(NAME, "ratoon", format!("{error:#}"));
            }
            measure(parts, load, samples)
        });
        there
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Takes this thread, and what it starts, into a network of its own with one tap.
fn own_network() -> Result<()> {
    // SAFETY: CLONE_NEWNET alone: the thread goes on sharing memory, descriptors and all else.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
        .context("a network namespace for the scenario needs root (CAP_SYS_ADMIN)")?;
    for command in [
        format!("tuntap add dev {TAP} mode tap"),
        format!("address add {HOST}/24 dev {TAP}"),
        format!("link set {TAP} up"),
    ] {
        let output = Command::new("ip")
            .args(command.split(' '))
            .output()
            .context("ip (iproute2)")?;
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr);
            bail!("ip {command}: {}", words.trim());
        }
    }
    Ok(())
}

fn measure(parts: &Parts, load: Load, samples: &mut Samples) -> Result<()> {
    let listener = TcpListener::bind((HOST, 0))?;
    let port = listener.local_addr()?.port();
    let shape = Shape {
        networks: vec![NetConfig {
            tap: TAP.into(),
            mac: None,
        }],
        ..Shape::of(256)
    };
    let mut vm = Ratoon::spawn(parts, &shape)?;
    let mut client = vm.ready(false)?.client;
    let address = NetworkSet {
        addresses: Some(vec![GUEST.into()]),
        ..NetworkSet::default()
    };
    client.call::<()>(&Call::NetworkSet(address), "set its address", PATIENCE)?;
    let connect = format!("socket.socket(), ({HOST:?}, {port})");
    raw::run(NAME, &vm, &mut client, samples, load, &connect, || {
        accept(&listener)
    })?;
    vm.stop()?;
    Ok(())
}

fn accept(listener: &TcpListener) -> Result<Patient> {
    listener.set_nonblocking(true)?;
    let (stream, _) = patiently(|| match listener.accept() {
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            std::thread::sleep(Duration::from_millis(2));
            Err(error)
        }
        accepted => accepted,
    })
    .context("the guest did not connect")?;
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LOOK))?;
    stream.set_write_timeout(Some(LOOK))?;
    Ok(Patient(stream))
}

/// A connection that waits [`PATIENCE`], and no longer than until ^C.
struct Patient(TcpStream);

impl Read for Patient {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        patiently(|| self.0.read(bytes))
    }
}

impl Write for Patient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        patiently(|| self.0.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Tries again what has nothing to do yet.
fn patiently<T>(mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let from = Instant::now();
    loop {
        match attempt() {
            Err(error) if error.kind() == ErrorKind::WouldBlock && from.elapsed() < PATIENCE => {
                go_on().map_err(io::Error::other)?;
            }
            done => return done,
        }
    }
}
