//! The machine over the async client: ports, metrics, clock, identity, and quiet for a freeze.
//!
//! Each is one call; its words are the protocol's own types. How it fails: as the call and the
//! connection do, [`RuntimeError`].

use std::fmt::Write;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{SystemTime, UNIX_EPOCH};

use ratoon_protocol::{
    Awake, Call, EntropyAdd, Event, FreezeParams, HostnameSet, Metrics, MetricsParams, NetworkSet,
    Port, PortConnect, TimeSet, Transferred, Wake,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::client::Client;
use crate::error::RuntimeError;
use crate::running::{Running, Stdin};

/// A connection to a server in the guest. Shutting it down ends what goes to the server, dropping it
/// ends both ways. Reading fails when the connection to the guest breaks off.
pub struct PortStream {
    running: Running,
    stdin: Stdin,
}

impl PortStream {
    /// Ends what goes to the server and waits until it has ended its side; what was not read is
    /// thrown away.
    ///
    /// # Errors
    /// As [`Running::result`].
    pub async fn finish(self) -> Result<Transferred, RuntimeError> {
        drop(self.stdin);
        self.running.result().await
    }
}

impl AsyncRead for PortStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.running.stdout).poll_read(context, buf)
    }
}

impl AsyncWrite for PortStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stdin).poll_write(context, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stdin).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stdin).poll_shutdown(context)
    }
}

impl Client {
    /// The TCP ports on which somebody listens in the guest.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn ports(&self) -> Result<Vec<Port>, RuntimeError> {
        self.call(Call::PortList).await
    }

    /// Connects to a server in the guest.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when nobody listens there, and as [`Client::begin`].
    pub async fn dial(&self, params: PortConnect) -> Result<PortStream, RuntimeError> {
        let running = self.begin(Call::PortConnect(params)).await?;
        let connected = |event| matches!(event, Event::Connected).then_some(());
        let (mut running, ()) = running.until(connected).await?;
        // A call that takes input has one.
        let stdin = running.stdin.take().ok_or(RuntimeError::Broken)?;
        Ok(PortStream { running, stdin })
    }

    /// How the machine is, with the `top` (at most 100) processes that used most processor time.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn metrics(&self, top: u32) -> Result<Metrics, RuntimeError> {
        self.call(Call::Metrics(MetricsParams { top })).await
    }

    /// Sets the guest's clock, to the microsecond; a time before 1970 is taken as 1970.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn set_time(&self, time: SystemTime) -> Result<(), RuntimeError> {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let time_us = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
        self.call(Call::TimeSet(TimeSet { time_us })).await
    }

    /// Reseeds the guest kernel's random numbers with 1 to 512 bytes.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn add_entropy(&self, bytes: &[u8]) -> Result<(), RuntimeError> {
        let mut hex = String::with_capacity(bytes.len() * 2);
        for byte in bytes {
            // A string takes all.
            let _ = write!(hex, "{byte:02x}");
        }
        self.call(Call::EntropyAdd(EntropyAdd { hex })).await
    }

    /// Names the machine: 1 to 63 letters, digits, `-` and `.`.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn set_hostname(&self, hostname: &str) -> Result<(), RuntimeError> {
        let hostname = hostname.into();
        self.call(Call::HostnameSet(HostnameSet { hostname })).await
    }

    /// Configures a network device.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when there is no such device or the kernel refuses, and as
    /// [`Client::call`].
    pub async fn set_network(&self, params: NetworkSet) -> Result<(), RuntimeError> {
        self.call(Call::NetworkSet(params)).await
    }

    /// Writes all file systems back.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn sync(&self) -> Result<(), RuntimeError> {
        self.call(Call::Sync).await
    }

    /// Brings processes, file systems or both to a halt.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when a process does not stop in time (nothing is then frozen), and as
    /// [`Client::call`].
    pub async fn freeze(&self, params: FreezeParams) -> Result<(), RuntimeError> {
        self.call(Call::Freeze(params)).await
    }

    /// Lets them go on; no error when nothing is frozen.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn thaw(&self, params: FreezeParams) -> Result<(), RuntimeError> {
        self.call(Call::Thaw(params)).await
    }

    /// From now on every call but [`Client::ping`] waits until [`Client::wake`].
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn expect_wake(&self) -> Result<(), RuntimeError> {
        self.call(Call::ExpectWake).await
    }

    /// Tells the machine who it is; the calls that wait go on.
    ///
    /// # Errors
    /// [`RuntimeError::Call`] when a step failed (the machine keeps waiting), and as [`Client::call`].
    pub async fn wake(&self, params: Wake) -> Result<Awake, RuntimeError> {
        self.call(Call::Wake(Box::new(params))).await
    }

    /// Who the machine is, as the last [`Client::wake`] told it.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn whoami(&self) -> Result<Awake, RuntimeError> {
        self.call(Call::Whoami).await
    }

    /// Ends the machine: processes are ended, file systems written back, then the power goes. When
    /// this returns the disk is safe.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn shutdown(&self) -> Result<(), RuntimeError> {
        self.call(Call::Shutdown).await
    }
}
