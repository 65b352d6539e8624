//! virtio-vsock (virtio 1.2, section 5.10) in the hybrid form: stream sockets of the guest's
//! AF_VSOCK on one side, Unix sockets of the host on the other.
//!
//! ```text
//!  host program --connect--> <socket>, "CONNECT 1024\n" --REQUEST--> guest listens on port 1024
//!               <--"OK <host port>\n"-------------------<-RESPONSE--
//!  guest connects to (CID 2, port N) --REQUEST--> device --connect--> <socket>_<N>
//!
//!  device.rs    queues, and who may use the next free buffer of the guest
//!  streams.rs   the host's side: listener, handshakes, epoll, timer
//!  connection.rs  one connection: credit both ways, half-closes (no queue, no epoll)
//!  packet.rs    the 44-byte header
//! ```
//!
//! How it fails: a packet that breaks the socket protocol is answered with a reset of that
//! connection; a chain that breaks the ring's rules makes the device need a reset. Memory is
//! bounded: [`connection::BUF_ALLOC`] a connection, [`MAX_CONNECTIONS`] connections.

mod connection;
mod device;
mod packet;
mod streams;

pub use device::Vsock;
pub use streams::VsockError;

/// The host's context id (VMADDR_CID_HOST).
pub const HOST_CID: u64 = 2;

/// How many connections, those still in their handshake included, a device has at most.
pub const MAX_CONNECTIONS: usize = 1024;
