//! The control socket: JSON, one object a line ([`ratoon_bridge_api::control`]).

use std::collections::VecDeque;
use std::sync::Arc;

use ratoon_bridge_api::control::{MAX_LINE_BYTES, Reply, Request};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{UnixListener, UnixStream};

use crate::bridge::Bridge;
use crate::socket;

/// Serves the control socket for as long as the process lives.
pub async fn serve(bridge: Arc<Bridge>, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let uid = stream.peer_cred().map(|peer| peer.uid());
                if !matches!(uid, Ok(uid) if uid == bridge.owner || uid == 0) {
                    tracing::warn!("a control connection of another user was refused");
                    continue;
                }
                let bridge = bridge.clone();
                tokio::spawn(async move {
                    if let Err(error) = talk(&bridge, stream).await {
                        tracing::debug!("a control connection ended: {error}");
                    }
                });
            }
            Err(error) => {
                tracing::warn!("no control connection accepted: {error}");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn talk(bridge: &Arc<Bridge>, mut stream: UnixStream) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    let mut fds = VecDeque::new();
    loop {
        let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
            if bytes.len() >= MAX_LINE_BYTES
                || socket::receive(&stream, &mut bytes, &mut fds).await? == 0
            {
                return Ok(());
            }
            continue;
        };
        let line: Vec<u8> = bytes.drain(..=end).collect();
        let reply = match serde_json::from_slice::<Request>(&line) {
            Ok(request) => bridge
                .tell(request, &mut fds)
                .await
                .unwrap_or_else(|error| Reply::Error {
                    message: chain(&error),
                }),
            Err(error) => Reply::Error {
                message: format!("no such request: {error}"),
            },
        };
        let mut answer = serde_json::to_vec(&reply)?;
        answer.push(b'\n');
        stream.write_all(&answer).await?;
    }
}

/// An error and its causes on one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
