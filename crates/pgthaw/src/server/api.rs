//! The server's HTTP/JSON API on its Unix sockets. Who asks for what is looked at here, before anything is done.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::extract::{ConnectInfo, Path, Request, State};
use axum::http::{Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json};
use futures_util::Stream;
use pgthaw_session::{ExportRequest, RecoveryChoice, RepositoryChoice, SessionState, Status};

use super::audit::Audit;
use super::callers::{Caller, Callers, Peer, Rights};
use super::mount_service;
use super::recovery_service::{RecoveryService, Seen, no_such};
use crate::admission::Turns;
use crate::configuration::{Configuration, resolve_name};
use crate::delivered::Delivered;
use crate::http::body_in_time;
use crate::rules::{self, Asked};
use crate::wire::{
    ApiError, BackupsAnswer, CheckAnswer, CleanAnswer, CleanRequest, DatabasesAnswer,
    DatabasesRequest, LogLine, SessionCreated,
};

/// How an error begins to list the stanzas of a repository ([`pgthaw_source::error::SourceError`]).
const SEVERAL_STANZAS: &str = "holds several stanzas";

/// What starts processes that read a repository; everything else is answered at once.
const WORK: [&str; 4] = ["/v1/backups", "/v1/databases", "/v1/check", "/v1/sessions"];

/// Most sessions of a caller by rules that are at work at a time.
const SESSIONS_MOST: usize = 8;

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

/// One socket of the server.
#[derive(Debug, Clone)]
pub struct Door {
    /// Names of repositories and hosts, and rules.
    pub configuration: Arc<Configuration>,
    /// Tells who asks.
    pub callers: Arc<Callers>,
    /// Who may do something now, and who waits.
    pub turns: Arc<Turns>,
    /// Whether everybody can open it.
    pub team: bool,
}

type Who = Extension<Caller>;
type At = Extension<Door>;

/// All routes, for those who come through `door`.
pub fn router(service: Arc<RecoveryService>, activity: Arc<Activity>, door: Door) -> axum::Router {
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
        .layer(middleware::from_fn_with_state(door.clone(), identify))
        .layer(middleware::from_fn(body_in_time))
        .layer(middleware::from_fn_with_state(activity, count))
        .layer(Extension(door))
        .with_state(service)
}

/// Finds out who asks.
async fn identify(
    State(door): State<Door>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    mut request: Request,
    next: Next,
) -> Response {
    let account = peer.uid;
    let (callers, team) = (door.callers.clone(), door.team);
    let identified = tokio::task::spawn_blocking(move || callers.identify(&peer, team));
    match identified.await {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            let works = request.method() == Method::POST && WORK.contains(&request.uri().path());
            let _turn = if team && works { door.turns.wait(account).await } else { None };
            next.run(request).await
        }
        Err(err) => ApiError::broken(format!("find out who asks: {err}")).into_response(),
    }
}

/// What refuses the caller, as an error.
fn not_allowed(caller: &Caller, what: &str) -> ApiError {
    ApiError {
        message: format!("no rule of this server allows {} {what}", caller.account.user),
        hint: Some("[[allow]] in the server's configuration says who may ask for what".into()),
        usage: true,
    }
}

/// A request that the command line would not have made.
fn not_possible(why: &str) -> ApiError {
    ApiError { message: format!("the request is not possible: {why}"), hint: None, usage: true }
}

/// Finds the repository that was asked for, if the caller may look at it.
fn repository(
    caller: &Caller,
    door: &Door,
    choice: RepositoryChoice,
) -> Result<RepositoryChoice, ApiError> {
    choice.objection().map_or(Ok(()), |why| Err(not_possible(&why)))?;
    if let Some(rules) = caller.rules() {
        let Some(name) = &choice.name else {
            return Err(not_allowed(caller, "a repository by its path; name one"));
        };
        if !rules.iter().any(|rule| rule.allows_repository(name)) {
            return Err(not_allowed(caller, &format!("repository `{name}`")));
        }
        let known = door.configuration.repositories.get(name).and_then(|r| r.stanza.as_ref());
        if choice.stanza.is_some() && choice.stanza.as_ref() != known {
            return Err(not_allowed(caller, "another stanza than the one that is configured"));
        }
        let paths = choice.wal_archives.first().or(choice.backup_label.as_ref());
        let named = paths.is_some() || !choice.tablespaces.is_empty();
        if !choice.path.as_os_str().is_empty() || named || choice.kind.is_some() {
            return Err(not_allowed(
                caller,
                "files of the server's machine besides the repository",
            ));
        }
    }
    resolve_name(choice, &door.configuration)
}

/// What a caller by rules may know of an error about a repository: neither where it lies nor what else is in it.
fn discreet(caller: &Caller, door: &Door, asked: &RepositoryChoice, error: ApiError) -> ApiError {
    let known = asked.name.as_ref().and_then(|name| door.configuration.repositories.get(name));
    let (Some(_), Some(name), Some(known)) = (caller.rules(), &asked.name, known) else {
        return error;
    };
    let paths = known.path.iter().chain(&known.wal_archives);
    let hidden = |text: &str| {
        paths
            .clone()
            .fold(text.to_owned(), |text, path| text.replace(&*path.to_string_lossy(), name))
    };
    let mut message = hidden(&error.message);
    if let Some(at) = message.find(SEVERAL_STANZAS) {
        message.truncate(at + SEVERAL_STANZAS.len());
        message.push_str(", and this server's configuration names none of them");
    }
    ApiError { message, hint: error.hint.as_deref().map(hidden), ..error }
}

/// Finds what an export was asked for, if the caller may have it.
fn resolve(
    caller: &Caller,
    door: &Door,
    mut request: ExportRequest,
) -> Result<ExportRequest, ApiError> {
    request.objection().map_or(Ok(()), |why| Err(not_possible(&why)))?;
    request.requester = caller.team.then(|| caller.account.clone());
    request.as_asked = None;
    request.as_asked = caller.team.then(|| Box::new(request.clone()));
    request.repository = repository(caller, door, request.repository)?;
    allowed(caller, &request)?;
    if let Some(path) = &mut request.read_from_staging
        && path.as_os_str().is_empty()
    {
        path.clone_from(&request.repository.path); // the same path as here, which only the server knows
    }
    let hosts = &door.configuration.hosts;
    if let Some(known) = request.staging.as_ref().and_then(|name| hosts.get(name)) {
        request.staging = Some(known.ssh.to_string());
    }
    if let Some(known) = request.target_host.as_ref().and_then(|name| hosts.get(name)) {
        request.target_host = Some(known.ssh.to_string());
        if let Some(directory) = &known.directory {
            request.target = directory.join(&request.target);
            if caller.rules().is_some() && !request.target.starts_with(directory) {
                let what = format!("a target outside `{}`", directory.display());
                return Err(not_allowed(caller, &what));
            }
        }
    }
    Ok(request)
}

/// A caller by rules has so many sessions at work, and no more.
fn may_begin(service: &RecoveryService, caller: &Caller) -> Result<(), ApiError> {
    if caller.rules().is_none() {
        return Ok(());
    }
    let active = service.list().into_iter().filter(|status| status.state.is_active());
    let own = active.filter(|status| own(service, caller, &status.id).is_ok()).count();
    if own < SESSIONS_MOST {
        return Ok(());
    }
    Err(ApiError {
        message: format!(
            "{} already has {own} running sessions, the limit for one account",
            caller.account.user
        ),
        hint: Some("wait until one of them ends, or cancel one".into()),
        usage: false,
    })
}

/// A caller by rules replaces his own exports only.
fn keep_to_own(
    service: &RecoveryService,
    caller: &Caller,
    mut request: ExportRequest,
) -> ExportRequest {
    request.replaces_only = None;
    if request.replace && request.target_caller.is_none() && caller.rules().is_some() {
        let sessions = service.list().into_iter().map(|status| status.id);
        let own = sessions.filter(|id| own(service, caller, id).is_ok());
        request.replaces_only = Some(own.collect());
    }
    request
}

/// Whether the caller's rules allow a request, by its names.
fn allowed(caller: &Caller, asked: &ExportRequest) -> Result<(), ApiError> {
    let Some(rules) = caller.rules() else { return Ok(()) };
    let repository = asked.repository.name.as_deref().unwrap_or_default();
    match rules::refusal(rules, &Asked { repository, request: asked }) {
        Some(what) => Err(not_allowed(caller, &what)),
        None => Ok(()),
    }
}

/// The caller's own session.
fn own(service: &RecoveryService, caller: &Caller, id: &str) -> Result<(), ApiError> {
    match caller.rights {
        Rights::Everything => Ok(()),
        Rights::Rules(_) => match service.requester(id) {
            Ok(requester) if caller.owns(requester.as_ref()) => Ok(()),
            _ => Err(no_such(id)), // whether there is one is nobody else's business
        },
    }
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
    State(service): Service,
    Extension(caller): Who,
    Extension(door): At,
    Json(choice): Json<RepositoryChoice>,
) -> Result<Json<BackupsAnswer>, ApiError> {
    let asked = choice.to_string();
    let found = match repository(&caller, &door, choice.clone()) {
        Ok(found) => mount_service::backups(found).await,
        Err(error) => Err(error),
    };
    let found = found.map_err(|error| discreet(&caller, &door, &choice, error));
    looked(&service, &caller, "backups", (&asked, None), &found);
    found.map(Json)
}

async fn databases(
    State(service): Service,
    Extension(caller): Who,
    Extension(door): At,
    Json(request): Json<DatabasesRequest>,
) -> Result<Json<DatabasesAnswer>, ApiError> {
    let asked = (request.repository.to_string(), request.backup.clone());
    let choice = request.repository.clone();
    let found = databases_of(&caller, &door, request).await;
    let found = found.map_err(|error| discreet(&caller, &door, &choice, error));
    looked(&service, &caller, "databases", (&asked.0, asked.1.as_deref()), &found);
    found.map(Json)
}

/// The databases of a backup that the caller may know of.
async fn databases_of(
    caller: &Caller,
    door: &Door,
    request: DatabasesRequest,
) -> Result<DatabasesAnswer, ApiError> {
    let choice = repository(caller, door, request.repository)?;
    let name = choice.name.clone().unwrap_or_default();
    let facts = mount_service::facts(choice, request.backup, RecoveryChoice::EndOfBackup).await?;
    let mut databases = facts.databases;
    if let Some(rules) = caller.rules() {
        let rules = rules.iter().filter(|rule| rule.allows_repository(&name));
        let rules: Vec<_> = rules.collect();
        databases.retain(|database| rules.iter().any(|r| r.allows_database(&database.name)));
    }
    Ok(DatabasesAnswer { backup: facts.backup, databases })
}

async fn check(
    State(service): Service,
    Extension(caller): Who,
    Extension(door): At,
    Json(asked): Json<ExportRequest>,
) -> Result<Json<CheckAnswer>, ApiError> {
    let checked = match resolve(&caller, &door, asked.clone()) {
        Ok(request) => service.check(keep_to_own(&service, &caller, request)).await,
        Err(error) => Err(error),
    };
    let checked = checked.map_err(|error| discreet(&caller, &door, &asked.repository, error));
    let result = checked.as_ref().map(|_| None).map_err(|err| &*err.message);
    was_asked(&service, &caller, "check", &asked, result);
    checked.map(Json)
}

async fn create(
    State(service): Service,
    Extension(caller): Who,
    Extension(door): At,
    Json(asked): Json<ExportRequest>,
) -> Result<Json<SessionCreated>, ApiError> {
    let begun = may_begin(&service, &caller).and_then(|()| resolve(&caller, &door, asked.clone()));
    let created = match begun {
        Ok(request) => service.clone().create(keep_to_own(&service, &caller, request)).await,
        Err(error) => Err(error),
    };
    let created = created.map_err(|error| discreet(&caller, &door, &asked.repository, error));
    let result = created.as_ref().map(|id| Some(&**id)).map_err(|err| &*err.message);
    was_asked(&service, &caller, "export", &asked, result);
    created.map(|id| Json(SessionCreated { id }))
}

async fn list(State(service): Service, Extension(caller): Who) -> Json<Vec<Status>> {
    let mut sessions = service.list();
    sessions.retain(|status| own(&service, &caller, &status.id).is_ok());
    Json(sessions)
}

async fn interrupted(State(service): Service, Extension(caller): Who) -> Json<Vec<Status>> {
    let Json(mut sessions) = list(State(service), Extension(caller)).await;
    sessions.retain(|status| status.state == SessionState::Failed);
    Json(sessions)
}

async fn look(
    State(service): Service,
    Extension(caller): Who,
    Path(id): Path<String>,
) -> Result<Json<Status>, ApiError> {
    own(&service, &caller, &id)?;
    service.look(&id).map(|seen| Json(seen.status))
}

async fn log(
    State(service): Service,
    Extension(caller): Who,
    Path(id): Path<String>,
) -> Result<Json<Vec<LogLine>>, ApiError> {
    own(&service, &caller, &id)?;
    service.look(&id).map(|seen| Json(seen.log.to_vec()))
}

async fn delivered(
    State(service): Service,
    Extension(caller): Who,
    Path(id): Path<String>,
) -> Result<Json<Delivered>, ApiError> {
    own(&service, &caller, &id)?;
    service.delivered(&id).await.map(Json)
}

/// The audit trail, for who comes through a team's socket.
fn trail<'a>(service: &'a RecoveryService, caller: &Caller) -> Option<&'a Audit> {
    service.audit().filter(|_| caller.team)
}

/// Writes down that somebody has looked at a repository.
fn looked<T>(
    service: &RecoveryService,
    caller: &Caller,
    action: &str,
    at: (&str, Option<&str>),
    found: &Result<T, ApiError>,
) {
    if let Some(trail) = trail(service, caller) {
        let result = found.as_ref().map(drop).map_err(|err| &*err.message);
        trail.looked(&caller.account, action, at, result);
    }
}

/// Writes down that somebody has asked for an export, or whether he could have it.
fn was_asked(
    service: &RecoveryService,
    caller: &Caller,
    action: &str,
    asked: &ExportRequest,
    result: Result<Option<&str>, &str>,
) {
    if let Some(trail) = trail(service, caller) {
        let repository = asked.repository.to_string();
        let asked = Asked { repository: &repository, request: asked };
        trail.asked(&caller.account, action, &asked, result);
    }
}

/// Writes down that somebody steers a session.
fn audited(
    service: &RecoveryService,
    caller: &Caller,
    action: &str,
    status: &Status,
    refused: Option<&str>,
) {
    if let Some(trail) = trail(service, caller) {
        trail.session(&caller.account, action, status, refused);
    }
}

async fn bundle(
    State(service): Service,
    Extension(caller): Who,
    Path(id): Path<String>,
) -> Result<Json<serde_json::Value>, ApiError> {
    own(&service, &caller, &id)?;
    service.bundle(&id).map(Json)
}

async fn retry(
    State(service): Service,
    Extension(caller): Who,
    Extension(door): At,
    Path(id): Path<String>,
) -> Result<Json<Status>, ApiError> {
    own(&service, &caller, &id)?;
    // Rules, groups and repositories may have changed since.
    let asked = service.request(&id)?.as_asked.filter(|_| caller.rules().is_some());
    let still = asked.map_or(Ok(()), |asked| resolve(&caller, &door, *asked).map(drop));
    if let Err(error) = still {
        let seen = service.look(&id)?;
        audited(&service, &caller, "retry", &seen.status, Some(&error.message));
        return Err(error);
    }
    let status = service.clone().retry(&id)?;
    audited(&service, &caller, "retry", &status, None);
    Ok(Json(status))
}

async fn cancel(
    State(service): Service,
    Extension(caller): Who,
    Path(id): Path<String>,
) -> Result<Json<Status>, ApiError> {
    own(&service, &caller, &id)?;
    let status = service.clone().cancel(&id)?;
    audited(&service, &caller, "cancel", &status, None);
    Ok(Json(status))
}

async fn stop(
    State(service): Service,
    Extension(caller): Who,
    Path(id): Path<String>,
) -> Result<Json<Status>, ApiError> {
    own(&service, &caller, &id)?;
    let status = service.stop(&id)?;
    audited(&service, &caller, "stop", &status, None);
    Ok(Json(status))
}

async fn clean(
    State(service): Service,
    Extension(caller): Who,
    Json(request): Json<CleanRequest>,
) -> Json<CleanAnswer> {
    let is_asked_for = |asked: &ExportRequest| {
        let host = request.host.as_ref();
        let hosts = [asked.staging.as_ref(), asked.target_machine()];
        caller.owns(asked.requester.as_ref()) && (host.is_none() || hosts.contains(&host))
    };
    Json(service.clean(request.dry_run, caller.rules().is_none(), is_asked_for).await)
}

/// Every change of a session until it is no longer at work: `log` events from the beginning, `status` events from now.
async fn events(
    State(service): Service,
    Extension(caller): Who,
    Path(id): Path<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>> + use<>>, ApiError> {
    own(&service, &caller, &id)?;
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

#[cfg(test)]
mod tests {
    use pgthaw_session::request::Requester;

    use super::*;

    const CONFIGURATION: &str = "
[repositories.prod]
path = '/backups'
stanza = 'main'

[hosts.files]
ssh = 'ops@files'
directory = '/srv/exports'

[[allow]]
user = 'ann'
repositories = ['prod']
databases = ['crm']
staging = ['mount-server']
targets = ['files:*']
";

    /// Ann, kept to her rule or allowed everything, at the team's socket.
    fn ann(by_rules: bool) -> (Caller, Door) {
        let configuration: Arc<Configuration> = Arc::new(toml::from_str(CONFIGURATION).unwrap());
        let rights = match by_rules {
            true => Rights::Rules(configuration.allow.clone()),
            false => Rights::Everything,
        };
        let account = Requester { user: "ann".into(), uid: 7 };
        let caller = Caller { account, rights, team: true };
        let callers = Arc::new(Callers::new(configuration.clone()));
        (caller, Door { configuration, callers, turns: Arc::default(), team: true })
    }

    /// What becomes of ann's request.
    fn resolved(
        by_rules: bool,
        change: impl FnOnce(&mut ExportRequest),
    ) -> Result<ExportRequest, String> {
        let (caller, door) = ann(by_rules);
        let mut request: ExportRequest = serde_json::from_value(serde_json::json!({
            "repository": { "name": "prod", "path": "" }, "databases": ["crm"],
            "target_host": "files", "target": "monday",
            "jobs": 1, "globals": true, "role_passwords": false,
            "requester": { "user": "root", "uid": 0 },
        }))
        .unwrap();
        change(&mut request);
        resolve(&caller, &door, request).map_err(|err| err.message)
    }

    #[test]
    fn names_become_paths_and_hosts() {
        let got = resolved(true, |_| {}).unwrap();
        assert_eq!(got.repository.path.to_str(), Some("/backups"));
        assert_eq!(got.repository.stanza.as_deref(), Some("main"));
        assert_eq!(got.target_host.as_deref(), Some("ops@files"));
        assert_eq!(got.target.to_str(), Some("/srv/exports/monday"));
        assert_eq!(got.requester.unwrap().uid, 7, "whatever the request says");
        // What rules are about is kept, to be asked for again.
        let asked = got.as_asked.unwrap();
        let again = resolved(true, |request| *request = *asked).unwrap();
        assert_eq!(again.target, got.target);
    }

    #[test]
    fn errors_do_not_tell_where_a_repository_lies_and_what_else_is_in_it() {
        let choice: RepositoryChoice =
            serde_json::from_str(r#"{ "name": "prod", "path": "" }"#).unwrap();
        let error = || ApiError {
            message: "repository `/backups` holds several stanzas: main, payroll".into(),
            hint: Some("name one of /backups".into()),
            usage: false,
        };
        let told = |by_rules| {
            let (caller, door) = ann(by_rules);
            discreet(&caller, &door, &choice, error())
        };
        assert_eq!(told(false), error());
        let told = told(true);
        assert_eq!(
            told.message,
            "repository `prod` holds several stanzas, and this server's configuration names none of them"
        );
        assert_eq!(told.hint.as_deref(), Some("name one of prod"));
    }

    #[test]
    fn what_the_command_line_refuses_is_refused_here_too() {
        for by_rules in [true, false] {
            let refused = resolved(by_rules, |r| r.stall_timeout = u64::MAX).unwrap_err();
            assert!(refused.contains("stall_timeout is not from 1 to"), "{refused}");
        }
    }

    #[test]
    fn names_cannot_be_left() {
        type Change = fn(&mut ExportRequest);
        let cases: [(&str, Change); 5] = [
            ("another stanza", |r| r.repository.stanza = Some("other".into())),
            ("files of the server's machine", |r| r.repository.path = "/etc".into()),
            ("files of the server's machine", |r| r.repository.wal_archives.push("/etc".into())),
            ("outside `/srv/exports`", |r| r.target = "/etc".into()),
            ("by its path", |r| r.repository.name = None),
        ];
        for (want, change) in cases {
            let refused = resolved(true, change).unwrap_err();
            assert!(refused.contains(want), "{want}: {refused}");
            assert!(resolved(false, change).is_ok(), "{want}");
        }
    }
}
