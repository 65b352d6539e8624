//! virtio-vsock (virtio 1.2, section 5.10) in the hybrid form: stream sockets of the guest's
//! AF_VSOCK on one side, Unix sockets of the host on the other.
//!
//! ```text
//!  host program --connect--> <socket>, "CONNECT 1024\n" --REQUEST--> guest listens on port 1024
//!               <--"OK <host port>\n"-------------------<-RESPONSE--
//!  guest connects to (CID 2, port N) --REQUEST--> device --connect--> <socket>_<N>
//!
//!  device.rs      its life, and who is connected to whom
//!  guest.rs       packets from the guest and for it: who gets the guest's next free buffer
//!  host.rs        what host programs do, what is late
//!  connection.rs  one connection: credit both ways, half-closes (no queue, no epoll)
//!  streams.rs     listener, handshakes, epoll, timer
//!  queues.rs      the three queues and the interrupt
//!  packet.rs      the 44-byte header
//!  state.rs       what is saved, and which connection goes on in another process
//! ```
//!
//! How it fails: a packet that breaks the socket protocol is answered with a reset of that
//! connection; a chain that breaks the ring's rules makes the device need a reset, and closes all
//! streams. Memory is bounded: 256 KiB a connection, [`MAX_CONNECTIONS`] connections.

mod connection;
mod device;
mod guest;
mod host;
mod packet;
mod queues;
mod state;
mod streams;
#[cfg(test)]
mod tests;

pub use device::{FIRST_RX_NS, FIRST_TX_NS, Vsock};
pub use state::{ControlState, ResetState, VsockState};
pub use streams::VsockError;

/// The host's context id (VMADDR_CID_HOST).
pub const HOST_CID: u64 = 2;

/// The host's port to which the guest's standing connection goes. Who listens for it is also the one to whom
/// a restore joins the connection that goes on.
pub const CONTROL_PORT: u32 = 1024;

/// How many connections, those still in their handshake included, a device has at most.
pub const MAX_CONNECTIONS: usize = 1024;
