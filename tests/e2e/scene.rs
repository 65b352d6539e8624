//! A model, a bridge and its configuration beside a Ratoon; and the host's key, looked for where nobody may have it.

use std::fs;
use std::path::{Path, PathBuf};

use ratoon_scripted_model::{Script, Server, Turn};
use ratoon_tests::Ratoon;
use serde_json::{Value, json};

/// The host's key, which nobody but the bridge and the model's server may ever have.
pub const KEY: &str = "sk-ant-the/Hosts+own_key-0123456789";

/// A model, a bridge's configuration, and Ratoon.
pub struct Scene {
    pub ratoon: Ratoon,
    pub model: Server,
    folder: tempfile::TempDir,
}

impl Scene {
    /// The configuration's only model is `scripted/m`. `provider` and `limits` say the rest of it.
    pub fn new(turns: impl IntoIterator<Item = Turn>, provider: Value, limits: Value) -> Self {
        let scene = Self {
            ratoon: Ratoon::warm(),
            model: Server::start(Script::new(turns).with_key(KEY)).expect("a scripted model"),
            folder: tempfile::tempdir().expect("a folder"),
        };
        fs::write(scene.path("key"), format!("{KEY}\n")).expect("a file");
        let mut provider = provider;
        provider["name"] = json!("scripted");
        provider["base_url"] = json!(scene.model.url());
        provider["key"] = json!({"command": ["cat", scene.path("key")]});
        let config =
            json!({"records": scene.path("runs"), "limits": limits, "providers": [provider]});
        fs::write(scene.path("bridge.json"), config.to_string()).expect("a file");
        scene
    }

    /// A file of its own.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Nothing of ours is left, and the model has nothing to complain of.
    pub fn over(self) {
        assert_eq!(self.model.violations(), [""; 0]);
        self.ratoon.nothing_is_left();
    }
}

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
