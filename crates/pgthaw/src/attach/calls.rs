//! Calls from another machine's server: what it asks of this machine, and requests that are passed on to a session's agent.

use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Extension, Json};
use http_body_util::{BodyExt, Full};
use percent_encoding::percent_decode_str;
use pgthaw_link::Carry;
use pgthaw_session::session::Place;

use super::{Only, Restriction};
use crate::agent::{check, place, sealing, undo};
use crate::cli::client::{Client, state_directory};
use crate::configuration::Configuration;
use crate::delivered::Delivered;
use crate::http::{self, ClientError, NOT_LISTENING_HEADER, SOCKET_HEADER};
use crate::server::agent_link::AgentLink;
use crate::server::{self, mount_service, site};
use crate::wire::{
    ApiError, Assignment, CheckPart, CheckReport, CheckTask, PlaceTask, TargetTask, TargetUndone,
};

/// All routes that a connection with this restriction may use.
pub fn router(restriction: &Restriction) -> axum::Router {
    let staging = axum::Router::new()
        .route("/v1/host/place", post(choose_place))
        .route("/v1/host/agent", post(start_agent))
        .route("/v1/host/checksums", post(checksums))
        .route("/v1/host/find", post(async |Json(place): Json<Place>| Json(undo::find_at(&place))))
        .route(
            "/v1/host/undo",
            post(async |Json(place): Json<Place>| blocking(move || undo::undo_at(&place)).await),
        );
    let target = axum::Router::new()
        .route("/v1/host/missing", post(missing))
        .route("/v1/host/find-in-target", post(find_in_target))
        .route("/v1/host/undo-target", post(undo_target))
        .route("/v1/host/sealed", post(sealed))
        .route("/v1/host/delivered", post(delivered));
    let both = axum::Router::new().route("/v1/host/check", post(checked));
    let allowed = match restriction.only {
        None => both.merge(staging).merge(target).fallback(pass_on_or_ask),
        Some(Only::Staging) => both.merge(staging).fallback(pass_on),
        Some(Only::Target) => both.merge(target),
        Some(Only::Server) => axum::Router::new().fallback(ask_server),
    };
    allowed.layer(Extension(restriction.clone())).layer(DefaultBodyLimit::disable())
}

/// Refuses what the connection is not for.
fn within(restriction: &Restriction, directory: &Path) -> Result<(), ApiError> {
    match restriction.allows_directory(directory) {
        true => Ok(()),
        false => Err(ApiError::broken("this connection may not be used for that directory")),
    }
}

async fn checked(
    Extension(restriction): Extension<Restriction>,
    Json(task): Json<CheckTask>,
) -> Result<Json<CheckReport>, ApiError> {
    let allowed = match restriction.only {
        None => true,
        Some(Only::Staging) => task.part == CheckPart::Staging,
        Some(Only::Target) => task.part == CheckPart::Target,
        Some(Only::Server) => false,
    };
    if !allowed {
        return Err(ApiError::broken("this connection may not be used for that"));
    }
    within(&restriction, &task.request.target)?;
    site::check_here(&task).await.map(Json)
}

async fn missing(
    Extension(restriction): Extension<Restriction>,
    Json(path): Json<PathBuf>,
) -> Result<Json<Vec<PathBuf>>, ApiError> {
    within(&restriction, &path)?;
    Ok(Json(check::missing_directories(&path)))
}

async fn find_in_target(
    Extension(restriction): Extension<Restriction>,
    Json(task): Json<TargetTask>,
) -> Result<Json<Vec<(String, String)>>, ApiError> {
    within(&restriction, &task.directory)?;
    Ok(Json(undo::find_in_target(&task)))
}

async fn undo_target(
    Extension(restriction): Extension<Restriction>,
    Json(task): Json<TargetTask>,
) -> Result<Json<TargetUndone>, ApiError> {
    within(&restriction, &task.directory)?;
    // Only directories on the way to the target were made for it.
    if task.made.iter().any(|made| !task.directory.starts_with(made)) {
        return Err(ApiError::broken("this connection may not be used for that directory"));
    }
    blocking(move || undo::undo_target(&task)).await
}

async fn sealed(
    Extension(restriction): Extension<Restriction>,
    Json((directory, session)): Json<(PathBuf, String)>,
) -> Result<Json<Option<u64>>, ApiError> {
    within(&restriction, &directory)?;
    Ok(Json(sealing::sealed_before(&directory, &session)))
}

async fn delivered(
    Extension(restriction): Extension<Restriction>,
    Json((directory, databases)): Json<(PathBuf, Vec<String>)>,
) -> Result<Json<Delivered>, ApiError> {
    within(&restriction, &directory)?;
    Ok(Json(Delivered::look(&directory, &databases)))
}

async fn checksums(
    Json((directory, files)): Json<(PathBuf, Vec<String>)>,
) -> Result<Json<Vec<Option<[u8; 32]>>>, ApiError> {
    mount_service::checksums(directory, files).await.map(Json)
}

async fn choose_place(Json(task): Json<PlaceTask>) -> Result<Json<Place>, ApiError> {
    Ok(Json(place::choose_place(&task.session, &task.request, task.marker)?))
}

async fn start_agent(Json(assignment): Json<Assignment>) -> Result<Json<()>, ApiError> {
    // What the agent says before its directories are there lies in memory and ends with it.
    let log = rustix::fs::memfd_create(c"agent.log", rustix::fs::MemfdFlags::CLOEXEC);
    let log = log.map_err(|err| ApiError::broken(format!("make a log in memory: {err}")))?;
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&log));
    AgentLink::start(&assignment, Path::new(&path)).await?;
    Ok(Json(()))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<Json<T>, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map(Json).map_err(|err| ApiError::broken(format!("the work ended early: {err}")))
}

/// What names no socket is for the server of this machine.
async fn pass_on_or_ask(request: Request) -> Response {
    match request.headers().contains_key(SOCKET_HEADER) {
        true => pass_on(request).await,
        false => ask_server(request).await,
    }
}

/// Passes a request on to the server of this machine.
async fn ask_server(request: Request) -> Response {
    match server_socket().await {
        Ok(socket) => pass_on_to(&socket, request).await,
        Err(err) => err.into_response(),
    }
}

/// The socket of this machine's server: a team's, else this account's own, which is started where none runs.
pub async fn server_socket() -> Result<PathBuf, ApiError> {
    let configured = Configuration::read(None)?.service.socket;
    let team = configured.unwrap_or_else(|| server::TEAM_SOCKET.into());
    if team.exists() {
        return Ok(team);
    }
    Client::connect(None, Carry::IfMissing).await?;
    Ok(state_directory().join(server::SOCKET))
}

/// Passes a request on to the socket that it names, and the answer back.
async fn pass_on(request: Request) -> Response {
    match own_socket(request.headers()) {
        Some(socket) => pass_on_to(&socket, request).await,
        None => (StatusCode::NOT_FOUND, "there is no such call here").into_response(),
    }
}

async fn pass_on_to(socket: &Path, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let bytes = match body.collect().await {
        Ok(body) => body.to_bytes(),
        Err(err) => return (StatusCode::BAD_REQUEST, err.to_string()).into_response(),
    };
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
    let mut onwards = hyper::Request::builder().method(head.method).uri(path);
    if let Some(kind) = head.headers.get(hyper::header::CONTENT_TYPE) {
        onwards = onwards.header(hyper::header::CONTENT_TYPE, kind);
    }
    let Ok(onwards) = onwards.body(Full::new(bytes)) else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    match http::send_to_socket(socket, onwards).await {
        Ok(answer) => {
            let (head, body) = answer.into_parts();
            let mut response = Response::new(Body::new(body));
            *response.status_mut() = head.status;
            if let Some(kind) = head.headers.get(hyper::header::CONTENT_TYPE) {
                response.headers_mut().insert(hyper::header::CONTENT_TYPE, kind.clone());
            }
            response
        }
        Err(err) => {
            let mut response = (StatusCode::BAD_GATEWAY, err.to_string()).into_response();
            if matches!(err, ClientError::NotListening(_)) {
                let name = HeaderName::from_static(NOT_LISTENING_HEADER);
                response.headers_mut().insert(name, HeaderValue::from_static("1"));
            }
            response
        }
    }
}

/// The socket that a request names: one of this account's, or one that is not there.
fn own_socket(headers: &HeaderMap) -> Option<PathBuf> {
    let named = headers.get(SOCKET_HEADER)?.to_str().ok()?;
    let path = PathBuf::from(std::ffi::OsString::from_vec(percent_decode_str(named).collect()));
    match std::fs::symlink_metadata(&path) {
        Err(_) => Some(path), // whoever asks is told that nothing listens there
        Ok(meta) => {
            let own = meta.uid() == rustix::process::geteuid().as_raw();
            (own && meta.file_type().is_socket()).then_some(path)
        }
    }
}
