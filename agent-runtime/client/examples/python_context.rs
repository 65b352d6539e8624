//! Runs code in an interpreter that keeps its state from cell to cell.
//!
//! `cargo run -p ratoon-client --example python_context -- VSOCK_SOCKET`, where VSOCK_SOCKET is that
//! of a running machine whose image has `python3`.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ratoon_client::protocol::{CodeRun, CodeStart, CodeStatus, Language};
use ratoon_client::{CellEvent, Client};

/// Nothing here waits longer than this for the connection.
const TIMEOUT: Duration = Duration::from_secs(10);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let socket = std::env::args_os().nth(1).ok_or("usage: VSOCK_SOCKET")?;
    println!("{}", run(&PathBuf::from(socket)).await?);
    Ok(())
}

/// Returns the value of the last cell's last expression.
pub async fn run(vsock_socket: &Path) -> Result<String, Box<dyn Error>> {
    let client = Client::connect(vsock_socket, TIMEOUT).await?;
    let start = CodeStart {
        language: Language::Python,
        ..CodeStart::default()
    };
    let context = client.code_start(start).await?.context;

    let mut value = String::new();
    for code in ["import math; radius = 2", "math.pi * radius ** 2"] {
        let cell = CodeRun {
            code: code.into(),
            context: Some(context.clone()),
            timeout_ms: Some(30_000),
            ..CodeRun::default()
        };
        let mut cell = client.code_run(cell).await?;
        while let Some(event) = cell.next().await? {
            match event {
                CellEvent::Stdout(text) => print!("{}", String::from_utf8_lossy(&text)),
                CellEvent::Stderr(text) => eprint!("{}", String::from_utf8_lossy(&text)),
                // Also `image/png`, `text/html` and others, where there are any.
                CellEvent::Value(shown) => {
                    let text = shown.data.get("text/plain");
                    value = text.and_then(|text| text.as_str()).unwrap_or("").into();
                }
            }
        }
        let end = cell.finish().await?;
        if end.status != CodeStatus::Ok {
            let error = end.error.unwrap_or_default();
            return Err(format!("the cell failed: {}: {}", error.name, error.message).into());
        }
    }
    // A context outlives its client; this one is not needed any more.
    client.code_stop(&context).await?;
    Ok(value)
}
