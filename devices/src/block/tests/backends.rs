use super::*;

/// Random writes, zeroes, discards and flushes; after each the range, at the end all, is as a plain
/// vector says. What was discarded is zeroed in the model by the disk itself, since it may be kept.
pub(super) fn agrees_with_a_model(backend: &mut dyn Backend, model: &mut [u8], seed: u64) {
    let mut seeded = Seeded(seed);
    for _ in 0..300 {
        let sectors = model.len() as u64 / SECTOR_BYTES;
        let first = seeded.below(sectors);
        let count = 1 + seeded.below((sectors - first).min(400));
        let (offset, len) = (first * SECTOR_BYTES, (count * SECTOR_BYTES) as usize);
        let place = &mut model[offset as usize..offset as usize + len];
        match seeded.below(8) {
            0..4 => {
                let bytes = seeded.bytes(len);
                write(backend, offset, &bytes);
                place.copy_from_slice(&bytes);
            }
            4 | 5 => {
                let may_unmap = seeded.below(2) == 0;
                backend.write_zeroes(offset, len as u64, may_unmap).unwrap();
                place.fill(0);
            }
            6 => {
                backend.discard(offset, len as u64).unwrap();
                let after = read(backend, offset, len);
                let kept = |(now, before): (&u8, &u8)| *now == 0 || now == before;
                assert!(
                    after.iter().zip(place.iter()).all(kept),
                    "discard at {offset}"
                );
                place.copy_from_slice(&after);
            }
            _ => backend.flush().unwrap(),
        }
        assert!(
            read(backend, offset, len) == *place,
            "at {offset}, {len} bytes"
        );
    }
    assert!(read(backend, 0, model.len()) == *model, "the whole disk");
}

#[test]
fn a_raw_file_keeps_what_was_written_over_a_reopen() {
    let (_directory, path, mut model) = disk();
    for seed in 0..3 {
        let mut backend = open(&path, false, &[], None).unwrap();
        assert!(read(backend.as_mut(), 0, model.len()) == model);
        agrees_with_a_model(backend.as_mut(), &mut model, seed);
    }
    assert!(fs::read(&path).unwrap() == model);
}

#[test]
fn a_layer_keeps_what_was_written_over_a_reopen_and_never_writes_its_base() {
    let (directory, base, content) = disk();
    let before = fs::metadata(&base).unwrap();
    let layer = directory.path().join("layer");
    let mut model = content.clone();
    for seed in 0..3 {
        let mut backend = open(&base, false, &[], Some(&layer)).unwrap();
        assert!(read(backend.as_mut(), 0, model.len()) == model);
        agrees_with_a_model(backend.as_mut(), &mut model, seed);
    }
    assert!(fs::read(&base).unwrap() == content);
    let after = fs::metadata(&base).unwrap();
    assert_eq!(
        (before.mtime(), before.mtime_nsec(), before.blocks()),
        (after.mtime(), after.mtime_nsec(), after.blocks())
    );
}

#[test]
fn two_layers_of_one_base_do_not_see_each_other() {
    let (directory, base, content) = disk();
    let mut one = open(&base, false, &[], Some(&directory.path().join("one"))).unwrap();
    let mut two = open(&base, false, &[], Some(&directory.path().join("two"))).unwrap();
    write(one.as_mut(), 4096, &[1; 8192]);
    write(two.as_mut(), 8192, &[2; 8192]);
    assert_eq!(read(one.as_mut(), 4096, 8192), [1; 8192]);
    assert!(read(one.as_mut(), 12288, 4096) == content[12288..16384]);
    assert!(read(two.as_mut(), 4096, 4096) == content[4096..8192]);
    assert_eq!(read(two.as_mut(), 8192, 8192), [2; 8192]);
}

/// Bytes on the host's disk.
pub(super) fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn a_discard_gives_a_raw_files_space_back() {
    let (_directory, path, _) = disk();
    let mut backend = open(&path, false, &[], None).unwrap();
    write(backend.as_mut(), 0, &vec![7; DISK_BYTES as usize]);
    backend.flush().unwrap();
    assert!(allocated(&path) >= DISK_BYTES);
    backend.discard(0, DISK_BYTES).unwrap();
    backend.flush().unwrap();
    assert!(allocated(&path) < DISK_BYTES / 4, "{}", allocated(&path));
    let all = read(backend.as_mut(), 0, DISK_BYTES as usize);
    assert!(all.iter().all(|byte| *byte == 0));
}

#[test]
fn a_layer_gives_back_the_space_of_what_is_discarded_or_unmapped() {
    let (directory, base, content) = disk();
    let layer = directory.path().join("layer");
    let mut backend = open(&base, false, &[], Some(&layer)).unwrap();
    let half = DISK_BYTES / 2;
    for unmap in [false, true] {
        let empty = allocated(&layer);
        write(backend.as_mut(), 0, &vec![7; half as usize]);
        backend.flush().unwrap();
        assert!(allocated(&layer) >= half);
        if unmap {
            // The clusters at both ends are zeroed in part only, so they stay.
            backend.write_zeroes(512, half - 1024, true).unwrap();
        } else {
            backend.discard(0, half).unwrap();
        }
        backend.flush().unwrap();
        let kept = allocated(&layer) - empty;
        assert!(kept <= 512 << 10, "{kept} bytes");
        let gone = read(backend.as_mut(), 512, half as usize - 1024);
        assert!(gone.iter().all(|byte| *byte == 0));
    }
    assert!(read(backend.as_mut(), half, half as usize) == content[half as usize..]);
}

#[test]
fn a_discard_of_what_only_the_base_has_writes_no_tables() {
    let (directory, base, content) = disk();
    let layer = directory.path().join("layer");
    let mut backend = open(&base, false, &[], Some(&layer)).unwrap();
    let empty = allocated(&layer);
    backend.discard(0, DISK_BYTES).unwrap();
    backend.flush().unwrap();
    assert_eq!(allocated(&layer), empty);
    assert!(read(backend.as_mut(), 0, content.len()) == content);
}

#[test]
fn what_a_layer_discards_is_used_again() {
    let (directory, base, _) = disk();
    let layer = directory.path().join("layer");
    let mut backend = open(&base, false, &[], Some(&layer)).unwrap();
    let half = DISK_BYTES / 2;
    write(backend.as_mut(), 0, &vec![7; half as usize]);
    backend.flush().unwrap();
    let full = fs::metadata(&layer).unwrap().len();
    for round in 1..8 {
        // The same data, now in one half, now in the other.
        let (from, to) = if round % 2 == 0 { (half, 0) } else { (0, half) };
        backend.discard(from, half).unwrap();
        write(backend.as_mut(), to, &vec![round; half as usize]);
        backend.flush().unwrap();
        let now = read(backend.as_mut(), to, half as usize);
        assert!(now.iter().all(|byte| *byte == round));
    }
    let end = fs::metadata(&layer).unwrap().len();
    assert!(end < full + half / 2, "{end}");
}

#[test]
fn a_transfer_of_more_buffers_than_one_call_takes_is_whole() {
    let (_directory, path, content) = disk();
    let mut backend = open(&path, false, &[], None).unwrap();
    let mut bytes = vec![0; 3 * 1024 * 512];
    // Three thousand buffers, some of them empty.
    let buffers: Vec<_> = bytes
        .chunks_mut(512)
        .enumerate()
        .flat_map(|(index, chunk)| {
            let empty = (index % 7 == 0).then_some(VolatileSlice::from(&mut [][..]));
            [empty, Some(VolatileSlice::from(chunk))]
                .into_iter()
                .flatten()
        })
        .collect();
    backend.read_at(&buffers, 512).unwrap();
    drop(buffers);
    assert!(bytes == content[512..512 + bytes.len()]);
}

#[test]
fn a_transfer_of_no_bytes_succeeds() {
    let (directory, path, content) = disk();
    let layer = directory.path().join("layer");
    for layer in [None, Some(layer.as_path())] {
        let mut backend = open(&path, false, &[], layer).unwrap();
        for offset in [0, DISK_BYTES] {
            backend.read_at(&[], offset).unwrap();
            backend.write_at(&[], offset).unwrap();
            assert!(read(backend.as_mut(), offset, 0).is_empty());
            write(backend.as_mut(), offset, &[]);
            backend.discard(offset, 0).unwrap();
            backend.write_zeroes(offset, 0, true).unwrap();
            backend.write_zeroes(offset, 0, false).unwrap();
        }
        assert!(read(backend.as_mut(), 0, content.len()) == content);
    }
}

#[test]
fn a_file_that_became_shorter_is_an_error_and_not_old_memory() {
    let (_directory, path, _) = disk();
    let mut backend = open(&path, false, &[], None).unwrap();
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(4096)
        .unwrap();
    let mut bytes = [0; 8192];
    let error = backend
        .read_at(&[VolatileSlice::from(&mut bytes[..])], 0)
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}
