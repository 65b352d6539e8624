//! `ratoon logs`.

use std::process::ExitCode;
use std::time::Duration;

use ratoon_engine::Engine;
use ratoon_engine::vm::life;
use ratoon_engine::vm::serial::{SerialReader, printable};

use crate::failure::Failure;
use crate::output;

/// How often a followed log is looked at.
const INTERVAL: Duration = Duration::from_millis(200);

/// Show a VM's serial console: the guest kernel's messages.
///
/// On a terminal, control characters are shown escaped; otherwise the bytes come as they are.
#[derive(clap::Args)]
pub struct Args {
    /// Go on until the VM ends.
    #[arg(long, short)]
    follow: bool,
    /// The VMM's own log instead.
    #[arg(long, conflicts_with = "follow")]
    vmm: bool,
    /// Name, id or the beginning of an id.
    vm: String,
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    let entry = engine.store().find(&args.vm)?;
    let log = if args.vmm {
        entry.dir.vmm_log()
    } else {
        entry.dir.serial_log()
    };
    let mut reader = SerialReader::new(&log);
    let mut buffer = vec![0; 64 * 1024];
    let mut pending = Vec::new();
    loop {
        // Asked before reading, so that what an ending VM wrote last is still read.
        let live = args.follow && life::info(&entry).status.is_live();
        loop {
            let len = reader
                .read(&mut buffer)
                .map_err(|error| Failure::new(format!("reading {}: {error}", log.display())))?;
            if len == 0 {
                break;
            }
            show(&mut pending, &buffer[..len])?;
        }
        if !live {
            break;
        }
        std::thread::sleep(INTERVAL);
    }
    output::write(printable(&pending).as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// Prints bytes; on a terminal whole characters only, the rest of one stays in `pending`.
fn show(pending: &mut Vec<u8>, bytes: &[u8]) -> Result<(), Failure> {
    if !output::is_terminal() {
        return output::write(bytes);
    }
    pending.extend_from_slice(bytes);
    let whole = whole_len(pending);
    output::write(printable(&pending[..whole]).as_bytes())?;
    pending.drain(..whole);
    Ok(())
}

/// How many bytes hold no half character and no half `\r\n` at their end.
fn whole_len(bytes: &[u8]) -> usize {
    let cut = match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        // Invalid somewhere, or whole: at most 3 bytes of a character can be waiting at the end.
        _ => (bytes.len().saturating_sub(3)..bytes.len())
            .find(|&at| {
                std::str::from_utf8(&bytes[at..])
                    .is_err_and(|error| error.error_len().is_none() && error.valid_up_to() == 0)
            })
            .unwrap_or(bytes.len()),
    };
    cut - usize::from(bytes[..cut].ends_with(b"\r"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_half_character_waits_for_its_rest() {
        assert_eq!(whole_len(b"ab"), 2);
        assert_eq!(whole_len(b"ab\xe2\x82"), 2);
        assert_eq!(whole_len(b"\xff ab\xe2\x82"), 4);
        assert_eq!(whole_len(b"ab\xff"), 3, "never a character: shown as it is");
        assert_eq!(whole_len(b"ab\r"), 2);
        assert_eq!(whole_len(b""), 0);
    }
}
