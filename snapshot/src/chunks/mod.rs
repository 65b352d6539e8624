//! Chunked memory: compressed, each chunk with a hash of its own, so that a pager can fetch and
//! prove one chunk without the rest.
//!
//! `memory.chunks` is the stored chunks end to end and nothing else; `memory.index` gives each
//! one's place, encoding and BLAKE3. The manifest holds the BLAKE3 of the index.

pub(crate) mod index;
pub(crate) mod source;
pub(crate) mod write;
