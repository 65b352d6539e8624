//! `ratoon-agent`: see the library.

use std::process::ExitCode;

const USAGE: &str =
    "usage: ratoon-agent loop | ratoon-agent proxy [--keep] [--port N]   (docs/agent.md)";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let served = match words.as_slice() {
        ["loop"] => return ExitCode::from(ratoon_agent::run_loop()),
        ["proxy", options @ ..] => match proxy(options) {
            Some(served) => served,
            None => return wrong_usage(),
        },
        ["--version"] => {
            println!("ratoon-agent {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        _ => return wrong_usage(),
    };
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ratoon-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn wrong_usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

/// `None`: these are no options of the proxy's.
fn proxy(options: &[&str]) -> Option<std::io::Result<()>> {
    // How a keeper starts it.
    if let ["--kept-by", keeper] = options {
        return Some(ratoon_agent::serve_proxy_for(keeper.parse().ok()?));
    }
    let (keep, options) = match options {
        ["--keep", rest @ ..] => (true, rest),
        all => (false, all),
    };
    let port = match options {
        [] => ratoon_protocol::LOOPBACK_PORT,
        ["--port", port] => port.parse().ok()?,
        _ => return None,
    };
    Some(match keep {
        true => ratoon_agent::keep_proxy(port),
        false => ratoon_agent::serve_proxy(port),
    })
}
