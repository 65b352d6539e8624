//! `ratoon-pager`: fetches the chunked memory of one generation for all its VMs on this host.
//!
//! Started by the engine with a listening socket as its standard input; ends by itself.

use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use ratoon_snapshot::pager::{BEAT, FETCH, Pager};
use ratoon_snapshot::{ChunkFile, PageSource as _, read_working_set};

/// How long it stays without a VM: the next one finds the memory as it is.
const LINGER: Duration = Duration::from_secs(2);

const HELP: &str = "\
Fetches the chunked memory of a snapshot for the VMs that were restored from it. The engine starts
it when it is needed; it ends by itself when it is not.

Usage: ratoon-pager SOCKET FOLDER

  SOCKET   Path of the listening socket (SOCK_SEQPACKET) that is its standard input
  FOLDER   The snapshot
";

fn serve(socket: PathBuf, folder: PathBuf) -> Result<(), Box<dyn std::error::Error>> {
    // A ^C at the terminal is not for us.
    let _ = rustix::process::setsid();
    let listener = std::io::stdin().as_fd().try_clone_to_owned()?;
    let pager = Pager {
        listener,
        path: socket,
        linger: LINGER,
        beat: BEAT,
        fetch: FETCH,
    };
    match ChunkFile::open(&folder) {
        Ok(chunks) => {
            // Without it all is fetched as it is touched.
            let working_set = read_working_set(&folder, chunks.memory_bytes());
            let working_set = working_set.ok().flatten().unwrap_or_default();
            pager.run(Box::new(chunks), &working_set)?;
        }
        Err(error) => pager.refuse(&error)?,
    }
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let said = match <[_; 2]>::try_from(args) {
        Ok([socket, folder]) => serve(socket.into(), folder.into()),
        Err(args) if args.iter().any(|arg| arg == "--help" || arg == "-h") => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(_) => Err("two words are wanted; see --help".into()),
    };
    match said {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "ratoon-pager: {error}");
            ExitCode::FAILURE
        }
    }
}
