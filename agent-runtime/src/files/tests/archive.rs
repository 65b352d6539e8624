//! Archives.

use super::*;

fn pack_of(path: &Path) -> Vec<u8> {
    let params = TreePack {
        path: text(path),
        ..TreePack::default()
    };
    let (result, archive) = done(pack(params), None);
    assert_eq!(result.unwrap()["bytes"], archive.len());
    archive
}

fn unpack_to(path: &Path, archive: &[u8]) -> Result<serde_json::Value, ErrorReply> {
    let params = TreeUnpack {
        path: text(path),
        ..TreeUnpack::default()
    };
    done(unpack(params), Some(archive)).0
}

#[test]
fn a_tree_comes_back_from_its_archive_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    let long = "n".repeat(150);
    fs::create_dir_all(tree.join(&long).join("empty")).unwrap();
    fs::write(tree.join(&long).join("f"), vec![7; 100_000]).unwrap();
    fs::set_permissions(
        tree.join(&long).join("f"),
        fs::Permissions::from_mode(0o4711),
    )
    .unwrap();
    fs::hard_link(tree.join(&long).join("f"), tree.join("hard")).unwrap();
    symlink("../nowhere", tree.join("soft")).unwrap();
    let archive = pack_of(&tree);
    let out = dir.path().join("new/out");
    unpack_to(&out, &archive).unwrap();
    let copied = out.join("tree");
    assert_eq!(fs::read(copied.join("hard")).unwrap(), vec![7; 100_000]);
    assert_eq!(
        fs::read_link(copied.join("soft")).unwrap(),
        Path::new("../nowhere")
    );
    assert!(copied.join(&long).join("empty").is_dir());
    let mode = fs::metadata(copied.join(&long).join("f"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o4711);
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs::metadata(copied.join("hard")).unwrap().nlink(), 2);
}

/// An archive that says what it should not.
fn hostile(add: impl FnOnce(&mut tar::Builder<Vec<u8>>)) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    add(&mut builder);
    builder.into_inner().unwrap()
}

fn raw(builder: &mut tar::Builder<Vec<u8>>, name: &str, kind: tar::EntryType, link: &str) {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(0o644);
    let content: &[u8] = if kind == tar::EntryType::Regular {
        b"evil"
    } else {
        b""
    };
    header.set_size(content.len() as u64);
    header.set_cksum();
    builder.append(&header, content).unwrap();
}

#[test]
fn nothing_of_an_archive_lands_outside_its_directory() {
    use tar::EntryType::{Link, Regular, Symlink};
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target");
    fs::write(dir.path().join("victim"), "safe").unwrap();
    let up = hostile(|b| raw(b, "../victim", Regular, ""));
    assert_eq!(code(unpack_to(&target, &up)), ErrorCode::BadRequest);
    let through = hostile(|b| {
        raw(b, "link", Symlink, "..");
        raw(b, "link/victim", Regular, "");
    });
    assert!(unpack_to(&target, &through).is_err());
    let hard = hostile(|b| raw(b, "h", Link, "../victim"));
    assert_eq!(code(unpack_to(&target, &hard)), ErrorCode::BadRequest);
    let over = hostile(|b| {
        raw(b, "f", Symlink, "../victim");
        raw(b, "f", Regular, "");
    });
    unpack_to(&target, &over).unwrap();
    let absolute = hostile(|b| raw(b, "/victim", Regular, ""));
    unpack_to(&target, &absolute).unwrap();
    assert_eq!(fs::read(target.join("victim")).unwrap(), b"evil");
    assert_eq!(fs::read(dir.path().join("victim")).unwrap(), b"safe");
    assert_eq!(
        code(unpack_to(&target, &[0x55; 2048])),
        ErrorCode::BadRequest
    );
}
