//! The balloon's rules, through the transport.

use std::sync::Mutex;

use super::*;
use crate::virtio::mmio::status;
use crate::virtio::state::through_json;
use crate::virtio::testing::{BUFFERS, MEMORY_LEN, MockDriver};

/// What was handed over.
#[derive(Clone, Default)]
struct Host {
    taken: Arc<Mutex<Vec<(u64, u64)>>>,
    refuses: bool,
}

impl Reclaim for Host {
    fn reclaim(
        &self,
        _memory: &GuestMemoryMmap,
        address: GuestAddress,
        len: u64,
    ) -> std::io::Result<u64> {
        if self.refuses {
            return Err(std::io::ErrorKind::OutOfMemory.into());
        }
        self.taken.lock().unwrap().push((address.0, len));
        Ok(len)
    }
}

impl Host {
    fn take(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.taken.lock().unwrap())
    }
}

fn driver(host: &Host) -> MockDriver {
    let mut driver = MockDriver::new(Balloon::new(Arc::new(host.clone())));
    driver.probe(u64::MAX);
    driver
}

/// Reports these runs, address and length.
fn report(driver: &mut MockDriver, runs: &[(u64, u32)]) {
    let buffers: Vec<_> = runs.iter().map(|(at, len)| (*at, *len, true)).collect();
    let head = driver.lay_chain(REPORTING, &buffers);
    driver.offer(REPORTING, head);
    driver.kick(REPORTING);
}

fn failure(driver: &MockDriver) -> Option<String> {
    driver.transport.failure().map(ToString::to_string)
}

#[test]
fn free_pages_are_handed_over_and_the_report_is_acknowledged() {
    let host = Host::default();
    let mut driver = driver(&host);
    report(
        &mut driver,
        &[(BUFFERS, 2 << 20), (BUFFERS + (4 << 20), 4096)],
    );
    assert_eq!(
        host.take(),
        [(BUFFERS, 2 << 20), (BUFFERS + (4 << 20), 4096)]
    );
    assert_eq!(driver.used(REPORTING).len(), 1);
    assert_eq!(driver.take_interrupt(), (Interrupt::USED_BUFFER, true));
    let counters = driver.transport.counters();
    assert!(counters.contains(&("reclaimed_bytes", (2 << 20) + 4096)));
}

#[test]
fn only_whole_pages_are_handed_over() {
    let host = Host::default();
    let mut driver = driver(&host);
    report(&mut driver, &[(BUFFERS + 1, 8191), (BUFFERS + 100, 4000)]);
    assert_eq!(host.take(), [(BUFFERS + 4096, 4096)]);
    report(&mut driver, &[(BUFFERS + 1, 3 * 4096)]);
    assert_eq!(host.take(), [(BUFFERS + 4096, 2 * 4096)]);
    report(&mut driver, &[(MEMORY_LEN - 4096, 4096)]);
    assert_eq!(host.take(), [(MEMORY_LEN - 4096, 4096)]);
}

#[test]
fn a_host_that_cannot_take_pages_does_not_stop_the_guest() {
    let host = Host {
        refuses: true,
        ..Host::default()
    };
    let mut driver = driver(&host);
    report(&mut driver, &[(BUFFERS, 4096)]);
    assert_eq!(driver.used(REPORTING).len(), 1);
    assert_eq!(failure(&driver), None);
    assert!(driver.transport.counters().contains(&("failures", 1)));
}

#[test]
fn broken_reports_need_a_reset_and_nothing_is_taken() {
    for (runs, readable, reason) in [
        (
            &[(MEMORY_LEN - 4096, 8192)][..],
            false,
            "buffer outside guest memory",
        ),
        (&[(BUFFERS, 0)], false, "empty buffer in a chain"),
        (
            &[(u64::MAX - 4095, 4096)],
            false,
            "buffer outside guest memory",
        ),
        (&[(BUFFERS, 4096)], true, "readable buffer in a report"),
    ] {
        let host = Host::default();
        let mut driver = driver(&host);
        let buffers: Vec<_> = runs
            .iter()
            .map(|(at, len)| (*at, *len, !readable))
            .collect();
        let head = driver.lay_chain(REPORTING, &buffers);
        driver.offer(REPORTING, head);
        driver.kick(REPORTING);
        let wanted = format!("the driver broke the virtio rules: {reason}");
        assert_eq!(failure(&driver), Some(wanted));
        assert!(host.take().is_empty());
        driver.probe(u64::MAX);
        assert_eq!(driver.status() & status::DEVICE_NEEDS_RESET, 0);
        report(&mut driver, &[(BUFFERS, 4096)]);
        assert_eq!(host.take(), [(BUFFERS, 4096)], "a reset revives");
    }
}

#[test]
fn pages_that_are_given_unasked_are_acknowledged_and_left_alone() {
    let host = Host::default();
    let mut driver = driver(&host);
    for queue in [0, 1] {
        driver.send(queue, &[&[0; 8]], &[]);
        driver.kick(queue);
        assert_eq!(driver.used(queue).len(), 1);
    }
    assert!(host.take().is_empty());
}

#[test]
fn the_host_never_asks_for_pages() {
    let host = Host::default();
    let mut driver = driver(&host);
    assert_eq!(driver.read_config(0, 20), [0; 20]);
    driver.transport.write(
        crate::virtio::mmio::register::CONFIG + ACTUAL,
        &[1, 2, 3, 4],
    );
    let mut wanted = [0; 20];
    wanted[4..8].copy_from_slice(&[1, 2, 3, 4]);
    assert_eq!(driver.read_config(0, 20), wanted);
    // Beyond the field or not a whole word: no such field.
    driver
        .transport
        .write(crate::virtio::mmio::register::CONFIG + ACTUAL + 1, &[9, 9]);
    assert_eq!(driver.read_config(0, 20), wanted);
}

#[test]
fn a_saved_device_serves_the_report_that_waits() {
    let host = Host::default();
    let mut driver = driver(&host);
    report(&mut driver, &[(BUFFERS, 4096)]);
    assert_eq!((driver.used(REPORTING).len(), host.take().len()), (1, 1));
    driver.take_interrupt();
    let head = driver.lay_chain(REPORTING, &[(BUFFERS + 8192, 4096, true)]);
    driver.offer(REPORTING, head);
    let state = through_json(&driver.transport.save());
    driver
        .restore(Balloon::new(Arc::new(host.clone())), &state)
        .unwrap();
    assert_eq!(driver.transport.save(), state);
    driver.run_kicks();
    assert_eq!(host.take(), [(BUFFERS + 8192, 4096)]);
    assert_eq!(driver.used(REPORTING).len(), 1);
}

#[test]
fn another_devices_state_is_refused() {
    let mut balloon = Balloon::new(Arc::new(Host::default()));
    let other = DeviceState::Rng(crate::rng::RngState {});
    match balloon.restore(&other) {
        Err(RestoreError::OwnKind { device_type: 5 }) => {}
        other => panic!("{other:?}"),
    }
}
