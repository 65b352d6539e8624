//! The wire protocol between the host and Ratoon's runtime in the guest.
//!
//! One byte stream (a vsock connection, joined to a Unix socket on the host) carries many *calls*.
//! Everything on it is a [`Frame`]: a fixed 24-byte header and a bounded payload. A call's id is
//! chosen by the client; output frames carry the stream's byte offset and are acknowledged, so that
//! the calls of a named session are taken up again on a new connection.
//!
//! ```text
//!  client                                   runtime
//!    |  <------------- HELLO ------------------ |   once a connection, call 0
//!    |  -- CALL id=1 {"method":"exec",...} ---> |
//!    |  <------------- EVENT id=1 started ----- |
//!    |  -- STDIN id=1 offset=0 ---------------> |
//!    |  <------------- ACK id=1 (stdin, n) ---- |
//!    |  <------------- STDOUT id=1 offset=0 --- |
//!    |  -- ACK id=1 (stdout, n) --------------> |
//!    |  <------------- REPLY id=1 {...} ------- |   or ERROR: either ends the call
//! ```
//!
//! An ERROR for call 0 is about the connection itself and its last frame: it says which rule the
//! other side broke. Frames for a call that has ended are no error (they cross its reply on the
//! way) and are dropped.
//!
//! The crate does no I/O and never panics on bytes from the other side: see [`Decoder`].
//! `docs/protocol.md` describes the same byte by byte.

mod agent;
mod code;
mod files;
mod frame;
mod message;
mod process;
mod system;

pub use agent::{
    AgentEvent, AgentLimits, AgentUsage, BRIDGE_PORT, Ending, Go, LOOPBACK_PORT, Order, Profile,
    Task, Wire,
};
pub use code::{
    CodeContext, CodeData, CodeEnd, CodeError, CodeName, CodeRun, CodeStart, CodeStatus, Language,
};
pub use files::{
    ChangeKind, FileChange, FileEntry, FileKind, FileList, FileMkdir, FileMove, FilePath, FileRead,
    FileRemove, FileWatch, FileWrite, Transferred, TreePack, TreeUnpack,
};
pub use frame::{Decoder, Frame, FrameError, HEADER_LEN, Kind, MAX_PAYLOAD_LEN};
pub use message::{Call, ErrorCode, ErrorReply, Event, Hello, Pong};
pub use process::{
    AttachParams, ExecParams, ExitReport, ExitStatus, Have, HaveInput, OutputReport, ProcessInfo,
    ResizeParams, SessionParams, SessionReply, SignalParams, Size, Target, Usage,
};
pub use system::{
    Awake, EntropyAdd, FreezeParams, HostnameSet, Metrics, MetricsParams, NetworkSet, Port,
    PortConnect, RuntimeSwap, Swapped, TimeSet, TopProcess, Wake,
};

/// The protocol version that this crate speaks, the header's `version` byte.
pub const VERSION: u8 = 1;

/// The vsock port on which the runtime listens in the guest, and, on the host's side, the port to
/// which it connects once at boot (`<vsock socket>_1024`) to say that it is ready.
pub const RUNTIME_PORT: u32 = 1024;

/// How many bytes of one stream (stdin, stdout or stderr of one call) may be sent and not yet
/// acknowledged. A sender that has filled it waits; a receiver acknowledges at the latest when it
/// has taken half of it (written it on to the process, or to the client's own output).
pub const STREAM_WINDOW: u64 = 256 * 1024;

/// How many calls may be open on one connection; the next is refused with
/// [`ErrorCode::TooManyCalls`].
pub const MAX_OPEN_CALLS: usize = 256;
