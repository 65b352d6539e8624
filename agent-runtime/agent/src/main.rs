//! `ratoon-agent`: see the library.

use std::process::ExitCode;

const USAGE: &str = "usage: ratoon-agent loop | ratoon-agent proxy [--port N]   (docs/agent.md)";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let served = match words.as_slice() {
        ["loop"] => return ExitCode::from(ratoon_agent::run_loop()),
        ["proxy"] => ratoon_agent::serve_proxy(ratoon_protocol::LOOPBACK_PORT),
        ["proxy", "--port", port] if port.parse::<u16>().is_ok() => {
            ratoon_agent::serve_proxy(port.parse().unwrap_or(ratoon_protocol::LOOPBACK_PORT))
        }
        ["--version"] => {
            println!("ratoon-agent {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ratoon-agent: {error}");
            ExitCode::FAILURE
        }
    }
}
