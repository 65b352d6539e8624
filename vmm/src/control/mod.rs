//! The control socket: HTTP/1.1 over a Unix socket, on a thread of its own. Every route is one
//! [`Action`]; the OpenAPI document is generated from the handlers and their types.

use std::convert::Infallible;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use ratoon_vmm_api::{
    BirthRequest, ErrorReply, FreezeReply, FreezeRequest, MetricsReply, StatusReply, TouchedReply,
};
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use utoipa::OpenApi;

use crate::birth;
use crate::machine::{Action, Machine, Refused, Reply};

/// Connections served at once; more wait.
const MAX_CONNECTIONS: usize = 16;
/// How long a client may take to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest request head, in bytes.
const MAX_HEAD_LEN: usize = 16 * 1024;

/// The longest request body, in bytes.
const MAX_BODY_LEN: usize = 64 * 1024;

/// The control plane's description.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "ratoon-vmm",
        description = "Control socket of one Ratoon virtual machine"
    ),
    paths(status, pause, resume, stop, metrics, touched, freeze, birth),
    components(schemas(ratoon_vmm_api::VmConfig, ratoon_vmm_api::ExitReport))
)]
struct Document;

/// The OpenAPI document as JSON.
pub fn openapi() -> String {
    Document::openapi()
        .to_pretty_json()
        .expect("a document made of plain types")
}

#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = StatusReply)))]
fn status(machine: &Machine) -> Result<Reply, Refused> {
    machine.perform(Action::Status)
}

#[utoipa::path(post, path = "/v1/pause", responses(
    (status = 200, body = StatusReply, description = "all vCPUs are held"),
    (status = 409, body = ErrorReply, description = "the VM does not run")))]
fn pause(machine: &Machine) -> Result<Reply, Refused> {
    machine.perform(Action::Pause)
}

#[utoipa::path(post, path = "/v1/resume", responses(
    (status = 200, body = StatusReply),
    (status = 409, body = ErrorReply, description = "the VM is over")))]
fn resume(machine: &Machine) -> Result<Reply, Refused> {
    machine.perform(Action::Resume)
}

#[utoipa::path(post, path = "/v1/stop", responses(
    (status = 200, body = StatusReply, description = "the VM ends now; the guest is not asked")))]
fn stop(machine: &Machine) -> Result<Reply, Refused> {
    machine.perform(Action::Stop)
}

#[utoipa::path(get, path = "/v1/metrics", responses((status = 200, body = MetricsReply)))]
fn metrics(machine: &Machine) -> Result<Reply, Refused> {
    machine.perform(Action::Metrics)
}

#[utoipa::path(get, path = "/v1/touched", responses((status = 200, body = TouchedReply)))]
fn touched(machine: &Machine) -> Result<Reply, Refused> {
    machine.perform(Action::Touched)
}

/// A freeze in a thread of its own: it takes as long as the requester takes the files.
#[utoipa::path(post, path = "/v1/freeze", request_body = FreezeRequest, responses(
    (status = 200, body = FreezeReply, description = "the generation has been sent; the VM goes on"),
    (status = 400, body = ErrorReply, description = "not a FreezeRequest"),
    (status = 409, body = ErrorReply, description = "the VM cannot be frozen")))]
async fn freeze(machine: Arc<Machine>, body: Incoming) -> Response<Full<Bytes>> {
    let request: FreezeRequest = match read(body).await {
        Ok(request) => request,
        Err(refused) => return refused,
    };
    let frozen = tokio::task::spawn_blocking(move || {
        let frozen = machine.freeze(&request);
        if frozen.is_ok() {
            machine.merge_later();
        }
        frozen
    });
    let frozen = frozen.await;
    match frozen {
        Ok(Ok(reply)) => json(
            StatusCode::OK,
            serde_json::to_vec(&reply).unwrap_or_default(),
        ),
        Ok(Err(why)) => error(StatusCode::CONFLICT, crate::causes(&why).join(": ")),
        Err(why) => error(StatusCode::INTERNAL_SERVER_ERROR, why.to_string()),
    }
}

/// The generation that the machine was started from.
#[utoipa::path(post, path = "/v1/birth", request_body = BirthRequest, responses(
    (status = 200, body = FreezeReply, description = "the generation has been sent"),
    (status = 400, body = ErrorReply, description = "not a BirthRequest"),
    (status = 409, body = ErrorReply, description = "the VM was not started from it")))]
async fn birth(machine: Arc<Machine>, body: Incoming) -> Response<Full<Bytes>> {
    let request: BirthRequest = match read(body).await {
        Ok(request) => request,
        Err(refused) => return refused,
    };
    let give = move || birth::give(machine.birth.as_ref(), &request);
    match tokio::task::spawn_blocking(give).await {
        Ok(Ok(reply)) => json(
            StatusCode::OK,
            serde_json::to_vec(&reply).unwrap_or_default(),
        ),
        Ok(Err(why)) => error(StatusCode::CONFLICT, crate::causes(&why).join(": ")),
        Err(why) => error(StatusCode::INTERNAL_SERVER_ERROR, why.to_string()),
    }
}

/// A request's body, or the reply that it is none.
async fn read<T: DeserializeOwned>(body: Incoming) -> Result<T, Response<Full<Bytes>>> {
    let wrong = |why: &dyn std::fmt::Display| {
        error(
            StatusCode::BAD_REQUEST,
            format!("the request's body: {why}"),
        )
    };
    let body = Limited::new(body, MAX_BODY_LEN).collect().await;
    let body = body.map_err(|why| wrong(&why))?.to_bytes();
    serde_json::from_slice(&body).map_err(|why| wrong(&why))
}

fn json(status: StatusCode, body: Vec<u8>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(
        hyper::header::CONTENT_TYPE,
        hyper::header::HeaderValue::from_static("application/json"),
    );
    response
}

fn error(status: StatusCode, error: String) -> Response<Full<Bytes>> {
    json(
        status,
        serde_json::to_vec(&ErrorReply { error }).unwrap_or_default(),
    )
}

fn answer(machine: &Machine, method: &Method, path: &str) -> Response<Full<Bytes>> {
    let handler = match (method, path) {
        (&Method::GET, "/v1/status") => status,
        (&Method::POST, "/v1/pause") => pause,
        (&Method::POST, "/v1/resume") => resume,
        (&Method::POST, "/v1/stop") => stop,
        (&Method::GET, "/v1/metrics") => metrics,
        (&Method::GET, "/v1/touched") => touched,
        (&Method::GET, "/openapi.json") => return json(StatusCode::OK, openapi().into_bytes()),
        (
            _,
            "/v1/status" | "/v1/pause" | "/v1/resume" | "/v1/stop" | "/v1/metrics" | "/v1/touched"
            | "/v1/freeze" | "/v1/birth",
        ) => {
            return error(
                StatusCode::METHOD_NOT_ALLOWED,
                format!("{method} is not for {path}; see /openapi.json"),
            );
        }
        _ => {
            return error(
                StatusCode::NOT_FOUND,
                format!("no route {path}; see /openapi.json"),
            );
        }
    };
    match handler(machine) {
        Ok(Reply::Status(reply)) => json(
            StatusCode::OK,
            serde_json::to_vec(&reply).unwrap_or_default(),
        ),
        Ok(Reply::Touched(reply)) => json(
            StatusCode::OK,
            serde_json::to_vec(&reply).unwrap_or_default(),
        ),
        Ok(Reply::Metrics(reply)) => json(
            StatusCode::OK,
            serde_json::to_vec(&reply).unwrap_or_default(),
        ),
        Err(refused) => error(StatusCode::CONFLICT, refused.to_string()),
    }
}

async fn serve(listener: UnixListener, machine: Arc<Machine>) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return Ok(());
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: they come back.
                tracing::warn!(%error, "control socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let machine = machine.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let machine = machine.clone();
                async move {
                    let route = (request.method(), request.uri().path());
                    Ok::<_, Infallible>(match route {
                        (&Method::POST, "/v1/freeze") => freeze(machine, request.into_body()).await,
                        (&Method::POST, "/v1/birth") => birth(machine, request.into_body()).await,
                        (method, path) => answer(&machine, method, path),
                    })
                }
            });
            // An error here is the client's: it went away or spoke no HTTP.
            let _ = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_buf_size(MAX_HEAD_LEN)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            drop(place);
        });
    }
}

/// Serves `listener` on a thread of its own until the process ends.
///
/// # Errors
/// When the system has no more threads or descriptors.
pub fn start(listener: UnixListener, machine: Arc<Machine>) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_io_events_per_tick(MAX_CONNECTIONS)
        .max_blocking_threads(1)
        .build()?;
    std::thread::Builder::new()
        .name("control".into())
        .stack_size(256 * 1024)
        .spawn(move || {
            if let Err(error) = runtime.block_on(serve(listener, machine)) {
                tracing::error!(%error, "control socket");
            }
        })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_document_describes_every_route_and_type() {
        let document: serde_json::Value = serde_json::from_str(&super::openapi()).unwrap();
        for path in [
            "status", "pause", "resume", "stop", "metrics", "freeze", "birth",
        ] {
            assert!(
                document["paths"].get(format!("/v1/{path}")).is_some(),
                "{path}"
            );
        }
        for schema in [
            "StatusReply",
            "MetricsReply",
            "VmConfig",
            "ExitReport",
            "ErrorReply",
        ] {
            assert!(
                document["components"]["schemas"].get(schema).is_some(),
                "{schema}"
            );
        }
    }
}
