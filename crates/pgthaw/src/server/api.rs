//! The server's HTTP/JSON API on its Unix socket. Who may open the socket may do everything: it lies in a 0700 directory.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::Stream;
use pgthaw_session::{ExportRequest, RecoveryChoice, RepositoryChoice, SessionState, Status};

use super::mount_service;
use super::recovery_service::{RecoveryService, Seen};
use crate::delivered::Delivered;
use crate::wire::{
    ApiError, BackupsAnswer, CheckAnswer, CleanAnswer, CleanRequest, DatabasesAnswer,
    DatabasesRequest, LogLine, SessionCreated,
};

type Service = State<Arc<RecoveryService>>;

/// Counts requests, so that a server knows when it has nothing to do.
#[derive(Debug, Default)]
pub struct Activity {
    open: AtomicUsize,
    since_last_look: AtomicUsize,
}

impl Activity {
    /// Whether a request is being answered, or was since the last call.
    pub fn busy(&self) -> bool {
        self.since_last_look.swap(0, Ordering::Relaxed) > 0 || self.open.load(Ordering::Relaxed) > 0
    }
}

/// Counts a request as open until its body has been sent.
struct Open(Arc<Activity>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status =
            if self.usage { StatusCode::BAD_REQUEST } else { StatusCode::INTERNAL_SERVER_ERROR };
        (status, Json(self)).into_response()
    }
}

/// All routes.
pub fn router(service: Arc<RecoveryService>, activity: Arc<Activity>) -> axum::Router {
    axum::Router::new()
        .route(
            "/v1/version",
            get(async || Json(serde_json::json!({ "version": env!("CARGO_PKG_VERSION") }))),
        )
        .route("/v1/backups", post(backups))
        .route("/v1/databases", post(databases))
        .route("/v1/check", post(check))
        .route("/v1/sessions", get(list).post(create))
        .route("/v1/interrupted", get(interrupted))
        .route("/v1/sessions/{id}", get(look))
        .route("/v1/sessions/{id}/log", get(log))
        .route("/v1/sessions/{id}/events", get(events))
        .route("/v1/sessions/{id}/delivered", get(delivered))
        .route("/v1/sessions/{id}/bundle", get(bundle))
        .route("/v1/sessions/{id}/retry", post(retry))
        .route("/v1/sessions/{id}/cancel", post(cancel))
        .route("/v1/sessions/{id}/stop", post(stop))
        .route("/v1/clean", post(clean))
        .layer(middleware::from_fn_with_state(activity, count))
        .with_state(service)
}

async fn count(State(activity): State<Arc<Activity>>, request: Request, next: Next) -> Response {
    activity.open.fetch_add(1, Ordering::Relaxed);
    activity.since_last_look.fetch_add(1, Ordering::Relaxed);
    let open = Open(activity);
    let response = next.run(request).await;
    drop(open);
    response
}

async fn backups(
    Json(repository): Json<RepositoryChoice>,
) -> Result<Json<BackupsAnswer>, ApiError> {
    mount_service::backups(repository).await.map(Json)
}

async fn databases(
    Json(request): Json<DatabasesRequest>,
) -> Result<Json<DatabasesAnswer>, ApiError> {
    let facts =
        mount_service::facts(request.repository, request.backup, RecoveryChoice::EndOfBackup)
            .await?;
    Ok(Json(DatabasesAnswer { backup: facts.backup, databases: facts.databases }))
}

async fn check(
    State(service): Service,
    Json(request): Json<ExportRequest>,
) -> Result<Json<CheckAnswer>, ApiError> {
    service.check(request).await.map(Json)
}

async fn create(
    State(service): Service,
    Json(request): Json<ExportRequest>,
) -> Result<Json<SessionCreated>, ApiError> {
    service.create(request).await.map(|id| Json(SessionCreated { id }))
}

async fn list(State(service): Service) -> Json<Vec<Status>> {
    Json(service.list())
}

async fn interrupted(State(service): Service) -> Json<Vec<Status>> {
    Json(service.list().into_iter().filter(|status| status.state == SessionState::Failed).collect())
}

async fn look(State(service): Service, Path(id): Path<String>) -> Result<Json<Status>, ApiError> {
    service.look(&id).map(|seen| Json(seen.status))
}

async fn log(
    State(service): Service,
    Path(id): Path<String>,
) -> Result<Json<Vec<LogLine>>, ApiError> {
    service.look(&id).map(|seen| Json(seen.log.to_vec()))
}

async fn delivered(
    State(service): Service,
    Path(id): Path<String>,
) -> Result<Json<Delivered>, ApiError> {
    service.delivered(&id).await.map(Json)
}

async fn bundle(
    State(service): Service,
    Path(id): Path<String>,
) -> Result<Json<serde_json::Value>, ApiError> {
    service.bundle(&id).map(Json)
}

async fn retry(State(service): Service, Path(id): Path<String>) -> Result<Json<Status>, ApiError> {
    service.retry(&id).map(Json)
}

async fn cancel(State(service): Service, Path(id): Path<String>) -> Result<Json<Status>, ApiError> {
    service.cancel(&id).map(Json)
}

async fn stop(State(service): Service, Path(id): Path<String>) -> Result<Json<Status>, ApiError> {
    service.stop(&id).map(Json)
}

async fn clean(State(service): Service, Json(request): Json<CleanRequest>) -> Json<CleanAnswer> {
    Json(service.clean(request.dry_run).await)
}

/// Every change of a session until it is no longer at work: `log` events from the beginning, `status` events from now.
async fn events(
    State(service): Service,
    Path(id): Path<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, ApiError> {
    let seen = service.watch(&id)?;
    let follow = Follow { seen, told: 0, first: true, ready: Vec::new(), ended: false };
    Ok(Sse::new(futures_util::stream::unfold(follow, next_event)))
}

struct Follow {
    seen: tokio::sync::watch::Receiver<Seen>,
    /// How many log lines were told.
    told: usize,
    first: bool,
    /// Events to send before looking again, last first.
    ready: Vec<Event>,
    ended: bool,
}

async fn next_event(mut follow: Follow) -> Option<(Result<Event, Infallible>, Follow)> {
    while follow.ready.is_empty() {
        if follow.ended {
            return None;
        }
        if !follow.first && follow.seen.changed().await.is_err() {
            follow.ended = true; // nobody works on it any more: what was seen last was its end
        }
        follow.first = false;
        let seen = follow.seen.borrow_and_update().clone();
        follow.ended |= !seen.status.state.is_active();
        let lines = seen
            .log
            .iter()
            .skip(follow.told)
            .map(|line| Event::default().event("log").json_data(line));
        let status = Event::default().event("status").json_data(&seen.status);
        follow.ready = lines.chain([status]).filter_map(Result::ok).collect();
        follow.ready.reverse();
        follow.told = seen.log.len();
    }
    let event = follow.ready.pop()?;
    Some((Ok(event), follow))
}
