//! Virtual machines: records, start, life and end.

pub mod process;
pub mod record;
pub mod store;
