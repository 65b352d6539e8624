//! The async client against a real runtime.
#![allow(missing_docs)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use common::{LONG, Runtime, command, sh};
use ratoon_client::{CellEvent, Client, RuntimeError};
use ratoon_protocol::{
    AttachParams, Call, ChangeKind, CodeRun, CodeStart, CodeStatus, ErrorCode, ExitReport,
    ExitStatus, FileKind, FileList, FileMkdir, FileMove, FilePath, FileRead, FileRemove, FileWatch,
    FileWrite, PortConnect, TreePack, TreeUnpack,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, UnixStream};

async fn connect(runtime: &Runtime) -> Client {
    let stream = UnixStream::connect(runtime.socket()).await.unwrap();
    Client::from_stream(stream, LONG).await.unwrap()
}

fn numbered(len: u32) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8).collect()
}

fn path(dir: &tempfile::TempDir, name: &str) -> String {
    dir.path().join(name).to_str().unwrap().into()
}

fn list(path: &str) -> FileList {
    FileList {
        path: path.into(),
        depth: 0,
        ..FileList::default()
    }
}

#[tokio::test]
async fn a_megabyte_goes_through_cat_and_comes_back_whole() {
    let runtime = Runtime::start();
    let client = connect(&runtime).await;
    client.ping().await.unwrap();
    let mut params = command(&["cat"]);
    params.stdin = true;
    let mut process = client.exec(params).await.unwrap();
    let sent = numbered(1_000_000);
    let mut stdin = process.stdin.take().unwrap();
    let (mut got, input) = (Vec::new(), sent.clone());
    let write = async move { stdin.write_all(&input).await.unwrap() };
    let ((), read) = tokio::join!(write, process.stdout.read_to_end(&mut got));
    assert_eq!(read.unwrap(), sent.len());
    assert!(got == sent, "the bytes differ");
    assert_eq!(process.wait().await.unwrap().status, ExitStatus::Code(0));
}

#[tokio::test]
async fn a_call_that_fails_says_why_and_the_connection_goes_on() {
    let runtime = Runtime::start();
    let client = connect(&runtime).await;
    let exec = Call::Exec(Box::new(command(&["/no/such/program"])));
    let failed = client.call::<ExitReport>(exec).await;
    assert!(matches!(failed, Err(RuntimeError::Call(error)) if error.code == ErrorCode::NotFound));
    client.ping().await.unwrap();
}

#[tokio::test]
async fn a_process_is_collected_killed_and_taken_over() {
    let runtime = Runtime::start();
    let client = connect(&runtime).await;
    let process = client.exec(sh("echo 12345; echo oh >&2; exit 3"));
    let output = process.await.unwrap().output(4).await.unwrap();
    assert_eq!(output.report.status, ExitStatus::Code(3));
    assert_eq!(
        (&output.stdout[..], &output.stderr[..]),
        (&b"1234"[..], &b"oh\n"[..])
    );
    assert!(output.truncated);

    let mut params = sh("read line; echo got $line; sleep 100");
    (params.stdin, params.keep) = (true, true);
    let first = client.exec(params).await.unwrap();
    let pid = first.pid;
    let have = [0, 0];
    let other = connect(&runtime).await;
    let mut second = other.attach(AttachParams { pid, have }).await.unwrap();
    let taken_over = first.wait().await;
    assert!(
        matches!(taken_over, Err(RuntimeError::Call(error)) if error.code == ErrorCode::TakenOver)
    );
    let stdin = second.stdin.as_mut().unwrap();
    stdin.write_all(b"it\n").await.unwrap();
    let mut line = [0; 7];
    second.stdout.read_exact(&mut line).await.unwrap();
    assert_eq!(&line, b"got it\n");
    assert_eq!(other.processes().await.unwrap()[0].pid, pid);
    second.kill().await.unwrap();
    assert_eq!(second.wait().await.unwrap().status, ExitStatus::Signal(9));
}

#[tokio::test]
async fn files_are_written_read_listed_moved_and_removed() {
    let (runtime, dir) = (Runtime::start(), tempfile::tempdir().unwrap());
    let client = connect(&runtime).await;
    let (file, top) = (path(&dir, "d/f"), path(&dir, ""));
    let directory = FileMkdir {
        path: path(&dir, "d"),
        ..FileMkdir::default()
    };
    client.mkdir(directory).await.unwrap();
    let content = numbered(700_000);
    let written = client.write_bytes(&file, &content).await.unwrap();
    assert_eq!(written.bytes, 700_000);
    client.append(&file, b"tail").await.unwrap();
    let read = client.read_to_vec(&file, 700_004).await.unwrap();
    assert!(read == [&content[..], b"tail"].concat());
    let over = client.read_to_vec(&file, 700_003).await;
    assert!(matches!(
        over,
        Err(RuntimeError::OverLimit { limit: 700_003, .. })
    ));
    let mut part = Vec::new();
    let params = FileRead {
        path: file.clone(),
        offset: 700_000,
        ..FileRead::default()
    };
    let mut incoming = client.read(params).await.unwrap();
    incoming.read_to_end(&mut part).await.unwrap();
    assert_eq!(part, b"tail");
    assert_eq!(incoming.finish().await.unwrap().bytes, 4);

    let (from, to) = (file.clone(), path(&dir, "g"));
    let twin = FileMove {
        from,
        to: to.clone(),
        ..FileMove::default()
    };
    client.copy(twin.clone()).await.unwrap();
    let taken = client.rename(twin).await;
    assert!(matches!(taken, Err(RuntimeError::Call(error)) if error.code == ErrorCode::Exists));
    let stat = FilePath {
        path: to.clone(),
        ..FilePath::default()
    };
    let entry = client.stat(stat).await.unwrap();
    assert_eq!((entry.kind, entry.size), (FileKind::File, 700_004));
    let entries = client.list(list(&top), 3).await.unwrap();
    let kinds: Vec<_> = entries.iter().map(|entry| entry.kind).collect();
    assert_eq!(kinds, [FileKind::Directory, FileKind::File, FileKind::File]);
    let more = client.list(list(&top), 2).await;
    assert!(matches!(
        more,
        Err(RuntimeError::OverLimit { limit: 2, .. })
    ));
    let none = client.list(list("/no/such"), 2).await;
    assert!(matches!(none, Err(RuntimeError::Call(error)) if error.code == ErrorCode::NotFound));
    let all = FileRemove {
        path: path(&dir, "d"),
        recursive: true,
        ..FileRemove::default()
    };
    assert_eq!(client.remove(all).await.unwrap().entries, 2);
}

/// A source that breaks off.
struct Broken(bool);

impl AsyncRead for Broken {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if std::mem::replace(&mut self.0, true) {
            return Poll::Ready(Err(std::io::Error::other("unplugged")));
        }
        buf.put_slice(b"half");
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_the_file_as_it_was() {
    let (runtime, dir) = (Runtime::start(), tempfile::tempdir().unwrap());
    let client = connect(&runtime).await;
    let file = path(&dir, "f");
    client.write_bytes(&file, b"old").await.unwrap();
    let params = FileWrite {
        path: file.clone(),
        ..FileWrite::default()
    };
    let broken = client.write(params, Broken(false)).await;
    assert!(matches!(broken, Err(RuntimeError::Input(_))));
    // Dropped in the middle, and before it has begun.
    let (_open, endless) = tokio::io::duplex(1);
    let params = FileWrite {
        path: file.clone(),
        ..FileWrite::default()
    };
    let dropped = client.write(params.clone(), endless);
    let short = std::time::Duration::from_millis(50);
    assert!(tokio::time::timeout(short, dropped).await.is_err());
    let mut early = Box::pin(client.write(params, &b"new"[..]));
    assert!(
        std::future::poll_fn(|context| Poll::Ready(early.as_mut().poll(context)))
            .await
            .is_pending()
    );
    drop(early);
    client.ping().await.unwrap();
    assert_eq!(client.read_to_vec(&file, 9).await.unwrap(), b"old");
    while std::fs::read_dir(dir.path()).unwrap().count() > 1 {
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"old");
}

#[tokio::test]
async fn a_watch_tells_what_changes_after_it_has_begun() {
    let (runtime, dir) = (Runtime::start(), tempfile::tempdir().unwrap());
    let client = connect(&runtime).await;
    let params = FileWatch {
        path: path(&dir, ""),
        ..FileWatch::default()
    };
    let mut changes = client.watch(params).await.unwrap();
    std::fs::write(dir.path().join("new"), "x").unwrap();
    let change = changes.next().await.unwrap().unwrap();
    assert_eq!(change.change, ChangeKind::Created);
    assert!(change.path.ends_with("/new"));
    drop(changes);
    let params = FileWatch {
        path: path(&dir, "none"),
        ..FileWatch::default()
    };
    let none = client.watch(params).await.map(|_| ());
    assert!(matches!(none, Err(RuntimeError::Call(error)) if error.code == ErrorCode::NotFound));
}

#[tokio::test]
async fn a_tree_is_packed_and_unpacked_through_the_client() {
    let (runtime, dir) = (Runtime::start(), tempfile::tempdir().unwrap());
    let client = connect(&runtime).await;
    std::fs::create_dir_all(dir.path().join("one/sub")).unwrap();
    std::fs::write(dir.path().join("one/sub/f"), numbered(300_000)).unwrap();
    let pack = TreePack {
        path: path(&dir, "one"),
        name: Some("two".into()),
        ..TreePack::default()
    };
    let unpack = TreeUnpack {
        path: path(&dir, "out"),
        ..TreeUnpack::default()
    };
    let mut archive = client.pack(pack).await.unwrap();
    let unpacked = client.unpack(unpack.clone(), &mut archive).await.unwrap();
    assert_eq!(unpacked.entries, 3);
    assert_eq!(archive.finish().await.unwrap().entries, 3);
    let copy = std::fs::read(dir.path().join("out/two/sub/f")).unwrap();
    assert!(copy == numbered(300_000));
    let missing = TreePack {
        path: path(&dir, "none"),
        ..TreePack::default()
    };
    // The source's failure is told as such, not as an empty archive.
    let mut archive = client.pack(missing).await.unwrap();
    let broken = client.unpack(unpack, &mut archive).await;
    assert!(matches!(broken, Err(RuntimeError::Input(_))), "{broken:?}");
    let why = archive.finish().await;
    assert!(matches!(why, Err(RuntimeError::Call(error)) if error.code == ErrorCode::NotFound));
}

fn cell(code: &str) -> CodeRun {
    CodeRun {
        code: code.into(),
        context: Some("c".into()),
        ..CodeRun::default()
    }
}

#[tokio::test]
async fn a_context_keeps_state_shows_values_and_can_be_interrupted() {
    let runtime = Runtime::start();
    let client = connect(&runtime).await;
    let start = CodeStart {
        context: Some("c".into()),
        ..CodeStart::default()
    };
    client.code_start(start).await.unwrap();
    let first = cell("import sys; x = 41; print('hi'); print('oh', file=sys.stderr)");
    let first = client.code_run(first).await.unwrap();
    let first = first.output(1000).await.unwrap();
    assert_eq!((first.end.status, first.end.count), (CodeStatus::Ok, 1));
    assert_eq!(
        (&first.stdout[..], &first.stderr[..]),
        (&b"hi\n"[..], &b"oh\n"[..])
    );
    let second = client.code_run(cell("x + 1")).await.unwrap();
    let second = second.output(1000).await.unwrap();
    assert!(!second.truncated && second.values[0].result);
    assert_eq!(second.values[0].data["text/plain"], "42");
    let third = client.code_run(cell("1 / 0")).await.unwrap();
    let third = third.finish().await.unwrap();
    assert_eq!(third.error.unwrap().name, "ZeroDivisionError");

    let endless = cell("print('on', flush=True)\nwhile True: pass");
    let mut endless = client.code_run(endless).await.unwrap();
    let said = endless.next().await.unwrap();
    assert_eq!(said, Some(CellEvent::Stdout(b"on\n".to_vec())));
    assert!(client.code_list().await.unwrap()[0].busy);
    client.code_interrupt("c").await.unwrap();
    assert_eq!(
        endless.finish().await.unwrap().status,
        CodeStatus::Interrupted
    );
    client.code_restart("c").await.unwrap();
    let gone = client.code_run(cell("x")).await.unwrap();
    assert_eq!(
        gone.finish().await.unwrap().error.unwrap().name,
        "NameError"
    );
    client.code_stop("c").await.unwrap();
    assert!(client.code_list().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_port_is_listed_and_dialled_and_its_server_hears_the_end_of_input() {
    let runtime = Runtime::start();
    let client = connect(&runtime).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let ports = client.ports().await.unwrap();
    assert!(ports.iter().any(|listed| listed.port == port));
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        heard
    };
    let user = async {
        let host = None;
        let mut stream = client.dial(PortConnect { port, host }).await.unwrap();
        stream.write_all(&numbered(300_000)).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.unwrap();
        let moved = stream.finish().await.unwrap();
        (heard, moved.bytes)
    };
    let (served, (heard, moved)) = tokio::join!(server, user);
    assert!(served == numbered(300_000));
    assert_eq!((&heard[..], moved), (&b"hello"[..], 300_005));
    drop(listener);
    let nobody = client.dial(PortConnect { port, host: None }).await;
    let nobody = nobody.map(|_| ());
    assert!(matches!(nobody, Err(RuntimeError::Call(error)) if error.code == ErrorCode::NotFound));
}

#[tokio::test]
async fn the_machine_tells_how_it_is() {
    let runtime = Runtime::start();
    let client = connect(&runtime).await;
    let metrics = client.metrics(2).await.unwrap();
    assert!(metrics.cpus > 0 && metrics.top.len() == 2);
    assert_eq!(client.whoami().await.unwrap().wakes, 0);
}

/// A client whose connections are cut after so many bytes, in either direction, that came through;
/// and how many connections it has made.
async fn cut_after(
    runtime: &Runtime,
    mut limits: impl Iterator<Item = u64> + Send + 'static,
) -> (Client, Arc<AtomicUsize>) {
    let (socket, dials) = (runtime.socket(), Arc::new(AtomicUsize::new(0)));
    let counter = dials.clone();
    let dial = move || {
        counter.fetch_add(1, Ordering::Relaxed);
        let (socket, limit) = (socket.clone(), limits.next().unwrap_or(u64::MAX));
        async move {
            let theirs = UnixStream::connect(socket)
                .await
                .map_err(RuntimeError::Io)?;
            let (ours, between) = UnixStream::pair().map_err(RuntimeError::Io)?;
            tokio::spawn(async move {
                let (mut from_guest, mut to_guest) = theirs.into_split();
                let (mut from_host, mut to_host) = between.into_split();
                // Whoever is through first drops all four.
                tokio::select! {
                    _ = async {
                        tokio::io::copy(&mut (&mut from_guest).take(limit), &mut to_host).await
                    } => {}
                    _ = async {
                        tokio::io::copy(&mut (&mut from_host).take(limit), &mut to_guest).await
                    } => {}
                }
            });
            Ok(ours)
        }
    };
    let client = Client::resumable(dial, LONG, LONG).await.unwrap();
    (client, dials)
}

#[tokio::test]
async fn a_long_output_survives_many_cuts_whole_and_once() {
    let runtime = Runtime::start();
    let (client, dials) = cut_after(&runtime, (0..20).map(|cut| 30_000 + 7_777 * cut)).await;
    let process = client
        .exec(sh("seq 1 200000; echo done >&2"))
        .await
        .unwrap();
    let output = process.output(1 << 21).await.unwrap();
    let expected: String = (1..=200_000).map(|line| format!("{line}\n")).collect();
    assert!(output.stdout == expected.as_bytes(), "the bytes differ");
    assert_eq!(output.stderr, b"done\n");
    assert_eq!(output.report.status, ExitStatus::Code(0));
    client.ping().await.unwrap();
    assert!(dials.load(Ordering::Relaxed) > 8, "{dials:?} connections");
}

#[tokio::test]
async fn input_and_output_survive_cuts_even_of_a_reader_that_waits() {
    let runtime = Runtime::start();
    let (client, dials) = cut_after(&runtime, (0..20).map(|cut| 5_000 + 31_000 * cut)).await;
    let mut params = command(&["cat"]);
    params.stdin = true;
    let mut process = client.exec(params).await.unwrap();
    let sent = numbered(2_000_000);
    let mut stdin = process.stdin.take().unwrap();
    let (mut got, input) = (Vec::new(), sent.clone());
    let write = async move { stdin.write_all(&input).await.unwrap() };
    let read = async {
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        process.stdout.read_to_end(&mut got).await
    };
    let ((), read) = tokio::join!(write, read);
    read.unwrap();
    assert!(got == sent, "the bytes differ");
    assert_eq!(process.wait().await.unwrap().status, ExitStatus::Code(0));
    assert!(dials.load(Ordering::Relaxed) > 8, "{dials:?} connections");
}

#[tokio::test]
async fn a_reader_that_is_dropped_between_cuts_stops_its_process() {
    let runtime = Runtime::start();
    let (client, dials) = cut_after(&runtime, (0..40).map(|cut| 20_000 + 9_000 * cut)).await;
    for _ in 0..5 {
        let mut process = client.exec(command(&["yes"])).await.unwrap();
        let mut some = vec![0; 90_000];
        process.stdout.read_exact(&mut some).await.unwrap();
        drop(process);
        while !client.processes().await.unwrap().is_empty() {}
    }
    assert!(dials.load(Ordering::Relaxed) > 4, "{dials:?} connections");
}
