//! The main job: databases out of backups made by the real tools, equal to their source.

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use pgthaw_testkit::{
    Fixture, ODD_NAME, PgBackRest, RestoreTarget, Scratch, User, fingerprint,
    restore_dump_into_fresh_server, tree_hash,
};
use support::{Pgthaw, assert_equal};

#[test]
fn every_database_of_a_pgbackrest_repository_equals_its_source() {
    let (fixture, pgthaw) = (Fixture::get(), Pgthaw::new());
    let (before, leftovers) = (tree_hash(&fixture.lz4.path), pgthaw.leftovers());
    for label in &fixture.lz4.labels {
        let target = pgthaw.target(label);
        pgthaw.export(
            &fixture.lz4.path,
            &[],
            &target,
            &["--all", "--exclude-database", "postgres", "--backup", label],
        );
        assert_equal(&target, &fixture.expected, &Fixture::DATABASES);
        std::fs::remove_dir_all(target).unwrap();
    }
    assert_eq!(leftovers.check(), [""; 0]);
    assert_eq!(tree_hash(&fixture.lz4.path), before, "the repository was touched");
}

#[test]
fn bundled_zst_and_gz_with_uncompressed_increments_are_read() {
    let (fixture, pgthaw) = (Fixture::get(), Pgthaw::new());
    for (name, repository) in [("zst", &fixture.zst), ("gz", &fixture.gz)] {
        for label in &repository.labels {
            let target = pgthaw.target(&format!("{name}-{label}"));
            pgthaw.export(
                &repository.path,
                &["crm", "sales"],
                &target,
                &["--backup", label, "--verify-source"],
            );
            assert_equal(&target, &fixture.expected, &["crm", "sales"]);
        }
    }
}

#[test]
fn base_backups_with_streamed_fetched_and_archived_wal_are_read() {
    let (fixture, pgthaw) = (Fixture::get(), Pgthaw::new());
    let leftovers = pgthaw.leftovers();
    let archive = fixture.wal_archive.display().to_string();
    let tablespace = fixture.bare.tablespace_option();
    let cases = [
        ("stream", &fixture.stream, &[][..]),
        ("fetch", &fixture.fetch, &[][..]),
        ("bare", &fixture.bare, &["--wal-archive", archive.as_str(), tablespace.as_str()][..]),
    ];
    for (name, plain, more) in cases {
        let target = pgthaw.target(name);
        // Not all of the fixture: other tests restore from it, and pgBackRest logs beside its repository.
        let backup = [&plain.dir, &plain.tablespace, &fixture.wal_archive];
        let before = backup.map(|path| tree_hash(path));
        pgthaw.export(&plain.dir, &["crm", "sales", ODD_NAME], &target, more);
        assert_equal(&target, &fixture.expected, &["crm", "sales", ODD_NAME]);
        let after = backup.map(|path| tree_hash(path));
        assert_eq!(after, before, "{name}: the backup was touched");
    }
    assert_eq!(leftovers.check(), [""; 0]);
}

#[test]
fn the_newest_point_is_the_end_of_the_archived_wal() {
    let (fixture, pgthaw) = (Fixture::get(), Pgthaw::new());
    let target = pgthaw.target("latest");
    let first = &fixture.lz4.labels[0];
    pgthaw.export(
        &fixture.lz4.path,
        &["crm", "sales", "warehouse"],
        &target,
        &["--backup", first, "--target-latest"],
    );
    let fresh = restore_dump_into_fresh_server(&target);
    for database in ["crm", "sales", "warehouse"] {
        let differences = fixture.lz4.latest[database].differences(&fingerprint(&fresh, database));
        // Unlogged tables are empty after recovery, and a sequence may be up to 32 ahead.
        let expected =
            |line: &&String| line.contains("session_cache") || line.starts_with("sequence ");
        let unexpected: Vec<_> = differences.iter().filter(|line| !expected(line)).collect();
        assert!(unexpected.is_empty(), "{database}: {unexpected:#?}");
    }
}

#[test]
fn a_dump_is_kept_when_that_is_asked_for() {
    let (fixture, pgthaw) = (Fixture::get(), Pgthaw::new());
    let leftovers = pgthaw.leftovers();
    let target = pgthaw.target("export");
    let (_, err) = pgthaw.export(&fixture.lz4.path, &["crm"], &target, &["--keep-dump"]);
    let kept = pgthaw.dump().join(format!("pgthaw-{}-kept", pgthaw.session_id()));
    assert!(err.contains(&format!("the dump stays in `{}`", kept.display())), "{err}");
    let files = |directory: &Path| -> BTreeMap<String, Vec<u8>> {
        let entries = std::fs::read_dir(directory).unwrap().map(Result::unwrap);
        let files = entries.filter(|entry| entry.file_type().unwrap().is_file());
        let named = files.map(|file| (file.file_name().into_string().unwrap(), file.path()));
        named.map(|(name, path)| (name, std::fs::read(path).unwrap())).collect()
    };
    assert_eq!(files(&kept.join("crm")), files(&target.join("crm")));
    assert!(files(&kept).keys().eq(["globals.sql"]), "no marker that would let it be removed");
    std::fs::remove_dir_all(kept).unwrap();
    assert_eq!(leftovers.check(), [""; 0]);
}

#[test]
fn an_export_says_what_it_is() {
    let (fixture, pgthaw) = (Fixture::get(), Pgthaw::new());
    let target = pgthaw.target("said");
    let (_, err) = pgthaw.export(&fixture.lz4.path, &["sales"], &target, &["--no-role-passwords"]);
    let first = err.lines().next().unwrap_or_default();
    let newest = fixture.lz4.labels.last().unwrap();
    assert!(
        first.starts_with(&format!("backup {newest}, ended "))
            && first.contains("--target-latest for newest"),
        "{first}"
    );
    let export = std::fs::read(target.join("export.json")).unwrap();
    assert!(export.ends_with(b"}\n"));
    let export: serde_json::Value = serde_json::from_slice(&export).unwrap();
    assert_eq!(export["backup"]["id"], **newest);
    assert_eq!(export["databases"][0]["unlogged_tables"][0], "public.session_cache");
    assert_eq!(export["databases"][0]["verified"]["none"], 0);
    let globals = std::fs::read_to_string(target.join("globals.sql")).unwrap();
    assert!(
        globals.contains("CREATE ROLE alice") && !globals.contains("SCRAM-SHA-256"),
        "{globals}"
    );
    for word in [pgthaw.scratch.path().to_str().unwrap(), "/run/media"] {
        assert!(!globals.contains(word), "a path of ours in globals.sql: {globals}");
    }
    use std::os::unix::fs::PermissionsExt;
    let mode =
        |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(
        (mode(&target), mode(&target.join("sales")), mode(&target.join("globals.sql"))),
        (0o700, 0o700, 0o600)
    );
    assert_eq!(mode(&target.join("sales/toc.dat")), 0o600);
}

/// What traffic has moved, too: row by row what the backup's own tool brings back.
#[test]
fn a_dump_agrees_with_a_restore_by_pgbackrest() {
    let (fixture, pgthaw, restored) = (Fixture::get(), Pgthaw::new(), Scratch::new());
    // Restoring reads the repository only, but pgBackRest locks and logs beside it.
    let made = PgBackRest::existing(fixture.lz4.path.parent().unwrap(), "demo");
    let cases = [
        ("full", &fixture.lz4.labels[0], &[][..]),
        ("incr", &fixture.lz4.labels[2], &[]),
        ("latest", &fixture.lz4.labels[1], &["--target-latest"]),
    ];
    for (name, label, more) in cases {
        let target = pgthaw.target(name);
        let options = [&["--backup", label.as_str()], more].concat();
        pgthaw.export(&fixture.lz4.path, &["crm", "sales", "warehouse"], &target, &options);
        let export = std::fs::read(target.join("export.json")).unwrap();
        let export: serde_json::Value = serde_json::from_slice(&export).unwrap();
        let lsn = export["recovery"]["lsn"].as_str().unwrap();
        let mut ends = vec![("the same LSN", RestoreTarget::Lsn(lsn))];
        ends.push(match more {
            [] => ("the end of the backup", RestoreTarget::EndOfBackup),
            _ => ("the end of the archive", RestoreTarget::Latest),
        });
        let fresh = restore_dump_into_fresh_server(&target);
        for (number, (end, restore)) in ends.into_iter().enumerate() {
            let dir = restored.join(format!("{name}{number}"));
            let server = made.restore_and_start(&dir, label, restore);
            for database in ["crm", "sales", "warehouse"] {
                let (theirs, ours) =
                    (fingerprint(&server, database), fingerprint(&fresh, database));
                assert_eq!(theirs.differences(&ours), [""; 0], "{name}, {end}: {database}");
            }
            drop(server);
            std::fs::remove_dir_all(dir).unwrap();
        }
    }
}

/// Without root, sudo or a session of logind: mounted by `fusermount3`, everything run by the account itself.
#[test]
fn an_ordinary_user_exports() {
    let (fixture, user) = (Fixture::get(), User::ordinary());
    let (pgthaw, backups) = (Pgthaw::of(user.clone()), Scratch::new());
    let leftovers = pgthaw.leftovers();
    let repository = fixture.zst.copy_for(&user, &backups.join("repository"));
    let plain = fixture.stream.copy_for(&user, &backups.join("plain"));
    for (name, path) in [("pgbackrest", &repository.path), ("basebackup", &plain.dir)] {
        let before = tree_hash(path);
        let target = pgthaw.target(name);
        pgthaw.export(path, &["crm", "sales"], &target, &[]);
        let owners = |path: &std::path::Path| {
            let found = std::fs::metadata(path).unwrap();
            (
                std::os::unix::fs::MetadataExt::uid(&found),
                std::os::unix::fs::MetadataExt::gid(&found),
            )
        };
        assert_eq!(owners(&target.join("crm/toc.dat")), (user.uid, user.gid));
        assert_equal(&target, &fixture.expected, &["crm", "sales"]);
        assert_eq!(tree_hash(path), before, "{name}: the backup was touched");
    }
    assert_eq!(leftovers.check(), [""; 0], "{}", pgthaw.logs());
}
