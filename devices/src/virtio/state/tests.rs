//! The encoding: what the first version wrote is read for ever.

use super::*;
use crate::legacy::SerialState;
use crate::vsock::{ControlState, ResetState};

/// Never to be changed: snapshots like this are on disks. A member that is added gets a serde
/// default, and a golden text of its own below.
const FIRST: &str = r#"{"device_type":19,"status":15,"active":true,"failure":null,
"device_features_select":1,"driver_features_select":2,"driver_features":4294967296,"queue_select":3,
"queues":[{"max_size":64,"size":32,"ready":true,"descriptors":4096,"driver_area":8192,
"device_area":12288}],"early_kicks":[false],"interrupt_status":1,"config_generation":4,
"rings":[{"next_avail":65535,"next_used":5}],"device":{"vsock":{"guest_cid":42,
"next_host_port":1073741824,"control":{"guest_port":6,"sent":7,"peer_alloc":8,"peer_taken":9,
"credit_asked":true,"forwarded":10,"told_forwarded":11,"owes_credit":true,"to_host":[1,2],
"to_guest":[3]},"resets":[{"host_cid":2,"host_port":12,"guest_port":13}],
"owes_transport_reset":true,"owes_interrupt":true}}}"#;

fn first() -> TransportState {
    TransportState {
        device_type: 19,
        status: 15,
        active: true,
        failure: None,
        device_features_select: 1,
        driver_features_select: 2,
        driver_features: 1 << 32,
        queue_select: 3,
        queues: vec![QueueRegistersState {
            max_size: 64,
            size: 32,
            ready: true,
            descriptors: 4096,
            driver_area: 8192,
            device_area: 12288,
        }],
        early_kicks: vec![false],
        interrupt_status: 1,
        config_generation: 4,
        rings: vec![RingState {
            next_avail: 65535,
            next_used: 5,
        }],
        device: DeviceState::Vsock(VsockState {
            guest_cid: 42,
            next_host_port: 1 << 30,
            control: Some(ControlState {
                host_port: 1024,
                guest_port: 6,
                sent: 7,
                peer_alloc: 8,
                peer_taken: 9,
                credit_asked: true,
                forwarded: 10,
                told_forwarded: 11,
                owes_credit: true,
                to_host: vec![1, 2],
                to_guest: vec![3],
            }),
            resets: vec![ResetState {
                host_cid: 2,
                host_port: 12,
                guest_port: 13,
            }],
            owes_transport_reset: true,
            owes_interrupt: true,
        }),
    }
}

#[test]
fn a_state_of_the_first_version_is_read() {
    let read: TransportState = serde_json::from_str(FIRST).unwrap();
    assert_eq!(read, first());
}

#[test]
fn every_kind_of_the_first_version_is_read() {
    let block = BlockState {
        len_bytes: 512,
        read_only: true,
    };
    for (text, kind) in [
        (
            r#"{"block":{"len_bytes":512,"read_only":true}}"#,
            DeviceState::Block(block),
        ),
        (r#"{"net":{}}"#, DeviceState::Net(NetState::default())),
        (r#"{"rng":{}}"#, DeviceState::Rng(RngState::default())),
    ] {
        assert_eq!(serde_json::from_str::<DeviceState>(text).unwrap(), kind);
    }
    let serial = r#"{"baud_divisor_low":1,"baud_divisor_high":2,"interrupt_enable":3,
"interrupt_identification":4,"line_control":5,"line_status":6,"modem_control":7,"modem_status":8,
"scratch":9,"in_buffer":[10,11]}"#;
    let read: SerialState = serde_json::from_str(serial).unwrap();
    assert_eq!((read.baud_divisor_low, read.scratch), (1, 9));
    assert_eq!(read.in_buffer, [10, 11]);
}

#[test]
fn a_member_that_was_there_from_the_first_is_required_and_an_unknown_kind_is_named() {
    let without = FIRST.replace(r#""queue_select":3,"#, "");
    let error = serde_json::from_str::<TransportState>(&without).unwrap_err();
    assert!(error.to_string().contains("queue_select"), "{error}");
    let error = serde_json::from_str::<DeviceState>(r#"{"balloon":{}}"#).unwrap_err();
    assert!(error.to_string().contains("balloon"), "{error}");
}
