//! Reading the serial console's log: `serial.log.1` (older), then `serial.log`.
//!
//! The VMM renames a full log to `.1` and begins anew, so a follower keeps its descriptor until it
//! has read the old file to its end and only then opens the new one. The bytes are the guest's:
//! any, in any encoding; [`printable`] makes them safe for a terminal.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// How much of a log's end is looked at for its last lines, in bytes.
const TAIL_LEN: u64 = 64 * 1024;

/// Reads a log from its beginning and then what is added.
#[derive(Debug)]
pub struct SerialReader {
    log: PathBuf,
    file: Option<File>,
    /// Older output has been read, or there is none.
    in_newest: bool,
}

impl SerialReader {
    /// A reader of `log`, which need not exist yet.
    pub fn new(log: impl Into<PathBuf>) -> Self {
        Self {
            log: log.into(),
            file: None,
            in_newest: false,
        }
    }

    /// Reads on into `buffer`; 0 when there is nothing more now.
    ///
    /// # Errors
    /// When a log cannot be read.
    pub fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            if let Some(file) = &mut self.file {
                // Asked before reading: what is written after a rename goes to the new file.
                let replaced = !self.in_newest || replaced(file, &self.log)?;
                let len = file.read(buffer)?;
                if len > 0 || !replaced {
                    return Ok(len);
                }
                self.file = None;
                self.in_newest = true;
            }
            let path = if self.in_newest {
                self.log.clone()
            } else {
                older(&self.log)
            };
            match File::open(&path) {
                Ok(file) => self.file = Some(file),
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    if self.in_newest {
                        return Ok(0);
                    }
                    self.in_newest = true;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// Whether `path` names another file than the open one by now. Between the VMM's rename and its
/// new file there is none: then it is not replaced yet.
fn replaced(file: &File, path: &Path) -> std::io::Result<bool> {
    let open = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) != (open.dev(), open.ino())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn older(log: &Path) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// The last lines of a log, at most `count`, made [`printable`]. What cannot be read is absent.
pub fn last_lines(log: &Path, count: usize) -> Vec<String> {
    let mut bytes = tail(&older(log));
    bytes.extend(tail(log));
    let text = printable(&bytes);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty())
        .collect();
    lines[lines.len().saturating_sub(count)..]
        .iter()
        .map(|line| (*line).to_owned())
        .collect()
}

fn tail(path: &Path) -> Vec<u8> {
    let read = || {
        let mut file = File::open(path)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(TAIL_LEN)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_LEN).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(bytes)
    };
    read().unwrap_or_default()
}

/// The bytes as text in which nothing can command a terminal: control characters other than
/// newline and tab appear as `\x1b` and the like, carriage returns before a newline vanish, what
/// is not UTF-8 becomes U+FFFD.
pub fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes).replace("\r\n", "\n");
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.extend(c.escape_default()),
            // Marks that reorder or hide text on a terminal.
            '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                out.extend(c.escape_default());
            }
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn read_all(reader: &mut SerialReader) -> String {
        let mut all = Vec::new();
        let mut buffer = [0; 5];
        loop {
            match reader.read(&mut buffer).unwrap() {
                0 => return String::from_utf8(all).unwrap(),
                len => all.extend_from_slice(&buffer[..len]),
            }
        }
    }

    #[test]
    fn older_output_comes_first() {
        let temp = tempfile::tempdir().unwrap();
        let log = temp.path().join("serial.log");
        std::fs::write(older(&log), "first ").unwrap();
        std::fs::write(&log, "second").unwrap();
        assert_eq!(read_all(&mut SerialReader::new(&log)), "first second");
    }

    #[test]
    fn a_follower_loses_nothing_when_the_log_is_renamed() {
        let temp = tempfile::tempdir().unwrap();
        let log = temp.path().join("serial.log");
        let mut reader = SerialReader::new(&log);
        assert_eq!(read_all(&mut reader), "");
        let mut file = File::create(&log).unwrap();
        file.write_all(b"one ").unwrap();
        assert_eq!(read_all(&mut reader), "one ");
        file.write_all(b"two ").unwrap();
        std::fs::rename(&log, older(&log)).unwrap();
        assert_eq!(read_all(&mut reader), "two ");
        std::fs::write(&log, "three").unwrap();
        assert_eq!(read_all(&mut reader), "three");
    }

    #[test]
    fn last_lines_go_back_into_the_older_log() {
        let temp = tempfile::tempdir().unwrap();
        let log = temp.path().join("serial.log");
        std::fs::write(older(&log), "a\nb\nc").unwrap();
        std::fs::write(&log, "d\r\n\r\ne\n").unwrap();
        assert_eq!(last_lines(&log, 3), ["b", "cd", "e"]);
        assert_eq!(last_lines(&temp.path().join("none"), 3), [""; 0]);
    }

    #[test]
    fn nothing_in_a_log_can_command_a_terminal() {
        assert_eq!(
            printable(b"a\x1b[2Jb\r\n\tc\xff\x07\xc2\x9b\r"),
            "a\\u{1b}[2Jb\n\tc\u{fffd}\\u{7}\\u{9b}\\r"
        );
        assert_eq!(printable("x\u{202e}y".as_bytes()), "x\\u{202e}y");
    }
}
