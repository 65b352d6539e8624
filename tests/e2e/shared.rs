//! One machine that is booted once, for all promises that only need some machine.

use std::sync::OnceLock;
use std::time::Duration;

use ratoon_client::blocking::Client;
use ratoon_tests::{Done, Ratoon};

/// Its name.
pub const NAME: &str = "shared";

static MACHINE: OnceLock<(Ratoon, String)> = OnceLock::new();

/// Ratoon, with the machine running.
pub fn machine() -> &'static Ratoon {
    &booted().0
}

fn booted() -> &'static (Ratoon, String) {
    MACHINE.get_or_init(|| {
        let ratoon = Ratoon::warm();
        let args = [
            "run", "-d", "--name", NAME, "--image", "debian", "--memory", "256M",
        ];
        let id = ratoon.run(args).ok().stdout.trim().to_owned();
        (ratoon, id)
    })
}

/// `ratoon exec` in it: the flags, then the command.
pub fn exec(flags: &[&str], command: &[&str]) -> Done {
    let mut args = vec!["exec"];
    args.extend(flags);
    args.extend([NAME, "--"]);
    args.extend(command);
    machine().run(args)
}

/// A connection of its own to the machine's runtime.
pub fn client() -> Client {
    let (ratoon, id) = booted();
    let socket = ratoon.vms_dir().join(id).join("vsock.sock");
    Client::connect(&socket, Duration::from_secs(60)).expect("the runtime answers")
}

/// Ends the machine, if it was ever wanted; to be called after the last test.
pub fn end() {
    let Some((ratoon, _)) = MACHINE.get() else {
        return;
    };
    ratoon.run(["rm", "-f", NAME]).ok();
    ratoon.nothing_is_left();
    std::fs::remove_dir_all(ratoon.state_dir()).expect("its directory can be removed");
}
