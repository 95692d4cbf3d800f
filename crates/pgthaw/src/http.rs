//! HTTP with JSON bodies, over a Unix socket of this machine or a line to another: the client and the server half.
//!
//! Owns connecting, binding and the shape of an answer (JSON, or an [`ApiError`] with a status outside 2xx); leaves what
//! is asked and answered to the callers. On this machine one connection serves one request: nothing is pooled, so nothing
//! outlives a call. Another machine's `pgthaw attach` passes on what is meant for one of its sockets ([`SOCKET_HEADER`]).

use std::ffi::OsStr;
use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::ConnectInfo;
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::IntoResponse;
use axum::{Extension, Router};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::HeaderValue;
use hyper::server::conn::http1 as http1_server;
use hyper::{Request, Response, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use pgthaw_link::LineError;
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::{UnixListener, UnixStream};

use crate::admission::Admission;
use crate::machine::Machine;
use crate::server::callers::Peer;
use crate::wire::ApiError;

/// How long connecting may take, the wait for a place in the listener's queue included.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Longest path a socket address holds: `sun_path` is 108 bytes with its final NUL (unix(7)).
const SOCKET_PATH_MAX: usize = 107;

/// Names the Unix socket of the other machine that a request is for, percent-encoded.
pub const SOCKET_HEADER: &str = "x-pgthaw-socket";
/// Marks the answer of the other machine's `pgthaw attach` that nothing listens on that socket.
pub const NOT_LISTENING_HEADER: &str = "x-pgthaw-not-listening";

/// How long the head of a request may take to arrive, from the connection or the request before on.
const HEAD_LIMIT: Duration = Duration::from_secs(10);
/// How long its body may take.
const BODY_LIMIT: Duration = Duration::from_secs(10);
/// The longest body of a request to a server, in bytes: tens of thousands of names of databases.
const BODY_MAX: usize = 2 << 20;
/// How long to wait before accepting again where that failed.
const ACCEPT_REST: Duration = Duration::from_millis(100);
/// How long another machine may take to answer a call that starts something, or asks for what is known.
const QUICK: Duration = Duration::from_secs(60);
/// How long it may take for what reads or removes files.
const LONG: Duration = Duration::from_secs(30 * 60);
/// The calls that do, by the end of their path.
const LONG_CALLS: [&str; 8] =
    ["/check", "/checksums", "/delivered", "/find", "/gone", "/map", "/undo", "/undo-target"];
/// The largest answer, in bytes: far more than the databases and files of a large cluster take.
const ANSWER_MAX: usize = 256 << 20;
/// The largest answer that tells of an error, in bytes.
const REFUSAL_MAX: usize = 64 << 10;
/// The largest event of a stream, in bytes.
const EVENT_MAX: usize = 64 << 20;

/// Where requests go.
#[derive(Debug, Clone)]
pub enum Address {
    /// A Unix socket of this machine.
    Socket(PathBuf),
    /// A Unix socket of another machine, or that machine's `pgthaw attach` itself.
    Far(Arc<Machine>, Option<PathBuf>),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(path) => write!(f, "`{}`", path.display()),
            Self::Far(machine, None) => write!(f, "{}", machine.name()),
            Self::Far(machine, Some(path)) => {
                write!(f, "`{}` on {}", path.display(), machine.name())
            }
        }
    }
}

impl From<&Self> for Address {
    fn from(address: &Self) -> Self {
        address.clone()
    }
}

impl From<&PathBuf> for Address {
    fn from(socket: &PathBuf) -> Self {
        Self::Socket(socket.clone())
    }
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens: the socket is not there, or nothing accepts behind it. Nothing was sent.
    #[error("nothing listens on {0}")]
    NotListening(String),
    /// There is no line to the other machine. Nothing was sent.
    #[error(transparent)]
    NoLine(#[from] LineError),
    /// The connection failed or broke, or the answer was no answer; whether the request had an effect is unknown.
    #[error("the connection to {address} broke: {reason}")]
    Broken {
        /// Where the request went.
        address: String,
        /// What failed.
        reason: String,
    },
    /// The server answered with an error.
    #[error("{}", .0.message)]
    Api(ApiError),
}

/// Sends one request and returns its decoded answer. A body is sent as JSON; an empty answer reads as `null`, so
/// that `T` may be `()`.
///
/// On this machine only connecting has a deadline (5 s): an answer may take as long as the work behind it. Another machine has to
/// answer within a time that the call cannot need, and its line is not used again where it does not: it may be a machine that answers
/// pings and nothing else, and other sessions share the line.
///
/// # Errors
/// [`ClientError`]; [`ClientError::Api`] for every status outside 2xx.
pub async fn request<T: DeserializeOwned>(
    address: impl Into<Address>,
    method: &str,
    path: &str,
    body: Option<impl Serialize>,
) -> Result<T, ClientError> {
    let address = &address.into();
    let bytes = match body {
        Some(body) => serde_json::to_vec(&body)
            .map_err(|err| broken(address, format!("the request is no JSON: {err}")))?,
        None => Vec::new(),
    };
    let answer = async {
        let response = send(address, method, path, "application/json", bytes).await?;
        decode(address, response).await
    };
    in_time(address, path, answer).await
}

/// Sends `bytes` as they are with `PUT` and returns the decoded answer. Beware of axum's limit for bodies on the other side.
///
/// # Errors
/// As [`request`].
pub async fn put_bytes<T: DeserializeOwned>(
    address: impl Into<Address>,
    path: &str,
    bytes: Vec<u8>,
) -> Result<T, ClientError> {
    let address = &address.into();
    let answer = async {
        let response = send(address, "PUT", path, "application/octet-stream", bytes).await?;
        decode(address, response).await
    };
    in_time(address, path, answer).await
}

/// Waits for the answer of another machine only as long as the call can take.
async fn in_time<T>(
    address: &Address,
    path: &str,
    answer: impl Future<Output = Result<T, ClientError>>,
) -> Result<T, ClientError> {
    let Address::Far(machine, _) = address else { return answer.await };
    let limit = if LONG_CALLS.iter().any(|call| path.ends_with(call)) { LONG } else { QUICK };
    match tokio::time::timeout(limit, answer).await {
        Ok(answer) => answer,
        Err(_) => {
            machine.leave_line();
            Err(broken(address, format!("no answer within {} s", limit.as_secs())))
        }
    }
}

/// Opens a stream of server-sent events.
///
/// # Errors
/// As [`request`].
pub async fn stream(address: impl Into<Address>, path: &str) -> Result<EventStream, ClientError> {
    let address = address.into();
    let response = send(&address, "GET", path, "application/json", Vec::new()).await?;
    if !response.status().is_success() {
        return Err(refusal(&address, response).await);
    }
    Ok(EventStream { address, body: response.into_body(), parser: EventParser::default() })
}

/// One server-sent event.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name; `message` where the server gave none, as the HTML standard says.
    pub name: String,
    /// Its data.
    pub data: serde_json::Value,
}

/// Server-sent events as they come in. Dropping it ends the connection.
#[derive(Debug)]
pub struct EventStream {
    address: Address,
    body: Incoming,
    parser: EventParser,
}

impl EventStream {
    /// Waits for the next event; `None` once the server has ended the stream in order. Can be cancelled without a loss.
    ///
    /// # Errors
    /// [`ClientError::Broken`] when the connection breaks off, or when an event's data is no JSON.
    pub async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            if let Some(raw) = self.parser.next_event() {
                let data = serde_json::from_str(&raw.data).map_err(|err| {
                    broken(&self.address, format!("an event `{}` is no JSON: {err}", raw.name))
                })?;
                return Ok(Some(Event { name: raw.name, data }));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(err)) => return Err(broken(&self.address, describe(&err))),
                Some(Ok(frame)) => {
                    if let Some(bytes) = frame.data_ref() {
                        if self.parser.size() + bytes.len() > EVENT_MAX {
                            let reason = format!("an event has more than {EVENT_MAX} bytes");
                            return Err(broken(&self.address, reason));
                        }
                        self.parser.feed(bytes);
                    }
                }
            }
        }
    }
}

/// An event whose data is not decoded yet.
#[derive(Debug, PartialEq, Eq)]
struct RawEvent {
    name: String,
    data: String,
}

/// Cuts bytes into events (HTML standard, "Server-sent events"): `field: value` lines, an empty line ends an event.
#[derive(Debug, Default)]
struct EventParser {
    /// Bytes of a line that has not ended yet, and of lines not looked at.
    pending: Vec<u8>,
    name: String,
    data: Vec<String>,
}

impl EventParser {
    fn feed(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    /// Bytes that are held of an event that has not ended yet.
    fn size(&self) -> usize {
        self.pending.len() + self.data.iter().map(String::len).sum::<usize>()
    }

    fn next_event(&mut self) -> Option<RawEvent> {
        while let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line[..end]);
            if let Some(event) = self.take_line(line.trim_end_matches('\r')) {
                return Some(event);
            }
        }
        None
    }

    fn take_line(&mut self, line: &str) -> Option<RawEvent> {
        if line.is_empty() {
            let name = std::mem::take(&mut self.name);
            let data = std::mem::take(&mut self.data);
            let name = if name.is_empty() { "message".into() } else { name };
            return (!data.is_empty()).then(|| RawEvent { name, data: data.join("\n") });
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => self.name = value.into(),
            "data" => self.data.push(value.into()),
            _ => {} // comments (keep-alive), `id` and `retry` mean nothing here
        }
        None
    }
}

/// Connects, sends one request and returns the answer's head; its body comes as it is read.
async fn send(
    address: &Address,
    method: &str,
    path: &str,
    content_type: &str,
    body: Vec<u8>,
) -> Result<Response<Incoming>, ClientError> {
    let host = if matches!(address, Address::Far(..)) { "http://pgthaw" } else { "" };
    let mut request = Request::builder()
        .method(method)
        .uri(format!("{host}{path}"))
        .header(header::CONTENT_TYPE, content_type);
    if let Address::Far(_, Some(socket)) = address {
        let socket = percent_encode(socket.as_os_str().as_bytes(), NON_ALPHANUMERIC);
        request = request.header(SOCKET_HEADER, socket.to_string());
    }
    let request = request
        .body(Full::new(Bytes::from(body)))
        .map_err(|err| broken(address, format!("no request can be made for `{path}`: {err}")))?;
    match address {
        Address::Socket(socket) => send_to_socket(socket, request).await,
        Address::Far(machine, _) => {
            let line = machine.line().await?;
            let answer = line.call(request).await;
            let answer = answer.map_err(|err| broken(address, describe(&err)))?;
            match answer.headers().contains_key(NOT_LISTENING_HEADER) {
                true => Err(ClientError::NotListening(address.to_string())),
                false => Ok(answer),
            }
        }
    }
}

/// Sends one request to a Unix socket of this machine and returns the answer's head.
///
/// # Errors
/// [`ClientError::NotListening`] or [`ClientError::Broken`].
pub async fn send_to_socket(
    socket: &Path,
    mut request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>, ClientError> {
    let address = &Address::Socket(socket.into());
    request.headers_mut().insert(header::HOST, HeaderValue::from_static("pgthaw"));
    let (mut sender, connection) = http1::handshake(TokioIo::new(connect(socket).await?))
        .await
        .map_err(|err| broken(address, describe(&err)))?;
    // The connection ends with the answer's last byte, or when sender and body are dropped.
    tokio::spawn(async move {
        let _ = connection.await; // the sender and the body report what goes wrong
    });
    sender.send_request(request).await.map_err(|err| broken(address, describe(&err)))
}

async fn decode<T: DeserializeOwned>(
    address: &Address,
    response: Response<Incoming>,
) -> Result<T, ClientError> {
    if !response.status().is_success() {
        return Err(refusal(address, response).await);
    }
    let body = collect(address, response, ANSWER_MAX).await?;
    let json: &[u8] = if body.is_empty() { b"null" } else { &body };
    serde_json::from_slice(json)
        .map_err(|err| broken(address, format!("the answer is not what was asked for: {err}")))
}

/// Reads a body of at most `most` bytes: who answers may be anybody.
async fn collect(
    address: &Address,
    response: Response<Incoming>,
    most: usize,
) -> Result<Bytes, ClientError> {
    let body = Limited::new(response.into_body(), most).collect().await;
    Ok(body.map_err(|err| broken(address, causes(&*err)))?.to_bytes())
}

/// Returns what an answer outside 2xx says.
async fn refusal(address: &Address, response: Response<Incoming>) -> ClientError {
    let status = response.status();
    let body = match collect(address, response, REFUSAL_MAX).await {
        Ok(body) => body,
        Err(error) => return error,
    };
    match serde_json::from_slice::<ApiError>(&body) {
        Ok(error) => ClientError::Api(error),
        Err(_) => {
            let text = String::from_utf8_lossy(&body);
            broken(
                address,
                format!("the server answered `{status}` {}", text.trim()).trim_end().into(),
            )
        }
    }
}

fn broken(address: &Address, reason: String) -> ClientError {
    ClientError::Broken { address: address.to_string(), reason }
}

/// Returns an error with its sources: hyper keeps the reason there.
fn describe(err: &hyper::Error) -> String {
    causes(err)
}

fn causes(err: &(dyn std::error::Error + 'static)) -> String {
    let mut text = err.to_string();
    let mut source = err.source();
    while let Some(err) = source {
        text = format!("{text}: {err}");
        source = err.source();
    }
    text
}

async fn connect(socket: &Path) -> Result<UnixStream, ClientError> {
    let attempt = async {
        let address = Reachable::new(socket)?;
        loop {
            match UnixStream::connect(&address.path).await {
                // A full queue answers EAGAIN on a socket that must not block.
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                result => return result,
            }
        }
    };
    match tokio::time::timeout(CONNECT_LIMIT, attempt).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(err)) if is_not_listening(&err) => {
            Err(ClientError::NotListening(format!("`{}`", socket.display())))
        }
        Ok(Err(err)) => Err(broken(&Address::Socket(socket.into()), format!("connect: {err}"))),
        Err(_) => Err(broken(
            &Address::Socket(socket.into()),
            format!("connect: no answer within {} s", CONNECT_LIMIT.as_secs()),
        )),
    }
}

fn is_not_listening(err: &io::Error) -> bool {
    matches!(err.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// A path of any length in a form that fits into a socket address, for as long as this lives.
struct Reachable {
    path: PathBuf,
    /// Keeps `/proc/self/fd/<number>` valid.
    _directory: Option<OwnedFd>,
}

impl Reachable {
    fn new(socket: &Path) -> io::Result<Self> {
        if socket.as_os_str().len() <= SOCKET_PATH_MAX {
            return Ok(Self { path: socket.into(), _directory: None });
        }
        let (Some(directory), Some(name)) = (socket.parent(), socket.file_name()) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the path of a socket"));
        };
        let directory = rustix::fs::open(
            directory,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Self { path: below_descriptor(&directory, name), _directory: Some(directory) })
    }
}

fn below_descriptor(directory: &OwnedFd, name: &OsStr) -> PathBuf {
    Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name)
}

/// Listens on `path`, which may be longer than a socket address holds, for this account alone: the socket has mode 0600 from the
/// start. A socket there that nothing listens on is removed; callers that may race for one path need a lock of their own.
/// Needs a tokio runtime.
///
/// # Errors
/// `AddrInUse` when something listens there already or the path is no socket; else what the system says.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    bind_with_mode(path, Mode::RUSR | Mode::WUSR)
}

/// As [`bind`], for everybody: whoever answers there has to look who asks.
///
/// # Errors
/// As [`bind`].
pub fn bind_for_everybody(path: &Path) -> io::Result<UnixListener> {
    bind_with_mode(path, Mode::from_raw_mode(0o666))
}

fn bind_with_mode(path: &Path, mode: Mode) -> io::Result<UnixListener> {
    let address = Reachable::new(path)?;
    let target = SocketAddrUnix::new(&address.path)?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    // Linux makes the file with the mode of the socket's own inode, so that no other user can connect in between.
    rustix::fs::fchmod(&socket, mode)?;
    match rustix::net::bind(&socket, &target) {
        Err(rustix::io::Errno::ADDRINUSE) => {
            remove_stale(&address.path)?;
            rustix::net::bind(&socket, &target)?;
        }
        result => result?,
    }
    if mode.contains(Mode::WOTH) {
        rustix::fs::chmod(&address.path, mode)?; // the umask has taken bits away
    }
    rustix::net::listen(&socket, BACKLOG)?;
    UnixListener::from_std(std::os::unix::net::UnixListener::from(socket))
}

/// Removes a socket that nothing listens on.
fn remove_stale(path: &Path) -> io::Result<()> {
    let in_use = |what: &str| Err(io::Error::new(io::ErrorKind::AddrInUse, what.to_owned()));
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return in_use("there is something there that is no socket");
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(err) if is_not_listening(&err) => std::fs::remove_file(path),
        _ => in_use("something listens there already"),
    }
}

/// Answers requests on `listener` until `shutdown` ends, then lets the requests at work end. Streams must end by
/// themselves then. An account that has its share of connections gets 503; one that says nothing, or says it too slowly, is hung up on.
pub async fn serve(
    listener: UnixListener,
    router: Router,
    admission: Arc<Admission>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) {
    let (ending, ends) = tokio::sync::watch::channel(false);
    let mut connections = tokio::task::JoinSet::new();
    tokio::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next() => continue, // let go of it
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(ACCEPT_REST).await; // no descriptor, which somebody has to give back first
            continue;
        };
        let peer = Peer::of(&stream);
        let Some(held) = admission.enter(peer.uid) else {
            turn_away(&stream);
            continue;
        };
        let router = router.clone().layer(Extension(ConnectInfo(peer)));
        let mut ends = ends.clone();
        connections.spawn(async move {
            let connection = http1_server::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_LIMIT)
                .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
            tokio::pin!(connection);
            tokio::select! {
                _ = &mut connection => {} // whoever asks is told what goes wrong
                () = async { _ = ends.wait_for(|ends| *ends).await } => {
                    connection.as_mut().graceful_shutdown();
                    let _ = connection.await;
                }
            }
            drop(held);
        });
    }
    drop(listener);
    let _ = ending.send(true);
    while connections.join_next().await.is_some() {}
}

/// Says to one more connection of an account that has its share of them that there is no place.
fn turn_away(stream: &UnixStream) {
    let error = ApiError {
        message: "this account has too many connections to the server".into(),
        hint: Some("end some of its commands, or try again".into()),
        usage: false,
    };
    let body = serde_json::to_string(&error).expect("plain data");
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    let _ = stream.try_write(answer.as_bytes()); // nobody waits for who does not listen
}

/// Reads a request's body before the request is worked on: at most [`BODY_MAX`] bytes, within [`BODY_LIMIT`].
pub async fn body_in_time(request: axum::extract::Request, next: Next) -> axum::response::Response {
    let (head, body) = request.into_parts();
    let read = tokio::time::timeout(BODY_LIMIT, axum::body::to_bytes(body, BODY_MAX)).await;
    match read {
        Ok(Ok(bytes)) => next.run(axum::extract::Request::from_parts(head, bytes.into())).await,
        Ok(Err(_)) => StatusCode::PAYLOAD_TOO_LARGE.into_response(),
        Err(_) => StatusCode::REQUEST_TIMEOUT.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::os::unix::fs::PermissionsExt;

    use axum::Json;
    use axum::response::sse::{self, Sse};
    use axum::routing::{get, post, put};
    use futures_util::stream as streams;
    use serde_json::json;
    use tokio::sync::oneshot;

    use super::*;

    async fn echo(Json(value): Json<serde_json::Value>) -> Json<serde_json::Value> {
        Json(value)
    }

    async fn refuse() -> (StatusCode, Json<ApiError>) {
        let error = ApiError {
            message: "unknown database `crn`".into(),
            hint: Some("there are `crm`, `sales`".into()),
            usage: true,
        };
        (StatusCode::BAD_REQUEST, Json(error))
    }

    async fn events() -> Sse<impl futures_util::Stream<Item = Result<sse::Event, Infallible>>> {
        let event = |name: &str, data: &str| Ok(sse::Event::default().event(name).data(data));
        Sse::new(streams::iter([event("log", "{\"text\":\"a\\nb\"}"), event("status", "[1,2]")]))
    }

    /// A server on a socket of its own that ends with the test.
    struct Server {
        socket: PathBuf,
        stop: Option<oneshot::Sender<()>>,
        task: tokio::task::JoinHandle<()>,
        _directory: tempfile::TempDir,
    }

    fn start(name: &str) -> Server {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join(name);
        std::fs::create_dir_all(socket.parent().unwrap()).unwrap();
        let router = Router::new()
            .route("/echo", post(echo))
            .route("/nothing", get(|| async {}))
            .route("/refuse", get(refuse))
            .route("/plain", get(|| async { "no json" }))
            .route("/events", get(events))
            .route("/bytes", put(|body: axum::body::Bytes| async move { Json(body.len()) }));
        let listener = bind(&socket).unwrap();
        let (stop, stopped) = oneshot::channel();
        let shutdown = async {
            let _ = stopped.await;
        };
        let task = tokio::spawn(serve(listener, router, Admission::of_connections(), shutdown));
        Server { socket, stop: Some(stop), task, _directory: directory }
    }

    #[tokio::test]
    async fn requests_and_answers_are_json() {
        let mut server = start("s");
        let socket = &server.socket;
        let echoed: serde_json::Value =
            request(socket, "POST", "/echo", Some(json!({"a": 1}))).await.unwrap();
        assert_eq!(echoed, json!({"a": 1}));
        request::<()>(socket, "GET", "/nothing", None::<()>).await.unwrap();
        assert_eq!(put_bytes::<usize>(socket, "/bytes", vec![0; 100_000]).await.unwrap(), 100_000);

        match request::<()>(socket, "GET", "/refuse", None::<()>).await.unwrap_err() {
            ClientError::Api(error) => assert_eq!(error.message, "unknown database `crn`"),
            other => panic!("{other}"),
        }
        match stream(socket, "/refuse").await.unwrap_err() {
            ClientError::Api(error) => assert!(error.usage),
            other => panic!("{other}"),
        }
        for path in ["/plain", "/missing"] {
            let error = request::<()>(socket, "GET", path, None::<()>).await.unwrap_err();
            assert!(matches!(error, ClientError::Broken { .. }), "{path}: {error}");
        }

        server.stop.take().unwrap().send(()).unwrap();
        server.task.await.unwrap();
        let error = request::<()>(socket, "GET", "/nothing", None::<()>).await.unwrap_err();
        assert!(matches!(error, ClientError::NotListening(_)), "{error}");
    }

    #[tokio::test]
    async fn events_come_one_by_one() {
        let server = start("s");
        let mut events = stream(&server.socket, "/events").await.unwrap();
        let first = events.next().await.unwrap();
        assert_eq!(first, Some(Event { name: "log".into(), data: json!({"text": "a\nb"}) }));
        let second = events.next().await.unwrap();
        assert_eq!(second, Some(Event { name: "status".into(), data: json!([1, 2]) }));
        assert_eq!(events.next().await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_stream_that_breaks_off_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let listener = bind(&socket).unwrap();
        let server = tokio::spawn(async move {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let (mut peer, _) = listener.accept().await.unwrap();
            assert!(peer.read(&mut [0; 4096]).await.unwrap() > 0);
            peer.write_all(
                b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n",
            )
            .await
            .unwrap();
        });
        let mut events = stream(&socket, "/events").await.unwrap();
        assert_eq!(events.next().await.unwrap().unwrap().data, json!(1));
        let error = events.next().await.unwrap_err();
        assert!(matches!(error, ClientError::Broken { .. }), "{error}");
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_path_longer_than_an_address_works() {
        let long = format!("{}/{}/server.sock", "d".repeat(100), "e".repeat(100));
        let server = start(&long);
        request::<()>(&server.socket, "GET", "/nothing", None::<()>).await.unwrap();
        assert_eq!(bind(&server.socket).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }

    #[tokio::test]
    async fn a_socket_is_private_and_a_stale_one_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let listener = bind(&socket).unwrap();
        assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(bind(&socket).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        drop(bind(&socket).unwrap());

        let file = directory.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        assert_eq!(bind(&file).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    }

    #[test]
    fn events_are_cut_wherever_the_bytes_are_split() {
        let text = b": keep-alive\n\nevent: log\r\ndata: {\"a\":\r\ndata:1}\r\n\r\nid: 3\ndata: 2\n\ndata: unfinished";
        let want = [
            RawEvent { name: "log".into(), data: "{\"a\":\n1}".into() },
            RawEvent { name: "message".into(), data: "2".into() },
        ];
        for size in 1..text.len() {
            let mut parser = EventParser::default();
            let mut events = Vec::new();
            for part in text.chunks(size) {
                parser.feed(part);
                events.extend(std::iter::from_fn(|| parser.next_event()));
            }
            assert_eq!(events, want, "pieces of {size}");
        }
    }
}
