//! A serial port's registers and FIFO, saved and continued.

use std::io;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{Error, NoEvents};

use super::{Line, Serial};
use crate::virtio::state::bounded;

/// The receive FIFO's length in bytes (vm-superio's).
const FIFO_SIZE: usize = 64;

/// A serial port; the names are the 16550A's registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // The names are the specification's.
pub struct SerialState {
    pub baud_divisor_low: u8,
    pub baud_divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    /// Bytes that the guest has not read.
    #[serde(deserialize_with = "bounded::<_, _, FIFO_SIZE>")]
    pub in_buffer: Vec<u8>,
}

/// Why a saved serial port cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SerialRestoreError {
    /// More bytes than the FIFO has room for.
    #[error("the state holds {len_bytes} bytes of input, a serial port {FIFO_SIZE}")]
    Fifo {
        /// How many.
        len_bytes: usize,
    },
    /// The interrupt's eventfd.
    #[error("the serial port's interrupt")]
    Line(#[source] io::Error),
}

impl Serial {
    /// All that the guest can see of the port. What it wrote is with the log, and stays there.
    pub fn save(&self) -> SerialState {
        let state = self.port.state();
        SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        }
    }

    /// This port, with its output and its interrupt line, as `state` was. An interrupt that waits
    /// is raised again.
    ///
    /// # Errors
    /// [`SerialRestoreError`].
    pub fn restored(self, state: &SerialState) -> Result<Self, SerialRestoreError> {
        let line = self.interrupt().try_clone();
        let line = Line(line.map_err(SerialRestoreError::Line)?);
        let registers = vm_superio::SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer.clone(),
        };
        let sink = self.port.into_writer();
        let port = vm_superio::Serial::from_state(&registers, line, NoEvents, sink);
        Ok(Self {
            port: port.map_err(|error| match error {
                Error::Trigger(source) | Error::IOError(source) => SerialRestoreError::Line(source),
                Error::FullFifo => SerialRestoreError::Fifo {
                    len_bytes: state.in_buffer.len(),
                },
            })?,
            dropped: self.dropped,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{DATA, INTERRUPT_ENABLE, LINE_STATUS, LOOPBACK, MODEM_CONTROL};
    use super::*;

    fn through_json(state: &SerialState) -> SerialState {
        serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
    }

    #[test]
    fn registers_and_input_go_on_and_a_waiting_interrupt_is_raised_again() {
        let mut serial = Serial::discard().unwrap();
        serial.write(INTERRUPT_ENABLE, 3);
        serial.write(MODEM_CONTROL, LOOPBACK);
        serial.write(7, 0x5a);
        for byte in b"input" {
            serial.write(DATA, *byte);
        }
        let state = serial.save();
        let new = Serial::discard().unwrap();
        let mut new = new.restored(&through_json(&state)).unwrap();
        assert_eq!(new.save(), state);
        new.interrupt().read().unwrap();
        assert_eq!(new.read(7), 0x5a);
        let mut input = Vec::new();
        while new.read(LINE_STATUS) & 1 != 0 {
            input.push(new.read(DATA));
        }
        assert_eq!(input, b"input");
    }

    #[test]
    fn output_goes_on_in_the_log_that_the_new_port_has() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial.log");
        let state = Serial::discard().unwrap().save();
        let serial = Serial::to_log(&path, 1 << 20).unwrap();
        serial.restored(&state).unwrap().write(DATA, b'x');
        assert_eq!(std::fs::read(&path).unwrap(), b"x");
    }

    #[test]
    fn more_input_than_the_fifo_holds_is_refused() {
        let mut state = Serial::discard().unwrap().save();
        state.in_buffer = vec![0; 65];
        let refused = Serial::discard().unwrap().restored(&state);
        assert!(matches!(
            refused.err(),
            Some(SerialRestoreError::Fifo { len_bytes: 65 })
        ));
        let json = serde_json::to_string(&state).unwrap();
        let error = serde_json::from_str::<SerialState>(&json).unwrap_err();
        assert!(error.to_string().contains("at most 64"), "{error}");
    }

    #[test]
    fn registers_of_any_content_are_only_registers() {
        for value in 0..=u8::MAX {
            let state = SerialState {
                baud_divisor_low: value,
                baud_divisor_high: value,
                interrupt_enable: value,
                interrupt_identification: value,
                line_control: value,
                line_status: value,
                modem_control: value,
                modem_status: value,
                scratch: value,
                in_buffer: vec![value; 64],
            };
            let mut serial = Serial::discard().unwrap().restored(&state).unwrap();
            for offset in 0..=8 {
                serial.write(offset, value);
                serial.read(offset);
            }
        }
    }
}
