//! `ratoon forward`.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::ExitCode;

use ratoon_client::blocking::CallIo;
use ratoon_engine::Engine;
use ratoon_engine::vm::record::VmDir;
use ratoon_protocol::{Call, Port, PortConnect, Transferred};

use crate::failure::Failure;
use crate::{guest, output};

/// Reach servers in a running VM from this host: connections to a local port go to the guest's.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  ratoon forward web 8080               # localhost:8080 is the guest's 8080
  ratoon forward web 9000:80 5432       # localhost:9000 is the guest's 80, and 5432 as well
  ratoon forward web 0:80               # any free local port; it is printed
  ratoon forward --list web             # servers that listen in the guest")]
pub struct Args {
    /// The local address to listen on.
    #[arg(long, value_name = "ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    bind: IpAddr,
    /// List the servers in the guest and end.
    #[arg(long)]
    list: bool,
    /// With --list: print JSON.
    #[arg(long, requires = "list")]
    json: bool,
    /// Name, id or beginning of an id.
    #[arg(value_name = "VM")]
    vm: String,
    /// Ports of the guest, each with the local one before it if that is another.
    #[arg(value_name = "[LOCAL:]PORT", value_parser = ports, required_unless_present = "list")]
    ports: Vec<(u16, u16)>,
}

fn ports(text: &str) -> Result<(u16, u16), String> {
    let (local, port) = text.split_once(':').unwrap_or((text, text));
    let number = |text: &str| {
        text.parse::<u16>()
            .map_err(|_| format!("{text:?} is no port (0 to 65535)"))
    };
    match number(port)? {
        0 => Err("the guest's port cannot be 0".into()),
        port => Ok((number(local)?, port)),
    }
}

pub fn run(engine: &Engine, args: &Args) -> Result<ExitCode, Failure> {
    let entry = guest::find(engine, &args.vm)?;
    let mut client = guest::connect(&entry)?;
    if args.list {
        let ports: Vec<Port> = client
            .call(&Call::PortList, "listed its ports", guest::CALL_TIMEOUT)
            .map_err(|error| guest::failure(error, "cannot list the guest's ports"))?;
        return list(args, &ports);
    }
    drop(client);
    let mut listeners = Vec::new();
    for &(local, port) in &args.ports {
        let address = SocketAddr::new(args.bind, local);
        let listener = TcpListener::bind(address).map_err(|error| {
            Failure::new(format!("cannot listen on {address}: {error}"))
                .hint(format!("`0:{port}` takes any free port"))
        })?;
        let address = listener.local_addr()?;
        output::line(&format!("{address} -> {port}"))?;
        listeners.push((listener, port));
    }
    std::thread::scope(|scope| {
        for (listener, port) in &listeners {
            let dir = &entry.dir;
            scope.spawn(move || accept(listener, dir, *port));
        }
    });
    Ok(ExitCode::SUCCESS)
}

fn list(args: &Args, ports: &[Port]) -> Result<ExitCode, Failure> {
    if args.json {
        output::json(&ports)?;
    } else {
        let rows: Vec<Vec<String>> = ports
            .iter()
            .map(|port| {
                vec![
                    port.port.to_string(),
                    shown(&port.address),
                    port.pid.map_or("-".into(), |pid| pid.to_string()),
                    shown(port.program.as_deref().unwrap_or("-")),
                ]
            })
            .collect();
        output::write(output::table(&["PORT", "ADDRESS", "PID", "PROGRAM"], &rows).as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The guest's words, without what steers a terminal.
fn shown(text: &str) -> String {
    text.replace(char::is_control, "\u{fffd}")
}

fn accept(listener: &TcpListener, dir: &VmDir, port: u16) {
    loop {
        let Ok((stream, _)) = listener.accept() else {
            // Out of descriptors, most likely: some connection has to end first.
            std::thread::sleep(std::time::Duration::from_millis(200));
            continue;
        };
        let dir = dir.clone();
        let spawned = std::thread::Builder::new()
            .name("forward".into())
            .spawn(move || {
                if let Err(failure) = join(&stream, &dir, port) {
                    let _ = write!(std::io::stderr(), "{}", failure.render());
                }
                let _ = stream.shutdown(Shutdown::Both);
            });
        if let Err(error) = spawned {
            let _ = writeln!(std::io::stderr(), "a connection is dropped: {error}");
        }
    }
}

/// Joins one connection to the guest's server, until both ways are at their end.
fn join(stream: &TcpStream, dir: &VmDir, port: u16) -> Result<(), Failure> {
    let mut client = guest::connect_at(dir)?;
    let call = Call::PortConnect(PortConnect { port, host: None });
    let mut to_peer = stream;
    let mut io = CallIo {
        stdin: Some(stream.as_fd()),
        stdout: &mut to_peer,
        stderr: &mut std::io::sink(),
        data: &mut std::io::sink(),
        events: &mut |_| {},
        ended: &mut |_| {
            // As the server says to its peer: nothing more comes.
            let _ = stream.shutdown(Shutdown::Write);
        },
    };
    let result: Result<Transferred, _> = client.run(&call, &mut io);
    result
        .map(|_| ())
        .map_err(|error| guest::failure(error, &format!("port {port} of the guest")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_may_have_another_local_one() {
        assert_eq!(ports("80"), Ok((80, 80)));
        assert_eq!(ports("0:80"), Ok((0, 80)));
        assert_eq!(ports("9000:80"), Ok((9000, 80)));
        for wrong in ["", "0", "80:0", "x", "70000", "1:2:3", "-1"] {
            assert!(ports(wrong).is_err(), "{wrong}");
        }
    }
}
