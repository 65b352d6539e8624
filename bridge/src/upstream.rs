//! Connections to a provider: to the one address that the configuration names, and no other.
//!
//! HTTP/1.1 over TLS, or without it on this machine alone. Nothing follows a redirect. A connection
//! that has served an answer to its end serves the next call. What goes out has our headers only.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderName, HeaderValue, USER_AGENT,
};
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use crate::config::{KeyHeader, Provider};
use crate::key::Key;
use crate::request::Wire;

/// How long an idle connection is kept.
const IDLE: Duration = Duration::from_secs(30);
/// How many are kept.
const MOST_IDLE: usize = 32;
const ANTHROPIC_VERSION: &str = "2023-06-01";

type Sender = SendRequest<Full<Bytes>>;

/// A provider.
pub struct Upstream {
    address: Address,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    host: HeaderValue,
    prefix: String,
    key: Option<HeaderValue>,
    bearer: Option<HeaderValue>,
    key_header: Option<KeyHeader>,
    connect: Duration,
    idle: Mutex<Vec<(Sender, Instant)>>,
}

impl std::fmt::Debug for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Upstream({:?})", self.address)
    }
}

#[derive(Debug)]
enum Address {
    Tcp(String, u16),
    Unix(PathBuf),
}

/// Headers of the guest's that may go on, checked.
#[derive(Debug, Default)]
pub struct Passed {
    /// `anthropic-version`
    pub version: Option<HeaderValue>,
    /// `anthropic-beta`
    pub beta: Option<HeaderValue>,
}

/// An answer that has begun, and the connection that it comes over.
#[derive(Debug)]
pub struct Begun {
    /// The answer.
    pub response: Response<Incoming>,
    sender: Sender,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// Nothing was sent: it may be tried again.
    #[error("the provider cannot be reached")]
    Connect(#[source] io::Error),
    /// It was sent, at least in part: it may have been paid for.
    #[error("the provider hung up before it answered")]
    Broken(#[source] hyper::Error),
}

/// Why a provider cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// Its address is none.
    #[error("provider \"{provider}\": {what}")]
    Address {
        /// Which.
        provider: String,
        /// Why.
        what: &'static str,
    },
    /// No certificates to trust.
    #[error(
        "provider \"{provider}\": no certificates to trust; install ca-certificates or give ca_file"
    )]
    Roots {
        /// Which.
        provider: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Upstream {
    /// Takes a provider's configuration and its key.
    ///
    /// # Errors
    /// When its address is none, or a key would travel in the clear.
    pub fn new(
        provider: &Provider,
        key: Option<&Key>,
        connect: Duration,
    ) -> Result<Self, UpstreamError> {
        let wrong = |what| UpstreamError::Address {
            provider: provider.name.clone(),
            what,
        };
        let header = |bytes: &[u8]| {
            let mut value =
                HeaderValue::from_bytes(bytes).map_err(|_| wrong("its key is no header value"))?;
            value.set_sensitive(true);
            Ok(value)
        };
        let mut bearer = None;
        if let Some(key) = key {
            let text = zeroize::Zeroizing::new([b"Bearer ", key.bytes()].concat());
            bearer = Some(header(&text)?);
        }
        let key = key.map(|key| header(key.bytes())).transpose()?;
        let (address, tls, host, prefix) = if let Some(path) =
            provider.base_url.strip_prefix("unix:")
        {
            let host = HeaderValue::from_static("localhost");
            (Address::Unix(path.into()), None, host, String::new())
        } else {
            let url: Uri = provider
                .base_url
                .parse()
                .map_err(|_| wrong("its base_url is no URL"))?;
            let name = url.host().unwrap_or_default();
            let bare = name.trim_start_matches('[').trim_end_matches(']');
            let secure = match url.scheme_str() {
                Some("https") => true,
                Some("http") => false,
                _ => {
                    return Err(wrong(
                        "its base_url begins with neither https, http nor unix:",
                    ));
                }
            };
            if url.query().is_some() || url.authority().is_none_or(|a| a.as_str().contains('@')) {
                return Err(wrong("its base_url has a query or a user"));
            }
            let local = bare == "localhost"
                || bare
                    .parse::<std::net::IpAddr>()
                    .is_ok_and(|address| address.is_loopback());
            if !secure && !local && key.is_some() {
                return Err(wrong(
                    "its key would travel in the clear; use https, or a server on this machine",
                ));
            }
            let tls = if secure {
                let server = ServerName::try_from(bare.to_owned())
                    .map_err(|_| wrong("its host is no name that a certificate can have"))?;
                Some((connector(provider)?, server))
            } else {
                None
            };
            let authority = url.authority().map_or("", |authority| authority.as_str());
            let host =
                HeaderValue::from_str(authority).map_err(|_| wrong("its host is no host"))?;
            let port = url.port_u16().unwrap_or(if secure { 443 } else { 80 });
            let prefix = url.path().trim_end_matches('/').to_owned();
            if prefix.ends_with("/v1") || prefix == "v1" {
                return Err(wrong("its base_url ends in /v1; leave that out"));
            }
            (Address::Tcp(bare.to_owned(), port), tls, host, prefix)
        };
        Ok(Self {
            address,
            tls,
            host,
            prefix,
            key,
            bearer,
            key_header: provider.key_header,
            connect,
            idle: Mutex::default(),
        })
    }

    /// Sends a request once; gives the answer's head.
    ///
    /// # Errors
    /// When there is none.
    pub async fn send(
        &self,
        wire: Wire,
        stream: bool,
        passed: &Passed,
        body: Bytes,
    ) -> Result<Begun, SendError> {
        let mut request = self.request(wire, stream, passed, body);
        loop {
            let (mut sender, used_before) = match self.take_idle() {
                Some(sender) => (sender, true),
                None => (self.dial().await.map_err(SendError::Connect)?, false),
            };
            match sender.try_send_request(request).await {
                Ok(response) => return Ok(Begun { response, sender }),
                // The provider closed an idle connection, and nothing was sent over it.
                Err(mut error) if used_before => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(SendError::Broken(error.into_error())),
                },
                Err(error) => return Err(SendError::Broken(error.into_error())),
            }
        }
    }

    /// Takes a connection back whose answer was read to its end.
    pub async fn give_back(&self, mut sender: Sender) {
        let ready = tokio::time::timeout(Duration::from_millis(100), sender.ready());
        if matches!(ready.await, Ok(Ok(()))) {
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            if idle.len() < MOST_IDLE {
                idle.push((sender, Instant::now()));
            }
        }
    }

    fn take_idle(&self) -> Option<Sender> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|(sender, since)| sender.is_ready() && since.elapsed() < IDLE);
        idle.pop().map(|(sender, _)| sender)
    }

    async fn dial(&self) -> io::Result<Sender> {
        tokio::time::timeout(self.connect, async {
            match &self.address {
                Address::Unix(path) => shake(UnixStream::connect(path).await?).await,
                Address::Tcp(host, port) => {
                    let stream = TcpStream::connect((host.as_str(), *port)).await?;
                    stream.set_nodelay(true)?;
                    match &self.tls {
                        None => shake(stream).await,
                        Some((tls, name)) => shake(tls.connect(name.clone(), stream).await?).await,
                    }
                }
            }
        })
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    fn request(
        &self,
        wire: Wire,
        stream: bool,
        passed: &Passed,
        body: Bytes,
    ) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = hyper::Method::POST;
        // The prefix was part of a valid URL, and the path is ours.
        *request.uri_mut() = format!("{}{}", self.prefix, wire.path())
            .parse()
            .unwrap_or_default();
        let headers = request.headers_mut();
        headers.insert(HOST, self.host.clone());
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        headers.insert(
            USER_AGENT,
            HeaderValue::from_static(concat!("ratoon-bridge/", env!("CARGO_PKG_VERSION"))),
        );
        headers.insert(
            ACCEPT,
            HeaderValue::from_static(if stream {
                "text/event-stream"
            } else {
                "application/json"
            }),
        );
        let form = self.key_header.unwrap_or(if wire.is_anthropic() {
            KeyHeader::XApiKey
        } else {
            KeyHeader::Bearer
        });
        let (name, key) = match form {
            KeyHeader::XApiKey => (HeaderName::from_static("x-api-key"), &self.key),
            KeyHeader::Bearer => (AUTHORIZATION, &self.bearer),
        };
        if let Some(key) = key {
            headers.insert(name, key.clone());
        }
        if wire.is_anthropic() {
            let version = passed
                .version
                .clone()
                .unwrap_or(HeaderValue::from_static(ANTHROPIC_VERSION));
            headers.insert("anthropic-version", version);
            if let Some(beta) = &passed.beta {
                headers.insert("anthropic-beta", beta.clone());
            }
        }
        request
    }
}

impl Begun {
    /// Parts it, so that the connection can be given back when the answer has been read.
    #[must_use]
    pub fn into_parts(self) -> (Response<Incoming>, Sender) {
        (self.response, self.sender)
    }
}

async fn shake<S>(stream: S) -> io::Result<Sender>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (sender, connection) = http1::Builder::new()
        .max_buf_size(64 * 1024)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(io::Error::other)?;
    tokio::spawn(async move {
        // Its end shows in the answers; there is nobody else to tell.
        let _ = connection.await;
    });
    Ok(sender)
}

fn connector(provider: &Provider) -> Result<TlsConnector, UpstreamError> {
    let failed = |source| UpstreamError::Roots {
        provider: provider.name.clone(),
        source,
    };
    let mut roots = RootCertStore::empty();
    match &provider.ca_file {
        Some(path) => {
            let file = rustls::pki_types::CertificateDer::pem_file_iter(path)
                .map_err(|error| failed(io::Error::other(error)))?;
            for certificate in file {
                let certificate = certificate.map_err(|error| failed(io::Error::other(error)))?;
                roots
                    .add(certificate)
                    .map_err(|error| failed(io::Error::other(error)))?;
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            // Single certificates that rustls cannot use are left out, as browsers do.
            roots.add_parsable_certificates(found.certs);
        }
    }
    if roots.is_empty() {
        return Err(failed(io::ErrorKind::NotFound.into()));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| failed(io::Error::other(error)))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}
