//! Looks for the host's key where nobody may have it.

use std::fs;
use std::path::Path;

/// The host's key, which nobody but the bridge and the model's server may ever have.
pub const KEY: &str = "sk-ant-the/Hosts+own_key-0123456789";

/// Looks for the key in every file of a folder, plain and in base64 and hexadecimal; gives how much there is.
pub fn search(folder: &Path) -> u64 {
    use std::io::Read;
    let hex: String = KEY.bytes().map(|byte| format!("{byte:02x}")).collect();
    // As `base64` writes it.
    let base64 = "c2stYW50LXRoZS9Ib3N0cytvd25fa2V5LTAxMjM0NTY3OD";
    let forms = [KEY.as_bytes(), hex.as_bytes(), base64.as_bytes()];
    let longest = forms.map(<[u8]>::len).into_iter().max().unwrap_or(0);
    let mut searched = 0;
    for entry in fs::read_dir(folder).expect("a folder") {
        let entry = entry.expect("an entry");
        let kind = entry.file_type().expect("a kind");
        if kind.is_dir() {
            searched += search(&entry.path());
        }
        if !kind.is_file() {
            continue;
        }
        let mut file = fs::File::open(entry.path()).expect("a file");
        let mut piece = vec![0; 4 << 20];
        let mut kept = 0;
        loop {
            let read = file.read(&mut piece[kept..]).expect("it can be read");
            if read == 0 {
                break;
            }
            searched += read as u64;
            let len = kept + read;
            // Most of a machine's memory is nothing.
            if piece[..len].iter().any(|byte| *byte != 0) {
                for form in forms {
                    let found = find(&piece[..len], form);
                    assert!(!found, "the key is in {}", entry.path().display());
                }
            }
            kept = longest.min(len);
            piece.copy_within(len - kept..len, 0);
        }
    }
    searched
}

fn find(bytes: &[u8], wanted: &[u8]) -> bool {
    let first = wanted[0];
    let mut at = 0;
    while let Some(next) = bytes[at..].iter().position(|byte| *byte == first) {
        at += next;
        if bytes[at..].starts_with(wanted) {
            return true;
        }
        at += 1;
    }
    false
}
