//! The few ports of a PC that a microVM still has. Each takes single bytes, the offset from its
//! base port and whatever value the guest likes; none can fail.
//!
//! ```text
//!  0x3f8-0x3ff  Serial   16550A, output to a bounded log, IRQ by eventfd
//!  0x60, 0x64   I8042    the reset command, nothing else
//!  0x505        Pvpanic  the guest's panic or power-off
//! ```
//!
//! Of these only the serial port has a state to save.

mod bounded_log;
mod i8042;
mod pvpanic;
mod serial;

pub use bounded_log::{BoundedLog, LogError};
pub use i8042::I8042;
pub use pvpanic::{Pvpanic, PvpanicEvent};
pub use serial::{Serial, SerialRestoreError, SerialState};
