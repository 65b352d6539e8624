//! A body that comes in pieces: a hidden file that gets its name, the hash of its bytes, when it is
//! whole, and goes when it is not. What a killed bridge leaves of an answer is kept by the next one:
//! so each piece is in the kernel's hands before a guest has it.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::sync::Arc;

use ratoon_bridge_api::record::{Body, Hash};

use super::room::Room;

/// A body that is being stored.
#[derive(Debug)]
pub struct Spool {
    pub(super) file: File,
    pub(super) room: Arc<Room>,
    pub(super) hasher: blake3::Hasher,
    pub(super) len: u64,
    pub(super) path: PathBuf,
    pub(super) bodies: PathBuf,
    pub(super) done: bool,
}

impl Spool {
    /// Adds a piece.
    ///
    /// # Errors
    /// When it cannot be written, or the run's record is full.
    pub fn write(&mut self, piece: &[u8]) -> io::Result<()> {
        self.room.take(piece.len() as u64)?;
        self.len += piece.len() as u64;
        self.file.write_all(piece)?;
        self.hasher.update(piece);
        Ok(())
    }

    /// Gives it its name: the hash of its bytes.
    ///
    /// # Errors
    /// When it cannot be written; nothing of it is left then.
    pub fn finish(mut self) -> io::Result<Body> {
        let hash = Hash(self.hasher.finalize().to_hex().to_string());
        let path = self.bodies.join(&hash.0);
        let is_known = path.exists();
        fs::rename(&self.path, path)?;
        self.done = true;
        if is_known {
            self.room.give_back(self.len);
        }
        Ok(Body {
            hash,
            len: self.len,
        })
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        if !self.done {
            // At worst the next bridge removes it, or keeps it as part of an answer.
            let _ = fs::remove_file(&self.path);
            self.room.give_back(self.len);
        }
    }
}
