//! `ratoon-runtime`: `/init` of the guest; with `--serve-unix PATH` a server for tests on the host.
//! `--check-state`, `--take-over` and `--take-back` are what one runtime says to the next (`swap`).
//!
//! As PID 1 it ends only with the machine. What cannot be mended in start-up ends it with one line
//! on the console and the kernel panics ("Attempted to kill init"): the VMM reports that, and the
//! line before says why. A clean end is a power-off.
//!
//! C's `main` and not Rust's: what Rust does before its `main` is a dozen system calls, and it
//! aborts when a kernel without a console leaves the standard descriptors closed.

#![no_main]

use std::env;
use std::io::Write as _;
use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;

use ratoon_protocol::RUNTIME_PORT;
use ratoon_runtime::{boot, power, server::Server, swap, sys};

/// The program's entry; the C library has made the arguments known to [`env::args_os`].
// SAFETY: the only `main` of this program, with a signature that C allows.
#[unsafe(no_mangle)]
pub extern "C" fn main() -> libc::c_int {
    let args: Vec<_> = env::args_os().skip(1).collect();
    let words: Vec<_> = args.iter().map(|arg| arg.to_str().unwrap_or("")).collect();
    let result = match words.as_slice() {
        ["--serve-unix", _] => serve_unix(args[1].as_ref()),
        ["--check-state", fd] => check_state(fd),
        ["--take-over", state, old] => take_over(state, old),
        ["--take-back", state, why] => take_back(state, why),
        _ if rustix::process::getpid().is_init() => serve_machine(),
        _ => {
            eprintln!(
                "usage: ratoon-runtime --serve-unix PATH   (without arguments only as PID 1)"
            );
            return 2;
        }
    };
    match result {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("ratoon-runtime: {}", boot::one_line(error.as_ref()));
            1
        }
    }
}

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn serve_machine() -> Result<()> {
    let signals = sys::block_signals()?;
    let options = boot::boot()?;
    let null = boot::open_null()?;
    let listener = sys::vsock_listen(RUNTIME_PORT)
        .map_err(|source| boot::BootError::Step("listen on vsock port 1024", source))?;
    let mut server = Server::new(listener, signals, null, true)?;
    if options.ready_on_console {
        // A console that takes nothing is no reason not to serve.
        let _ = writeln!(std::io::stdout(), "{}", boot::READY_LINE);
    }
    match sys::vsock_connect_host(RUNTIME_PORT) {
        Ok(connection) => server.add(connection, false),
        Err(error) => eprintln!("ratoon-runtime: cannot connect to the host: {error}"),
    }
    serve(&mut server)
}

/// Serves to the end of the machine, or of a test.
fn serve(server: &mut Server) -> Result<()> {
    server.run()?;
    match server.is_machine() {
        true => Err(power::power_off().into()),
        false => Ok(()),
    }
}

fn check_state(state: &str) -> Result<()> {
    swap::check(state.parse()?)?;
    println!("{}", env!("CARGO_PKG_VERSION"));
    Ok(())
}

fn take_over(state: &str, old: &str) -> Result<()> {
    let (state, old): (RawFd, RawFd) = (state.parse()?, old.parse()?);
    let server = sys::block_signals()
        .map_err(|source| swap::state::StateError::System("hear of signals", source))
        .and_then(|signals| swap::resume(state, Some(old), None, signals));
    match server {
        Ok(mut server) => serve(&mut server),
        Err(error) => Err(swap::give_back(state, old, &boot::one_line(&error)).into()),
    }
}

fn take_back(state: &str, why: &str) -> Result<()> {
    let signals = sys::block_signals()?;
    serve(&mut swap::resume(state.parse()?, None, Some(why), signals)?)
}

fn serve_unix(path: &std::path::Path) -> Result<()> {
    let signals = sys::block_signals()?;
    // As PID 1 would, so that orphans are reaped here in tests too.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    let null = boot::open_null()?;
    serve(&mut Server::new(listener.into(), signals, null, false)?)
}
