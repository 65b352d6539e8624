//! Tars of root file systems.

use super::*;

/// The error of a refused entry, without the archive's name.
fn refusal(tar: &[u8]) -> (String, String) {
    let lab = Lab::new();
    let result = lab.import_tar(tar);
    lab.assert_untouched();
    match result {
        Err(Error::RefusedEntry { entry, reason, .. }) => (entry, reason),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_tar_keeps_owners_modes_links_and_times() {
    let lab = Lab::new();
    let tar = Tar::new()
        .entry(EntryType::Regular, "bin/su", "", 0o4755, b"su")
        .entry(EntryType::Directory, "secret", "", 0o700, b"")
        .entry(EntryType::Regular, "secret/none", "", 0o000, b"x")
        .symlink("etc", "/somewhere/absolute")
        .hard_link("bin/su2", "bin/su")
        .entry(EntryType::Char, "dev/null", "", 0o666, b"")
        .entry(EntryType::Fifo, "run/pipe", "", 0o600, b"")
        .done();
    let image = lab.import_tar(&tar).unwrap();
    assert_sound(&image);
    let su = stat(&image, "/bin/su");
    assert!(su.contains("Mode:  04755"), "{su}");
    assert!(su.contains("User:  1000   Group:  1001"), "{su}");
    assert!(su.contains("Links: 2"), "{su}");
    assert!(su.contains(&format!("mtime: {:#x}", 1_700_000_000)), "{su}");
    assert_eq!(content(&image, "/bin/su2"), "su");
    assert!(stat(&image, "/secret/none").contains("Mode:  0000"));
    assert!(stat(&image, "/etc").contains("Fast link dest: \"/somewhere/absolute\""));
    let null = stat(&image, "/dev/null");
    assert!(
        null.contains("Type: character special") && null.contains("01:03"),
        "{null}"
    );
    assert!(stat(&image, "/run/pipe").contains("Type: FIFO"));
    assert!(
        stat(&image, "/proc").contains("Type: directory"),
        "mount points are made"
    );
}

#[test]
fn a_set_id_bit_never_exists_on_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let tar = Tar::new()
        .entry(EntryType::Regular, "su", "", 0o6755, b"su")
        .done();
    let mut tree = tree::Tree::create(&folder.path().join("tree")).unwrap();
    let budget = stream::Budget::new(Limits::default());
    let mut archive = archive::Archive::new(Box::new(tar.as_slice()), "x", &budget);
    while let Some(entry) = archive.next().unwrap() {
        tree.put(&entry, &mut archive, &Quiet).unwrap();
    }
    let (_, fixes) = tree.finish().unwrap();
    let fix = fixes.iter().find(|fix| fix.path == "/su").unwrap();
    assert_eq!(fix.mode, Some(0o106_755));
    use std::os::unix::fs::MetadataExt as _;
    assert_eq!(
        fs::metadata(folder.path().join("tree/su")).unwrap().mode(),
        0o100_755
    );
}

#[test]
fn dot_dot_in_a_name_is_refused() {
    let (entry, reason) = refusal(&Tar::new().file("a/../../escape", "x").done());
    assert_eq!(entry, "a/../../escape");
    assert_eq!(reason, "`..` could lead out of the image");
}

#[test]
fn an_absolute_name_means_the_images_root() {
    let lab = Lab::new();
    let image = lab
        .import_tar(&Tar::new().file("/etc/absolute", "inside").done())
        .unwrap();
    assert_eq!(content(&image, "/etc/absolute"), "inside");
    assert!(!Path::new("/etc/absolute").exists());
}

#[test]
fn an_absolute_hard_link_out_of_the_tree_is_refused() {
    let (entry, reason) = refusal(&Tar::new().hard_link("mine", "/etc/hostname").done());
    assert_eq!(entry, "mine");
    assert_eq!(reason, "it is a hard link to something outside the archive");
}

#[test]
fn a_hard_link_through_a_link_stays_inside_the_image() {
    let tar = Tar::new()
        .symlink("out", "/etc")
        .hard_link("mine", "out/hostname")
        .done();
    assert_eq!(
        refusal(&tar).1,
        "it is a hard link to something outside the archive"
    );
}

#[test]
fn a_hard_link_to_a_folder_is_refused() {
    let tar = Tar::new().folder("a").hard_link("b", "a").done();
    assert_eq!(refusal(&tar).1, "it is a hard link to a folder");
}

#[test]
fn writing_through_a_link_to_a_folder_stays_inside_the_image() {
    let lab = Lab::new();
    let outside = lab.path("outside");
    fs::create_dir(&outside).unwrap();
    let target = outside.to_str().unwrap();
    let tar = Tar::new()
        .folder(target.trim_start_matches('/'))
        .symlink("out", target)
        .symlink("up", "../../../../../../../../../..")
        .file("out/file", "inside")
        .file("up/top", "top")
        .done();
    let image = lab.import_tar(&tar).unwrap();
    assert_eq!(
        fs::read_dir(&outside).unwrap().count(),
        0,
        "nothing was written on the host"
    );
    assert!(!Path::new("/top").exists());
    assert_eq!(content(&image, &format!("{target}/file")), "inside");
    assert_eq!(content(&image, "/top"), "top");
}

#[test]
fn a_file_replaces_a_link_of_its_name_and_does_not_follow_it() {
    let lab = Lab::new();
    let victim = lab.write("victim", b"untouched");
    let tar = Tar::new()
        .symlink("link", victim.to_str().unwrap())
        .file("link", "replaced")
        .done();
    let image = lab.import_tar(&tar).unwrap();
    assert_eq!(fs::read(&victim).unwrap(), b"untouched");
    assert_eq!(content(&image, "/link"), "replaced");
}

#[test]
fn a_file_used_as_a_folder_is_refused() {
    let (entry, reason) = refusal(&Tar::new().file("a", "x").file("a/b", "y").done());
    assert_eq!(entry, "a");
    assert!(
        reason.starts_with("it is used as a folder but is a file"),
        "{reason}"
    );
}

#[test]
fn extended_attributes_reach_the_disk() {
    let lab = Lab::new();
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\n\0\0\0";
    let tar = Tar::new()
        .pax(&[
            ("SCHILY.xattr.security.capability", capability),
            ("SCHILY.xattr.user.note", b"a\nb"),
            ("SCHILY.xattr.security.selinux", b"host"),
        ])
        .file("ping", "x")
        .done();
    let image = lab.import_tar(&tar).unwrap();
    let list = debugfs(&image, "ea_list /ping");
    assert!(
        list.contains("security.capability (20) = 01 00 00 02 00 20"),
        "{list}"
    );
    assert!(list.contains("user.note (3)"), "{list}");
    assert!(!list.contains("selinux"), "{list}");
    assert_sound(&image);
}

#[test]
fn extended_attributes_over_the_limit_are_refused() {
    let lab = Lab::new();
    let tar = Tar::new()
        .pax(&[("SCHILY.xattr.user.big", &[b'x'; 4000])])
        .file("a", "")
        .done();
    match lab.import_tar(&tar) {
        Err(Error::OverLimit { what, limit, .. }) => {
            assert_eq!(
                (what, limit),
                ("bytes of extended attributes of a file", 3584)
            );
        }
        other => panic!("{other:?}"),
    }
    lab.assert_untouched();
}

#[test]
fn names_with_quotes_and_spaces_survive_debugfs() {
    let lab = Lab::new();
    let image = lab
        .import_tar(&Tar::new().file("a \"b\" #c", "odd").done())
        .unwrap();
    let listing = debugfs(&image, "ls -l /");
    let line = listing
        .lines()
        .find(|line| line.contains("a \"b\" #c"))
        .expect("listed");
    assert!(line.contains("1000   1001"), "the owner was set: {line}");
}

#[test]
fn a_pax_name_longer_than_the_header_is_kept() {
    let lab = Lab::new();
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(200));
    let tar = Tar::new()
        .pax(&[("path", long.as_bytes())])
        .file("short", "x")
        .done();
    let image = lab.import_tar(&tar).unwrap();
    assert_eq!(content(&image, &format!("/{long}")), "x");
}

#[test]
fn a_path_over_the_limit_is_refused() {
    let lab = Lab::new();
    let long = "d/".repeat(3000);
    let tar = Tar::new()
        .entry(EntryType::GNULongName, "x", "", 0, long.as_bytes())
        .file("x", "")
        .done();
    match lab.import_tar(&tar) {
        Err(Error::OverLimit { what, limit, .. }) => {
            assert_eq!((what, limit), ("bytes of a path", 4095))
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_cut_tar_is_damaged_wherever_the_cut_is() {
    let whole = Tar::new()
        .file("a", &"x".repeat(1500))
        .file("b", "y")
        .done();
    // Inside a header, inside data, between entries, before the end mark.
    for cut in [100, 700, 512 + 1536, 512 + 1536 + 1024] {
        let lab = Lab::new();
        match lab.import_tar(&whole[..cut]) {
            Err(Error::DamagedArchive { reason, .. }) => {
                assert!(
                    reason.contains("cut short") || reason.contains("breaks off"),
                    "{reason}"
                );
            }
            other => panic!("{cut}: {other:?}"),
        }
        lab.assert_untouched();
    }
}

#[test]
fn a_header_with_a_wrong_checksum_is_damaged() {
    let lab = Lab::new();
    let mut tar = Tar::new().file("a", "x").done();
    tar[0] ^= 1;
    match lab.import_tar(&tar) {
        Err(Error::DamagedArchive { offset, reason, .. }) => {
            assert_eq!(
                (offset, reason.as_str()),
                (0, "no tar header with a right checksum here")
            );
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_sparse_entry_is_refused_with_the_remedy() {
    let tar = Tar::new()
        .entry(EntryType::GNUSparse, "hole", "", 0o644, b"")
        .done();
    assert_eq!(
        refusal(&tar).1,
        "it is stored sparse: pack again without `tar --sparse`"
    );
}

#[test]
fn a_decompression_bomb_is_refused_by_its_ratio() {
    let lab = Lab::new();
    let tar = Tar::new().file("zeroes", &"\0".repeat(4 << 20)).done();
    let packed = zstd::encode_all(tar.as_slice(), 3).unwrap();
    let limits = Limits {
        ratio_from_bytes: 1 << 20,
        ..Limits::default()
    };
    let path = lab.write("bomb.tar.zst", &packed);
    match lab.store.import_with(&path, None, "it", &limits, &Quiet) {
        Err(Error::OverLimit { what, limit, .. }) => {
            assert_eq!((what, limit), ("unpacked bytes for each packed byte", 200));
        }
        other => panic!("{other:?}"),
    }
    lab.assert_untouched();
}

#[test]
fn too_many_bytes_and_too_many_entries_are_refused() {
    let lab = Lab::new();
    let path = lab.write(
        "a.tar",
        &Tar::new().file("a", &"x".repeat(9000)).file("b", "").done(),
    );
    let with = |limits: Limits| lab.store.import_with(&path, None, "it", &limits, &Quiet);
    match with(Limits {
        total_bytes: 8192,
        ..Limits::default()
    }) {
        Err(Error::OverLimit { what, limit, .. }) => {
            assert_eq!((what, limit), ("unpacked bytes", 8192))
        }
        other => panic!("{other:?}"),
    }
    match with(Limits {
        entries: 1,
        ..Limits::default()
    }) {
        Err(Error::OverLimit { what, limit, .. }) => assert_eq!((what, limit), ("entries", 1)),
        other => panic!("{other:?}"),
    }
    lab.assert_untouched();
}

#[test]
fn gzip_and_zstd_are_unpacked_and_xz_is_named() {
    use std::io::Write as _;
    let tar = Tar::new().file("a", "packed").done();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    for packed in [
        gzip.finish().unwrap(),
        zstd::encode_all(tar.as_slice(), 1).unwrap(),
    ] {
        let lab = Lab::new();
        let image = lab.import(&lab.write("a.bin", &packed), None).unwrap();
        assert_eq!(content(&image, "/a"), "packed");
        assert_eq!(image.config.source, "root file system tar a.bin");
    }
    let lab = Lab::new();
    match lab.import(&lab.write("a.xz", b"\xfd7zXZ\0more"), None) {
        Err(Error::UnknownFormat { reason, .. }) => {
            assert_eq!(reason, "it is packed with xz: unpack it with `xz -d`");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_cut_gzip_is_damaged() {
    use std::io::Write as _;
    let lab = Lab::new();
    let tar = Tar::new().file("a", &"some text ".repeat(500)).done();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    let gzip = gzip.finish().unwrap();
    match lab.import(&lab.write("a.tar.gz", &gzip[..gzip.len() / 2]), None) {
        Err(Error::DamagedArchive { archive, .. }) => assert_eq!(archive, "a.tar.gz"),
        other => panic!("{other:?}"),
    }
    lab.assert_untouched();
}

#[test]
fn a_tar_without_entries_is_no_image() {
    let lab = Lab::new();
    match lab.import_tar(&Tar::new().done()) {
        Err(Error::WrongKind { reason, .. }) => assert_eq!(reason, "it has no entries"),
        other => panic!("{other:?}"),
    }
}
