//! Backups made in unusual ways.

use std::fs;

use pgthaw_source::repository::{BackupType, WalWanted};

use crate::cluster::Cluster;
use crate::support::{open, reader};

/// A page with a wrong checksum: pgBackRest notes it down, and goes on.
pub fn damaged_page(cluster: &mut Cluster) {
    let relation = cluster.sql("crm", "SELECT pg_relation_filepath('a')");
    cluster.stop();
    let path = cluster.path("pg").join(&relation);
    let mut bytes = fs::read(&path).unwrap();
    bytes[8192 * 3 + 4000] ^= 0xFF;
    fs::write(&path, bytes).unwrap();
    cluster.run(cluster.path("pg"));
    cluster.pgbackrest(&["--repo=2", "--type=incr", "backup"]);
    let backup = open(&cluster.path("repo2")).open_backup(None, WalWanted::EndOfBackup).unwrap();
    assert!(backup.info.damaged);
    let damaged: Vec<_> = backup.damaged_files.iter().map(|path| path.as_str()).collect();
    assert_eq!(damaged, [format!("data/{relation}")]);
}

/// A backup of a stopped server has no label, and holds the WAL it needs.
pub fn offline(cluster: &mut Cluster) {
    cluster.stop();
    cluster.pgbackrest(&["--repo=4", "--type=full", "--no-online", "--force", "backup"]);
    let repository = open(&cluster.path("repo4"));
    let backup = repository.open_backup(None, WalWanted::Latest).unwrap();
    assert_eq!(backup.info.backup_type, BackupType::Full);
    assert!(backup.label.is_none() && backup.info.archived_until.is_none());
    assert_eq!((backup.timeline, backup.wal.stop_segment.as_ref()), (2, None));
    let reader = reader(&backup);
    let shown = |path: &str| reader.files().iter().position(|file| file.path.as_str() == path);
    assert_eq!(shown("data/recovery.signal"), None);
    let first = shown(&format!("data/pg_wal/{}", backup.wal.first.as_ref().unwrap())).unwrap();
    let name = fs::canonicalize(cluster.path("pg/pg_wal"))
        .unwrap()
        .join(backup.wal.first.as_ref().unwrap());
    assert!(reader.read_whole(first).unwrap() == fs::read(name).unwrap());
}
