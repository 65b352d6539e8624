//! The keyboard controller, of which a microVM needs one command: to reset the machine, which is
//! how Linux with `reboot=k` reboots and, without ACPI, gives up.

/// Offset of the command register (port 0x64) from the data register (port 0x60).
const COMMAND: u8 = 4;
/// Pulses the line that resets the CPU (linux/arch/x86/kernel/reboot.c).
const RESET_CPU: u8 = 0xfe;

/// A keyboard controller without a keyboard.
#[derive(Debug, Default)]
pub struct I8042;

impl I8042 {
    /// A controller.
    pub fn new() -> Self {
        Self
    }

    /// Reads the port at `offset` from 0x60. No data is ever there and a command can always be
    /// written: all bits of the status are zero.
    pub fn read(&self, _offset: u8) -> u8 {
        0
    }

    /// Writes the port at `offset` from 0x60. True when the guest asks for a reset.
    pub fn write(&mut self, offset: u8, value: u8) -> bool {
        offset == COMMAND && value == RESET_CPU
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_command_of_one_port_resets() {
        let mut i8042 = I8042::new();
        for offset in 0..=u8::MAX {
            assert_eq!(i8042.read(offset), 0);
            for value in 0..=u8::MAX {
                let expected = offset == 4 && value == 0xfe;
                assert_eq!(i8042.write(offset, value), expected, "{offset} {value:#x}");
            }
        }
    }
}
