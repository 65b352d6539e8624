use super::*;

fn refusal(path: &Path, read_only: bool, layer: Option<&Path>) -> OpenError {
    match open(path, read_only, &[], layer) {
        Ok(_) => panic!("{path:?} was opened"),
        Err(error) => error,
    }
}

#[test]
fn a_missing_disk_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("none");
    let error = refusal(&path, true, None);
    assert_eq!(
        error.to_string(),
        format!("disk {path:?} does not exist; check the path")
    );
    let layer = directory.path().join("layer");
    assert!(matches!(
        refusal(&path, false, Some(&layer)),
        OpenError::Missing { path: missing } if missing == path
    ));
    assert!(!layer.exists(), "no layer without a base");
}

#[test]
fn a_directory_and_a_device_are_no_disks() {
    let directory = tempfile::tempdir().unwrap();
    for read_only in [true, false] {
        assert!(matches!(
            refusal(directory.path(), read_only, None),
            OpenError::NotADisk {
                found: "a directory",
                ..
            }
        ));
        assert!(matches!(
            refusal(Path::new("/dev/null"), read_only, None),
            OpenError::NotADisk {
                found: "a character device",
                ..
            }
        ));
    }
}

#[test]
fn a_size_that_is_not_whole_sectors_is_refused() {
    let (_directory, path, _) = disk();
    for len in [0, 511, 513] {
        fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(len)
            .unwrap();
        assert!(matches!(
            refusal(&path, false, None),
            OpenError::Size { len_bytes, .. } if len_bytes == len
        ));
    }
}

#[test]
fn two_writers_of_one_file_are_refused_and_many_readers_are_not() {
    let (_directory, path, _) = disk();
    let writer = open(&path, false, &[], None).unwrap();
    for (read_only, writable) in [(false, true), (true, false)] {
        assert!(matches!(
            refusal(&path, read_only, None),
            OpenError::Locked { writable: w, .. } if w == writable
        ));
    }
    drop(writer);
    let _reader = open(&path, true, &[], None).unwrap();
    let _another = open(&path, true, &[], None).unwrap();
    assert!(matches!(
        refusal(&path, false, None),
        OpenError::Locked { writable: true, .. }
    ));
}

#[test]
fn one_layer_has_one_vm_and_one_base_many_layers() {
    let (directory, base, _) = disk();
    let layer = directory.path().join("layer");
    let _first = open(&base, false, &[], Some(&layer)).unwrap();
    assert!(matches!(
        refusal(&base, false, Some(&layer)),
        OpenError::Locked { path, .. } if path == layer
    ));
    let _second = open(&base, false, &[], Some(&directory.path().join("other"))).unwrap();
    assert!(matches!(
        refusal(&base, false, None),
        OpenError::Locked { path, .. } if path == base
    ));
}

#[test]
fn a_layer_fits_its_base_only() {
    let (directory, base, _) = disk();
    let layer = directory.path().join("layer");
    drop(open(&base, false, &[], Some(&layer)).unwrap());
    let larger = directory.path().join("larger");
    fs::write(&larger, vec![0; DISK_BYTES as usize + 512]).unwrap();
    let error = refusal(&larger, false, Some(&layer));
    assert!(
        matches!(
            error,
            OpenError::LayerMismatch { layer_bytes: DISK_BYTES, base_bytes, .. }
                if base_bytes == DISK_BYTES + 512
        ),
        "{error:?}"
    );
    assert!(matches!(
        refusal(&base, false, Some(&base)),
        OpenError::LayerIsBase { .. }
    ));
    assert!(matches!(
        refusal(&base, true, Some(&layer)),
        OpenError::ReadOnlyLayer { .. }
    ));
}

#[test]
fn a_damaged_layer_is_refused() {
    let (directory, base, _) = disk();
    let layer = directory.path().join("layer");
    drop(open(&base, false, &[], Some(&layer)).unwrap());
    let good = fs::read(&layer).unwrap();
    for damage in [&good[..40], &b"not a qcow2 file"[..], &[]] {
        fs::write(&layer, damage).unwrap();
        let error = refusal(&base, false, Some(&layer));
        assert!(matches!(error, OpenError::LayerFormat { .. }), "{error:?}");
    }
}

#[test]
fn making_a_layer_leaves_nothing_else_behind() {
    let (directory, base, _) = disk();
    drop(open(&base, false, &[], Some(&directory.path().join("layer"))).unwrap());
    let mut names: Vec<_> = fs::read_dir(directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["disk.raw", "layer"]);
    let nowhere = directory.path().join("no").join("layer");
    assert!(matches!(
        refusal(&base, false, Some(&nowhere)),
        OpenError::LayerCreate { .. }
    ));
}
