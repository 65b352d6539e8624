//! Manifests and indexes, spoiled one rule at a time.

use serde_json::{Value, json};

use super::*;

fn manifest() -> Value {
    let lab = Lab::new();
    let snapshot = lab.snapshot("it", MemoryKind::Chunks).unwrap();
    serde_json::from_slice(&fs::read(snapshot.folder.join("manifest.json")).unwrap()).unwrap()
}

fn parse(manifest: &Value) -> Result<Manifest> {
    Manifest::parse(&serde_json::to_vec(manifest).unwrap(), Path::new("m.json"))
}

fn reason(result: Result<Manifest>) -> String {
    match result {
        Err(Error::Damaged { path, reason }) => {
            assert_eq!(path, Path::new("m.json"));
            reason
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_newer_format_is_refused_by_name_whatever_else_it_holds() {
    let newer = json!({"format": 2, "ratoon": "9.1.0", "memory": "elsewhere"});
    let error = parse(&newer).unwrap_err();
    assert_eq!(
        error.to_string(),
        "m.json has snapshot format 2 (written by Ratoon 9.1.0); this Ratoon reads format 1 and \
         older: upgrade Ratoon"
    );
}

#[test]
fn members_of_a_later_ratoon_are_ignored() {
    let mut later = manifest();
    let before = parse(&later).unwrap();
    later["hibernation"] = json!({"depth": [1, 2.5, null]});
    later["memory"]["numa"] = json!(1);
    later["layers"][0]["format"] = json!("qcow3");
    assert_eq!(parse(&later).unwrap(), before);
}

#[test]
fn a_manifest_over_its_limits_is_refused() {
    let sound = manifest();
    type Spoil = fn(&mut Value);
    let cases: &[(Spoil, &str)] = &[
        (|m| m["format"] = json!(0), "there is no format 0"),
        (
            |m| m["memory"]["bytes"] = json!(4096),
            "memory regions make up 3145728 bytes",
        ),
        (
            |m| m["memory"]["regions"] = json!([]),
            "memory needs 1 to 16 regions",
        ),
        (
            |m| {
                let region = |at: u64| json!({"guest_address": at << 20, "length": 4096});
                m["memory"]["regions"] = (0..17).map(region).collect();
            },
            "memory needs 1 to 16 regions",
        ),
        (
            |m| m["memory"]["regions"][1]["guest_address"] = json!(4096),
            "memory regions overlap",
        ),
        (
            |m| m["memory"]["regions"][1]["guest_address"] = json!(u64::MAX - 4095),
            "a memory region beyond the end",
        ),
        (
            |m| m["memory"]["regions"][1]["length"] = json!(1_u64 << 45),
            "more than 16 TiB",
        ),
        (
            |m| m["memory"]["regions"][0]["length"] = json!(4097),
            "not whole pages",
        ),
        (
            |m| m["memory"]["kind"] = json!("plain"),
            "do not go together",
        ),
        (
            |m| m["memory"]["kind"] = json!("tape"),
            "unknown variant `tape`",
        ),
        (
            |m| m["memory"]["file_length"] = json!(1_u64 << 40),
            "chunks that are longer",
        ),
        (
            |m| m["memory"]["index"]["length"] = json!(1_u64 << 40),
            "an index of more than",
        ),
        (
            |m| m["memory"]["blake3"] = json!("00"),
            "not 64 lower-case hexadecimal digits",
        ),
        (
            |m| m["state"]["length"] = json!(1_u64 << 40),
            "a state of more than",
        ),
        (|m| m["vcpus"] = json!(0), "vcpus is not within"),
        (|m| m["memory_mib"] = json!(u64::MAX), "memory_mib is over"),
        (
            |m| m["cpu"]["vendor"] = json!("a\u{1b}[2J"),
            "`cpu.vendor` is empty",
        ),
        (
            |m| m["cpu"]["features"] = (0..4097).map(|n| json!(n.to_string())).collect(),
            "more than 4096 CPU features",
        ),
        (
            |m| m["layers"] = (0..65).map(|_| m["layers"][0].clone()).collect(),
            "more than 64 layers",
        ),
        (
            |m| m["layers"] = json!([m["layers"][0], m["layers"][0]]),
            "two layers in the file",
        ),
        (
            |m| m["layers"][0]["file"] = json!("../../etc/passwd"),
            "a layer's file is named",
        ),
        (
            |m| m["layers"][0]["file"] = json!("memory.bin"),
            "a layer's file is named",
        ),
        (
            |m| m["layers"][0]["external"] = m["kernel"].clone(),
            "either a file or an external",
        ),
        (
            |m| m["layers"][0]["length"] = json!(u64::MAX),
            "longer than a file can be",
        ),
        (
            |m| m["labels"] = json!({"x": "y".repeat(1025)}),
            "label `x` has",
        ),
    ];
    for (spoil, expected) in cases {
        let mut manifest = sound.clone();
        spoil(&mut manifest);
        let reason = reason(parse(&manifest));
        assert!(reason.contains(expected), "{reason}, not {expected}");
    }
    let mut long = serde_json::to_vec(&sound).unwrap();
    long.resize((1 << 20) + 1, b' ');
    assert_eq!(
        reason(Manifest::parse(&long, Path::new("m.json"))),
        "longer than 1048576 bytes"
    );
}

/// Changes an index and gives it the hash that goes with the change.
fn resealed(index: &[u8], change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut body = index[..index.len() - 32].to_vec();
    change(&mut body);
    let hash = blake3::hash(&body);
    body.extend(hash.as_bytes());
    body
}

#[test]
fn a_chunk_index_that_breaks_a_rule_is_refused_with_a_right_hash_too() {
    let mut lab = Lab::new();
    lab.memory[..64 << 10].fill(0);
    lab.memory[64 << 10..128 << 10].fill(1);
    let snapshot = lab.snapshot("it", MemoryKind::Chunks).unwrap();
    let path = Path::new("memory.index");
    let index = fs::read(snapshot.folder.join(path)).unwrap();
    ChunkIndex::parse(&index, path).unwrap();
    type Spoil = fn(&mut [u8]);
    let header: &[Spoil] = &[
        |i| i[0] ^= 1,     // magic
        |i| i[8] = 0,      // version
        |i| i[13] = 3,     // chunk size: no power of two
        |i| i[15] = 0x80,  // chunk size: too large
        |i| i[17] ^= 0x10, // memory: another count
        |i| i[24] ^= 1,    // count: another length
        |i| i[31] = 0x80,  // count: over the limit
    ];
    for (place, spoil) in header.iter().enumerate() {
        match ChunkIndex::parse(&resealed(&index, spoil), path) {
            Err(Error::Damaged { .. }) => {}
            other => panic!("{place}: {other:?}"),
        }
    }
    let entries: &[(u64, Spoil)] = &[
        (0, |i| i[32] = 1),      // a zero chunk with a place
        (0, |i| i[32 + 40] = 1), // a zero chunk with a hash
        (0, |i| i[32 + 12] = 3), // an unknown encoding
        (1, |i| i[80] = 1),      // a hole before it
        (1, |i| i[80 + 10] = 2), // packed larger than plain
        (1, |i| i[80 + 12] = 1), // stored, of another length
    ];
    for (chunk, spoil) in entries {
        match ChunkIndex::parse(&resealed(&index, spoil), path) {
            Err(Error::DamagedChunk { chunk: named, .. }) => assert_eq!(named, *chunk),
            other => panic!("{chunk}: {other:?}"),
        }
    }
    match ChunkIndex::parse(&resealed(&index, |i| i[8] = 2), path) {
        Err(Error::NewerFormat {
            found: 2, known: 1, ..
        }) => {}
        other => panic!("{other:?}"),
    }
    for length in 0..index.len() {
        assert!(ChunkIndex::parse(&index[..length], path).is_err());
    }
}

#[test]
fn a_run_index_that_breaks_a_rule_is_refused_with_a_right_hash_too() {
    let path = Path::new("memory.runs");
    let run = |offset, length| Run { offset, length };
    let index = |runs: &[Run]| RunIndex {
        memory_bytes: 1 << 20,
        runs: runs.to_vec(),
    };
    let sound = index(&[run(0, 4096), run(8192, 8192)]);
    let bytes = sound.to_bytes();
    assert_eq!(RunIndex::parse(&bytes, path).unwrap(), sound);
    for runs in [
        &[run(8192, 4096), run(0, 4096)][..],
        &[run(0, 8192), run(4096, 4096)],
        &[run(0, 4096), run(4096, 4096)],
        &[run(0, 0)],
        &[run(7, 4096)],
        &[run(0, 1 << 21)],
        &[run(u64::MAX - 4095, 4096)],
    ] {
        match RunIndex::parse(&index(runs).to_bytes(), path) {
            Err(Error::Damaged { reason, .. }) => {
                assert_eq!(reason, "its runs overlap, touch or lie outside");
            }
            other => panic!("{runs:?}: {other:?}"),
        }
    }
    for place in 0..bytes.len() {
        let mut spoiled = bytes.clone();
        spoiled[place] ^= 0x10;
        assert!(RunIndex::parse(&spoiled, path).is_err(), "{place}");
        assert!(RunIndex::parse(&bytes[..place], path).is_err(), "{place}");
    }
}

#[test]
fn a_chunk_that_unpacks_to_more_than_a_chunk_is_refused() {
    let lab = Lab::new();
    let snapshot = lab.snapshot("it", MemoryKind::Chunks).unwrap();
    let path = snapshot.folder.join("memory.index");
    let index = ChunkIndex::parse(&fs::read(&path).unwrap(), &path).unwrap();
    let chunk = (0..index.count())
        .find(|chunk| index.entry(*chunk).unwrap().encoding == Encoding::Zstd)
        .unwrap();
    let entry = *index.entry(chunk).unwrap();
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    let mut bytes = fs::read(snapshot.folder.join("memory.chunks")).unwrap();
    let at = entry.offset as usize;
    let room = entry.stored_bytes as usize;
    bytes[at..at + room.min(bomb.len())].copy_from_slice(&bomb[..room.min(bomb.len())]);
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    let source = ChunkFile::new(file, Path::new("bomb"), index).unwrap();
    let mut into = vec![0; 64 << 10];
    match source.chunk(chunk, &mut into) {
        Err(Error::DamagedChunk {
            chunk: named,
            reason,
            ..
        }) => assert_eq!((named, reason.as_str()), (chunk, "it does not unpack")),
        other => panic!("{other:?}"),
    }
}
