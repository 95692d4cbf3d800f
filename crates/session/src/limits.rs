//! What an export may ask for, whoever asks: the command line, a script that speaks to the API, another account of the host.
//!
//! The command line says the same with better words, out of the same numbers; a request that comes another way is refused here.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::request::{ExportRequest, RepositoryChoice};

/// Most tables dumped at a time.
pub const JOBS_MAX: u32 = 256;
/// The shortest lease, in seconds: several times what a lost connection takes to come back.
pub const LEASE_MIN: u64 = 30;
/// The smallest cache, in bytes: a few of the chunks that files are decoded in.
pub const CACHE_MIN: u64 = 1 << 20;
/// The largest cache, in bytes: more memory than any machine that a backup is mounted on.
pub const CACHE_MAX: u64 = 1 << 44;
/// The longest time, in seconds: a year.
pub const TIME_MAX: u64 = 365 * 24 * 60 * 60;
/// Most attempts that are begun without anybody's doing.
pub const RETRIES_MAX: u32 = 1_000_000;
/// Most entries of a list, such as the databases of a request.
const LIST_MAX: usize = 10_000;
/// The longest text, in bytes; a path of Linux is no longer (`PATH_MAX`).
const TEXT_MAX: usize = 4096;

impl RepositoryChoice {
    /// Returns what is wrong with it, if anything.
    pub fn objection(&self) -> Option<String> {
        let paths = [("path", &self.path)].into_iter();
        let paths = paths.chain(self.wal_archives.iter().map(|path| ("wal_archives", path)));
        let tablespaces = self.tablespaces.iter().filter_map(|(_, path)| path.as_ref());
        let tablespaces = tablespaces.map(|path| ("tablespaces", path));
        let paths = paths.chain(tablespaces);
        let mut paths = paths.chain(self.backup_label.iter().map(|path| ("backup_label", path)));
        let texts = [("name", &self.name), ("kind", &self.kind), ("stanza", &self.stanza)];
        let mut texts = texts.into_iter().filter_map(|(name, text)| Some((name, text.as_ref()?)));
        list("wal_archives", self.wal_archives.len())
            .or_else(|| list("tablespaces", self.tablespaces.len()))
            .or_else(|| paths.find_map(|(name, value)| path(name, value)))
            .or_else(|| texts.find_map(|(name, value)| text(name, value)))
            .map(|why| format!("repository: {why}"))
    }
}

impl ExportRequest {
    /// Returns what is wrong with it, if anything: a value out of its range, or a text that no path or name can be.
    pub fn objection(&self) -> Option<String> {
        let range = |name: &str, value: u64, from: u64, to: u64| {
            (!(from..=to).contains(&value)).then(|| format!("{name} is not from {from} to {to}"))
        };
        let numbers = [
            ("jobs", self.jobs.into(), 1, JOBS_MAX.into()),
            ("stall_timeout", self.stall_timeout, 1, TIME_MAX),
            ("retry_for", self.retry_for, 1, TIME_MAX),
            ("lease", self.lease, LEASE_MIN, TIME_MAX),
            ("retries", self.retries.into(), 0, RETRIES_MAX.into()),
            ("cache_size", self.cache_size.unwrap_or(CACHE_MIN), CACHE_MIN, CACHE_MAX),
        ];
        let ports = self.mover.ports.is_some_and(|(first, last)| first == 0 || first > last);
        self.repository
            .objection()
            .or_else(|| numbers.into_iter().find_map(|(n, v, from, to)| range(n, v, from, to)))
            .or_else(|| ports.then(|| "the mover's ports are no range".into()))
            .or_else(|| self.bad_list())
            .or_else(|| self.bad_path())
            .or_else(|| self.bad_text())
    }

    fn bad_list(&self) -> Option<String> {
        let lists = [
            ("databases", &self.databases),
            ("exclude_databases", &self.exclude_databases),
            ("pg_dump_arguments", &self.pg_dump_arguments),
            ("preload", &self.preload),
        ];
        if self.databases.is_empty() != self.all {
            return Some("it asks for neither databases nor all of them, or for both".into());
        }
        lists.iter().find_map(|(name, entries)| list(name, entries.len())).or_else(|| {
            let mut entries =
                lists.iter().flat_map(|(name, list)| list.iter().map(move |entry| (*name, entry)));
            entries.find_map(|(name, entry)| text(name, entry))
        })
    }

    fn bad_path(&self) -> Option<String> {
        let paths = [
            ("target", Some(&self.target)),
            ("read_from_staging", self.read_from_staging.as_ref()),
            ("dump_dir", self.dump_dir.as_ref()),
            ("work_dir", self.work_dir.as_ref()),
            ("pg_bin", self.pg_bin.as_ref()),
        ];
        paths.into_iter().find_map(|(name, value)| path(name, value?))
    }

    fn bad_text(&self) -> Option<String> {
        let callers =
            [("target_caller", &self.target_caller), ("ssh_agent_of", &self.ssh_agent_of)];
        let callers = callers.iter().filter_map(|(name, caller)| Some((*name, caller.as_ref()?)));
        let callers = callers.flat_map(|(name, caller)| [(name, &caller.name), (name, &caller.id)]);
        let texts = [
            ("backup", &self.backup),
            ("staging", &self.staging),
            ("target_host", &self.target_host),
            ("compress", &self.compress),
            ("os_user", &self.os_user),
            ("superuser", &self.superuser),
        ];
        let texts = texts.iter().filter_map(|(name, value)| Some((*name, value.as_ref()?)));
        texts.chain(callers).find_map(|(name, value)| text(name, value))
    }
}

fn list(name: &str, entries: usize) -> Option<String> {
    (entries > LIST_MAX).then(|| format!("{name} has more than {LIST_MAX} entries"))
}

fn path(name: &str, path: &Path) -> Option<String> {
    bytes(name, path.as_os_str().as_bytes())
}

fn text(name: &str, value: &str) -> Option<String> {
    bytes(name, value.as_bytes()).or_else(|| value.is_empty().then(|| format!("{name} is empty")))
}

fn bytes(name: &str, value: &[u8]) -> Option<String> {
    match () {
        () if value.contains(&0) => Some(format!("{name} holds a NUL byte")),
        () if value.len() >= TEXT_MAX => Some(format!("{name} is longer than {TEXT_MAX} bytes")),
        () => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_export_can_be_is_refused() {
        let request = || -> ExportRequest {
            serde_json::from_value(serde_json::json!({
                "repository": { "path": "/backups" }, "databases": ["crm"], "target": "/o",
                "jobs": 2, "globals": true, "role_passwords": true,
            }))
            .unwrap()
        };
        assert_eq!(request().objection(), None);
        type Change = fn(&mut ExportRequest);
        let cases: [(&str, Change); 20] = [
            ("jobs", |r| r.jobs = 0),
            ("jobs", |r| r.jobs = 257),
            ("stall_timeout", |r| r.stall_timeout = u64::MAX),
            ("retry_for", |r| r.retry_for = u64::MAX),
            ("lease", |r| r.lease = 1),
            ("lease", |r| r.lease = u64::MAX),
            ("retries", |r| r.retries = u32::MAX),
            ("cache_size", |r| r.cache_size = Some(u64::MAX)),
            ("cache_size", |r| r.cache_size = Some(0)),
            ("ports", |r| r.mover.ports = Some((0, 9))),
            ("ports", |r| r.mover.ports = Some((9, 8))),
            ("target holds a NUL", |r| r.target = "/o\0".into()),
            ("work_dir holds a NUL", |r| r.work_dir = Some("/\0".into())),
            ("databases holds a NUL", |r| r.databases.push("\0".into())),
            ("databases is empty", |r| r.databases.push(String::new())),
            ("neither databases", |r| r.databases.clear()),
            ("or for both", |r| r.all = true),
            ("databases has more", |r| r.databases = vec!["x".into(); LIST_MAX + 1]),
            ("staging is longer", |r| r.staging = Some("x".repeat(5000))),
            ("repository: path holds", |r| r.repository.path = "\0".into()),
        ];
        for (want, change) in cases {
            let mut changed = request();
            change(&mut changed);
            let found = changed.objection().unwrap_or_default();
            assert!(found.contains(want), "{want}: {found}");
        }
    }
}
