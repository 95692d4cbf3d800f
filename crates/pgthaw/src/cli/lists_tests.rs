//! Tables and JSON, word for word.

use pgthaw_session::{SessionState, TakenWay};
use pgthaw_source::repository::{BackupType, WalReach};
use serde_json::json;

use super::*;
use crate::cli::samples;
use crate::wire::{CheckReport, CleanedObject};

fn zone() -> TimeZone {
    TimeZone::fixed(jiff::tz::offset(1))
}

fn backup() -> BackupInfo {
    BackupInfo {
        id: "20261122-011000F".into(),
        backup_type: BackupType::Full,
        started_at: 1_795_306_200,
        stopped_at: Some(1_795_306_244),
        size: 4_700_000_000,
        stored_size: Some(900_000_000),
        postgres_major: 15,
        prior: None,
        damaged: false,
        annotations: BTreeMap::new(),
        archived_until: Some(WalReach {
            segment: "000000010000000000000012".into(),
            modified: 1_795_312_711,
            gap: None,
        }),
        start_lsn: None,
        stop_lsn: None,
        unusable: None,
    }
}

fn answer(backups: Vec<BackupInfo>) -> BackupsAnswer {
    BackupsAnswer { kind: "pgbackrest".into(), stanza: Some("main".into()), backups }
}

#[test]
fn backups_are_a_table() {
    let second = BackupInfo {
        id: "20261122-011000F_20261122-020000I".into(),
        backup_type: BackupType::Incremental,
        stopped_at: None,
        stored_size: None,
        postgres_major: 0,
        archived_until: None,
        ..backup()
    };
    let want = "\
pgBackRest repository /backups/prod, stanza main
 id                                | type        | started                | ended                  |   size |   stored | PostgreSQL | WAL archived up to
-----------------------------------+-------------+------------------------+------------------------+--------+----------+------------+------------------------
 20261122-011000F                  | full        | 2026-11-22 01:10:00+01 | 2026-11-22 01:10:44+01 | 4.4 GB | 858.3 MB | 15         | 2026-11-22 02:58:31+01
 20261122-011000F_20261122-020000I | incremental | 2026-11-22 01:10:00+01 |                        | 4.4 GB |          |            |
";
    assert_eq!(backups(Path::new("/backups/prod"), &answer(vec![backup(), second]), &zone()), want);
}

#[test]
fn backups_with_something_wrong_say_so() {
    let unusable =
        BackupInfo { unusable: Some("it is encrypted".into()), damaged: true, ..backup() };
    let damaged = BackupInfo { damaged: true, ..backup() };
    let mut holed = damaged.clone();
    holed.archived_until.as_mut().unwrap().gap = Some("000000010000000000000013".into());
    let listed = answer(vec![backup(), unusable, damaged, holed]);
    let text = backups(Path::new("/b"), &listed, &zone());
    let remarks: Vec<&str> =
        text.lines().skip(1).filter_map(|line| line.split('|').nth(8)).map(str::trim).collect();
    assert_eq!(
        remarks,
        [
            "remark",
            "",
            "unusable: it is encrypted",
            "the backup tool found damaged pages",
            "the backup tool found damaged pages; WAL segment 000000010000000000000013 is missing, later ones are there",
        ]
    );
    assert_eq!(
        backups(Path::new("/b"), &answer(vec![]), &zone()),
        "pgBackRest repository /b, stanza main: no backups\n"
    );
}

#[test]
fn backups_for_programs() {
    let got =
        serde_json::to_value(backups_json(Path::new("/backups/prod"), &answer(vec![backup()])))
            .unwrap();
    let want = json!([{
        "repository": "/backups/prod",
        "kind": "pgbackrest",
        "stanza": "main",
        "id": "20261122-011000F",
        "type": "full",
        "started_at": "2026-11-22T00:10:00Z",
        "stopped_at": "2026-11-22T00:10:44Z",
        "size": 4_700_000_000_u64,
        "stored_size": 900_000_000,
        "postgres_major": 15,
        "prior": null,
        "damaged": false,
        "archived_until": "2026-11-22T01:58:31Z",
        "archived_segment": "000000010000000000000012",
        "archive_gap": null,
        "annotations": {},
        "unusable": null,
    }]);
    assert_eq!(got, want);
}

#[test]
fn databases_are_a_table_in_the_order_of_their_making() {
    let database = |oid, name: &str, bytes| BackupDatabase {
        oid,
        name: name.into(),
        bytes,
        relations: 300,
        largest_relation: 0,
        template: false,
        allows_connections: true,
        damaged: false,
        collate: Some("C.UTF-8".into()),
        ctype: None,
    };
    let template = BackupDatabase {
        template: true,
        allows_connections: false,
        ..database(4, "template0", 7_000_000)
    };
    let list = DatabasesAnswer {
        backup: backup(),
        databases: vec![
            database(16384, "crm", 80_000_000),
            database(5, "two\nlines", 100),
            template,
        ],
    };
    let want = "\
backup 20261122-011000F (full), ended 2026-11-22 01:10:44+01, PostgreSQL 15
 name       |      size | relations | collate | ctype | remark
------------+-----------+-----------+---------+-------+----------------------------------
 template0  |    6.7 MB |       300 | C.UTF-8 |       | template, accepts no connections
 two\\nlines | 100 bytes |       300 | C.UTF-8 |       |
 crm        |   76.3 MB |       300 | C.UTF-8 |       |
";
    assert_eq!(databases(&list, &zone()), want);
    let oids: Vec<u32> = by_oid(&list.databases).iter().map(|database| database.oid).collect();
    assert_eq!(oids, [4, 5, 16384]);
}

#[test]
fn a_check_tells_errors_last() {
    let mut report = CheckReport {
        passed: vec!["PostgreSQL 15.18 in /usr/lib/postgresql/15/bin".into()],
        ..CheckReport::default()
    };
    report.error("target `/o` is not empty", Some("name another directory".into()));
    report.warning("the repository is older than a day", None);
    let want = "\
backup X; recovering to the end of the backup
ok: PostgreSQL 15.18 in /usr/lib/postgresql/15/bin
warning: the repository is older than a day
error: target `/o` is not empty
  remedy: name another directory
1 error would refuse the export.
";
    let line = "backup X; recovering to the end of the backup";
    assert_eq!(check(&CheckAnswer { recovery_line: line.into(), report }), want);
    let nothing = CheckAnswer { recovery_line: line.into(), report: CheckReport::default() };
    assert_eq!(check(&nothing), format!("{line}\nNothing refuses the export.\n"));
}

#[test]
fn sessions_are_a_table() {
    let mut ended = samples::status();
    ended.state = SessionState::Succeeded;
    ended.databases = vec![ended.databases[0].clone(); 5];
    let want = "\
 id                   | state     | doing   | created                | databases               |  delivered | target
----------------------+-----------+---------+------------------------+-------------------------+-----------+---------------------
 20261122-101112-kqvd | running   | dumping | 2026-11-22 11:11:12+01 | crm, my sales           |   47.7 MB | /srv/exports/monday
 20261122-101112-kqvd | succeeded |         | 2026-11-22 11:11:12+01 | crm, crm, crm, and 2 more |   47.7 MB | /srv/exports/monday
";
    let got = sessions(&[samples::status(), ended], &zone());
    assert_eq!(squeezed(&got), squeezed(want));
    assert_eq!(sessions(&[], &zone()), "no sessions\n");
}

/// Without the padding of columns.
fn squeezed(text: &str) -> Vec<Vec<String>> {
    let lines = text.lines().filter(|line| !line.starts_with("--"));
    lines.map(|line| line.split('|').map(|cell| cell.trim().to_owned()).collect()).collect()
}

#[test]
fn a_session_tells_all_of_itself() {
    let mut status = samples::status();
    status.state = SessionState::Failed;
    status.error = Some("first\nsecond".into());
    status.hint = Some("make room".into());
    let want = "\
session       20261122-101112-kqvd
kind          export
state         failed
error         first
error         second
hint          make room
created       2026-11-22 11:11:12+01
attempts      1
repository    /backups/prod
backup        20261122-011000F
recovered to  0/5000100
target        /srv/exports/monday
delivered     47.7 MB

 database | state     |  dumped | tables   | error
----------+-----------+---------+----------+-------
 crm      | delivered | 38.1 MB | 45 of 45 |
 my sales | dumping   |  9.5 MB | 12 of 45 |
";
    assert_eq!(session(&status, &zone()), want);
    status.databases.clear();
    assert!(session(&status, &zone()).ends_with("delivered     47.7 MB\n"));
    let text = "directly from db-stage to port 47000 of files".into();
    status.dump_way = Some(TakenWay { direct: true, text });
    let way = "\ndump goes     directly from db-stage to port 47000 of files\n";
    assert!(session(&status, &zone()).contains(way));
}

#[test]
fn a_session_for_programs_has_the_keys_of_the_contract() {
    let got = serde_json::to_value(samples::status()).unwrap();
    for key in ["id", "kind", "state", "step", "created_at", "databases"] {
        assert!(got.get(key).is_some(), "{key}");
    }
    assert_eq!(got["state"], "running");
    assert_eq!(got["created_at"], "2026-11-22T10:11:12Z");
    for key in ["name", "state", "error", "bytes"] {
        assert!(got["databases"][0].get(key).is_some(), "{key}");
    }
}

#[test]
fn a_log_has_times() {
    let line = LogLine { at: "2026-11-22T10:11:12Z".parse().unwrap(), text: "one\ntwo\n".into() };
    assert_eq!(log_line(&line, &zone()), "2026-11-22 11:11:12+01  one\n    two\n");
}

#[test]
fn cleaning_names_every_object() {
    let object =
        CleanedObject { session: "s1".into(), kind: "mount".into(), name: "/run/x".into() };
    let session = CleanedObject { session: "s1".into(), kind: "session".into(), name: "s1".into() };
    let failed = vec!["session s2: busy".into()];
    let answer = CleanAnswer { removed: vec![object, session], failed };
    assert_eq!(
        cleaned(&answer, true),
        "would remove mount /run/x of session s1\nwould cancel session s1\nnot removed: session s2: busy\n"
    );
    assert_eq!(
        cleaned(&answer, false),
        "removed mount /run/x of session s1\ncanceled session s1\nnot removed: session s2: busy\n"
    );
    assert_eq!(cleaned(&CleanAnswer::default(), false), "nothing is left to remove\n");
}
