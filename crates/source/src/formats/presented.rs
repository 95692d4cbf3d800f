//! What of a backup the mounted cluster shows.
//!
//! Left out is what `pg_basebackup` leaves out (PostgreSQL source, `basebackup.c`: `excludeDirContents`,
//! `excludeFiles`), and what would tell the thawed instance how the original was run. A replication slot that came
//! with a snapshot makes start-up fail; a signal file or `postgresql.auto.conf` would make it follow somebody.

/// Directories of the data directory that are there but empty.
pub(crate) const EMPTY_DIRECTORIES: [&str; 7] = [
    "pg_dynshmem",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat_tmp",
    "pg_subtrans",
];

/// Files at the top of the data directory that are not shown. `tablespace_map` would make PostgreSQL replace the
/// mount's own links; `recovery.conf` makes it refuse to start since version 12.
const HIDDEN_AT_TOP: [&str; 13] = [
    "backup_label.old",
    "backup_manifest",
    "current_logfiles",
    "current_logfiles.tmp",
    "postgresql.auto.conf",
    "postgresql.auto.conf.tmp",
    "postmaster.opts",
    "postmaster.pid",
    "recovery.conf",
    "recovery.signal",
    "standby.signal",
    "tablespace_map",
    "tablespace_map.old",
];

/// Whether the file `path` (`data/…` or `tablespaces/…`) is shown. WAL is chosen elsewhere: of `data/pg_wal`
/// nothing is.
pub(crate) fn shows_file(path: &str) -> bool {
    let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
    if directory == "data" && HIDDEN_AT_TOP.contains(&name) {
        return false;
    }
    shows_content_of(directory)
        && !name.starts_with("pgsql_tmp")
        && !name.starts_with("pg_internal.init")
        && !is_temporary_relation(name)
}

/// Whether the directory `path` is shown, be it empty.
pub(crate) fn shows_directory(path: &str) -> bool {
    path == "data/pg_wal/archive_status" || {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        shows_content_of(parent) && !name.starts_with("pgsql_tmp")
    }
}

/// Whether anything in the directory `path` is shown.
pub(crate) fn shows_content_of(path: &str) -> bool {
    let below_data = path.strip_prefix("data/").unwrap_or("");
    let top = below_data.split('/').next().unwrap_or("");
    top != "pg_wal"
        && !EMPTY_DIRECTORIES.contains(&top)
        && !path.split('/').any(|part| part.starts_with("pgsql_tmp"))
}

/// Whether a file's name is that of a temporary relation: `t<backend>_<relfilenode>[_<fork>][.<segment>]`
/// (PostgreSQL source, `looks_like_temp_rel_name`).
fn is_temporary_relation(name: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let Some((backend, rest)) = name.strip_prefix('t').and_then(|rest| rest.split_once('_')) else {
        return false;
    };
    let (rest, segment) =
        rest.split_once('.').map_or((rest, None), |(rest, segment)| (rest, Some(segment)));
    let (node, fork) = rest.split_once('_').map_or((rest, None), |(node, fork)| (node, Some(fork)));
    digits(backend)
        && digits(node)
        && segment.is_none_or(digits)
        && fork.is_none_or(|fork| matches!(fork, "fsm" | "vm" | "init"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files() {
        let cases = [
            ("data/PG_VERSION", true),
            ("data/postgresql.conf", true),
            ("data/backup_label", true),
            ("data/base/5/1259", true),
            ("data/base/5/1259_fsm", true),
            ("data/base/5/16384_init", true),
            ("data/global/pg_filenode.map", true),
            ("tablespaces/16384/PG_15_202209061/5/16400.1", true),
            ("data/pg_replslot_of_mine/state", true),
            ("data/sub/postmaster.pid", true),
            ("data/base/5/t3", true),
            ("data/base/5/t3_x", true),
            ("data/base/5/t3_16384_main", true),
            ("data/postmaster.pid", false),
            ("data/postmaster.opts", false),
            ("data/standby.signal", false),
            ("data/recovery.signal", false),
            ("data/postgresql.auto.conf", false),
            ("data/tablespace_map", false),
            ("data/backup_manifest", false),
            ("data/pg_replslot/slot/state", false),
            ("data/pg_stat_tmp/global.stat", false),
            ("data/pg_subtrans/0000", false),
            ("data/pg_wal/000000010000000000000001", false),
            ("data/pg_wal/archive_status/000000010000000000000001.done", false),
            ("data/base/pgsql_tmp/pgsql_tmp123.0", false),
            ("data/base/5/pgsql_tmp1.2", false),
            ("tablespaces/16384/PG_15_202209061/pgsql_tmp/x", false),
            ("data/base/5/t3_16384", false),
            ("data/base/5/t3_16384_vm.2", false),
            ("tablespaces/16384/PG_15_202209061/5/t12_16400_fsm", false),
            ("data/base/5/pg_internal.init", false),
            ("data/global/pg_internal.init.123", false),
        ];
        for (path, want) in cases {
            assert_eq!(shows_file(path), want, "{path}");
        }
    }

    #[test]
    fn directories() {
        let cases = [
            ("data", true),
            ("data/base/5", true),
            ("data/pg_replslot", true),
            ("data/pg_wal", true),
            ("data/pg_wal/archive_status", true),
            ("tablespaces/16384", true),
            ("data/pg_wal/summaries", false),
            ("data/pg_replslot/slot", false),
            ("data/base/pgsql_tmp", false),
            ("data/base/pgsql_tmp/pgsql_tmp1.sharedfileset", false),
        ];
        for (path, want) in cases {
            assert_eq!(shows_directory(path), want, "{path}");
        }
    }
}
