//! What a snapshot from elsewhere hands to parsers: the manifest and both memory indexes.
//!
//! Rules: no panic; what is accepted keeps its bounds.

#![no_main]

use std::path::Path;

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use ratoon_fuzz::rarely;
use ratoon_snapshot::{ChunkIndex, MAX_LAYERS, MAX_REGIONS, Manifest, RunIndex};

const PAGE: u64 = 4096;
/// Numbers at which something could tip over.
const EDGES: [u64; 8] = [
    0,
    1,
    PAGE,
    3 * PAGE,
    1 << 20,
    1 << 44,
    u64::MAX - 4095,
    u64::MAX,
];
const WORDS: [&str; 8] = [
    "plain",
    "chunks",
    "root",
    "a.qcow2",
    "../x",
    "memory.bin",
    "",
    "\\u001b",
];

fn number(input: &mut Unstructured<'_>, sound: u64) -> Result<u64> {
    if rarely(input)? {
        return Ok(*input.choose(&EDGES)?);
    }
    Ok(sound)
}

fn word(input: &mut Unstructured<'_>, sound: &'static str) -> Result<&'static str> {
    if rarely(input)? {
        return Ok(input.choose(&WORDS)?);
    }
    Ok(sound)
}

/// A mostly sound manifest.
fn manifest(input: &mut Unstructured<'_>) -> Result<String> {
    let digest = "0123456789abcdef".repeat(4);
    let mut bytes = 0;
    let mut regions = Vec::new();
    for place in 0..input.int_in_range(1..=4_u64)? {
        let length = number(input, 3 * PAGE)?;
        bytes += length.min(1 << 50);
        let address = number(input, place << 30)?;
        regions.push(format!(
            r#"{{"guest_address":{address},"length":{length}}}"#
        ));
    }
    let mut layers = Vec::new();
    for place in 0..input.int_in_range(0..=3_u8)? {
        let (disk, length) = (word(input, "root")?, number(input, 512)?);
        let kept = match input.arbitrary()? {
            true => format!(r#""external":"{digest}""#),
            false => format!(r#""file":"{place}{}""#, word(input, "a.qcow2")?),
        };
        layers.push(format!(
            r#"{{"disk":"{disk}",{kept},"length":{length},"blake3":"{digest}"}}"#
        ));
    }
    let (kind, rest) = match input.int_in_range(0..=2_u8)? {
        0 => ("plain", String::new()),
        1 => (
            "plain",
            format!(r#","base":"{digest}","index":{{"length":96,"blake3":"{digest}"}}"#),
        ),
        _ => (
            "chunks",
            format!(r#","index":{{"length":96,"blake3":"{digest}"}}"#),
        ),
    };
    Ok(format!(
        r#"{{"format":{},"ratoon":"0.1.0","created_unix_seconds":{},"memory":{{"bytes":{},
        "regions":[{}],"kind":"{}","file_length":{},"blake3":"{digest}"{rest}}},
        "state":{{"length":{},"blake3":"{digest}"}},"layers":[{}],
        "cpu":{{"vendor":"{}","features":["x"]}},"kernel":"{digest}","vcpus":{},"memory_mib":{},
        "labels":{{"a":"{}"}},"later":{}}}"#,
        number(input, 1)?,
        number(input, 7)?,
        number(input, bytes)?,
        regions.join(","),
        word(input, kind)?,
        number(input, bytes)?,
        number(input, 10)?,
        layers.join(","),
        word(input, "GenuineIntel")?,
        number(input, 2)?,
        number(input, 16)?,
        word(input, "b")?,
        number(input, 0)?,
    ))
}

/// An index with a right length and hash, whose entries are the input's.
fn index(input: &mut Unstructured<'_>, chunks: bool) -> Result<Vec<u8>> {
    let count = input.int_in_range(0..=8_u64)?;
    let mut bytes = Vec::new();
    bytes.extend(if chunks { b"RTNCHNK1" } else { b"RTNRUNS1" });
    bytes.extend((number(input, 1)? as u32).to_le_bytes());
    bytes.extend((number(input, PAGE)? as u32).to_le_bytes());
    bytes.extend(number(input, if chunks { count * PAGE } else { 1 << 20 })?.to_le_bytes());
    bytes.extend(number(input, count)?.to_le_bytes());
    let mut next = 0;
    for place in 0..count {
        if !chunks {
            bytes.extend(number(input, place * 3 * PAGE)?.to_le_bytes());
            bytes.extend(number(input, PAGE)?.to_le_bytes());
            continue;
        }
        let (encoding, stored) = match input.int_in_range(0..=2_u32)? {
            0 => (0_u64, 0),
            1 => (1, PAGE),
            _ => (2, input.int_in_range(1..=PAGE - 1)?),
        };
        let offset = if encoding == 0 { 0 } else { next };
        next += stored;
        bytes.extend(number(input, offset)?.to_le_bytes());
        bytes.extend((number(input, stored)? as u32).to_le_bytes());
        bytes.extend((number(input, encoding)? as u32).to_le_bytes());
        bytes.extend([u8::from(encoding != 0); 32]);
    }
    let hash = blake3::hash(&bytes);
    bytes.extend(hash.as_bytes());
    if rarely(input)? {
        let place = input.int_in_range(0..=bytes.len() - 1)?;
        bytes[place] ^= 1;
    }
    Ok(bytes)
}

fn check_manifest(bytes: &[u8]) {
    let Ok(manifest) = Manifest::parse(bytes, Path::new("manifest.json")) else {
        return;
    };
    assert!(manifest.layers.len() <= MAX_LAYERS);
    assert!(manifest.memory.regions.len() <= MAX_REGIONS);
    let lengths = manifest.memory.regions.iter().map(|region| region.length);
    assert_eq!(lengths.sum::<u64>(), manifest.memory.bytes);
    for file in manifest
        .layers
        .iter()
        .filter_map(|layer| layer.file.as_ref())
    {
        assert!(!file.contains('/') && !file.starts_with('.'));
    }
}

fn check_indexes(bytes: &[u8]) {
    if let Ok(index) = ChunkIndex::parse(bytes, Path::new("memory.index")) {
        let plain: u64 = (0..index.count())
            .map(|chunk| u64::from(index.place(chunk).1))
            .sum();
        assert_eq!(plain, index.memory_bytes());
        assert!(index.file_length() <= index.memory_bytes());
    }
    if let Ok(index) = RunIndex::parse(bytes, Path::new("memory.runs")) {
        assert!(index.file_length() <= index.memory_bytes);
        for mapping in index.mappings() {
            assert!(mapping.memory_offset + mapping.length <= index.memory_bytes);
            assert!(mapping.file_offset + mapping.length <= index.file_length());
        }
    }
}

fn run(input: &mut Unstructured<'_>) -> Result<()> {
    match input.int_in_range(0..=3_u8)? {
        0 => {
            let bytes = input.bytes(input.len())?;
            check_manifest(bytes);
            check_indexes(bytes);
        }
        1 => check_manifest(manifest(input)?.as_bytes()),
        kind => check_indexes(&index(input, kind == 2)?),
    }
    Ok(())
}

fuzz_target!(|bytes: &[u8]| {
    // An input that ends early is no finding.
    let _ = run(&mut Unstructured::new(bytes));
});
