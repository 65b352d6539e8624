//! What changes.

use std::io::{BufRead, BufReader, Lines};

use super::*;

/// A watch that has begun.
struct Watched {
    office: Office,
    lines: Lines<BufReader<fs::File>>,
}

impl Watched {
    fn begin(path: &str, root: Option<&Path>) -> Self {
        let mut office = Office::new().unwrap();
        let params = FileWatch {
            path: path.into(),
            root: root.map(text),
            recursive: true,
        };
        let started = office.start(watch(params), false).unwrap();
        let lines = BufReader::new(fs::File::from(started.output)).lines();
        let mut watched = Self { office, lines };
        let first = watched.news();
        assert!(matches!(first, News::Event(Event::Watching)), "{first:?}");
        watched
    }

    fn news(&mut self) -> News {
        loop {
            if let Some((_, news)) = self.office.news().pop() {
                return news;
            }
            std::thread::yield_now();
        }
    }

    fn next(&mut self) -> FileChange {
        serde_json::from_str(&self.lines.next().unwrap().unwrap()).unwrap()
    }

    /// Takes changes until this one.
    fn until(&mut self, change: ChangeKind, path: &str) -> FileChange {
        loop {
            let next = self.next();
            if (next.change, next.path.as_str()) == (change, path) {
                return next;
            }
        }
    }

    /// No more is told; how the call ended.
    fn end(mut self) -> Result<serde_json::Value, ErrorReply> {
        assert_eq!(self.lines.by_ref().count(), 0);
        match self.news() {
            News::End(end) => end,
            news => panic!("{news:?}"),
        }
    }
}

#[test]
fn what_changes_is_told_until_nobody_listens() {
    let dir = tempfile::tempdir().unwrap();
    let mut watched = Watched::begin(&text(dir.path()), None);
    fs::create_dir(dir.path().join("new")).unwrap();
    fs::write(dir.path().join("new/file"), "x").unwrap();
    let first = watched.next();
    assert_eq!((first.change, first.directory), (ChangeKind::Created, true));
    watched.until(ChangeKind::Created, &text(&dir.path().join("new/file")));
    let Watched { mut office, lines } = watched;
    drop(lines);
    let end = loop {
        fs::write(dir.path().join("more"), "x").unwrap();
        if let Some((_, News::End(end))) = office.news().pop() {
            break end;
        }
        std::thread::yield_now();
    };
    end.unwrap();
}

#[test]
fn a_watch_ends_with_what_is_watched() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("it");
    for way in ["file", "directory", "moved"] {
        match way {
            "file" => fs::write(&path, "").unwrap(),
            _ => fs::create_dir_all(path.join("sub")).unwrap(),
        }
        let mut watched = Watched::begin(&text(&path), None);
        match way {
            "file" => fs::remove_file(&path).unwrap(),
            "directory" => fs::remove_dir_all(&path).unwrap(),
            _ => fs::rename(&path, dir.path().join("there")).unwrap(),
        }
        let last = watched.until(ChangeKind::Removed, &text(&path));
        assert_eq!(last.directory, way != "file");
        watched.end().unwrap();
    }
}

#[test]
fn new_directories_are_watched_below_a_root_and_links_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("d")).unwrap();
    fs::create_dir(dir.path().join("outside")).unwrap();
    let mut watched = Watched::begin("d", Some(&root));
    fs::create_dir(root.join("d/new")).unwrap();
    symlink(dir.path().join("outside"), root.join("d/link")).unwrap();
    watched.until(ChangeKind::Created, "d/new");
    watched.until(ChangeKind::Created, "d/link");
    fs::write(dir.path().join("outside/secret"), "x").unwrap();
    fs::write(root.join("d/new/file"), "x").unwrap();
    let next = watched.next();
    assert_eq!(next.path, "d/new/file");
}

#[test]
fn what_is_moved_away_is_no_longer_told_and_what_is_moved_within_is() {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().join("top");
    fs::create_dir_all(top.join("out/below")).unwrap();
    fs::create_dir_all(top.join("stays/below")).unwrap();
    let mut watched = Watched::begin(&text(&top), None);
    fs::rename(top.join("out"), dir.path().join("foreign")).unwrap();
    fs::rename(top.join("stays"), top.join("here")).unwrap();
    watched.until(ChangeKind::Created, &text(&top.join("here/below")));
    fs::write(dir.path().join("foreign/below/file"), "x").unwrap();
    fs::write(top.join("here/below/file"), "x").unwrap();
    let next = watched.next();
    assert_eq!(next.path, text(&top.join("here/below/file")));
}

#[test]
fn changes_that_are_too_many_are_told_as_such_and_the_watch_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    let mut watched = Watched::begin(&text(dir.path()), None);
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    fs::write(&a, "").unwrap();
    // Each tells of two; what fits the pipe comes on top.
    for _ in 0..limit / 4 + 2000 {
        fs::rename(&a, &b).unwrap();
        fs::rename(&b, &a).unwrap();
    }
    fs::create_dir(dir.path().join("lost")).unwrap();
    watched.until(ChangeKind::Overflow, "");
    fs::write(dir.path().join("lost/file"), "x").unwrap();
    watched.until(ChangeKind::Created, &text(&dir.path().join("lost/file")));
}

#[test]
fn a_tree_that_is_too_deep_is_not_watched() {
    let dir = tempfile::tempdir().unwrap();
    super::tree::deep(dir.path(), MAX_DEPTH);
    drop(Watched::begin(&text(dir.path()), None));
    let mut watched = Watched::begin(&text(dir.path()), None);
    let bottom = dir.path().join("d/".repeat(MAX_DEPTH));
    fs::create_dir(bottom.join("more")).unwrap();
    watched.until(ChangeKind::Created, &text(&bottom.join("more")));
    let error = watched.end().unwrap_err();
    assert!(error.message.contains("d/more: it is more"), "{error:?}");
}
