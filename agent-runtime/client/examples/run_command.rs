//! Runs a command in a machine and prints what it says.
//!
//! `cargo run -p ratoon-client --example run_command -- VSOCK_SOCKET`, where VSOCK_SOCKET is that of
//! a running machine.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ratoon_client::Client;
use ratoon_client::protocol::{ExecParams, ExitStatus};

/// Nothing here waits longer than this for the connection.
const TIMEOUT: Duration = Duration::from_secs(10);

/// More output than this is thrown away: 64 KiB.
const LIMIT: usize = 64 * 1024;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let socket = std::env::args_os().nth(1).ok_or("usage: VSOCK_SOCKET")?;
    print!("{}", run(&PathBuf::from(socket)).await?);
    Ok(())
}

/// Returns the command's output.
pub async fn run(vsock_socket: &Path) -> Result<String, Box<dyn Error>> {
    let client = Client::connect(vsock_socket, TIMEOUT).await?;
    let command = ExecParams {
        shell: Some("echo \"$GREETING from $(uname -s)\"".into()),
        env: vec![("GREETING".into(), "Hello".into())],
        cwd: Some("/".into()),
        // Of the command; then it is ended, and `report.timed_out` says so.
        timeout_ms: Some(30_000),
        ..ExecParams::default()
    };
    let process = client.exec(command).await?;
    let output = process.output(LIMIT).await?;
    match output.report.status {
        ExitStatus::Code(0) => Ok(String::from_utf8(output.stdout)?),
        status => Err(format!("the command ended with {status:?}").into()),
    }
}
