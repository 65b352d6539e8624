//! What changes.

use super::*;

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
