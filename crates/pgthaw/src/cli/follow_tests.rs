//! Following a session of a server that plays a script.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Json;
use axum::body::{Body, Bytes};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::{get, post};
use pgthaw_session::SessionState;
use serde::Serialize;

use super::*;
use crate::cli::samples;
use crate::http;

/// What the server sends on one connection, and whether it breaks the connection off afterwards.
type Script = (Vec<String>, bool);

struct Server {
    client: Client,
    /// How often the session was asked to stop.
    stops: Arc<AtomicUsize>,
    _directory: tempfile::TempDir,
}

/// Starts a server whose `n`th stream of events is the `n`th script; streams stay open after the last one.
fn start(scripts: Vec<Script>) -> Server {
    let directory = tempfile::tempdir().unwrap();
    let state: PathBuf = directory.path().into();
    let listener = http::bind(&state.join("server.sock")).unwrap();
    let scripts = Arc::new(Mutex::new(scripts.into_iter()));
    let stops = Arc::new(AtomicUsize::new(0));
    let events = move || {
        let script = scripts.lock().unwrap().next();
        async move {
            let Some((events, breaks)) = script else { std::future::pending().await };
            let parts = events.into_iter().map(|event| Ok(Bytes::from(event)));
            let end = breaks.then(|| Err(std::io::Error::other("broken off")));
            Body::from_stream(futures_util::stream::iter(parts.chain(end)))
        }
    };
    let counted = stops.clone();
    let stop = move || {
        let count = counted.fetch_add(1, Ordering::SeqCst);
        async move {
            let error = ApiError { message: "it cannot".into(), hint: None, usage: false };
            match count {
                0 => (StatusCode::INTERNAL_SERVER_ERROR, Json(error)).into_response(),
                _ => Json(samples::status()).into_response(),
            }
        }
    };
    let version = serde_json::json!({ "version": env!("CARGO_PKG_VERSION") });
    let router = axum::Router::new()
        .route("/v1/version", get(async move || Json(version)))
        .route("/v1/sessions/{id}/events", get(events))
        .route("/v1/sessions/{id}/stop", post(stop));
    tokio::spawn(http::serve(
        listener,
        router,
        crate::admission::Admission::of_connections(),
        std::future::pending(),
    ));
    Server { client: Client::at(state), stops, _directory: directory }
}

fn event(name: &str, data: &impl Serialize) -> String {
    format!("event: {name}\ndata: {}\n\n", serde_json::to_string(data).unwrap())
}

fn log(text: &str) -> String {
    event("log", &LogLine { at: "2026-11-22T10:11:12Z".parse().unwrap(), text: text.into() })
}

fn status(state: SessionState) -> String {
    event("status", &Status { state, ..samples::status() })
}

async fn log_of(server: &Server) -> Result<Vec<String>, ApiError> {
    let mut lines = Vec::new();
    follow_log(&server.client, "ID", |line| {
        lines.push(line.text);
        Ok(())
    })
    .await
    .map(|()| lines)
}

#[tokio::test]
async fn every_line_is_told_once_whatever_becomes_of_connections() {
    let server = start(vec![
        (vec![log("a"), status(SessionState::Running), log("b")], true),
        (vec![log("a")], true),
        (vec![log("a"), log("b"), status(SessionState::Running)], false), // the server ended in order
        (vec![log("a"), log("b"), log("c"), status(SessionState::Succeeded)], false),
    ]);
    assert_eq!(log_of(&server).await.unwrap(), ["a", "b", "c"]);
}

#[tokio::test]
async fn a_server_that_always_breaks_off_is_given_up() {
    tokio::time::timeout(Duration::from_secs(60), async {
        let script = (vec![log("a"), status(SessionState::Running)], true);
        let error = log_of(&start(vec![script; 20])).await.unwrap_err();
        assert!(error.message.contains("cannot be followed"), "{}", error.message);
        assert!(error.hint.unwrap().contains("pgthaw attach ID"));
    })
    .await
    .expect("it tries for ever");
}

#[tokio::test]
async fn the_end_is_the_last_status() {
    let server = start(vec![(
        vec![log("a"), status(SessionState::Running), status(SessionState::Failed)],
        false,
    )]);
    let mut interrupts = Interrupts::notice().unwrap();
    match follow(&server.client, "ID", 1, OnInterrupt::Stop, &mut interrupts).await.unwrap() {
        Ending::Ended { status, stopped } => {
            assert_eq!((status.state, stopped), (SessionState::Failed, false));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_termination_leaves_at_once() {
    let server = start(vec![]);
    let mut interrupts = Interrupts::notice().unwrap();
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM)
        .unwrap();
    let ending = follow(&server.client, "ID", 0, OnInterrupt::Stop, &mut interrupts).await.unwrap();
    let left = matches!(ending, Ending::Left { stopped: false, by: Noticed::Terminate });
    assert!(left, "{ending:?}");
    assert_eq!(server.stops.load(Ordering::SeqCst), 0, "the session goes on");
}

/// One test for all that Ctrl-C does: a signal reaches every follower in this process.
#[tokio::test]
async fn the_first_interrupt_stops_and_the_second_leaves() {
    let interrupt = || {
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::INT)
            .unwrap()
    };

    // Leaving at once.
    let server = start(vec![]);
    let mut interrupts = Interrupts::notice().unwrap();
    interrupt();
    let ending =
        follow(&server.client, "ID", 0, OnInterrupt::Leave, &mut interrupts).await.unwrap();
    assert!(
        matches!(ending, Ending::Left { stopped: false, by: Noticed::Interrupt }),
        "{ending:?}"
    );
    assert_eq!(server.stops.load(Ordering::SeqCst), 0);

    // A stop that is refused may be asked for again; then leaving.
    let server = start(vec![]);
    let stops = server.stops.clone();
    let signals = async {
        for wanted in [1, 2] {
            interrupt();
            while stops.load(Ordering::SeqCst) < wanted {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            tokio::time::sleep(Duration::from_millis(300)).await; // until the refusal is heard
        }
        interrupt();
    };
    let mut interrupts = Interrupts::notice().unwrap();
    let following = follow(&server.client, "ID", 0, OnInterrupt::Stop, &mut interrupts);
    let (ending, ()) = tokio::join!(following, signals);
    assert!(matches!(ending.unwrap(), Ending::Left { stopped: true, by: Noticed::Interrupt }));
    assert_eq!(server.stops.load(Ordering::SeqCst), 2);
}
