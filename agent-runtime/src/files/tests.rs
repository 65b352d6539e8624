//! The calls on real files.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use ratoon_protocol::*;

use super::*;
use crate::work::{News, Office, Work};

mod archive;
mod tree;
mod watch;

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
fn what_is_appended_goes_behind_what_others_append() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    fs::write(&path, "").unwrap();
    let params = FileWrite {
        path: text(&path),
        append: true,
        ..FileWrite::default()
    };
    let mut upload = Upload::begin(&params).unwrap();
    fs::write(&path, "theirs ").unwrap();
    rustix::io::write(upload.file(), b"ours").unwrap();
    upload.finish().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"theirs ours");
}

#[test]
fn a_new_file_inherits_nothing_through_a_link_and_no_setuid() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mode = |name: &str| {
        fs::symlink_metadata(path(name))
            .unwrap()
            .permissions()
            .mode()
    };
    fs::write(path("target"), "old").unwrap();
    fs::set_permissions(path("target"), fs::Permissions::from_mode(0o6711)).unwrap();
    symlink("target", path("link")).unwrap();
    symlink("nowhere", path("dangling")).unwrap();
    symlink(".", path("directory")).unwrap();
    for name in ["link", "dangling", "directory"] {
        let params = FileWrite {
            path: text(&path(name)),
            ..FileWrite::default()
        };
        write(&params, b"new").unwrap();
        assert_eq!(mode(name), 0o100_644, "{name}");
    }
    assert_eq!(fs::read(path("target")).unwrap(), b"old");
    let params = FileWrite {
        path: text(&path("target")),
        ..FileWrite::default()
    };
    write(&params, b"new").unwrap();
    assert_eq!(mode("target"), 0o100_711);
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
fn a_path_that_is_too_long_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let made = |path: String| {
        mkdir(&FileMkdir {
            path: text(dir.path()) + &path,
            parents: true,
            ..FileMkdir::default()
        })
    };
    assert_eq!(code(made("/a".repeat(30_000))), ErrorCode::BadRequest);
    assert_eq!(code(made("/a".repeat(1000))), ErrorCode::BadRequest);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    made("/a".repeat(MAX_DEPTH)).unwrap();
    let long = FilePath {
        path: "/".repeat(5000) + "tmp",
        ..FilePath::default()
    };
    assert_eq!(code(stat(&long)), ErrorCode::BadRequest);
}
