//! What a saved transport has in common with the one that goes on, and what is refused.

use serde_json::{Value, json};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::*;
use crate::rng::Rng;
use crate::virtio::mmio::register;
use crate::virtio::state::{DeviceState, through_json};
use crate::virtio::testing::{Echo, MEMORY_LEN, MockDriver};

const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// Into a new device and on; what was saved is what the new one would save.
fn move_on(driver: &mut MockDriver) {
    let state = through_json(&driver.transport.save());
    driver.restore(Echo::default(), &state).unwrap();
    assert_eq!(driver.transport.save(), state);
}

fn active() -> MockDriver {
    let mut driver = MockDriver::new(Echo::default());
    driver.probe(EVENT_IDX);
    driver
}

fn echoes(driver: &mut MockDriver, queue: usize) {
    let sent = driver.send(queue, &[b"hello"], &[5]);
    driver.kick(queue);
    assert_eq!(driver.used(queue).len(), 1);
    assert_eq!(driver.read_memory(sent.writable[0], 5), b"hello");
}

/// The state of a working device with `spoil` done to it, read as JSON by a new one.
fn refusal(spoil: impl FnOnce(&mut TransportState)) -> String {
    let mut driver = active();
    echoes(&mut driver, 0);
    let mut state = driver.transport.save();
    spoil(&mut state);
    match driver.restore(Echo::default(), &through_json(&state)) {
        Ok(()) => panic!("not refused"),
        Err(RestoreError::Activation(source)) => text(&source),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_working_device_goes_on_at_its_place_in_every_queue() {
    let mut driver = active();
    for _ in 0..100 {
        echoes(&mut driver, 0);
    }
    echoes(&mut driver, 1);
    move_on(&mut driver);
    assert_eq!(driver.transport.save().rings[0].next_avail, 100);
    for _ in 0..100 {
        echoes(&mut driver, 0);
    }
    echoes(&mut driver, 1);
    assert_eq!(driver.transport.save().rings[0].next_used, 200);
}

#[test]
fn a_kick_that_was_lost_between_is_made_up_for() {
    let mut driver = active();
    let sent = driver.send(1, &[b"lost"], &[4]);
    move_on(&mut driver);
    assert_eq!(driver.used(1), []);
    assert!(driver.run_kicks());
    assert_eq!(driver.used(1).len(), 1);
    assert_eq!(driver.read_memory(sent.writable[0], 4), b"lost");
}

#[test]
fn an_interrupt_is_raised_again_only_when_it_was_not_acknowledged() {
    let mut driver = active();
    echoes(&mut driver, 0);
    move_on(&mut driver);
    assert_eq!(driver.take_interrupt(), (Interrupt::USED_BUFFER, true));
    move_on(&mut driver);
    assert_eq!(driver.take_interrupt(), (0, false));
}

#[test]
fn a_driver_in_the_middle_of_its_probe_goes_on_with_it() {
    let mut driver = MockDriver::new(Echo::default());
    move_on(&mut driver);
    let features = driver.offered();
    assert!(driver.negotiate(features));
    move_on(&mut driver);
    driver.set_up_queue(0);
    driver.kick(1);
    driver.write32(register::QUEUE_SEL, 1);
    move_on(&mut driver);
    assert_eq!(driver.read32(register::QUEUE_NUM_MAX), 64);
    driver.set_up_queue(1);
    driver.add_status(status::DRIVER_OK);
    assert_eq!(driver.status(), RUNNING);
    echoes(&mut driver, 0);
}

#[test]
fn the_configuration_space_and_its_generation_go_on() {
    let mut driver = active();
    driver.transport.write(register::CONFIG, &[7, 8]);
    driver.transport.interrupt().config_change();
    move_on(&mut driver);
    assert_eq!(driver.read_config(0, 2), [7, 8]);
    assert_eq!(driver.read32(register::CONFIG_GENERATION), 1);
    assert_eq!(driver.take_interrupt(), (Interrupt::CONFIG_CHANGE, true));
}

#[test]
fn a_device_that_needs_a_reset_still_does_and_says_why() {
    let mut driver = active();
    let head = driver.lay_chain(0, &[(MEMORY_LEN, 8, true)]);
    driver.offer(0, head);
    driver.kick(0);
    driver.take_interrupt();
    for _ in 0..2 {
        move_on(&mut driver);
        let failure = driver.transport.failure().map(ToString::to_string);
        let reason = "the driver broke the virtio rules: buffer outside guest memory";
        assert_eq!(failure.as_deref(), Some(reason));
        assert_eq!(driver.take_interrupt(), (0, false));
        assert!(!driver.run_kicks());
    }
    driver.probe(EVENT_IDX);
    echoes(&mut driver, 0);
}

#[test]
fn a_device_that_its_driver_gave_up_waits_for_a_reset() {
    let mut driver = active();
    driver.add_status(status::FAILED);
    move_on(&mut driver);
    assert_eq!(driver.status(), RUNNING | status::FAILED);
    driver.probe(EVENT_IDX);
    echoes(&mut driver, 0);
}

#[test]
fn saving_changes_nothing() {
    let mut driver = active();
    driver.send(0, &[b"x"], &[1]);
    assert_eq!(driver.transport.save(), driver.transport.save());
    driver.kick(0);
    assert_eq!(driver.used(0).len(), 1);
    echoes(&mut driver, 0);
}

#[test]
fn another_device_is_refused_by_name() {
    let mut driver = active();
    let state = driver.transport.save();
    let refused = driver.restore(Rng::new(), &state).unwrap_err();
    let text = "the state is of virtio device type 32767, the new device is of type 4";
    assert_eq!(refused.to_string(), text);
    let own = DeviceState::Rng(Default::default());
    assert_eq!(
        refusal(|state| state.device = own),
        "the state of a device of type 32767 holds another kind's own part"
    );
}

#[test]
fn queues_that_the_new_device_has_not_are_refused_by_name() {
    assert_eq!(
        refusal(|state| state.queues.truncate(1)),
        "1 queues were saved, the device needs 2"
    );
    assert_eq!(
        refusal(|state| state.rings.clear()),
        "0 rings were saved, the device needs 2"
    );
    assert_eq!(
        refusal(|state| state.early_kicks.push(true)),
        "3 early kicks were saved, the device needs 2"
    );
    assert_eq!(
        refusal(|state| state.queues[1].max_size = 128),
        "queue 1 could have 128 chains, in the new device 64"
    );
}

#[test]
fn features_that_the_new_device_has_not_are_refused_by_name() {
    assert_eq!(
        refusal(|state| state.driver_features |= 1 << 40),
        "the driver uses features 0x10000000000, which the new device does not offer"
    );
    assert_eq!(
        refusal(|state| state.driver_features = 0),
        "the state contradicts itself: features without VERSION_1 (0x0)"
    );
}

#[test]
fn queues_that_no_driver_could_have_started_are_refused_by_name() {
    for size in [0, 3, 63, 65, 128, 65535, u32::MAX] {
        let refused = refusal(|state| state.queues[0].size = size);
        assert_eq!(refused, "queue 0: invalid queue size", "{size}");
    }
    let outside = "the driver broke the virtio rules: rings outside guest memory";
    for address in [MEMORY_LEN, MEMORY_LEN - 16, !0xf, 1 << 63] {
        assert_eq!(refusal(|s| s.queues[0].descriptors = address), outside);
        assert_eq!(refusal(|s| s.queues[0].driver_area = address), outside);
        assert_eq!(refusal(|s| s.queues[1].device_area = address), outside);
    }
    refusal(|state| state.queues[1].descriptors = 8);
    refusal(|state| state.queues[1].driver_area = 1);
    refusal(|state| state.queues[1].device_area = 2);
    assert_eq!(
        refusal(|state| state.queues[1].ready = false),
        "the driver broke the virtio rules: DRIVER_OK with a queue not ready"
    );
}

#[test]
fn a_state_that_contradicts_itself_is_refused_by_name() {
    let inconsistent = |what: &str| format!("the state contradicts itself: {what}");
    for (status, what) in [
        (4, "a status that no driver reaches (0x4)"),
        (15 | 1 << 20, "a status that no driver reaches (0x10000f)"),
        (75, "a device that needs a reset before DRIVER_OK (0x4b)"),
    ] {
        assert_eq!(refusal(|state| state.status = status), inconsistent(what));
    }
    let what = "whether the device is active is not what the status says (0xb)";
    assert_eq!(refusal(|state| state.status = 11), inconsistent(what));
    let what = "DEVICE_NEEDS_RESET and a reason for it go together (0xf)";
    let failure = Some("x".into());
    assert_eq!(refusal(|s| s.failure = failure), inconsistent(what));
    let what = "unknown causes of an interrupt (0x4)";
    assert_eq!(refusal(|s| s.interrupt_status = 4), inconsistent(what));
    let refused = refusal(|state| {
        state.status = RUNNING | status::DEVICE_NEEDS_RESET;
        state.active = false;
        state.rings.clear();
        state.failure = Some("x".repeat(FAILURE_LEN_MAX + 1));
    });
    let what = "the reason of a failure is too long (0x401)";
    assert_eq!(refused, inconsistent(what));
}

#[test]
fn a_position_that_no_driver_has_reached_needs_a_reset() {
    for next_avail in [2, 1000, 0x8000, u16::MAX - 100] {
        let mut driver = active();
        echoes(&mut driver, 0);
        let mut state = driver.transport.save();
        state.rings[0].next_avail = next_avail;
        driver.restore(Echo::default(), &state).unwrap();
        driver.run_kicks();
        assert!(driver.transport.needs_reset(), "{next_avail}");
        driver.probe(EVENT_IDX);
        echoes(&mut driver, 0);
    }
}

#[test]
fn a_wrong_place_in_the_used_ring_harms_nobody_but_the_guest() {
    let mut driver = active();
    let mut state = driver.transport.save();
    state.rings[0].next_used = u16::MAX;
    driver.restore(Echo::default(), &state).unwrap();
    driver.send(0, &[b"x"], &[1]);
    driver.run_kicks();
    assert!(!driver.transport.needs_reset());
}

#[test]
fn unknown_members_are_ignored_and_long_lists_are_not_read() {
    let driver = active();
    let state = driver.transport.save();
    let mut value = serde_json::to_value(&state).unwrap();
    value["added-later"] = json!({"any": ["thing"]});
    value["queues"][0]["added-later"] = json!(1);
    let read: TransportState = serde_json::from_value(value.clone()).unwrap();
    assert_eq!(read, state);
    value["early_kicks"] = Value::Array(vec![json!(false); 65]);
    let error = serde_json::from_value::<TransportState>(value).unwrap_err();
    assert!(error.to_string().contains("at most 64"), "{error}");
}

#[test]
fn a_long_reason_is_cut_between_characters() {
    let error = DeviceError::Host {
        what: "ä".repeat(FAILURE_LEN_MAX),
        source: std::io::Error::other("cause"),
    };
    assert_eq!(text(&error), "ä".repeat(FAILURE_LEN_MAX / 2));
    let error = DeviceError::Host {
        what: "what".into(),
        source: std::io::Error::other("cause"),
    };
    assert_eq!(text(&error), "what: cause");
}
