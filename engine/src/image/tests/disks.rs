//! Folders, raw ext4 files and things that are neither.

use super::*;

fn raw_ext4(lab: &Lab) -> PathBuf {
    let path = lab.path("raw.ext4");
    fs::File::create(&path).unwrap().set_len(16 << 20).unwrap();
    let made = Command::new(tool::MKE2FS.find().unwrap())
        .args(["-q", "-F", "-t", "ext4"])
        .arg(&path)
        .status()
        .unwrap();
    assert!(made.success());
    path
}

#[test]
fn a_folder_becomes_a_disk() {
    let lab = Lab::new();
    let root = lab.path("rootfs");
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::write(root.join("etc/name"), "folder").unwrap();
    std::os::unix::fs::symlink("/etc/name", root.join("link")).unwrap();
    let image = lab.import(&root, None).unwrap();
    assert_sound(&image);
    assert_eq!(content(&image, "/etc/name"), "folder");
    assert!(stat(&image, "/link").contains("Fast link dest: \"/etc/name\""));
    assert!(stat(&image, "/etc/name").contains("User:     0   Group:     0"));
}

#[test]
fn an_empty_folder_is_no_image() {
    let lab = Lab::new();
    let root = lab.path("rootfs");
    fs::create_dir(&root).unwrap();
    match lab.import(&root, None) {
        Err(Error::WrongKind { reason, .. }) => assert_eq!(reason, "it is empty"),
        other => panic!("{other:?}"),
    }
    lab.assert_untouched();
}

#[test]
fn a_folder_that_holds_the_store_is_refused() {
    let lab = Lab::new();
    match lab.import(lab.folder.path(), None) {
        Err(Error::WrongKind { reason, .. }) => {
            assert!(reason.starts_with("it holds the image store"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_raw_ext4_file_is_taken_as_it_is() {
    let lab = Lab::new();
    let image = lab.import(&raw_ext4(&lab), None).unwrap();
    assert_eq!(image.config.size_bytes, 16 << 20);
    assert_eq!(image.config.source, "raw ext4 file raw.ext4");
    assert_sound(&image);
}

#[test]
fn a_cut_ext4_file_is_refused() {
    let lab = Lab::new();
    let path = raw_ext4(&lab);
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(8 << 20)
        .unwrap();
    match lab.import(&path, None) {
        Err(Error::BadExt4 { reason, .. }) => {
            assert!(
                reason.ends_with("the file has 8388608 bytes: it is cut short"),
                "{reason}"
            );
        }
        other => panic!("{other:?}"),
    }
    lab.assert_untouched();
}

#[test]
fn a_corrupt_ext4_file_is_refused() {
    use std::os::unix::fs::FileExt as _;
    let lab = Lab::new();
    let path = raw_ext4(&lab);
    let file = fs::File::options().write(true).open(&path).unwrap();
    // Everything but the superblock: group descriptors, bitmaps, inodes.
    file.write_all_at(&[0xa5; 2 << 20], 4096).unwrap();
    match lab.import(&path, None) {
        Err(Error::BadExt4 { reason, .. }) => {
            assert!(reason.starts_with("e2fsck says:"), "{reason}")
        }
        other => panic!("{other:?}"),
    }
    lab.assert_untouched();
}

#[test]
fn garbage_and_an_empty_file_are_no_format() {
    let lab = Lab::new();
    for (bytes, why) in [
        (&b"not an image"[..], "its first bytes are no format's mark"),
        (b"", "it is empty"),
    ] {
        match lab.import(&lab.write("garbage", bytes), None) {
            Err(Error::UnknownFormat { reason, .. }) => assert_eq!(reason, why),
            other => panic!("{other:?}"),
        }
    }
    lab.assert_untouched();
}

#[test]
fn a_claimed_kind_is_checked() {
    let lab = Lab::new();
    let tar = lab.write("a.tar", &Tar::new().file("a", "x").done());
    for (kind, why) in [
        (ImportKind::Folder, "it is a file"),
        (ImportKind::Oci, "it lacks oci-layout or index.json"),
        (
            ImportKind::DockerArchive,
            "it has no manifest.json of docker's form",
        ),
    ] {
        match lab.import(&tar, Some(kind)) {
            Err(Error::WrongKind { reason, .. }) => assert_eq!(reason, why),
            other => panic!("{other:?}"),
        }
    }
    match lab.import(&tar, Some(ImportKind::Ext4)) {
        Err(Error::BadExt4 { .. }) => {}
        other => panic!("{other:?}"),
    }
    lab.assert_untouched();
}

#[test]
fn a_missing_source_is_named() {
    let lab = Lab::new();
    match lab.import(&lab.path("nothing"), None) {
        Err(Error::Io { action, path, .. }) => {
            assert_eq!((action, path), ("open", lab.path("nothing")));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_missing_tool_is_named_with_its_package() {
    let tool = tool::Tool {
        name: "no-such-tool",
        package: "no-such-package",
    };
    assert_eq!(
        tool.find().unwrap_err().to_string(),
        "no-such-tool is not installed: install it with `apt install no-such-package`"
    );
}

#[test]
fn holes_do_not_change_the_digest() {
    let folder = tempfile::tempdir().unwrap();
    let (hole, full) = (folder.path().join("hole"), folder.path().join("full"));
    fs::File::create(&hole).unwrap().set_len(1 << 20).unwrap();
    fs::write(&full, vec![0; 1 << 20]).unwrap();
    let digest = |path: &Path| ext4::digest(path, &Quiet).unwrap();
    assert_eq!(digest(&hole), digest(&full));
    fs::write(&full, vec![0; (1 << 20) + 1]).unwrap();
    assert_ne!(digest(&hole), digest(&full), "the length counts");
}
