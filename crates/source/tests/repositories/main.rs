//! Repositories made by the real tools: what is read from them is what the tools restore, and damage is told.
//!
//! One cluster serves all of it, so there is one test per world: `pgbackrest` (four repositories), `basebackup`.

mod base;
mod cluster;
mod damage;
mod made;
mod support;

use std::fs;

use cluster::Cluster;
use pgthaw_source::Location;
use pgthaw_source::map::Content;
use pgthaw_source::repository::{Backup, BackupType, Repository, WalWanted, database_sizes};
use support::{compare_wal, compare_with_restored, latest, open};

/// Fills a fresh cluster, and returns the tablespace's OID.
fn fill(cluster: &Cluster) -> u32 {
    let ts = cluster.path("ts");
    cluster.sql("postgres", &format!("CREATE TABLESPACE t1 LOCATION '{}'", ts.display()));
    cluster.sql("postgres", "CREATE DATABASE crm");
    cluster.sql("crm", "CREATE TABLE a AS SELECT i, md5(i::text) FROM generate_series(1, 20000) i");
    cluster.sql(
        "crm",
        "CREATE TABLE b TABLESPACE t1 AS SELECT i, md5(i::text) FROM generate_series(1, 5000) i",
    );
    cluster.sql("crm", "CREATE UNLOGGED TABLE u AS SELECT i FROM generate_series(1, 5000) i");
    cluster.sql("crm", "CREATE TABLE empty (i int)");
    cluster.sql("crm", "SELECT pg_create_physical_replication_slot('slot', true)");
    cluster.sql("postgres", "SELECT oid FROM pg_tablespace WHERE spcname = 't1'").parse().unwrap()
}

#[test]
fn pgbackrest() {
    let mut cluster = Cluster::start("16");
    let tablespace = fill(&cluster);
    let backup = |repository: u32, kind: &str, more: &[&str]| {
        let (repository, kind) = (format!("--repo={repository}"), format!("--type={kind}"));
        let mut all = vec![repository.as_str(), kind.as_str()];
        all.extend(more);
        all.push("backup");
        cluster.pgbackrest(&all);
    };
    backup(1, "full", &["--annotation=source=test"]);
    cluster.configure("lz4");
    backup(2, "full", &[]);
    cluster.sql("crm", "UPDATE a SET i = i + 1 WHERE i % 100 = 0; DROP TABLE empty");
    cluster.configure("zst");
    backup(3, "full", &[]);
    cluster.configure("gz");
    backup(1, "diff", &[]);
    cluster.sql("crm", "INSERT INTO b SELECT i FROM generate_series(1, 9000) i");
    backup(1, "incr", &[]);
    cluster.configure("lz4");
    backup(2, "incr", &[]);
    cluster.configure("none");
    backup(4, "full", &["--archive-copy"]);
    cluster.sql("crm", "DELETE FROM a WHERE i % 7 = 0");
    let last = cluster.archive();

    for (repository, types) in [
        (1, &[BackupType::Full, BackupType::Differential, BackupType::Incremental][..]),
        (2, &[BackupType::Full, BackupType::Incremental]),
        (3, &[BackupType::Full]),
        (4, &[BackupType::Full]),
    ] {
        let path = cluster.path(&format!("repo{repository}"));
        let opened = open(&path);
        let backups = opened.backups().unwrap();
        assert_eq!(backups.iter().map(|backup| backup.backup_type).collect::<Vec<_>>(), types);
        for info in &backups {
            assert_eq!(
                (info.postgres_major, info.unusable.as_deref(), info.damaged),
                (15, None, false)
            );
            assert!(info.size > 20_000_000 && info.stored_size.unwrap() > 100_000);
            assert!(info.started_at <= info.stopped_at.unwrap() && info.start_lsn < info.stop_lsn);
            assert_eq!(info.archived_until.as_ref().unwrap().segment, last);
            let backup = opened.open_backup(Some(&info.id), WalWanted::EndOfBackup).unwrap();
            assert_eq!(backup.info, *info);
            // A restore syncs every file, which takes its time; full backups are what the others build upon.
            if info.backup_type != BackupType::Full || backups.len() == 1 {
                restore_and_compare(&cluster, repository, tablespace, &backup);
            }
            compare_wal(&backup, &cluster.path("plain"));
            assert!(backup.page_checksums && backup.damaged_files.is_empty());
            assert_eq!((backup.timeline, backup.wal.segment_size), (1, 16 << 20));
            assert_eq!(
                backup.wal.first.as_deref(),
                Some(backup.label.as_ref().unwrap().start_segment.as_str())
            );
            assert_eq!(backup.wal.last, backup.wal.stop_segment);
            assert_eq!(backup.wal.expected_last, None);
            assert_eq!(backup.tablespaces[0].location, cluster.path("ts").to_str().unwrap());
            assert_eq!(
                (backup.tablespaces[0].oid, backup.tablespaces[0].name.as_deref()),
                (tablespace, Some("t1"))
            );
            let crm = backup
                .databases
                .as_ref()
                .unwrap()
                .iter()
                .find(|database| database.name == "crm")
                .unwrap();
            assert!(database_sizes(&backup.map)[&crm.oid] > 7_000_000);

            let newest = opened.open_backup(Some(&info.id), WalWanted::Latest).unwrap();
            assert_eq!(newest.wal.expected_last.as_deref(), Some(last.as_str()));
            compare_wal(&newest, &cluster.path("plain"));
            assert!(newest.map.files.len() > backup.map.files.len());
        }
        let newest = opened.open_backup(None, WalWanted::EndOfBackup).unwrap();
        assert_eq!(newest.info.id, backups.last().unwrap().id);
    }
    assert_eq!(open(&cluster.path("repo1")).backups().unwrap()[0].annotations["source"], "test");
    let bundled = open(&cluster.path("repo2")).open_backup(None, WalWanted::EndOfBackup).unwrap();
    assert!(bundled.objects.objects.iter().any(|object| object.path.contains("/bundle/")));

    // What a changed tree would break: another timeline, whose history must be shown.
    let oldest = open(&cluster.path("repo1")).backups().unwrap()[0].id.clone();
    switch_timeline(&mut cluster, tablespace);
    let repository = open(&cluster.path("repo1"));
    let second = repository.open_backup(None, WalWanted::EndOfBackup).unwrap();
    assert_eq!(second.timeline, 2);
    let history = latest(&second, "data/pg_wal/00000002.history");
    assert!(matches!(&history.content, Content::Inline(bytes) if bytes.starts_with(b"1\t")));
    compare_wal(&second, &cluster.path("plain"));
    let first = repository.open_backup(Some(&oldest), WalWanted::Latest).unwrap();
    let names = fs::read_dir(cluster.path("plain"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let last = names.filter(|name| name.len() == 24 && name.starts_with("00000001")).max(); // the stopping server's too
    assert_eq!((first.timeline, first.wal.expected_last), (1, last));

    damage::pgbackrest(&cluster);
    made::damaged_page(&mut cluster);
    made::offline(&mut cluster);
}

/// Restores a backup with its own tool and compares every byte.
fn restore_and_compare(cluster: &Cluster, repository: u32, tablespace: u32, backup: &Backup) {
    let restored = cluster.path(&format!("restored/{repository}"));
    let restored_tablespace = restored.with_extension("ts");
    cluster.pgbackrest(&[
        &format!("--repo={repository}"),
        &format!("--set={}", backup.info.id),
        &format!("--pg1-path={}", restored.display()),
        &format!("--tablespace-map={tablespace}={}", restored_tablespace.display()),
        "--type=immediate",
        "restore",
    ]);
    compare_with_restored(backup, &restored, &[(tablespace, restored_tablespace.clone())]);
    fs::remove_dir_all(restored).unwrap();
    fs::remove_dir_all(restored_tablespace).unwrap();
}

/// Recovers the newest backup of repository 1 to its end, which begins timeline 2, and backs that up.
fn switch_timeline(cluster: &mut Cluster, tablespace: u32) {
    cluster.stop();
    fs::rename(cluster.path("pg"), cluster.path("pg.old")).unwrap();
    fs::rename(cluster.path("ts"), cluster.path("ts.old")).unwrap();
    cluster.pgbackrest(&[
        "--repo=1",
        &format!("--tablespace-map={tablespace}={}", cluster.path("ts").display()),
        "--type=immediate",
        "--target-action=promote",
        "restore",
    ]);
    cluster.run(cluster.path("pg"));
    for _ in 0..200 {
        if cluster.sql("postgres", "SELECT pg_is_in_recovery()") == "f" {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    cluster.configure("gz");
    cluster.pgbackrest(&["--repo=1", "--type=full", "backup"]);
}

#[test]
fn basebackup() {
    let mut cluster = Cluster::start("1");
    let tablespace = fill(&cluster);
    base::plain(&cluster, tablespace);
    base::archives(&cluster, tablespace);
    base::without_label(&mut cluster, tablespace);
    damage::basebackup(&cluster, tablespace);
}

#[test]
fn what_is_no_repository_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let told = |path: &std::path::Path| {
        let location = Location { path: path.into(), ..Location::default() };
        let err = Repository::open(&location).unwrap_err();
        assert!(err.hint().is_some() && err.is_usage(), "{err}: the argument is wrong");
        err.to_string()
    };
    assert!(told(&dir.path().join("nothing")).contains("does not exist"));
    assert!(told(dir.path()).contains("is empty"));
    fs::write(dir.path().join("file"), b"x").unwrap();
    assert!(told(&dir.path().join("file")).contains("no directory"));
    assert!(told(dir.path()).contains("no repository"));
    fs::write(dir.path().join("backup.info"), b"x").unwrap();
    assert!(told(dir.path()).contains("inside a pgBackRest repository"));
    fs::create_dir(dir.path().join("tar")).unwrap();
    fs::write(dir.path().join("tar/base.tar.gz"), b"x").unwrap();
    let tar = open(&dir.path().join("tar"));
    assert!(tar.backups().unwrap()[0].unusable.as_ref().unwrap().contains("tar backup"));
    let err = tar.open_backup(None, WalWanted::Latest).unwrap_err();
    assert!(err.to_string().contains("tar backup (pg_basebackup -Ft) is not read yet"), "{err}");
}
