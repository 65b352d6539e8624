//! What another user of a shared disk could put beside a snapshot: the working-set file.
//!
//! Rules: no panic; what is accepted lies within the memory, in order, and is bounded.

#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use ratoon_fuzz::rarely;
use ratoon_snapshot::{PAGE_BYTES, read_working_set};
use tempfile::TempDir;

const MEMORY: u64 = 1 << 30;
const MAX_BYTES: u64 = 512 << 20;
const MAX_RUNS: usize = 1 << 16;

static FOLDER: LazyLock<TempDir> =
    LazyLock::new(|| tempfile::tempdir_in("/dev/shm").expect("a folder in memory"));

/// A number that is mostly as it should be.
fn number(input: &mut Unstructured<'_>, sound: u64) -> Result<u64> {
    if rarely(input)? {
        let edges = [
            0,
            1,
            PAGE_BYTES - 1,
            MEMORY,
            MEMORY + PAGE_BYTES,
            MAX_BYTES,
            u64::MAX - 4095,
            u64::MAX,
        ];
        return Ok(*input.choose(&edges)?);
    }
    Ok(sound)
}

/// A file with a right length and hash, whose entries are the input's.
fn file(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let count = input.int_in_range(0..=8_u64)?;
    let magic = match rarely(input)? {
        true => b"RTNRUNS1",
        false => b"RTNWSET1",
    };
    let mut bytes = magic.to_vec();
    bytes.extend((number(input, 1)? as u32).to_le_bytes());
    bytes.extend((number(input, PAGE_BYTES)? as u32).to_le_bytes());
    bytes.extend(number(input, MEMORY)?.to_le_bytes());
    bytes.extend(number(input, count)?.to_le_bytes());
    let mut next = 0;
    for _ in 0..count {
        let gap = input.int_in_range(1..=100_u64)? * PAGE_BYTES;
        let length = input.int_in_range(1..=100_u64)? * PAGE_BYTES;
        bytes.extend(number(input, next + gap)?.to_le_bytes());
        bytes.extend(number(input, length)?.to_le_bytes());
        next += gap + length;
    }
    let hash = blake3::hash(&bytes);
    bytes.extend(hash.as_bytes());
    if rarely(input)? {
        let place = input.int_in_range(0..=bytes.len() - 1)?;
        bytes[place] ^= 1;
    }
    Ok(bytes)
}

fn run(input: &mut Unstructured<'_>) -> Result<()> {
    let bytes = match rarely(input)? {
        true => input.bytes(input.len())?.to_vec(),
        false => file(input)?,
    };
    let path: PathBuf = FOLDER.path().join("working-set");
    std::fs::write(&path, &bytes).expect("memory for the file");
    let Ok(found) = read_working_set(FOLDER.path(), MEMORY) else {
        return Ok(());
    };
    let runs = found.expect("the file is there");
    assert!(runs.len() <= MAX_RUNS);
    assert!(runs.iter().map(|run| run.length).sum::<u64>() <= MAX_BYTES);
    let mut end = 0;
    for (place, run) in runs.iter().enumerate() {
        assert!(run.length > 0 && (run.offset | run.length).is_multiple_of(PAGE_BYTES));
        assert!(place == 0 || run.offset > end);
        end = run.offset + run.length;
    }
    assert!(end <= MEMORY);
    Ok(())
}

fuzz_target!(|bytes: &[u8]| {
    // An input that ends early is no finding.
    let _ = run(&mut Unstructured::new(bytes));
});
