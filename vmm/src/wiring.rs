//! What a machine's configuration becomes: the kernel's command line, and devices on the bus.

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, VmFd};
use ratoon_devices::balloon::Balloon;
use ratoon_devices::block::{self, Block};
use ratoon_devices::legacy::Serial;
use ratoon_devices::net::Net;
use ratoon_devices::rng::Rng;
use ratoon_devices::virtio::Device;
use ratoon_devices::virtio::mmio::MmioTransport;
use ratoon_devices::vsock::Vsock;
use ratoon_vmm_api::{DiskConfig, HostClass, NetConfig, VmConfig};

use crate::bus::{MMIO_BASE, MMIO_IRQ, MMIO_SIZE};
use crate::host;
use crate::memory::FreeMemory;
use crate::start::{StartError, kvm_step, system};

/// The register by which a driver kicks a queue (virtio 1.2, 4.2.2: QueueNotify).
const QUEUE_NOTIFY: u64 = 0x50;

/// Binds a device's interrupt and the kicks of its queues.
pub(crate) fn wire(
    vm: &VmFd,
    index: usize,
    name: &str,
    transport: &MmioTransport,
) -> Result<(), StartError> {
    vm.register_irqfd(transport.interrupt().line(), MMIO_IRQ + index as u32)
        .map_err(kvm_step(format!("the interrupt of {name}")))?;
    let notify = MMIO_BASE + index as u64 * MMIO_SIZE + QUEUE_NOTIFY;
    for (queue, kick) in transport.queue_eventfds().iter().enumerate() {
        vm.register_ioevent(kick, &IoEventAddress::Mmio(notify), queue as u32)
            .map_err(kvm_step(format!("queue {queue} of {name}")))?;
    }
    Ok(())
}

pub(crate) fn device_error<E>(what: String) -> impl FnOnce(E) -> StartError
where
    E: std::error::Error + Send + Sync + 'static,
{
    |source| StartError::Device {
        what,
        source: Box::new(source),
    }
}

pub(crate) fn serial(config: &VmConfig) -> Result<Serial, StartError> {
    match &config.serial {
        Some(serial) => Serial::to_log(&serial.log, serial.limit_bytes)
            .map_err(device_error(format!("serial log {}", serial.log.display()))),
        None => Serial::discard().map_err(system("an event descriptor")),
    }
}

/// A device and its name in metrics.
pub(crate) type Named = (String, Box<dyn Device>);

/// The balloon's name.
pub(crate) const BALLOON: &str = "balloon";

/// Opens disks, and makes the layers that are not there.
pub(crate) fn disks(disks: &[DiskConfig]) -> Result<Vec<Named>, StartError> {
    let open = |disk: &DiskConfig| {
        let layer = disk.layer.as_deref();
        let backend = block::open(&disk.path, disk.read_only, &disk.frozen, layer)
            .map_err(device_error(format!("disk {:?}", disk.id)))?;
        let device = Block::new(&disk.id, backend, disk.read_only);
        Ok((format!("block.{}", disk.id), Box::new(device) as _))
    };
    disks.iter().map(open).collect()
}

/// All virtio devices, in the order of their addresses: `disks` first, so that they are vda, vdb, …
pub(crate) fn devices(
    config: &VmConfig,
    disks: Vec<Named>,
    free: &Arc<FreeMemory>,
) -> Result<Vec<Named>, StartError> {
    let mut devices = disks;
    if let Some(vsock) = &config.vsock {
        let device = Vsock::new(vsock.guest_cid, &vsock.socket).map_err(device_error(format!(
            "vsock socket {}",
            vsock.socket.display()
        )))?;
        devices.push(("vsock".into(), Box::new(device)));
    }
    for (index, net) in config.networks.iter().enumerate() {
        let device = Net::open(&net.tap, mac(net, &config.id, index)?)
            .map_err(device_error(format!("network device {}", net.tap)))?;
        devices.push((format!("net.{index}"), Box::new(device)));
    }
    devices.push(("rng".into(), Box::new(Rng::new())));
    if config.balloon {
        let device = Balloon::new(free.clone());
        devices.push((BALLOON.into(), Box::new(device)));
    }
    Ok(devices)
}

/// See [`NetConfig::mac_of`].
fn mac(net: &NetConfig, id: &str, index: usize) -> Result<[u8; 6], StartError> {
    let text = net.mac_of(id, index);
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| {
            u8::from_str_radix(part, 16)
                .ok()
                .filter(|_| part.len() == 2)
        })
        .collect();
    bytes
        .and_then(|bytes| <[u8; 6]>::try_from(bytes).ok())
        .filter(|mac| mac[0] & 1 == 0)
        .ok_or_else(|| StartError::Device {
            what: format!("MAC address {text:?} of {}", net.tap),
            source: "it needs six hex bytes with colons, the first one even".into(),
        })
}

/// The kernel's command line: quiet, its devices, what the host needs, what the user adds.
pub(crate) fn command_line(config: &VmConfig, class: HostClass) -> String {
    let mut words = vec![
        "console=ttyS0 quiet reboot=k panic=-1".to_owned(),
        format!("pvpanic_mmio.port={:#x}", crate::bus::PVPANIC_PORT),
        // A stable TSC would be preferred, but it does not survive a move to another host.
        "clocksource=kvm-clock swiotlb=noforce".to_owned(),
        host::boot_args(class).to_owned(),
    ];
    let devices = config.disks.len()
        + usize::from(config.vsock.is_some())
        + config.networks.len()
        + usize::from(config.balloon)
        + 1;
    for index in 0..devices {
        words.push(format!(
            "virtio_mmio.device={}K@{:#x}:{}",
            MMIO_SIZE >> 10,
            MMIO_BASE + index as u64 * MMIO_SIZE,
            MMIO_IRQ + index as u32
        ));
    }
    words.push(config.kernel_args.clone());
    words.retain(|word| !word.is_empty());
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig::from_json(
            br#"{"id":"vm-1","vcpus":1,"memory_mib":128,"kernel":"/k","kernel_args":"x=1",
                 "disks":[{"id":"root","path":"/d"}],"vsock":{"guest_cid":3,"socket":"/s"}}"#,
        )
        .unwrap()
    }

    #[test]
    fn every_device_is_announced_and_the_users_words_come_last() {
        let line = command_line(&config(), HostClass::Hardware);
        assert!(line.contains("virtio_mmio.device=4K@0xd0000000:5 "));
        assert!(line.contains("virtio_mmio.device=4K@0xd0002000:7 "));
        assert!(line.contains("virtio_mmio.device=4K@0xd0003000:8 "));
        assert!(!line.contains("0xd0004000"));
        let without = VmConfig {
            balloon: false,
            ..config()
        };
        assert!(!command_line(&without, HostClass::Hardware).contains("0xd0003000"));
        assert!(line.ends_with(" x=1"), "{line}");
        assert!(!line.contains("noxsave"));
        assert!(command_line(&config(), HostClass::Emulated).contains("noxsave"));
    }

    #[test]
    fn a_mac_is_the_given_one_or_a_local_one_of_the_vms_own() {
        let net = |mac: Option<&str>| NetConfig {
            tap: "tap0".into(),
            mac: mac.map(str::to_owned),
        };
        let of = |mac| super::mac(&net(mac), "vm-1", 0);
        assert_eq!(
            of(Some("02:00:00:0a:0b:0c")).unwrap(),
            [2, 0, 0, 10, 11, 12]
        );
        assert_eq!(of(None).unwrap()[0], 2);
        assert_ne!(
            of(None).unwrap(),
            super::mac(&net(None), "vm-2", 0).unwrap()
        );
        for wrong in [
            "",
            "02:00",
            "03:00:00:00:00:00",
            "2:0:0:0:0:0",
            "02:00:00:00:00:0g",
        ] {
            assert!(of(Some(wrong)).is_err(), "{wrong}");
        }
    }
}
