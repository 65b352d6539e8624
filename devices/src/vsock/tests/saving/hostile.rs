//! A state that nobody saved.

use super::*;
use crate::vsock::{ControlState, HOST_CID};

fn own_mut(state: &mut TransportState) -> &mut VsockState {
    match &mut state.device {
        DeviceState::Vsock(own) => own,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_state_that_contradicts_itself_is_refused_by_name() {
    let mut guest = Guest::new();
    let _control = control(&mut guest, 1_000);
    let state = guest.driver.transport.save();
    let mut refusal = |spoil: fn(&mut VsockState)| {
        let mut state = state.clone();
        spoil(own_mut(&mut state));
        let (dir, device) = deserted();
        let refused = guest.restore(dir, device, &state).unwrap_err().to_string();
        let prefix = "the state contradicts itself: ";
        refused.strip_prefix(prefix).unwrap().to_owned()
    };
    let what = "a context id that no guest has";
    assert_eq!(refusal(|s| s.guest_cid = 2), format!("{what} (0x2)"));
    let cid = u64::from(u32::MAX);
    let refused = refusal(|s| s.guest_cid = u64::from(u32::MAX));
    assert_eq!(refused, format!("{what} ({cid:#x})"));
    assert_eq!(
        refusal(|s| s.next_host_port = 1024),
        "a host port that is not given to connections (0x400)"
    );
    assert_eq!(
        refusal(|s| s.resets.push(ResetState {
            host_cid: HOST_CID,
            host_port: CONTROL_PORT,
            guest_port: PORT,
        })),
        "a control connection that goes on and ends (0x1388)"
    );
}

#[test]
fn more_bytes_or_resets_than_there_can_be_are_not_read() {
    let mut guest = Guest::new();
    let _control = control(&mut guest, 1_000);
    let state = guest.driver.transport.save();
    let refusal = |spoil: fn(&mut VsockState)| {
        let mut state = state.clone();
        spoil(own_mut(&mut state));
        let json = serde_json::to_string(&state).unwrap();
        let error = serde_json::from_str::<TransportState>(&json).unwrap_err();
        error.to_string()
    };
    fn bytes(state: &mut VsockState) -> &mut ControlState {
        state.control.as_mut().unwrap()
    }
    let long = refusal(|s| bytes(s).to_host = vec![0; BUF_ALLOC as usize + 1]);
    assert!(long.contains("at most 262144 entries"), "{long}");
    let long = refusal(|s| bytes(s).to_guest = vec![0; (1 << 20) + 1]);
    assert!(long.contains("at most 1048576 entries"), "{long}");
    let long = refusal(|s| {
        s.resets = (0..=4096)
            .map(|guest_port| ResetState {
                host_cid: 2,
                host_port: 1,
                guest_port,
            })
            .collect();
    });
    assert!(long.contains("at most 4096 entries"), "{long}");
}

#[test]
fn any_credit_in_a_state_starves_the_guest_at_worst() {
    for value in [0, 1, u32::MAX, 1 << 31, u32::MAX - 5] {
        let mut guest = Guest::new();
        let _control = control(&mut guest, 1_000);
        let mut state = guest.driver.transport.save();
        let saved = own_mut(&mut state).control.as_mut().unwrap();
        saved.sent = value;
        saved.peer_taken = value.wrapping_mul(3);
        saved.peer_alloc = value;
        saved.forwarded = value;
        saved.told_forwarded = value.wrapping_mul(5);
        saved.to_host = vec![1; BUF_ALLOC as usize];
        saved.to_guest = vec![2; 1 << 20];
        let (dir, device, listener) = elsewhere();
        guest.restore(dir, device, &state).unwrap();
        let (new, _) = listener.accept().unwrap();
        new.set_nonblocking(true).unwrap();
        for _ in 0..20 {
            guest.send(credit(Op::Data, 1, 1 << 20, value), b"x", &[]);
            guest.settle();
            read_some(&new);
        }
        assert_eq!(guest.failure(), None);
    }
}
