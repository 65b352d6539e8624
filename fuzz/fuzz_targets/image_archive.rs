//! Image archives: tars of layers with hostile names, links, whiteouts and headers, and docker
//! archives around them.
//!
//! Rules: no panic; nothing appears or changes outside the private folder.

#![no_main]

use std::fs;
use std::path::Path;

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use ratoon_engine::image::fuzz_import;
use ratoon_fuzz::rarely;

const BLOCK: usize = 512;
/// Few names, so that entries meet each other.
const NAMES: [&str; 16] = [
    "a",
    "b",
    "a/b",
    "a/b/c",
    "b/a",
    "./a/",
    "/a",
    "..",
    "a/../../b",
    ".wh.a",
    "a/.wh.b",
    "a/.wh..wh..opq",
    ".wh...",
    "",
    "link/x",
    "link",
];
const TARGETS: [&str; 8] = [
    "a",
    "/a",
    "..",
    "../../..",
    "/",
    "link",
    "b/a",
    "../outside",
];
const TYPES: &[u8; 12] = b"05123467LKxg";

/// One entry; rarely a header byte is wrong or the checksum is.
fn entry(tar: &mut Vec<u8>, input: &mut Unstructured<'_>) -> Result<()> {
    let name = *input.choose(&NAMES)?;
    let target = *input.choose(&TARGETS)?;
    let kind = *input.choose(TYPES)?;
    let data: Vec<u8> = match kind {
        b'L' | b'K' => name.as_bytes().to_vec(),
        b'x' => b"18 path=a/b/c/d/e\n".to_vec(),
        b'0' => {
            let length: u8 = input.arbitrary()?;
            input.bytes(usize::from(length).min(input.len()))?.to_vec()
        }
        _ => Vec::new(),
    };
    let mut header = [0_u8; BLOCK];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..107].copy_from_slice(b"0004755");
    header[108..115].copy_from_slice(b"0000001");
    header[116..123].copy_from_slice(b"0000002");
    header[124..135].copy_from_slice(format!("{:011o}", data.len()).as_bytes());
    header[136..147].copy_from_slice(b"14524000000");
    header[156] = kind;
    header[157..157 + target.len()].copy_from_slice(target.as_bytes());
    header[257..265].copy_from_slice(b"ustar\x0000");
    if rarely(input)? {
        let place = input.int_in_range(0..=BLOCK - 1)?;
        header[place] = input.arbitrary()?;
    }
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    tar.extend_from_slice(&header);
    tar.extend_from_slice(&data);
    tar.resize(tar.len().next_multiple_of(BLOCK), 0);
    Ok(())
}

fn archive(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut tar = Vec::new();
    for _ in 0..input.int_in_range(0..=12)? {
        entry(&mut tar, input)?;
    }
    if !rarely(input)? {
        tar.resize(tar.len() + 2 * BLOCK, 0);
    }
    Ok(tar)
}

/// All names below a folder that are not in the private one.
fn outside(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Unstructured::new(bytes);
    let Ok(style) = input.int_in_range(0..=3_u8) else {
        return;
    };
    let rest = match style {
        // Bytes as they come: headers, gzip, zstd.
        0 => input.take_rest().to_vec(),
        _ => match archive(&mut input) {
            Ok(tar) => tar,
            Err(_) => return,
        },
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let private = folder.path().join("private");
    fs::create_dir(&private).expect("the private folder");
    fs::write(folder.path().join("outside"), b"untouched").expect("a file outside");
    fuzz_import(&rest, style == 1, &private);
    assert_eq!(outside(folder.path()), ["outside", "private"]);
    assert_eq!(
        fs::read(folder.path().join("outside")).ok().as_deref(),
        Some(&b"untouched"[..])
    );
});
