//! The network device in a real guest: TCP between a program in the guest and the host, over a tap.
//!
//! The tap is made in a network namespace of the scenario's own, in which its thread and the VMM live: nothing
//! of the host's network is touched, and all of it is gone with the thread. Without the right to make one (root)
//! the figure is n/a.

use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ratoon_protocol::{Call, NetworkSet};
use ratoon_vmm_api::NetConfig;
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::Plan;
use super::raw::{self, Load};
use crate::machine::{Parts, Ratoon, Shape, go_on};
use crate::samples::Samples;

const NAME: &str = "net";
const TAP: &str = "ratoon0";
const HOST: &str = "10.99.0.1";
const GUEST: &str = "10.99.0.2/24";
const PATIENCE: Duration = Duration::from_secs(240);

/// Runs it.
///
/// # Errors
/// When the guest does not come up or its program fails.
pub fn run(plan: &Plan<'_>, samples: &mut Samples) -> Result<()> {
    let (mib, trips) = if plan.quick { (2, 20) } else { (8, 100) };
    let load = Load {
        bytes: mib << 20,
        turns: plan.rounds(5, 2),
        trips,
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

fn accept(listener: &TcpListener) -> Result<TcpStream> {
    let from = Instant::now();
    listener.set_nonblocking(true)?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                go_on()?;
                if from.elapsed() > PATIENCE {
                    bail!("the guest did not connect");
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(error.into()),
        }
    }
}
