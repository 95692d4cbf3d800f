//! Where a session works on this machine: chosen, and written into the journal, before anything is created.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pgthaw_postgres::os_user::OsUser;
use pgthaw_session::ExportRequest;
use pgthaw_session::observed::Failure;
use pgthaw_session::session::Place;

use super::check::missing_directories;
use super::space::{choose_dump_dir, free_bytes};

/// Where private directories are made when the user names no other place.
pub const DEFAULT_WORK_DIRECTORY: &str = "/var/tmp";
/// Where dumps are kept when the user names no other place: the roomier of the two.
pub const DUMP_DIRECTORIES: [&str; 2] = ["/var/tmp", "/tmp"];
/// Where root mounts.
pub const ROOTS_MOUNTS: &str = "/run/media/pgthaw";

/// Chooses where session `id` works on this machine. The target's directories are left to the target's machine.
///
/// # Errors
/// When none of the directories for the dump can be looked at.
pub fn choose_place(id: &str, request: &ExportRequest, marker: String) -> Result<Place, Failure> {
    let name = format!("pgthaw-{id}");
    let work_directory =
        request.work_dir.clone().unwrap_or_else(|| DEFAULT_WORK_DIRECTORY.into()).join(&name);
    let mountpoint = match rustix::process::geteuid().is_root() {
        true => Path::new(ROOTS_MOUNTS).join(id),
        false => work_directory.join("mount"),
    };
    let mount_directories = match mountpoint.starts_with(&work_directory) {
        true => Vec::new(),
        false => mount_directories(&mountpoint),
    };
    let candidates: Vec<PathBuf> = match &request.dump_dir {
        Some(directory) => vec![directory.clone()],
        None => DUMP_DIRECTORIES.iter().map(PathBuf::from).collect(),
    };
    let rooms: Vec<(PathBuf, u64)> = candidates
        .into_iter()
        .filter_map(|path| free_bytes(&path).ok().map(|free| (path, free)))
        .collect();
    let dump_parent = choose_dump_dir(&rooms).ok_or_else(|| {
        Failure::new("no directory for the dump can be used").hint("name one with --dump-dir")
    })?;
    Ok(Place {
        host: request.staging.clone(),
        marker,
        accounts: accounts(request),
        work_directory,
        mountpoint,
        mount_directories,
        dump_directory: dump_parent.join(format!("{name}-dump")),
        target_directories: match request.delivers_elsewhere() {
            true => Vec::new(),
            false => missing_directories(&request.target),
        },
    })
}

/// The accounts that the session's processes run as: ours, and as root those of PostgreSQL and of who reads the repository.
fn accounts(request: &ExportRequest) -> Vec<u32> {
    let own = rustix::process::geteuid();
    let mut accounts = vec![own.as_raw()];
    if own.is_root() {
        let postgres = OsUser::for_postgres(request.os_user.as_deref());
        accounts.extend(postgres.map(|user| user.uid)); // without such an account the check has refused the export
        let repository = request.repository_beside_instance();
        accounts.extend(repository.and_then(|path| path.metadata().ok()).map(|meta| meta.uid()));
    }
    accounts.sort_unstable();
    accounts.dedup();
    accounts
}

/// The directories to make for root's `mountpoint`, the outermost first. The one that all sessions share is among them even if it is
/// there: whoever ends last removes it.
fn mount_directories(mountpoint: &Path) -> Vec<PathBuf> {
    let mut directories = missing_directories(mountpoint);
    let shared = PathBuf::from(ROOTS_MOUNTS);
    if !directories.contains(&shared) {
        directories.insert(0, shared);
    }
    directories
}
