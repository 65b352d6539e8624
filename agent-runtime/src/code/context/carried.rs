//! A context in the state that goes from one runtime to the next (see [`crate::swap`]).

use super::{Cell, Context};
use crate::swap::forms::carried;

carried!(Cell {
    at,
    code,
    timeout,
    since,
    due,
    tick,
    again,
    interrupted,
    timed_out,
    stopped
});
carried!(Context {
    params,
    name,
    hidden,
    zygote,
    is_orphan,
    pid,
    group,
    is_reaped_for,
    waiting,
    count,
    cell,
    up,
    calming,
    up_by,
    control,
    outputs,
    wire,
    outbox,
    late,
    owed,
    watched,
    left,
    heard,
    blocked,
    dying,
    verdict,
    refused,
    gone,
    fate
});
