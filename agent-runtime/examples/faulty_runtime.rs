//! A runtime that is not fit to take over, for `tests/swap.rs`. What is wrong with it stands at the
//! end of its own file: `early` refuses the state when it is asked, `late` when it has taken over.

#![no_main]

use std::env;

use ratoon_runtime::swap;

/// The program's entry, as that of the runtime itself: Rust's own would change the dispositions of
/// signals, and the old runtime would have them.
// SAFETY: the only `main` of this program, with a signature that C allows.
#[unsafe(no_mangle)]
pub extern "C" fn main() -> libc::c_int {
    let args: Vec<_> = env::args().skip(1).collect();
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let own = std::fs::read("/proc/self/exe").unwrap_or_default();
    match args.as_slice() {
        ["--check-state", _] if own.ends_with(b"late") => {
            println!("9.9.9");
            0
        }
        ["--take-over", state, old] => {
            if let (Ok(state), Ok(old)) = (state.parse(), old.parse()) {
                swap::give_back(state, old, "it has changed\nits mind");
            }
            1
        }
        _ => {
            eprintln!("ratoon-runtime: this is nothing for me");
            1
        }
    }
}
