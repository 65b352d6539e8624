//! Virtual machines: records, start, life and end.
