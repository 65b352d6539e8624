//! pvpanic: one byte by which a guest kernel tells the host how it ends (QEMU's interface,
//! docs/specs/pvpanic; Linux's drivers/misc/pvpanic).
//!
//! Any program in the guest with port access can write it; so an event is what the guest says of
//! itself, no more.

/// Bit 0: the guest panicked and does nothing more.
const PANICKED: u8 = 1 << 0;
/// Bit 2: the guest has shut down and asks to be switched off.
const SHUTDOWN: u8 = 1 << 2;

/// What a guest reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PvpanicEvent {
    /// The kernel panicked.
    Panicked,
    /// The guest asks to be switched off.
    Shutdown,
}

/// The device, which has no state.
#[derive(Debug, Default, Clone, Copy)]
pub struct Pvpanic;

impl Pvpanic {
    /// The events that can be reported. Crash kernels (bit 1) are none of ours.
    pub fn read(&self) -> u8 {
        PANICKED | SHUTDOWN
    }

    /// The guest reports `value`; `None` when it has no bit that was offered. A panic goes before
    /// a shutdown.
    pub fn write(&self, value: u8) -> Option<PvpanicEvent> {
        if value & PANICKED != 0 {
            Some(PvpanicEvent::Panicked)
        } else if value & SHUTDOWN != 0 {
            Some(PvpanicEvent::Shutdown)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panic_and_shutdown_are_offered() {
        assert_eq!(Pvpanic.read(), 0b101);
    }

    #[test]
    fn only_offered_events_are_reported_and_a_panic_goes_first() {
        assert_eq!(Pvpanic.write(0b001), Some(PvpanicEvent::Panicked));
        assert_eq!(Pvpanic.write(0b100), Some(PvpanicEvent::Shutdown));
        assert_eq!(Pvpanic.write(0b111), Some(PvpanicEvent::Panicked));
        assert_eq!(Pvpanic.write(0b010), None);
        assert_eq!(Pvpanic.write(0b1111_1010), None);
        assert_eq!(Pvpanic.write(0), None);
    }
}
