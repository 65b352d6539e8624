//! Ratoon on the host: images, VM records and the life of a sandbox.

pub mod dirs;
pub mod image;
pub mod initramfs;
pub mod runtime;
pub mod vm;
