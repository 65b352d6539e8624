//! Client of a VMM's control socket: HTTP/1.1 over a Unix socket, one connection a request.
//!
//! Blocking; each request is bounded in time and size. It fails when nobody listens (the VMM has
//! ended), when the reply does not come, or when the VMM refuses.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use ratoon_vmm_api::{
    BirthRequest, ErrorReply, FreezeReply, FreezeRequest, MetricsReply, StatusReply, TouchedReply,
};
use serde::de::DeserializeOwned;

/// A longer reply is none.
const MAX_REPLY_LEN: usize = 4 << 20;

/// A VMM's control socket.
#[derive(Debug, Clone)]
pub struct Control {
    socket: PathBuf,
    timeout: Duration,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody answers at the socket.
    #[error("connecting to the VMM at {}", socket.display())]
    Connect {
        /// The control socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The VMM did not answer in time.
    #[error("the VMM at {} did not answer within {timeout:?}", socket.display())]
    Timeout {
        /// The control socket.
        socket: PathBuf,
        /// How long it was given.
        timeout: Duration,
    },
    /// What came back is not HTTP, or not the reply's JSON.
    #[error("talking to the VMM at {}", socket.display())]
    Http {
        /// The control socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The VMM's own words.
    #[error("the VMM refused {path}: {message}")]
    Refused {
        /// The request's path.
        path: &'static str,
        /// Its reason.
        message: String,
    },
}

impl Control {
    /// The control socket at `socket`; each request may take `timeout`.
    pub fn new(socket: impl Into<PathBuf>, timeout: Duration) -> Self {
        Self {
            socket: socket.into(),
            timeout,
        }
    }

    /// Where the VM is in its life.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn status(&self) -> Result<StatusReply, ControlError> {
        self.request(Method::GET, "/v1/status")
    }

    /// Holds the vCPUs.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn pause(&self) -> Result<StatusReply, ControlError> {
        self.request(Method::POST, "/v1/pause")
    }

    /// Lets the vCPUs run.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn resume(&self) -> Result<StatusReply, ControlError> {
        self.request(Method::POST, "/v1/resume")
    }

    /// Ends the VM without asking the guest.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn stop(&self) -> Result<StatusReply, ControlError> {
        self.request(Method::POST, "/v1/stop")
    }

    /// The VM's counters.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn metrics(&self) -> Result<MetricsReply, ControlError> {
        self.request(Method::GET, "/v1/metrics")
    }

    /// Which of its memory the VM has touched.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn touched(&self) -> Result<TouchedReply, ControlError> {
        self.request(Method::GET, "/v1/touched")
    }

    /// Makes a generation of the VM; see [`super::freeze`].
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn freeze(&self, request: &FreezeRequest) -> Result<FreezeReply, ControlError> {
        let body = serde_json::to_vec(request).map_err(|error| self.http(error))?;
        self.request_with(Method::POST, "/v1/freeze", body)
    }

    /// What the VM was started from; see [`super::freeze`].
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn birth(&self, request: &BirthRequest) -> Result<FreezeReply, ControlError> {
        let body = serde_json::to_vec(request).map_err(|error| self.http(error))?;
        self.request_with(Method::POST, "/v1/birth", body)
    }

    fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &'static str,
    ) -> Result<T, ControlError> {
        self.request_with(method, path, Vec::new())
    }

    fn request_with<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &'static str,
        body: Vec<u8>,
    ) -> Result<T, ControlError> {
        // On a thread of its own, so that a caller inside another tokio runtime may block on it.
        let (status, body) = std::thread::scope(|scope| {
            scope
                .spawn(|| self.exchange(method, path, body))
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        if status.is_success() {
            serde_json::from_slice(&body).map_err(|error| self.http(error))
        } else {
            let message = serde_json::from_slice(&body)
                .map_or_else(|_| status.to_string(), |reply: ErrorReply| reply.error);
            Err(ControlError::Refused { path, message })
        }
    }

    fn exchange(
        &self,
        method: Method,
        path: &'static str,
        body: Vec<u8>,
    ) -> Result<(hyper::StatusCode, Bytes), ControlError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| self.http(error))?;
        runtime.block_on(async {
            let exchange = exchange(&self.socket, method, path, body);
            match tokio::time::timeout(self.timeout, exchange).await {
                Ok(Ok(reply)) => Ok(reply),
                Ok(Err(Failed::Connect(source))) => Err(ControlError::Connect {
                    socket: self.socket.clone(),
                    source,
                }),
                Ok(Err(Failed::Http(source))) => Err(self.http(source)),
                Err(_) => Err(ControlError::Timeout {
                    socket: self.socket.clone(),
                    timeout: self.timeout,
                }),
            }
        })
    }

    fn http(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ControlError {
        ControlError::Http {
            socket: self.socket.clone(),
            source: source.into(),
        }
    }
}

enum Failed {
    Connect(std::io::Error),
    Http(Box<dyn std::error::Error + Send + Sync>),
}

impl<E: Into<Box<dyn std::error::Error + Send + Sync>>> From<E> for Failed {
    fn from(error: E) -> Self {
        Self::Http(error.into())
    }
}

async fn exchange(
    socket: &Path,
    method: Method,
    path: &str,
    body: Vec<u8>,
) -> Result<(hyper::StatusCode, Bytes), Failed> {
    let stream = tokio::net::UnixStream::connect(socket)
        .await
        .map_err(Failed::Connect)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(hyper::header::HOST, "vmm")
        .header(hyper::header::CONNECTION, "close")
        .body(Full::new(Bytes::from(body)))?;
    let reply = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_REPLY_LEN)
            .collect()
            .await?
            .to_bytes();
        Ok::<_, Failed>((status, body))
    };
    // The connection's future moves the bytes; the reply is there before it ends.
    tokio::pin!(connection);
    tokio::pin!(reply);
    tokio::select! {
        reply = &mut reply => reply,
        _ = &mut connection => reply.await,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    fn served(reply: &'static str) -> (tempfile::TempDir, Control) {
        let temp = tempfile::tempdir().unwrap();
        let socket = temp.path().join("c");
        let listener = UnixListener::bind(&socket).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
                head.push(byte[0]);
            }
            stream.write_all(reply.as_bytes()).unwrap();
        });
        (temp, Control::new(socket, Duration::from_secs(60)))
    }

    #[test]
    fn a_refusal_carries_the_vmms_words() {
        let (_temp, control) = served(
            "HTTP/1.1 409 Conflict\r\ncontent-length: 29\r\n\r\n{\"error\":\"the VM is stopped\"}",
        );
        match control.pause() {
            Err(ControlError::Refused { path, message }) => {
                assert_eq!((path, message.as_str()), ("/v1/pause", "the VM is stopped"));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_reply_that_is_not_http_is_an_error() {
        let (_temp, control) = served("hello\r\n\r\n");
        let error = control.status().unwrap_err();
        assert!(matches!(error, ControlError::Http { .. }), "{error}");
    }

    #[test]
    fn a_vmm_that_closes_without_a_reply_is_an_error() {
        let (_temp, control) = served("");
        let error = control.status().unwrap_err();
        assert!(matches!(error, ControlError::Http { .. }), "{error}");
    }

    #[test]
    fn a_vmm_that_is_gone_is_named_by_its_socket() {
        let control = Control::new("/nonexistent/control.sock", Duration::from_secs(60));
        let error = control.status().unwrap_err();
        assert_eq!(
            error.to_string(),
            "connecting to the VMM at /nonexistent/control.sock"
        );
    }

    #[test]
    fn a_vmm_that_does_not_answer_is_given_up() {
        let temp = tempfile::tempdir().unwrap();
        let socket = temp.path().join("c");
        let _listener = UnixListener::bind(&socket).unwrap();
        let control = Control::new(socket, Duration::from_millis(20));
        let error = control.status().unwrap_err();
        assert!(matches!(error, ControlError::Timeout { .. }), "{error}");
    }
}
