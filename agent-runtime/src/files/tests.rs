//! The calls on real files.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use ratoon_protocol::*;

use super::*;
use crate::work::{News, Office, Work};

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Does work to its end; returns its result and what it wrote.
fn done(work: Work, input: Option<&[u8]>) -> (Result<serde_json::Value, ErrorReply>, Vec<u8>) {
    let mut office = Office::new().unwrap();
    let started = office.start(work, input.is_some()).unwrap();
    let input = input.map(<[u8]>::to_vec);
    let writer = started.input.map(|pipe| {
        std::thread::spawn(move || {
            // It may end before it has read all.
            let _ = fs::File::from(pipe).write_all(&input.unwrap());
        })
    });
    let mut output = Vec::new();
    fs::File::from(started.output)
        .read_to_end(&mut output)
        .unwrap();
    if let Some(writer) = writer {
        writer.join().unwrap();
    }
    loop {
        for (_, news) in office.news() {
            if let News::End(result) = news {
                return (result, output);
            }
        }
        std::thread::yield_now();
    }
}

fn write(params: &FileWrite, content: &[u8]) -> Result<Transferred, ErrorReply> {
    let mut upload = Upload::begin(params)?;
    let mut rest = content;
    while !rest.is_empty() {
        let len = rustix::io::write(upload.file(), rest).unwrap();
        rest = &rest[len..];
    }
    upload.finish()
}

fn code<T: std::fmt::Debug>(result: Result<T, ErrorReply>) -> ErrorCode {
    result.unwrap_err().code
}

#[test]
fn a_file_appears_whole_with_its_mode_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/b/file");
    let params = FileWrite {
        path: text(&path),
        mode: Some(0o640),
        parents: true,
        ..FileWrite::default()
    };
    assert_eq!(write(&params, b"hello").unwrap().bytes, 5);
    assert_eq!(fs::read(&path).unwrap(), b"hello");
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o7777,
        0o640
    );
    let begun = Upload::begin(&params).unwrap();
    rustix::io::write(begun.file(), b"half").unwrap();
    drop(begun);
    assert_eq!(fs::read(&path).unwrap(), b"hello");
    assert_eq!(fs::read_dir(dir.path().join("a/b")).unwrap().count(), 1);
    // Without a mode it keeps the one it had.
    let again = FileWrite {
        mode: None,
        ..params
    };
    write(&again, b"new").unwrap();
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o7777,
        0o640
    );
}

#[test]
fn a_file_is_appended_to_and_written_into_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mut params = FileWrite {
        path: text(&path),
        append: true,
        ..FileWrite::default()
    };
    write(&params, b"one ").unwrap();
    assert_eq!(write(&params, b"two").unwrap().bytes, 3);
    params.append = false;
    params.offset = Some(1);
    write(&params, b"XX").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"oXX two");
    params.append = true;
    assert_eq!(code(Upload::begin(&params)), ErrorCode::BadRequest);
}

#[test]
fn only_a_range_of_a_file_is_read_and_only_of_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    fs::write(&path, "0123456789").unwrap();
    let params = FileRead {
        path: text(&path),
        offset: 4,
        length: Some(3),
        ..FileRead::default()
    };
    let mut download = open_read(&params).unwrap();
    let mut rest = String::new();
    download.file.read_to_string(&mut rest).unwrap();
    assert_eq!((rest.as_str(), download.left), ("456789", Some(3)));
    let read = |path: String| {
        open_read(&FileRead {
            path,
            ..FileRead::default()
        })
    };
    assert_eq!(code(read(text(dir.path()))), ErrorCode::BadRequest);
    assert_eq!(
        code(read(text(&dir.path().join("none")))),
        ErrorCode::NotFound
    );
    rustix::fs::mknodat(
        CWD,
        dir.path().join("fifo"),
        FileType::Fifo,
        Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    assert_eq!(
        code(read(text(&dir.path().join("fifo")))),
        ErrorCode::BadRequest
    );
}

#[test]
fn a_root_is_not_left_by_links_nor_by_dots() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    fs::write(dir.path().join("secret"), "s").unwrap();
    symlink(dir.path().join("secret"), root.join("link")).unwrap();
    symlink("..", root.join("up")).unwrap();
    for path in ["link", "up/secret", "../secret", "/../secret"] {
        let params = FileRead {
            path: path.into(),
            root: Some(text(&root)),
            ..FileRead::default()
        };
        assert_eq!(code(open_read(&params)), ErrorCode::NotFound, "{path}");
    }
    for path in ["link", "up/secret", "../secret", "/../secret"] {
        let params = FileWrite {
            path: path.into(),
            root: Some(text(&root)),
            append: true,
            ..FileWrite::default()
        };
        let _ = Upload::begin(&params);
        assert_eq!(fs::read(dir.path().join("secret")).unwrap(), b"s");
    }
}

#[test]
fn a_link_is_described_and_followed_when_asked_to() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "123").unwrap();
    symlink("f", dir.path().join("l")).unwrap();
    let look = |follow| {
        stat(&FilePath {
            path: text(&dir.path().join("l")),
            root: None,
            follow,
        })
        .unwrap()
    };
    assert_eq!(
        (look(false).kind, look(false).target),
        (FileKind::Symlink, Some("f".into()))
    );
    assert_eq!((look(true).kind, look(true).size), (FileKind::File, 3));
}

#[test]
fn a_directory_is_made_with_those_above_it_and_renamed_over_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = text(&dir.path().join("x/y"));
    let mut params = FileMkdir {
        path: path.clone(),
        mode: Some(0o700),
        ..FileMkdir::default()
    };
    assert_eq!(code(mkdir(&params)), ErrorCode::NotFound);
    params.parents = true;
    mkdir(&params).unwrap();
    mkdir(&params).unwrap();
    params.parents = false;
    assert_eq!(code(mkdir(&params)), ErrorCode::Exists);
    let there = text(&dir.path().join("z"));
    fs::write(&there, "").unwrap();
    let mut params = FileMove {
        from: there.clone(),
        to: text(&dir.path().join("x/file")),
        ..FileMove::default()
    };
    rename(&params).unwrap();
    fs::write(&there, "new").unwrap();
    assert_eq!(code(rename(&params)), ErrorCode::Exists);
    params.replace = true;
    rename(&params).unwrap();
    assert_eq!(fs::read(&params.to).unwrap(), b"new");
}

#[test]
fn a_list_is_as_deep_as_asked_and_only_what_fits() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("a/b")).unwrap();
    fs::write(dir.path().join("a/one.rs"), "").unwrap();
    fs::write(dir.path().join("a/b/two.rs"), "").unwrap();
    symlink("/", dir.path().join("a/root")).unwrap();
    let listed = |depth, glob: Option<&str>| {
        let params = FileList {
            path: text(dir.path()),
            root: None,
            depth,
            glob: glob.map(str::to_owned),
        };
        let (result, output) = done(list(params), None);
        result.unwrap();
        String::from_utf8(output)
            .unwrap()
            .lines()
            .map(|line| {
                let entry: FileEntry = serde_json::from_str(line).unwrap();
                let base = text(dir.path());
                entry.path.strip_prefix(&base).unwrap().to_owned()
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(listed(1, None), ["/a"]);
    assert_eq!(
        listed(0, None),
        ["/a", "/a/b", "/a/b/two.rs", "/a/one.rs", "/a/root"]
    );
    assert_eq!(listed(0, Some("*.rs")), ["/a/b/two.rs", "/a/one.rs"]);
    assert_eq!(listed(2, Some("a/*.rs")), ["/a/one.rs"]);
}

#[test]
fn a_tree_is_removed_and_what_its_links_lead_to_stays() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(dir.path().join("outside"), "").unwrap();
    symlink(dir.path(), tree.join("sub/link")).unwrap();
    let mut params = FileRemove {
        path: text(&tree),
        ..FileRemove::default()
    };
    let (result, _) = done(remove(params.clone()), None);
    assert_eq!(code(result), ErrorCode::Exists);
    params.recursive = true;
    let (result, _) = done(remove(params.clone()), None);
    assert_eq!(result.unwrap()["entries"], 3);
    assert!(dir.path().join("outside").exists() && !tree.exists());
    let (result, _) = done(remove(params.clone()), None);
    assert_eq!(code(result), ErrorCode::NotFound);
    params.missing_ok = true;
    let (result, _) = done(remove(params), None);
    assert_eq!(result.unwrap()["entries"], 0);
}

#[test]
fn a_copy_has_modes_links_and_times_and_replaces_only_when_asked_to() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("f"), "content").unwrap();
    fs::set_permissions(tree.join("f"), fs::Permissions::from_mode(0o751)).unwrap();
    symlink("f", tree.join("l")).unwrap();
    let mut params = FileMove {
        from: text(&tree),
        to: text(&dir.path().join("copy")),
        ..FileMove::default()
    };
    let (result, _) = done(copy(params.clone()), None);
    assert_eq!(code(result), ErrorCode::BadRequest);
    params.recursive = true;
    let (result, _) = done(copy(params.clone()), None);
    assert_eq!(result.unwrap()["entries"], 3);
    let copied = dir.path().join("copy");
    assert_eq!(fs::read_link(copied.join("l")).unwrap(), Path::new("f"));
    let (old, new) = (
        fs::metadata(tree.join("f")).unwrap(),
        fs::metadata(copied.join("f")).unwrap(),
    );
    assert_eq!(old.permissions(), new.permissions());
    assert_eq!(old.modified().unwrap(), new.modified().unwrap());
    let (result, _) = done(copy(params), None);
    assert_eq!(code(result), ErrorCode::Exists);
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        2,
        "nothing is left"
    );
}

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
fn what_changes_is_told_until_nobody_listens() {
    let dir = tempfile::tempdir().unwrap();
    let mut office = Office::new().unwrap();
    let params = FileWatch {
        path: text(dir.path()),
        root: None,
        recursive: true,
    };
    let started = office.start(watch(params), false).unwrap();
    let wait = |office: &mut Office| loop {
        if let Some((_, news)) = office.news().pop() {
            return news;
        }
        std::thread::yield_now();
    };
    assert!(matches!(wait(&mut office), News::Event(Event::Watching)));
    fs::create_dir(dir.path().join("new")).unwrap();
    fs::write(dir.path().join("new/file"), "x").unwrap();
    let mut lines =
        std::io::BufRead::lines(std::io::BufReader::new(fs::File::from(started.output)));
    let mut next =
        || -> FileChange { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    let first = next();
    assert_eq!((first.change, first.directory), (ChangeKind::Created, true));
    loop {
        let change = next();
        if change.path.ends_with("new/file") {
            assert!(matches!(
                change.change,
                ChangeKind::Created | ChangeKind::Written
            ));
            break;
        }
    }
    drop(lines);
    fs::write(dir.path().join("last"), "x").unwrap();
    let end = loop {
        fs::write(dir.path().join("more"), "x").unwrap();
        if let Some((_, News::End(end))) = office.news().pop() {
            break end;
        }
        std::thread::yield_now();
    };
    end.unwrap();
}
