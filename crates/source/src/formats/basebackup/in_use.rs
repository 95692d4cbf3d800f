//! Whether a server runs on a directory: then it is no backup, and what is read of it belongs together at no moment.
//!
//! Two ways tell, and neither asks the server: its working directory is its data directory (PostgreSQL source, `ChangeToDataDir`),
//! and its `postmaster.pid` names the directory and the shared memory of its processes (`miscadmin.h`, "LOCK_FILE_LINE_…"). The first
//! needs the right to look at its processes, which root and its own account have.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

/// A directory, whatever its name is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: (u32, u32),
    inode: u64,
}

/// Returns who uses the data directory `data`, or one of the further `directories` that hold parts of it; for people.
pub(crate) fn user_of(data: &Path, directories: &[PathBuf]) -> Option<String> {
    if let Some(pid) = attached(data) {
        return Some(format!(
            "`{}` is a running server's data directory (process {pid})",
            data.display()
        ));
    }
    let own = identity(data);
    let parts: Vec<(&PathBuf, Identity)> =
        directories.iter().filter_map(|path| Some((path, identity(path)?))).collect();
    for (pid, working) in working_directories() {
        if own.is_some() && own == identity(&working) {
            return Some(format!(
                "`{}` is a running server's data directory (process {pid})",
                data.display()
            ));
        }
        if parts.is_empty() || !working.join("PG_VERSION").exists() {
            continue;
        }
        for link in links_of(&working) {
            let lead = identity(&link);
            if let Some((path, _)) = parts.iter().find(|(_, part)| lead == Some(*part)) {
                return Some(format!(
                    "`{}` belongs to a running server (process {pid})",
                    path.display()
                ));
            }
        }
    }
    None
}

/// Returns the process that `postmaster.pid` names, if the directory is its own and its shared memory is in use. A copy or a snapshot
/// of a running server's directory names another directory.
fn attached(data: &Path) -> Option<u32> {
    let text = fs::read_to_string(data.join("postmaster.pid")).ok()?;
    let lines: Vec<&str> = text.lines().collect();
    let pid = lines.first()?.trim().trim_start_matches('-').parse().ok()?;
    if Path::new(lines.get(1)?.trim_end()) != data.canonicalize().ok()? {
        return None;
    }
    let segment = lines.get(6)?.split_ascii_whitespace().nth(1)?;
    let table = fs::read_to_string("/proc/sysvipc/shm").ok()?;
    attachments(&table, segment).filter(|count| *count > 0).map(|_| pid)
}

/// Reads `/proc/sysvipc/shm` (proc(5)): how many processes are attached to the segment `id`.
fn attachments(table: &str, id: &str) -> Option<u64> {
    let mut lines = table.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let header = lines.next()?;
    let column = |name: &str| header.iter().position(|known| *known == name);
    let (ids, counts) = (column("shmid")?, column("nattch")?);
    let line = lines.find(|line| line.get(ids) == Some(&id))?;
    line.get(counts)?.parse().ok()
}

/// The working directories of PostgreSQL's processes that may be looked at, each once. Those on FUSE are left out: they are our own
/// instances, and a look could wait for a mount that does not answer.
fn working_directories() -> Vec<(u32, PathBuf)> {
    let mut found: Vec<(u32, PathBuf)> = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if !matches!(name.trim_end(), "postgres" | "postmaster") {
            continue;
        }
        let Ok(directory) = fs::read_link(entry.path().join("cwd")) else { continue };
        let link = entry.path().join("cwd");
        let known =
            found.iter().any(|(_, other)| other.read_link().is_ok_and(|at| at == directory));
        if !known && !is_on_fuse(&entry.path(), &link) {
            found.push((pid, link));
        }
    }
    found
}

fn is_on_fuse(process: &Path, link: &Path) -> bool {
    let Some(identity) = identity(link) else { return true };
    let device = format!("{}:{}", identity.device.0, identity.device.1);
    let mounts = fs::read_to_string(process.join("mountinfo")).unwrap_or_default();
    let mut kinds = mounts.lines().filter_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let here = before.split(' ').nth(2)? == device;
        here.then(|| after.split(' ').next().unwrap_or_default())
    });
    kinds.any(|kind| kind.starts_with("fuse"))
}

/// What a data directory's links lead to, by the links' own paths.
fn links_of(data: &Path) -> Vec<PathBuf> {
    let tablespaces = fs::read_dir(data.join("pg_tblspc")).into_iter().flatten().flatten();
    tablespaces.map(|entry| entry.path()).chain([data.join("pg_wal")]).collect()
}

/// Which directory a path leads to; asks a file system only for what it knows already.
fn identity(path: &Path) -> Option<Identity> {
    let found = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::INO).ok()?;
    let device = (found.stx_dev_major, found.stx_dev_minor);
    Some(Identity { device, inode: found.stx_ino })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_table_of_shared_memory() {
        let table = "       key      shmid perms                  size  cpid  lpid nattch   uid\n\
                     5432001          7   600                  56  1003  1003      6   104\n\
                     5432002          8   600                  56  1004  1004      0   104\n";
        assert_eq!(attachments(table, "7"), Some(6));
        assert_eq!(attachments(table, "8"), Some(0));
        assert_eq!(attachments(table, "9"), None);
        assert_eq!(attachments("", "7"), None);
    }

    #[test]
    fn a_directory_that_nobody_uses_is_free() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("postmaster.pid"), "1\n/elsewhere\n1\n5432\n/tmp\n\n 1 1\n")
            .unwrap();
        assert_eq!(user_of(dir.path(), &[dir.path().join("none")]), None);
    }
}
