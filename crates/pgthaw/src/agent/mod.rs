//! The agent: one session's mount, instance, dump and delivery on this machine, in a process that no terminal, server or
//! connection can take along.
//!
//! It is told what to do by a few verbs, each of which may be repeated, over HTTP on a Unix socket in its private directory;
//! `observe` shows how far each has come. What a verb creates is named in the journal before the agent is started ([`place`]),
//! so that [`undo`] can remove it whether or not the agent is still alive.
//!
//! | verb | file | what it makes |
//! |------|------|----------------|
//! | `map`, `mount` | [`mounting`] | the mount and the child that serves it |
//! | `instance` | [`recovering`] | PostgreSQL, recovered and inspected |
//! |  | [`tablespaces`] | places for the tablespaces that replay makes |
//! | `globals`, `dump` | [`dumping`] | `globals.sql`; a database's dump, delivered and renamed into place |
//! |  | [`pace`] | how fast pg_dump may go, where the dump's directory is small |
//! |  | [`delivering`] | the way to the target, on this machine or another |
//! | `seal` | [`sealing`] | everything verified; `SHA256SUMS`, `export.json` |
//! | `gone` | here | nothing of it runs any more |

pub mod check;
pub mod delivering;
mod dumping;
mod locales;
mod mount_child;
pub mod mounting;
mod pace;
pub mod place;
mod recovering;
pub mod sealing;
pub mod space;
mod tablespaces;
pub mod undo;

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::routing::{get, post, put};
use pgthaw_mover::RemoteTarget;
use pgthaw_postgres::isolation::try_root;
use pgthaw_postgres::os_user::OsUser;
use pgthaw_postgres::root::Confinement;
use pgthaw_session::AgentView;
use pgthaw_session::observed::{DatabaseView, Failure, Progress};
use pgthaw_session::session::Place;
use serde::Deserialize;
use tokio::sync::watch;

use crate::admission::Admission;
use crate::http;
use crate::internal;
use crate::leftovers::create_private_directory;
pub use crate::processes::MARKER_VARIABLE;
use crate::wire::{ApiError, Assignment};
use mount_child::MountChild;
use recovering::Running;

/// Ending that takes longer than this is told in the agent's log.
const SLOW: Duration = Duration::from_secs(3);
/// How long `observe` waits for something newer.
pub const OBSERVE_LIMIT: Duration = Duration::from_secs(5);

/// The agent's socket.
pub fn socket_of(place: &Place) -> PathBuf {
    place.work_directory.join("agent").join("agent.sock")
}

/// Runs an agent; its assignment comes on standard input.
pub fn run() -> ExitCode {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let worked = work();
    pgthaw_link::remove_if_unused();
    match worked {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("{err}");
            ExitCode::FAILURE
        }
    }
}

fn work() -> io::Result<()> {
    let mut bytes = Vec::new();
    io::stdin().lock().read_to_end(&mut bytes)?;
    let assignment: Assignment = serde_json::from_slice(&bytes).map_err(io::Error::other)?;
    let os_user =
        OsUser::for_postgres(assignment.request.os_user.as_deref()).map_err(io::Error::other)?;
    let _directories = create_directories(&assignment.place, &os_user, &assignment)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let view = watch::channel(AgentView::default()).0;
    let remote_target = delivering::remote_target(&assignment, view.clone())?;
    let dump_room =
        pace::DumpRoom::of(&assignment.place.dump_directory, assignment.request.keep_dump);
    let confinement = confinement(&assignment, &os_user)?;
    let agent = Arc::new(Agent {
        assignment,
        confinement,
        os_user,
        view,
        map: Mutex::default(),
        mount: Mutex::default(),
        running: tokio::sync::Mutex::default(),
        target: Mutex::default(),
        remote_target,
        dump_room,
        contact: Mutex::new(tokio::time::Instant::now()),
        gone: watch::channel(false).0,
    });
    runtime.block_on(serve(agent))
}

/// What walls in PostgreSQL: a root of its own; none only where the kernel refuses one and the user has accepted that.
fn confinement(assignment: &Assignment, os_user: &OsUser) -> io::Result<Confinement> {
    let helper = internal::root_helper();
    if !assignment.request.allow_unisolated {
        return Ok(Confinement::Root(helper)); // the check has tried it, and the start says why not
    }
    let user = rustix::process::geteuid().is_root().then_some(os_user);
    match try_root(&helper, None, user) {
        Ok(()) => Ok(Confinement::Root(helper)),
        Err(reason) => {
            eprintln!("no root of its own for PostgreSQL: {reason}");
            Ok(Confinement::Unisolated)
        }
    }
}

/// Makes the session's private directories. The returned descriptors hold their locks, which keep tmpfiles' hands off them.
fn create_directories(
    place: &Place,
    os_user: &OsUser,
    assignment: &Assignment,
) -> io::Result<Vec<std::os::fd::OwnedFd>> {
    let root = rustix::process::geteuid().is_root();
    let owned_by = |ids: (u32, u32)| root.then_some(ids);
    let postgres = (os_user.uid, os_user.gid);
    let reader = mounting::reader_of(assignment, os_user)?;
    let work = &place.work_directory;
    let outer_mode = if root { 0o711 } else { 0o700 }; // other accounts of the session must get through to their own
    let mut held = vec![create_private_directory(work, &place.marker, None, outer_mode)?];
    for (name, owner) in
        [("agent", None), ("layer", owned_by(reader)), ("instance", owned_by(postgres))]
    {
        held.push(create_private_directory(&work.join(name), &place.marker, owner, 0o700)?);
    }
    held.push(create_private_directory(
        &place.dump_directory,
        &place.marker,
        owned_by(postgres),
        0o700,
    )?);
    make_mount_directories(place)?;
    if place.mountpoint.starts_with(work) {
        std::fs::create_dir(&place.mountpoint)?;
    }
    Ok(held)
}

/// Makes the directories on the way to root's mountpoint. Another session that ends just now may remove the one they share in between.
fn make_mount_directories(place: &Place) -> io::Result<()> {
    let make = |directory: &PathBuf| {
        let mode = if *directory == place.mountpoint { 0o700 } else { 0o755 };
        match make_directory(directory, mode) {
            Err(err) if err.kind() != io::ErrorKind::AlreadyExists => {
                Err(io::Error::new(err.kind(), format!("make `{}`: {err}", directory.display())))
            }
            _ => Ok(()),
        }
    };
    let mut tries = 0;
    loop {
        match place.mount_directories.iter().try_for_each(make) {
            Err(err) if err.kind() == io::ErrorKind::NotFound && tries < 10 => tries += 1,
            made => return made,
        }
    }
}

/// Creates a directory with exactly `mode`, whatever the umask is. Sessions share the directory: a session that was killed between
/// `mkdir` and `chmod` would leave it closed to all later sessions. The umask belongs to the whole process, which has one thread here.
fn make_directory(directory: &Path, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let umask = rustix::process::umask(rustix::fs::Mode::empty());
    let made = std::fs::DirBuilder::new().mode(mode).create(directory);
    rustix::process::umask(umask);
    made
}

/// One session's work on this machine.
pub struct Agent {
    assignment: Assignment,
    os_user: OsUser,
    view: watch::Sender<AgentView>,
    map: Mutex<Option<Vec<u8>>>,
    mount: Mutex<Option<Arc<MountChild>>>,
    running: tokio::sync::Mutex<Option<Running>>,
    target: Mutex<Option<Arc<dyn pgthaw_mover::Target>>>,
    /// The same where it is on another machine: connections to it come and go.
    remote_target: Option<Arc<RemoteTarget>>,
    dump_room: pace::DumpRoom,
    /// What walls in PostgreSQL and its clients.
    confinement: Confinement,
    contact: Mutex<tokio::time::Instant>,
    gone: watch::Sender<bool>,
}

impl Agent {
    /// Changes what `observe` shows.
    fn show(&self, change: impl FnOnce(&mut AgentView)) {
        self.view.send_modify(|view| {
            change(view);
            view.version += 1;
        });
    }

    /// Ends the attempt: whatever is found first is the reason.
    fn broken(&self, failure: Failure) {
        if !*self.gone.borrow() {
            self.show(|view| {
                view.broken.get_or_insert(failure);
            });
        }
    }

    /// Tells something for the log.
    fn tell(&self, text: impl Into<String>) {
        let text = text.into();
        self.show(|view| view.messages.push(text));
    }

    fn database(&self, name: &str, change: impl FnOnce(&mut DatabaseView)) {
        self.show(|view| change(view.databases.entry(name.to_owned()).or_default()));
    }

    fn mount(&self) -> Result<Arc<MountChild>, Failure> {
        lock(&self.mount).clone().ok_or_else(|| Failure::new("the backup is not mounted"))
    }

    fn instance_directory(&self) -> PathBuf {
        self.assignment.place.work_directory.join("instance")
    }

    /// Ends everything that runs: pg_dump, then whatever waits for the mount, then PostgreSQL, then the mount.
    async fn end_everything(&self) {
        self.gone.send_replace(true);
        if let Some(target) = &self.remote_target {
            target.abort();
        }
        let begun = tokio::time::Instant::now();
        let mount = lock(&self.mount).take();
        if let Some(mount) = &mount {
            mount.kill(); // first, so that nothing waits for a page that will never come
        }
        let killed = begun.elapsed();
        if let Some(running) = self.running.lock().await.take() {
            running.ended().await;
        }
        if begun.elapsed() > SLOW {
            let server = begun.elapsed() - killed;
            eprintln!(
                "ending took long: {killed:.1?} for the mount's process, {server:.1?} for PostgreSQL"
            );
        }
        if mount.is_some()
            && let Err(err) = pgthaw_mountfs::unmount(&self.assignment.place.mountpoint, true)
        {
            eprintln!("unmount `{}`: {err}", self.assignment.place.mountpoint.display());
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn serve(agent: Arc<Agent>) -> io::Result<()> {
    let listener = http::bind(&socket_of(&agent.assignment.place))?;
    let router = axum::Router::new()
        .route("/v1/observe", get(observe))
        .route("/v1/map", put(take_map))
        .route("/v1/mount", post(async |State(agent): Shared| mounting::begin(agent)))
        .route("/v1/instance", post(async |State(agent): Shared| recovering::begin(agent)))
        .route("/v1/globals", post(async |State(agent): Shared| dumping::begin_globals(agent)))
        .route(
            "/v1/dump",
            post(async |State(agent): Shared, Json(database): Json<String>| {
                dumping::begin(agent, database)
            }),
        )
        .route("/v1/seal", post(async |State(agent): Shared| sealing::begin(agent)))
        .route("/v1/gone", post(gone))
        .layer(DefaultBodyLimit::disable())
        .with_state(agent.clone());
    let mut is_gone = agent.gone.subscribe();
    let lease = Duration::from_secs(agent.assignment.request.lease);
    let end = async move {
        loop {
            let expiry = *lock(&agent.contact) + lease;
            tokio::select! {
                () = async { drop(is_gone.wait_for(|gone| *gone).await) } => {
                    tokio::time::sleep(Duration::from_millis(50)).await; // the answer to `gone` is on its way
                    return;
                }
                () = tokio::time::sleep_until(expiry) => {
                    if *lock(&agent.contact) + lease <= tokio::time::Instant::now() {
                        // Nobody may ever come who removes what is here.
                        agent.end_everything().await;
                        let place = agent.assignment.place.clone();
                        let _ = tokio::task::spawn_blocking(move || undo::undo_at(&place)).await;
                        return;
                    }
                }
            }
        }
    };
    http::serve(listener, router, Admission::of_connections(), end).await;
    Ok(())
}

type Shared = State<Arc<Agent>>;

#[derive(Deserialize)]
struct ObserveQuery {
    after: Option<u64>,
}

async fn observe(State(agent): Shared, Query(query): Query<ObserveQuery>) -> Json<AgentView> {
    *lock(&agent.contact) = tokio::time::Instant::now();
    let mut view = agent.view.subscribe();
    if let Some(after) = query.after {
        let newer = view.wait_for(|view| view.version > after);
        let _ = tokio::time::timeout(OBSERVE_LIMIT, newer).await; // then what there is
    }
    let seen = view.borrow().clone();
    Json(seen)
}

async fn take_map(State(agent): Shared, body: Bytes) -> Json<()> {
    *lock(&agent.map) = Some(body.to_vec());
    Json(())
}

/// Ends everything that runs, then the agent itself. What lies on disk is removed by whoever asks ([`undo`]).
async fn gone(State(agent): Shared) -> Result<Json<()>, ApiError> {
    agent.end_everything().await;
    Ok(Json(()))
}

/// Begins a verb unless it has begun: `slot` is where the view shows it.
fn begin_once<T: Clone + Send + Sync + 'static>(
    agent: &Arc<Agent>,
    slot: fn(&mut AgentView) -> &mut Progress<T>,
    work: impl Future<Output = Result<T, Failure>> + Send + 'static,
) -> Json<()> {
    let mut begins = false;
    agent.show(|view| {
        let progress = slot(view);
        if *progress_is_absent(progress) {
            *progress = Progress::Running;
            begins = true;
        }
    });
    if begins {
        let agent = agent.clone();
        tokio::spawn(async move {
            let result = match work.await {
                Ok(result) => Progress::Done(result),
                Err(failure) => Progress::Failed(failure),
            };
            agent.show(|view| *slot(view) = result);
        });
    }
    Json(())
}

fn progress_is_absent<T>(progress: &Progress<T>) -> &bool {
    if matches!(progress, Progress::Absent) { &true } else { &false }
}
