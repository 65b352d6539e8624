//! The client's examples, run as they are, against a real runtime behind a vsock socket.
#![allow(missing_docs)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

#[allow(dead_code, reason = "its main is for people")]
#[path = "../client/examples/copy_tree.rs"]
mod copy_tree;
#[allow(dead_code, reason = "its main is for people")]
#[path = "../client/examples/python_context.rs"]
mod python_context;
#[allow(dead_code, reason = "its main is for people")]
#[path = "../client/examples/run_command.rs"]
mod run_command;

use std::path::{Path, PathBuf};

use common::Runtime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

/// What a VMM does: joins a connection that says CONNECT to the runtime's port.
fn vsock(dir: &Path, runtime: &Runtime) -> PathBuf {
    let (path, socket) = (dir.join("vsock"), runtime.socket());
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (mut host, _) = listener.accept().await.unwrap();
        let mut line = [0; 13];
        host.read_exact(&mut line).await.unwrap();
        assert_eq!(&line, b"CONNECT 1024\n");
        host.write_all(b"OK 1073741824\n").await.unwrap();
        let mut guest = UnixStream::connect(socket).await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut host, &mut guest).await;
    });
    path
}

#[tokio::test]
async fn run_command_prints_what_the_command_says() {
    let (runtime, dir) = (Runtime::start(), tempfile::tempdir().unwrap());
    let said = run_command::run(&vsock(dir.path(), &runtime)).await;
    assert_eq!(said.unwrap(), "Hello from Linux\n");
}

#[tokio::test]
async fn copy_tree_reads_what_was_made_of_its_tree() {
    let (runtime, dir) = (Runtime::start(), tempfile::tempdir().unwrap());
    let result = copy_tree::run(&vsock(dir.path(), &runtime)).await;
    assert_eq!(result.unwrap(), "Erianthus\nMiscanthus\nSaccharum\n");
}

#[tokio::test]
async fn python_context_keeps_its_state() {
    let (runtime, dir) = (Runtime::start(), tempfile::tempdir().unwrap());
    let value = python_context::run(&vsock(dir.path(), &runtime)).await;
    assert_eq!(value.unwrap(), "12.566370614359172");
}
