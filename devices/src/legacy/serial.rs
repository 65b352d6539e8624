//! The serial console: vm-superio's 16550A, whose output goes to a [`BoundedLog`] or nowhere.
//!
//! A guest can write for ever; it never waits for the host's disk to have space, and what could
//! not be kept is counted.

use std::io::{self, Write};
use std::path::Path;

use vm_superio::Trigger;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::bounded_log::{BoundedLog, LogError};

mod state;

pub use state::{SerialRestoreError, SerialState};

/// A serial port.
pub struct Serial {
    port: vm_superio::Serial<Line, NoEvents, Sink>,
    /// Bytes of loopback input and interrupts that found no place.
    dropped: u64,
}

impl Serial {
    /// A port whose output is kept in the file `log` and its predecessor, of `limit_bytes`
    /// together.
    ///
    /// # Errors
    /// When the file cannot be opened, or there is no file descriptor left.
    pub fn to_log(log: &Path, limit_bytes: u64) -> Result<Self, LogError> {
        let log = BoundedLog::open(log, limit_bytes)?;
        Self::new(Sink::Log(log)).map_err(LogError::Eventfd)
    }

    /// A port whose output is dropped.
    ///
    /// # Errors
    /// When there is no file descriptor left.
    pub fn discard() -> io::Result<Self> {
        Self::new(Sink::Discard)
    }

    fn new(sink: Sink) -> io::Result<Self> {
        let line = Line(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        Ok(Self {
            port: vm_superio::Serial::new(line, sink),
            dropped: 0,
        })
    }

    /// The interrupt line, for the VMM to bind to IRQ 4.
    pub fn interrupt(&self) -> &EventFd {
        &self.port.interrupt_evt().0
    }

    /// Output bytes that could not be kept: a full disk, mostly.
    pub fn lost_bytes(&self) -> u64 {
        match self.port.writer() {
            Sink::Log(log) => log.lost_bytes(),
            Sink::Discard => 0,
        }
    }

    /// Loopback bytes and interrupts that found no place since creation.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Reads the register at `offset` from the base port; zero beyond the last.
    pub fn read(&mut self, offset: u8) -> u8 {
        self.port.read(offset)
    }

    /// Writes the register at `offset` from the base port; nothing beyond the last.
    pub fn write(&mut self, offset: u8, value: u8) {
        // The sink never fails: what does is the interrupt's eventfd, when nobody reads it.
        if self.port.write(offset, value).is_err() {
            self.dropped += 1;
        }
    }
}

struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

enum Sink {
    Log(BoundedLog),
    Discard,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Log(log) => log.append(bytes),
            Self::Discard => {}
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) const DATA: u8 = 0;
    pub(super) const INTERRUPT_ENABLE: u8 = 1;
    const INTERRUPT_IDENTIFICATION: u8 = 2;
    pub(super) const MODEM_CONTROL: u8 = 4;
    pub(super) const LINE_STATUS: u8 = 5;
    pub(super) const LOOPBACK: u8 = 0x10;

    #[test]
    fn what_the_guest_writes_is_in_the_log() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial.log");
        let mut serial = Serial::to_log(&path, 1 << 20).unwrap();
        for byte in b"hello\r\n" {
            assert_eq!(serial.read(LINE_STATUS) & 0x60, 0x60, "ready to send");
            serial.write(DATA, *byte);
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"hello\r\n");
        assert_eq!(serial.lost_bytes(), 0);
    }

    #[test]
    fn an_enabled_interrupt_is_raised_for_each_byte_sent() {
        let mut serial = Serial::discard().unwrap();
        serial.write(DATA, b'x');
        let error = serial.interrupt().read().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        serial.write(INTERRUPT_ENABLE, 2);
        serial.interrupt().read().unwrap();
        assert_eq!(serial.read(INTERRUPT_IDENTIFICATION) & 0xf, 2, "empty");
        serial.write(DATA, b'x');
        serial.interrupt().read().unwrap();
    }

    #[test]
    fn a_loopback_flood_is_bounded() {
        let mut serial = Serial::discard().unwrap();
        serial.write(MODEM_CONTROL, LOOPBACK);
        for _ in 0..10_000 {
            serial.write(DATA, 0x55);
        }
        let mut held = 0;
        while serial.read(LINE_STATUS) & 1 != 0 {
            assert_eq!(serial.read(DATA), 0x55);
            held += 1;
        }
        assert_eq!(held, 64);
    }

    #[test]
    fn every_register_takes_every_value() {
        let mut serial = Serial::discard().unwrap();
        for offset in 0..=u8::MAX {
            for value in 0..=u8::MAX {
                serial.write(offset, value);
                serial.read(offset);
            }
        }
        serial.write(3, 0);
        assert_eq!(serial.read(8), 0);
        assert_eq!(serial.dropped(), 0);
    }
}
