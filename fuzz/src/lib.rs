//! What the fuzz targets share: a mock driver whose requests are mostly valid.
//!
//! Random bytes alone die at the first check. A target turns its input into what a driver would
//! do, and [`rarely`] breaks single rules on the way: so the parser is reached, and each of its
//! refusals too.
//!
//! ```no_run
//! use arbitrary::Unstructured;
//! use ratoon_devices::virtio::testing::{Echo, MockDriver};
//!
//! let mut input = Unstructured::new(&[]);
//! let mut driver = MockDriver::new(Echo::default());
//! driver.probe(0);
//! while !input.is_empty() {
//!     let _ = ratoon_fuzz::send_chain(&mut driver, &mut input, 0, &[16], &[512, 1]);
//!     ratoon_fuzz::kick_or_else(&mut driver, &mut input, 0, 0);
//! }
//! ```

use arbitrary::{Result, Unstructured};
use ratoon_devices::virtio::mmio::{REGION_LEN, register, status};
use ratoon_devices::virtio::testing::{BUFFERS, Descriptor, MEMORY_LEN, MockDriver, NEXT, WRITE};

/// True about once in sixteen times; false when the input is used up.
///
/// # Errors
/// None: `arbitrary`'s signature.
pub fn rarely(input: &mut Unstructured<'_>) -> Result<bool> {
    if input.is_empty() {
        return Ok(false);
    }
    Ok(input.int_in_range(0..=15u8)? == 15)
}

/// An interesting guest address: in a buffer, in a ring, at an end of memory, anywhere.
///
/// # Errors
/// None: `arbitrary`'s signature.
pub fn address(input: &mut Unstructured<'_>) -> Result<u64> {
    let near: u64 = input.int_in_range(0..=64u64)?;
    Ok(match input.int_in_range(0..=5u8)? {
        0 => BUFFERS + near * 8,
        1 => MEMORY_LEN - near,
        2 => MEMORY_LEN + near,
        3 => u64::MAX - near,
        4 => MockDriver::areas(0)[(near % 3) as usize] + near,
        _ => input.arbitrary()?,
    })
}

/// Lays and offers a chain of readable buffers of the given lengths, with content from the input,
/// then writable ones. Rarely a length, an address, a flag, a link or the head is wrong.
///
/// `content` of readable buffers is what remains of the input, so put structured requests together
/// with [`send_bytes`] instead.
///
/// # Errors
/// None: `arbitrary`'s signature.
pub fn send_chain(
    driver: &mut MockDriver,
    input: &mut Unstructured<'_>,
    queue: usize,
    readable: &[u32],
    writable: &[u32],
) -> Result<()> {
    let mut contents = Vec::new();
    for len in readable {
        let len = (*len as usize).min(input.len());
        contents.push(input.bytes(len)?.to_vec());
    }
    let contents: Vec<&[u8]> = contents.iter().map(Vec::as_slice).collect();
    send_bytes(driver, input, queue, &contents, writable)
}

/// As [`send_chain`], with the readable buffers' bytes given.
///
/// # Errors
/// None: `arbitrary`'s signature.
pub fn send_bytes(
    driver: &mut MockDriver,
    input: &mut Unstructured<'_>,
    queue: usize,
    readable: &[&[u8]],
    writable: &[u32],
) -> Result<()> {
    let mut buffers = Vec::new();
    for bytes in readable {
        let at = driver.allocate(bytes.len() as u32);
        driver.write_memory(at, bytes);
        buffers.push((at, bytes.len() as u32, false));
    }
    for len in writable {
        buffers.push((driver.allocate(*len), *len, true));
    }
    for buffer in &mut buffers {
        if rarely(input)? {
            match input.int_in_range(0..=3u8)? {
                0 => buffer.0 = address(input)?,
                1 => buffer.1 = input.arbitrary()?,
                2 => buffer.1 = 0,
                _ => buffer.2 = !buffer.2,
            }
        }
    }
    let mut head = driver.lay_chain(queue, &buffers);
    if rarely(input)? {
        break_descriptor(driver, input, queue)?;
    }
    if rarely(input)? {
        head = input.arbitrary()?;
    }
    driver.offer(queue, head);
    if rarely(input)? {
        driver.set_available_index(queue, input.arbitrary()?);
    }
    Ok(())
}

/// Overwrites one descriptor with whatever the input says: loops and indirect tables among it.
fn break_descriptor(
    driver: &mut MockDriver,
    input: &mut Unstructured<'_>,
    queue: usize,
) -> Result<()> {
    let size = driver.queue_size(queue);
    let slot = input.int_in_range(0..=size - 1)?;
    let flags = *input.choose(&[0, NEXT, WRITE, NEXT | WRITE, 4, 4 | NEXT, u16::MAX])?;
    let descriptor = Descriptor {
        address: address(input)?,
        len_bytes: *input.choose(&[0, 1, 16, 48, 512, 1 << 20, u32::MAX])?,
        flags,
        next: *input.choose(&[0, slot, size - 1, size, u16::MAX])?,
    };
    driver.set_descriptor(queue, slot, descriptor);
    Ok(())
}

/// Kicks `queue`; rarely does something else to the transport first. A device that needs reset is
/// reset and probed again with `features`, so that one bad request does not end the run.
///
/// # Errors
/// None: `arbitrary`'s signature.
pub fn kick_or_else(
    driver: &mut MockDriver,
    input: &mut Unstructured<'_>,
    queue: usize,
    features: u64,
) -> Result<()> {
    if rarely(input)? {
        poke_register(driver, input)?;
    }
    if rarely(input)? {
        driver.transport.host_event();
    }
    driver.kick(queue);
    driver.take_interrupt();
    if driver.status() & (status::DEVICE_NEEDS_RESET | status::FAILED) != 0
        || driver.status() & status::DRIVER_OK == 0
    {
        driver.probe(features);
        assert!(!driver.transport.needs_reset(), "a reset revives");
    }
    Ok(())
}

/// One read or write of a register or of configuration space, of any width.
///
/// # Errors
/// None: `arbitrary`'s signature.
pub fn poke_register(driver: &mut MockDriver, input: &mut Unstructured<'_>) -> Result<()> {
    let offset = match input.int_in_range(0..=3u8)? {
        0 => 4 * input.int_in_range(0..=register::CONFIG / 4)?,
        1 => input.int_in_range(register::CONFIG..=register::CONFIG + 64)?,
        2 => input.int_in_range(0..=REGION_LEN)?,
        _ => input.arbitrary()?,
    };
    let width = if rarely(input)? {
        input.int_in_range(0..=16usize)?
    } else {
        *input.choose(&[1, 2, 4, 4, 4, 8])?
    };
    let mut data = [0; 16];
    input.fill_buffer(&mut data)?;
    if input.arbitrary()? {
        driver.transport.write(offset, &data[..width]);
    } else {
        driver.transport.read(offset, &mut data[..width]);
    }
    Ok(())
}
