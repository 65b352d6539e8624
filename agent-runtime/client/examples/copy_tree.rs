//! Copies a tree into a machine, works on it there, and reads the result.
//!
//! `cargo run -p ratoon-client --example copy_tree -- VSOCK_SOCKET`, where VSOCK_SOCKET is that of a
//! running machine.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ratoon_client::Client;
use ratoon_client::protocol::{ExecParams, ExitStatus, FileRemove, TreeUnpack};

/// Nothing here waits longer than this for the connection.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A result that is longer is refused: 1 MiB.
const LIMIT: usize = 1024 * 1024;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let socket = std::env::args_os().nth(1).ok_or("usage: VSOCK_SOCKET")?;
    print!("{}", run(&PathBuf::from(socket)).await?);
    Ok(())
}

/// Returns the result.
pub async fn run(vsock_socket: &Path) -> Result<String, Box<dyn Error>> {
    let client = Client::connect(vsock_socket, TIMEOUT).await?;
    let project = format!("/tmp/ratoon-example-{}", std::process::id());

    // A tree travels as a tar archive; one of any size can be sent from a file or a pipe.
    let archive = archive()?;
    let unpack = TreeUnpack {
        path: project.clone(),
        owner: Some("0:0".into()),
        ..TreeUnpack::default()
    };
    client.unpack(unpack, &archive[..]).await?;

    let build = ExecParams {
        argv: vec!["sh".into(), "build.sh".into()],
        cwd: Some(project.clone()),
        ..ExecParams::default()
    };
    let report = client.exec(build).await?.wait().await?;
    if report.status != ExitStatus::Code(0) {
        return Err(format!("the build ended with {:?}", report.status).into());
    }

    let result = format!("{project}/out/result");
    let result = client.read_to_vec(&result, LIMIT).await?;
    let all = FileRemove {
        path: project,
        recursive: true,
        ..FileRemove::default()
    };
    client.remove(all).await?;
    Ok(String::from_utf8(result)?)
}

/// A directory with two files. `tar::Builder::append_dir_all` takes one from the disk.
fn archive() -> std::io::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, content) in [
        ("build.sh", "mkdir -p out; sort src/names > out/result\n"),
        ("src/names", "Saccharum\nErianthus\nMiscanthus\n"),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, name, content.as_bytes())?;
    }
    archive.into_inner()
}
