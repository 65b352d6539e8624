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

#[test]
fn a_directory_has_its_time_again_whatever_is_put_into_it() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    fs::create_dir_all(tree.join("c")).unwrap();
    fs::write(tree.join("a/b/f"), "").unwrap();
    fs::write(tree.join("z"), "").unwrap();
    let all = ["a/b", "a", "c", ""];
    let time = |seconds| std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
    for (at, name) in all.iter().enumerate() {
        let directory = fs::File::open(tree.join(name)).unwrap();
        directory
            .set_modified(time(1_000_000_000 + at as u64))
            .unwrap();
    }
    unpack_to(&dir.path().join("out"), &pack_of(&tree)).unwrap();
    for (at, name) in all.iter().enumerate() {
        let made = fs::metadata(dir.path().join("out/tree").join(name)).unwrap();
        assert_eq!(
            made.modified().unwrap(),
            time(1_000_000_000 + at as u64),
            "{name}"
        );
    }
}

/// A header whose content is announced, not there.
fn announced(kind: tar::EntryType, size: u64) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_cksum();
    header.as_bytes().to_vec()
}

#[test]
fn names_and_records_without_end_are_refused() {
    use tar::EntryType::{GNULongLink, GNULongName, XGlobalHeader, XHeader};
    let dir = tempfile::tempdir().unwrap();
    for kind in [GNULongName, GNULongLink, XHeader] {
        let mut archive = announced(kind, 300 << 20);
        archive.resize(1 << 20, b'a');
        let error = unpack_to(dir.path(), &archive).unwrap_err();
        assert_eq!(error.code, ErrorCode::BadRequest);
        assert!(error.message.contains("65536 bytes"), "{}", error.message);
    }
    // Nor are they counted together, nor what nobody keeps.
    let archive = hostile(|b| {
        for at in 0..100 {
            let name = format!("{}/{at}", "n".repeat(200) + "/" + &"m".repeat(200));
            let mut header = tar::Header::new_gnu();
            header.set_size(1000);
            header.set_mode(0o644);
            b.append_data(&mut header, name, &[0; 1000][..]).unwrap();
        }
    });
    let mut global = announced(XGlobalHeader, 1 << 20);
    global.resize(512 + (1 << 20), b'a');
    global.extend(archive);
    assert_eq!(unpack_to(dir.path(), &global).unwrap()["entries"], 100);
}

#[test]
fn an_archive_that_is_too_deep_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let packed = |levels: usize| {
        hostile(|b| {
            let mut header = tar::Header::new_gnu();
            header.set_size(0);
            header.set_mode(0o644);
            b.append_data(&mut header, "d/".repeat(levels) + "f", std::io::empty())
                .unwrap();
        })
    };
    unpack_to(dir.path(), &packed(MAX_DEPTH + 1)).unwrap();
    let error = unpack_to(dir.path(), &packed(MAX_DEPTH + 2)).unwrap_err();
    assert_eq!(error.code, ErrorCode::BadRequest);
    assert!(
        error.message.contains("directories deep"),
        "{}",
        error.message
    );
}

#[test]
fn what_vanishes_or_shrinks_while_it_is_packed_spoils_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("a"), vec![7; 1 << 20]).unwrap();
    fs::write(tree.join("b"), "gone").unwrap();
    fs::write(tree.join("c"), "last").unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    let mut packer = crate::files::archive::Packer::new(std::os::fd::OwnedFd::from(writer).into());
    let here = rustix::fs::open(&tree, DIRECTORY, Mode::empty()).unwrap();
    // As the walk saw them; the pipe makes it wait within the first.
    let seen = ["a", "b", "c"].map(|name| {
        let stat = statat(&here, name, AtFlags::empty()).unwrap();
        (std::ffi::CString::new(name).unwrap(), stat)
    });
    let packing = std::thread::spawn(move || {
        for (name, stat) in seen {
            let path = Path::new(name.to_str().unwrap());
            packer.entry(here.as_fd(), &name, &stat, path, 1).unwrap();
        }
        packer.finish().unwrap()
    });
    let mut reader = reader;
    let mut first = vec![0; 1024];
    reader.read_exact(&mut first).unwrap();
    fs::File::options()
        .write(true)
        .open(tree.join("a"))
        .unwrap()
        .set_len(0)
        .unwrap();
    fs::remove_file(tree.join("b")).unwrap();
    reader.read_to_end(&mut first).unwrap();
    assert_eq!(packing.join().unwrap(), first.len() as u64);
    unpack_to(&dir.path().join("out"), &first).unwrap();
    let out = |name| fs::read(dir.path().join("out").join(name));
    let a = out("a").unwrap();
    assert_eq!((a.len(), a[0], a[a.len() - 1]), (1 << 20, 7, 0));
    assert!(out("b").is_err());
    assert_eq!(out("c").unwrap(), b"last");
}
