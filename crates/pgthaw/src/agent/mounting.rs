//! The verb `mount`: the mount, and the child that serves it.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use axum::Json;
use pgthaw_mountfs::{mount_as_root, mount_as_user};
use pgthaw_postgres::os_user::OsUser;
use pgthaw_session::observed::Failure;
use pgthaw_session::session::Place;

use super::mount_child::{MountChild, Told};
use super::{Agent, begin_once, lock};
use crate::internal::mount::MountTask;
use crate::internal::source::with_causes;
use crate::wire::Assignment;

/// Largest default for the cache of decoded pages; a quarter of the free memory where that is less.
const DEFAULT_CACHE: u64 = 1 << 30;

/// Begins to mount.
pub fn begin(agent: Arc<Agent>) -> Json<()> {
    let work = agent.clone();
    begin_once(&agent, |view| &mut view.mount, async move {
        let mounted = tokio::task::spawn_blocking(move || mount(&work)).await;
        mounted.unwrap_or_else(|err| Err(Failure::new(format!("mounting ended early: {err}"))))
    })
}

/// User and group that read the repository: its owner, or PostgreSQL's account where another machine reads it.
///
/// # Errors
/// When the repository cannot be looked at.
pub fn reader_of(assignment: &Assignment, os_user: &OsUser) -> io::Result<(u32, u32)> {
    let Some(path) = assignment.request.repository_beside_instance() else {
        return Ok((os_user.uid, os_user.gid));
    };
    let meta = std::fs::metadata(path);
    let meta = meta.map_err(|err| {
        io::Error::new(err.kind(), format!("repository `{}`: {err}", path.display()))
    })?;
    Ok((meta.uid(), meta.gid()))
}

fn mount(agent: &Arc<Agent>) -> Result<(), Failure> {
    let assignment = &agent.assignment;
    let place = &assignment.place;
    let map = lock(&agent.map).take().ok_or_else(|| Failure::new("the map has not arrived"))?;
    let owner =
        reader_of(assignment, &agent.os_user).map_err(|err| Failure::new(err.to_string()))?;
    let root = rustix::process::geteuid().is_root();
    let device =
        if root { mount_as_root(&place.mountpoint) } else { mount_as_user(&place.mountpoint) };
    let device = device.map_err(|err| {
        Failure::new(format!("mount at `{}`: {}", place.mountpoint.display(), with_causes(&err)))
            .hint(err.hint())
    })?;
    let task = MountTask {
        device: -1,
        mountpoint: place.mountpoint.clone(),
        layer_directory: place.work_directory.join("layer"),
        owner: (agent.os_user.uid, agent.os_user.gid),
        cache_bytes: assignment.request.cache_size.unwrap_or_else(default_cache),
        timeline: assignment.facts.start.timeline,
        reads_socket: match assignment.request.repository_beside_instance() {
            Some(_) => None,
            None => Some(reads_socket(place)),
        },
        stall_timeout: assignment.request.stall_timeout,
        map_bytes: 0,
    };
    let told = agent.clone();
    let tell = move |what| match what {
        Told::Broken(failure) => told.broken(failure),
        Told::Waiting(why) => told.show(|view| view.waiting_for_repository = why),
    };
    let log = place.work_directory.join("agent").join("mount.log");
    let child = MountChild::start(task, device, &map, owner, &place.marker, &log, tell)?;
    *lock(&agent.mount) = Some(Arc::new(child));
    Ok(())
}

/// The socket on which connections for reads arrive.
pub fn reads_socket(place: &Place) -> PathBuf {
    place.work_directory.join("layer").join("reads.sock")
}

/// A quarter of the memory that is free now, at most [`DEFAULT_CACHE`].
fn default_cache() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes =
        available.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kilobytes.map_or(DEFAULT_CACHE, |kilobytes| (kilobytes * 1024 / 4).min(DEFAULT_CACHE))
}
