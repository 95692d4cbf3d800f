//! A session and backups that the tests of this module render.

use pgthaw_session::status::DatabaseStatus;
use pgthaw_session::{DatabaseState, SessionState, Status, Step};

/// A session that has delivered one database and dumps the other.
pub fn status() -> Status {
    let database = |name: &str, state, bytes, tables_done| DatabaseStatus {
        name: name.into(),
        state,
        error: None,
        bytes,
        tables_done,
        tables_total: 45,
    };
    Status {
        id: "20261122-101112-kqvd".into(),
        kind: "export".into(),
        state: SessionState::Running,
        step: Step::Dump,
        created_at: "2026-11-22T10:11:12Z".parse().expect("a time"),
        attempts: 1,
        detail: None,
        error: None,
        hint: None,
        repository: "/backups/prod".into(),
        backup: Some("20261122-011000F".into()),
        staging: None,
        target_host: None,
        user: None,
        ssh_keys_of: None,
        target: "/srv/exports/monday".into(),
        dump_way: None,
        reads_way: None,
        recovery_lsn: Some("0/5000100".into()),
        bytes_done: 50_000_000,
        bytes_total: 60_000_000,
        databases: vec![
            database("crm", DatabaseState::Delivered, 40_000_000, 45),
            database("my sales", DatabaseState::Dumping, 10_000_000, 12),
        ],
    }
}
