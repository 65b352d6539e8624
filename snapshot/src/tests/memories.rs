//! What was written is what is read.

use super::*;

#[test]
fn the_files_of_a_difference_come_after_those_it_lies_over() {
    let mut lab = Lab::new();
    let whole = lab.snapshot("whole", MemoryKind::Plain).unwrap();
    let one = lab.difference("one", &whole).unwrap();
    let two = lab.difference("two", &one).unwrap();
    let files = lab.store.memory_files(&two).unwrap();
    let folders = [&whole, &one, &two].map(|it| it.folder.join("memory.bin"));
    let paths: Vec<_> = files.iter().map(|file| file.path.clone()).collect();
    assert_eq!(paths, folders);
    let kinds: Vec<bool> = files.iter().map(|file| file.is_difference).collect();
    assert_eq!(kinds, [false, true, true]);
    // Laid over each other as they say, they are the memory.
    let mut memory = fs::read(&files[0].path).unwrap();
    for file in &files[1..] {
        let packed = fs::read(&file.path).unwrap();
        let mut at = 0;
        for run in &file.runs {
            let (start, length) = (run.offset as usize, run.length as usize);
            memory[start..start + length].copy_from_slice(&packed[at..at + length]);
            at += length;
        }
        assert_eq!(at, packed.len());
    }
    assert!(memory == lab.memory);
    fs::remove_file(&folders[1]).unwrap();
    let missing = lab.store.memory_files(&two).unwrap_err();
    assert!(
        matches!(&missing, Error::Damaged { path, .. } if *path == folders[1]),
        "{missing}"
    );
}

#[test]
fn plain_memory_comes_back_and_its_zero_pages_are_holes() {
    let lab = Lab::new();
    let snapshot = lab.snapshot("it", MemoryKind::Plain).unwrap();
    assert!(lab.read("it").unwrap() == lab.memory);
    lab.store.verify("it", &Quiet).unwrap();
    assert_eq!(snapshot.state().unwrap(), b"the state of the VM");
    let layer = &snapshot.manifest.layers[0];
    let mut end = [0; 13];
    let file = snapshot.layer(layer).unwrap();
    file.read_exact_at(&mut end, 100_000).unwrap();
    assert_eq!(&end, b"a layer's end");
    let sizes = snapshot.sizes().unwrap();
    assert!(sizes.apparent_bytes > MEMORY_BYTES);
    assert!(sizes.disk_bytes < MEMORY_BYTES / 2, "{sizes:?}");
}

#[test]
fn zero_pages_of_a_full_file_are_left_out() {
    let lab = Lab::new();
    let mut writer = lab.store.begin().unwrap();
    let whole = [Run {
        offset: 0,
        length: MEMORY_BYTES,
    }];
    let full = writer
        .memory_plain(&REGIONS, &lab.memory.as_slice(), &whole, &Quiet)
        .unwrap()
        .clone();
    let sparse = lab.snapshot("it", MemoryKind::Plain).unwrap();
    assert_eq!(full, sparse.manifest.memory);
}

#[test]
fn chunks_come_back_and_have_the_name_of_the_same_plain_memory() {
    let lab = Lab::new();
    let plain = lab.snapshot("plain", MemoryKind::Plain).unwrap();
    let chunks = lab.snapshot("chunks", MemoryKind::Chunks).unwrap();
    assert_eq!(plain.manifest.memory.blake3, chunks.manifest.memory.blake3);
    assert!(lab.read("chunks").unwrap() == lab.memory);
    lab.store.verify("chunks", &Quiet).unwrap();
}

#[test]
fn every_chunk_size_and_encoding_comes_back() {
    let mut lab = Lab::new();
    lab.memory[..64 << 10].fill(0);
    for at in 64 << 10..128 << 10 {
        lab.memory[at] = lab.random.next() as u8;
    }
    lab.memory[128 << 10..192 << 10].fill(7);
    let file = lab.memory_file();
    for chunk_bytes in [4096, 64 << 10, 2 << 20] {
        let mut writer = lab.store.begin().unwrap();
        let options = ChunkOptions {
            chunk_bytes,
            level: 3,
        };
        let runs = populated(&file).unwrap();
        writer
            .memory_chunks(&REGIONS, &file, &runs, options, &Quiet)
            .unwrap();
        writer.state(b"").unwrap();
        let snapshot = writer.finish(about(None), None, None).unwrap();
        let image = lab.store.memory(&snapshot).unwrap();
        let Base::Chunks(chunks) = &image.base else {
            panic!("{image:?}");
        };
        let source: &dyn PageSource = chunks;
        let mut into = vec![9; chunk_bytes as usize];
        for chunk in 0..chunks.index().count() {
            let (at, length) = chunks.index().place(chunk);
            let into = &mut into[..length as usize];
            let content = source.chunk(chunk, into).unwrap();
            assert!(*into == lab.memory[at as usize..][..length as usize]);
            assert_eq!(content == Content::Zero, into.iter().all(|byte| *byte == 0));
            assert_eq!(content == Content::Zero, source.is_zero(chunk));
        }
        if chunk_bytes == 64 << 10 {
            let kinds: Vec<_> = (0..3)
                .map(|chunk| chunks.index().entry(chunk).unwrap().encoding)
                .collect();
            assert_eq!(kinds, [Encoding::Zero, Encoding::Stored, Encoding::Zstd]);
        }
        match source.chunk(chunks.index().count(), &mut into) {
            Err(Error::BadRequest { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_last_chunk_that_is_short_comes_back() {
    let lab = Lab::new();
    let mut writer = lab.store.begin().unwrap();
    let region = Region {
        guest_address: 0,
        length: 5 * 4096,
    };
    let memory = vec![5; 5 * 4096];
    let run = Run {
        offset: 0,
        length: region.length,
    };
    let options = ChunkOptions {
        chunk_bytes: 16384,
        level: 1,
    };
    writer
        .memory_chunks(&[region], &memory.as_slice(), &[run], options, &Quiet)
        .unwrap();
    writer.state(b"").unwrap();
    writer.finish(about(None), Some("it"), None).unwrap();
    assert!(lab.read("it").unwrap() == memory);
}

#[test]
fn differences_over_differences_come_back_over_either_base() {
    for kind in [MemoryKind::Plain, MemoryKind::Chunks] {
        let mut lab = Lab::new();
        let first = lab.snapshot("first", kind).unwrap();
        let before = lab.memory.clone();
        let second = lab.difference("second", &first).unwrap();
        let between = lab.memory.clone();
        lab.difference("third", &second).unwrap();
        assert!(lab.read("first").unwrap() == before);
        assert!(lab.read("second").unwrap() == between);
        assert!(lab.read("third").unwrap() == lab.memory);
        lab.store.verify("third", &Quiet).unwrap();
        let third = lab.store.get("third").unwrap();
        assert!(third.manifest.memory.file_length <= 100 * PAGE_BYTES);

        // Odd places and lengths, across the edges of runs.
        let image = lab.store.memory(&third).unwrap();
        assert_eq!(image.overlays.len(), 2);
        for _ in 0..300 {
            let at = lab.random.below(MEMORY_BYTES - 20_000);
            let mut into = vec![9; lab.random.below(20_000) as usize];
            image.read(at, &mut into).unwrap();
            assert!(into == lab.memory[at as usize..][..into.len()]);
        }
        match image.read(MEMORY_BYTES - 1, &mut [0; 2]) {
            Err(Error::BadRequest { .. }) => {}
            other => panic!("{other:?}"),
        }

        // Written whole from its layers it has the same bytes, and needs nobody.
        let mut writer = lab.store.begin().unwrap();
        let whole = [Run {
            offset: 0,
            length: MEMORY_BYTES,
        }];
        writer
            .memory_plain(&REGIONS, &image, &whole, &Quiet)
            .unwrap();
        writer.state(b"").unwrap();
        writer.finish(about(None), Some("whole"), None).unwrap();
        assert!(lab.read("whole").unwrap() == lab.memory);
    }
}

#[test]
fn mappings_put_together_give_the_memory() {
    let mut lab = Lab::new();
    let first = lab.snapshot("first", MemoryKind::Plain).unwrap();
    let second = lab.difference("second", &first).unwrap();
    let image = lab.store.memory(&second).unwrap();
    let Base::Plain(base) = &image.base else {
        panic!("{image:?}");
    };
    let mut memory = vec![9; MEMORY_BYTES as usize];
    base.read_exact_at(&mut memory, 0).unwrap();
    for overlay in &image.overlays {
        for mapping in &overlay.mappings {
            assert_eq!(
                (mapping.memory_offset | mapping.file_offset | mapping.length) % PAGE_BYTES,
                0
            );
            let part = &mut memory[mapping.memory_offset as usize..][..mapping.length as usize];
            overlay
                .file
                .read_exact_at(part, mapping.file_offset)
                .unwrap();
        }
    }
    assert!(memory == lab.memory);
}

#[test]
fn what_no_snapshot_can_hold_is_refused_before_it_is_written() {
    let lab = Lab::new();
    let mut writer = lab.store.begin().unwrap();
    let overlapping = [REGIONS[0], REGIONS[0]];
    let beyond = [Run {
        offset: MEMORY_BYTES,
        length: 4096,
    }];
    for (regions, runs) in [
        (&overlapping[..], &[][..]),
        (&[], &[]),
        (&REGIONS, &beyond[..]),
    ] {
        match writer.memory_plain(regions, &lab.memory.as_slice(), runs, &Quiet) {
            Err(Error::BadRequest { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    for name in ["../x", ".x", "", "state.bin", "lock", "a/b"] {
        let disk = tempfile::tempfile().unwrap();
        match writer.layer("root", name, &disk, &Quiet) {
            Err(Error::BadRequest { .. }) => {}
            other => panic!("{name}: {other:?}"),
        }
    }
    match writer.finish(about(None), None, None) {
        Err(Error::BadRequest { reason }) => {
            assert_eq!(reason, "its memory or its state was not written");
        }
        other => panic!("{other:?}"),
    }
    assert!(lab.leftovers().is_empty());
}
