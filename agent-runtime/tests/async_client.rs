//! The async client against a real runtime.
#![allow(missing_docs)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Runtime, command};
use ratoon_client::{Client, RuntimeError};
use ratoon_protocol::{Call, ErrorCode, ExitReport, ExitStatus};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

#[tokio::test]
async fn a_megabyte_goes_through_cat_and_comes_back_whole() {
    let runtime = Runtime::start();
    let client = Client::from_stream(UnixStream::connect(runtime.socket()).await.unwrap());
    client.ping().await.unwrap();
    let mut params = command(&["cat"]);
    params.stdin = true;
    let mut running = client.begin(Call::Exec(Box::new(params))).await.unwrap();
    let sent: Vec<u8> = (0..1_000_000u32).map(|at| (at % 251) as u8).collect();
    let mut stdin = running.stdin.take().unwrap();
    let (mut got, input) = (Vec::new(), sent.clone());
    let write = async move { stdin.write_all(&input).await.unwrap() };
    let ((), read) = tokio::join!(write, running.stdout.read_to_end(&mut got));
    assert_eq!(read.unwrap(), sent.len());
    assert!(got == sent, "the bytes differ");
    let report: ExitReport = running.result().await.unwrap();
    assert_eq!(report.status, ExitStatus::Code(0));
}

#[tokio::test]
async fn a_call_that_fails_says_why_and_the_connection_goes_on() {
    let runtime = Runtime::start();
    let client = Client::from_stream(UnixStream::connect(runtime.socket()).await.unwrap());
    let exec = Call::Exec(Box::new(command(&["/no/such/program"])));
    let failed = client.call::<ExitReport>(exec).await;
    assert!(matches!(failed, Err(RuntimeError::Call(error)) if error.code == ErrorCode::NotFound));
    client.ping().await.unwrap();
}
