//! Directories made by the real `pg_basebackup`.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use pgthaw_source::location::Kind;
use pgthaw_source::map::{Content, Digest};
use pgthaw_source::repository::{Repository, WalWanted};
use pgthaw_source::{Location, SourceError};

use crate::cluster::{Cluster, copy};
use crate::support::{compare_wal, compare_with_restored, latest, open};

fn at(path: &Path, wal_archives: &[PathBuf]) -> Repository {
    let location =
        Location { path: path.into(), wal_archives: wal_archives.to_vec(), ..Location::default() };
    Repository::open(&location).unwrap()
}

/// Streamed and fetched WAL, each digest, a `pg_wal` link; each compared with what lies there.
pub fn plain(cluster: &Cluster, tablespace: u32) {
    let wal = cluster.path("base/linked.wal");
    let waldir = format!("--waldir={}", wal.display());
    let cases: [(&str, &[&str]); 4] = [
        ("streamed", &["-X", "stream"]),
        ("fetched", &["-X", "fetch", "--manifest-checksums=SHA512", "-R"]),
        ("nothing", &["-X", "stream", "--no-manifest"]),
        (
            "linked",
            &["-X", "stream", &waldir, "--manifest-checksums=NONE", "--manifest-force-encode"],
        ),
    ];
    for (name, arguments) in cases {
        let path = cluster.basebackup(name, tablespace, arguments);
        let mapped = cluster.path(&format!("base/{name}_{tablespace}"));
        let mut location = Location { path: path.clone(), ..Location::default() };
        if name == "nothing" {
            let refused = open(&path).open_backup(None, WalWanted::EndOfBackup).unwrap_err();
            assert!(matches!(refused, SourceError::UnprovenLink { .. }), "{refused}");
            location.tablespaces.insert(tablespace, Some(mapped.clone()));
        }
        if name == "linked" {
            let refused = open(&path).open_backup(None, WalWanted::EndOfBackup).unwrap_err();
            assert!(refused.hint().unwrap().contains("--wal-archive"), "{refused}");
            location.wal_archives.push(wal.clone());
        }
        let repository = Repository::open(&location).unwrap();
        assert_eq!((repository.kind(), repository.stanza()), (Kind::BaseBackup, None));
        let info = repository.backups().unwrap().remove(0);
        assert_eq!(
            (info.id.as_str(), info.postgres_major, info.unusable.as_deref()),
            (name, 15, None)
        );
        assert!(info.size > 20_000_000, "{}", info.size);
        assert!(info.stopped_at.unwrap() - info.started_at < 60, "{info:?}");
        assert_eq!(info.stop_lsn.is_some(), name != "nothing");
        let backup = repository.open_backup(Some(name), WalWanted::EndOfBackup).unwrap();
        compare_with_restored(&backup, &path, &[(tablespace, mapped.clone())]);
        compare_wal(&backup, &path.join("pg_wal"));
        assert!(backup.page_checksums && latest(&backup, "data/global/1262").page_checksums);
        assert!(!latest(&backup, "data/PG_VERSION").page_checksums);
        let digest = &latest(&backup, "data/PG_VERSION").digest;
        match name {
            "streamed" => assert!(matches!(digest, Some(Digest::Crc32c(_)))),
            "fetched" => assert!(matches!(digest, Some(Digest::Sha2(bytes)) if bytes.len() == 64)),
            _ => assert_eq!(*digest, None),
        }
        assert_eq!(backup.tablespaces[0].mapped.as_ref(), Some(&mapped));
        assert_eq!(backup.wal.stop_segment.is_some(), name != "nothing");
        assert!(backup.roots_shown.contains(&(format!("tablespace {tablespace}"), mapped)));
        assert!(backup.system_identifier.is_some());
        assert_eq!(backup.notes.len(), usize::from(name == "linked"), "{:?}", backup.notes);
    }

    // A directory that holds several lists each, oldest first.
    let several = open(&cluster.path("base"));
    let ids: Vec<_> = several.backups().unwrap().into_iter().map(|info| info.id).collect();
    assert_eq!(ids.len(), 4);
    assert_eq!(
        several.open_backup(Some("fetched"), WalWanted::EndOfBackup).unwrap().info.id,
        "fetched"
    );
    let err = several.open_backup(Some("monday"), WalWanted::EndOfBackup).unwrap_err();
    assert!(err.is_usage() && err.to_string().contains("streamed"), "{err}");

    // A relative link, and a tablespace inside the data directory.
    let path = cluster.path("base/relative");
    copy(&cluster.path("base/streamed"), &path);
    let link = path.join(format!("pg_tblspc/{tablespace}"));
    fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(format!("../../streamed_{tablespace}"), &link).unwrap();
    let streamed = cluster.path(&format!("base/streamed_{tablespace}"));
    let backup = open(&path).open_backup(None, WalWanted::EndOfBackup).unwrap();
    compare_with_restored(&backup, &path, &[(tablespace, streamed.clone())]);
    fs::remove_file(&link).unwrap();
    copy(&streamed, &link);
    let backup = open(&path).open_backup(None, WalWanted::EndOfBackup).unwrap();
    compare_with_restored(&backup, &path, &[(tablespace, link)]);
    assert_eq!(backup.tablespaces[0].mapped, None);
    fs::remove_dir_all(path).unwrap();
}

/// WAL from archive directories, in every form they have.
pub fn archives(cluster: &Cluster, tablespace: u32) {
    let path = cluster.basebackup("archived", tablespace, &["-X", "none"]);
    let start = cluster.archive();
    for _ in 0..6 {
        cluster.sql("crm", "DELETE FROM a WHERE random() < 0.1");
        cluster.archive();
    }
    let plain = cluster.path("plain");
    let mut names: Vec<String> = fs::read_dir(&plain)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.retain(|name| name.len() == 24 && name.as_str() >= start.as_str());
    names.sort();
    let last = names.last().unwrap();

    let err = open(&path).open_backup(None, WalWanted::EndOfBackup).unwrap_err();
    assert!(matches!(err, SourceError::MissingWal { .. }), "{err}");

    let kept = cluster.path("kept");
    let deep = kept.join("0000000100000000");
    fs::create_dir_all(&deep).unwrap();
    for (number, name) in names.iter().enumerate() {
        let bytes = fs::read(plain.join(name)).unwrap();
        match number % 6 {
            0 => fs::write(kept.join(format!("{name}.gz")), gzip(&bytes)).unwrap(),
            1 => fs::write(deep.join(format!("{name}.lz4")), lz4(&bytes)).unwrap(),
            2 => fs::write(
                kept.join(format!("{name}.zst")),
                zstd::bulk::compress(&bytes, 1).unwrap(),
            )
            .unwrap(),
            3 => fs::write(deep.join(name), gzip(&bytes)).unwrap(),
            4 => fs::write(kept.join(name), zstd::bulk::compress(&bytes, 1).unwrap()).unwrap(),
            _ => fs::write(kept.join(name), &bytes).unwrap(),
        }
    }
    fs::write(kept.join(format!("{last}.partial")), b"").unwrap();
    for archive in [&plain, &kept] {
        let repository = at(&path, std::slice::from_ref(archive));
        let end = repository.open_backup(None, WalWanted::EndOfBackup).unwrap();
        assert_eq!(end.wal.last, end.wal.stop_segment);
        compare_wal(&end, &plain);
        let newest = repository.open_backup(None, WalWanted::Latest).unwrap();
        assert_eq!(newest.wal.expected_last.as_ref(), Some(last));
        compare_wal(&newest, &plain);
        assert_eq!(
            repository.backups().unwrap()[0].archived_until.as_ref().unwrap().segment,
            *last
        );
    }

    // The last segment that was streamed ends where the backup ended: for the newest WAL the archive has the say.
    let streamed = cluster.path("base/streamed");
    let newest =
        at(&streamed, std::slice::from_ref(&plain)).open_backup(None, WalWanted::Latest).unwrap();
    assert_eq!(newest.wal.expected_last.as_ref(), Some(last));
    compare_wal(&newest, &plain);

    // Without a manifest the backup's history file in the archive tells its end.
    let nothing = cluster.path("base/nothing");
    let copy_of_it = cluster.path(&format!("base/nothing_{tablespace}"));
    let location = Location {
        path: nothing,
        wal_archives: vec![plain.clone()],
        tablespaces: [(tablespace, Some(copy_of_it))].into(),
        ..Location::default()
    };
    let end =
        Repository::open(&location).unwrap().open_backup(None, WalWanted::EndOfBackup).unwrap();
    assert!(end.wal.stop_segment.is_some() && end.wal.last == end.wal.stop_segment);

    // A hole with later segments behind it, and a segment that is too short.
    let hole = names[names.len() - 2].clone();
    let holed = cluster.path("holed");
    copy(&plain, &holed);
    fs::remove_file(holed.join(&hole)).unwrap();
    let repository = at(&path, std::slice::from_ref(&holed));
    let err = repository.open_backup(None, WalWanted::Latest).unwrap_err();
    assert!(
        matches!(&err, SourceError::WalHole { segment, later, .. } if *segment == hole && later == last),
        "{err}"
    );
    repository.open_backup(None, WalWanted::EndOfBackup).unwrap();
    fs::write(holed.join(&hole), b"short").unwrap();
    let err = repository_error(&path, &holed);
    assert!(err.contains(&hole) && err.contains("has 5"), "{err}");
}

fn repository_error(path: &Path, archive: &Path) -> String {
    at(path, &[archive.into()]).open_backup(None, WalWanted::Latest).unwrap_err().to_string()
}

/// A stopped server's directory, and `--backup-label`.
pub fn without_label(cluster: &mut Cluster, tablespace: u32) {
    let streamed = cluster.path("base/streamed");
    let label = streamed.join("backup_label");
    let own = fs::read(&label).unwrap();
    let given = cluster.path("label");
    fs::write(&given, &own).unwrap();
    let location = Location {
        path: streamed.clone(),
        backup_label: Some(given.clone()),
        ..Location::default()
    };
    let same =
        Repository::open(&location).unwrap().open_backup(None, WalWanted::EndOfBackup).unwrap();
    assert!(same.label.is_some());
    let snapshot =
        Location { path: streamed.clone(), atomic_snapshot: true, ..Location::default() };
    let err =
        Repository::open(&snapshot).unwrap().open_backup(None, WalWanted::Latest).unwrap_err();
    assert!(err.is_usage() && err.to_string().contains("--atomic-snapshot"), "{err}");
    fs::write(&given, [&own[..], b"\n"].concat()).unwrap();
    let err =
        Repository::open(&location).unwrap().open_backup(None, WalWanted::EndOfBackup).unwrap_err();
    assert!(err.is_usage(), "{err}");
    let copied = cluster.path("copied");
    copy(&streamed, &copied);
    fs::remove_file(copied.join("backup_label")).unwrap();

    // The manifest knows its own label.
    let err = open(&copied).open_backup(None, WalWanted::EndOfBackup).unwrap_err();
    assert!(err.hint().unwrap().contains("--backup-label"), "{err}");
    let mut location =
        Location { path: copied.clone(), backup_label: Some(given.clone()), ..Location::default() };
    let longer = [&own[..], b"\n"].concat();
    let other = String::from_utf8(own.clone()).unwrap().replace("base backup", "best backup");
    for (bytes, what) in [(&longer[..], "its size"), (other.as_bytes(), "its checksum")] {
        fs::write(&given, bytes).unwrap();
        let opened = Repository::open(&location).unwrap();
        let err = opened.open_backup(None, WalWanted::EndOfBackup).unwrap_err();
        let text = err.to_string();
        assert!(err.is_usage() && text.contains(what) && text.contains("label`"), "{err}");
    }
    fs::write(&given, &own).unwrap();
    let backup =
        Repository::open(&location).unwrap().open_backup(None, WalWanted::EndOfBackup).unwrap();
    assert!(backup.label.is_some());
    assert_eq!(latest(&backup, "data/backup_label").size, own.len() as u64);
    fs::write(&given, longer).unwrap();

    fs::remove_file(copied.join("backup_manifest")).unwrap();
    location.tablespaces =
        [(tablespace, Some(cluster.path(&format!("base/streamed_{tablespace}"))))].into();
    location.backup_label = None;
    let without =
        Repository::open(&location).unwrap().open_backup(None, WalWanted::EndOfBackup).unwrap();
    assert_eq!(without.label, None);
    location.backup_label = Some(given);
    let backup =
        Repository::open(&location).unwrap().open_backup(None, WalWanted::EndOfBackup).unwrap();
    assert!(
        backup.label.is_some() && latest(&backup, "data/backup_label").size == own.len() as u64 + 1
    );
    fs::remove_dir_all(&copied).unwrap();

    cluster.stop();
    let stopped = cluster.path("stopped");
    copy(&cluster.path("pg"), &stopped);
    let leading_out = open(&stopped).open_backup(None, WalWanted::EndOfBackup).unwrap_err();
    assert!(
        matches!(&leading_out, SourceError::LeadsOut { path, .. } if path.ends_with("pg_ident.conf")),
        "{leading_out}"
    );
    fs::remove_file(stopped.join("pg_ident.conf")).unwrap();
    // A copy's links lead to the original's tablespaces and WAL: neither is followed.
    let refused = open(&stopped).open_backup(None, WalWanted::EndOfBackup).unwrap_err();
    assert!(matches!(refused, SourceError::UnprovenLink { .. }), "{refused}");
    let (link, space) = (stopped.join("pg_wal"), cluster.path("stopped_space"));
    copy(&fs::canonicalize(stopped.join(format!("pg_tblspc/{tablespace}"))).unwrap(), &space);
    let wal = fs::canonicalize(&link).unwrap();
    let of_stopped = |archives: &[PathBuf], wanted| {
        let location = Location {
            path: stopped.clone(),
            wal_archives: archives.to_vec(),
            tablespaces: [(tablespace, Some(space.clone()))].into(),
            ..Location::default()
        };
        Repository::open(&location).unwrap().open_backup(None, wanted).unwrap()
    };
    let without = of_stopped(&[], WalWanted::EndOfBackup);
    assert_eq!(without.wal.first, None);
    assert!(
        without.notes.iter().any(|note| note.contains("--wal-archive DIR")),
        "{:?}",
        without.notes
    );
    let named = of_stopped(std::slice::from_ref(&wal), WalWanted::EndOfBackup);
    fs::remove_file(&link).unwrap();
    copy(&wal, &link);
    let backup = of_stopped(&[], WalWanted::EndOfBackup);
    assert_eq!((&named.wal.first, &named.wal.last), (&backup.wal.first, &backup.wal.last));
    assert!(backup.label.is_none() && backup.wal.expected_last.is_none());
    assert_eq!(backup.timeline, 1);
    assert!(backup.map.files.iter().all(|file| file.path.as_str() != "data/recovery.signal"));
    let pg_wal = fs::canonicalize(stopped.join("pg_wal")).unwrap();
    compare_wal(&backup, &pg_wal);
    assert!(
        backup.map.files.iter().all(|file| !file.path.as_str().starts_with("data/pg_replslot/"))
    );
    let nothing_new = of_stopped(&[cluster.path("plain")], WalWanted::Latest);
    assert_eq!((nothing_new.wal.expected_last, &nothing_new.map), (None, &backup.map));
    cluster.run(cluster.path("pg"));
    let last = cluster.archive();
    let newest = of_stopped(&[cluster.path("plain")], WalWanted::Latest);
    assert_eq!(newest.wal.expected_last.as_ref(), Some(&last));
    let running = open(&cluster.path("pg")).open_backup(None, WalWanted::EndOfBackup).unwrap_err();
    assert!(matches!(running, SourceError::InUse(_)), "{running}");
    let first = latest(&newest, &format!("data/pg_wal/{last}"));
    assert!(
        matches!(first.content, Content::Stored { object, .. }
        if newest.objects.objects[object.0 as usize].root > 1),
        "the archive's copy goes first"
    );
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn lz4(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = lz4_flex::frame::FrameEncoder::new(Vec::new());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}
