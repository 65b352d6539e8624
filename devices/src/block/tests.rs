//! The block device's rules.
