//! The verb `seal`: everything is verified that can be, then `SHA256SUMS` and, last of all, `export.json` are written. A dump that is to
//! be kept stays from then on.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Json;
use jiff::Timestamp;
use pgthaw_mover::{
    EXPORT_JSON, GLOBALS_SQL, SHA256SUMS, SumEntry, file_name_for_database, parse_sha256sums,
};
use pgthaw_session::observed::{Failure, InstanceReady, Progress};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::Serialize;

use super::delivering::target;
use super::dumping::{moving, refuse_faults};
use super::{Agent, begin_once};
use crate::internal::mount::CoverageCount;
use crate::leftovers::MARKER_FILE;

/// What `export.json` says. Its keys are part of the command line's contract.
#[derive(Debug, Serialize)]
struct ExportJson {
    format: u32,
    pgthaw_version: &'static str,
    session: String,
    completed_at: Timestamp,
    repository: Repository,
    backup: Backup,
    recovery: Recovery,
    postgres_version: String,
    pg_dump_version: String,
    pg_dump_arguments: Vec<String>,
    isolation: String,
    globals: bool,
    role_passwords: bool,
    source_verified_whole: bool,
    databases: Vec<Database>,
    rolled_back_transactions: Vec<String>,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Repository {
    kind: String,
    path: String,
    stanza: Option<String>,
}

#[derive(Debug, Serialize)]
struct Backup {
    id: String,
    started_at: Option<Timestamp>,
    stopped_at: Option<Timestamp>,
}

#[derive(Debug, Serialize)]
struct Recovery {
    target: &'static str,
    lsn: String,
    timeline: u32,
    last_transaction: Option<String>,
}

#[derive(Debug, Serialize)]
struct Database {
    name: String,
    directory: String,
    database_bytes: u64,
    dump_files: usize,
    /// Unlogged tables are empty after any recovery.
    unlogged_tables: Vec<String>,
    verified: CoverageCount,
}

/// Begins to complete the export.
pub fn begin(agent: Arc<Agent>) -> Json<()> {
    let work = agent.clone();
    begin_once(&agent, |view| &mut view.seal, async move {
        let running = work.running.lock().await;
        let Some(running) = running.as_ref() else {
            return Err(Failure::new("the instance does not run"));
        };
        let (sealing, pg_dump) = (work.clone(), running.binaries.version.clone());
        let oids: Vec<u32> = running.databases.values().map(|database| database.oid).collect();
        let sealed = tokio::task::spawn_blocking(move || seal(&sealing, &oids, pg_dump)).await;
        sealed.unwrap_or_else(|err| {
            Err(Failure::new(format!("completing the export ended early: {err}")))
        })
    })
}

/// Returns the bytes of the export in `target` if it is complete and `session` made it: an attempt that died after its last
/// write could not say so any more.
pub fn sealed_before(target: &Path, session: &str) -> Option<u64> {
    let json = std::fs::read(target.join(EXPORT_JSON)).ok()?;
    let json: serde_json::Value = serde_json::from_slice(&json).ok()?;
    let sums = std::fs::read_to_string(target.join(SHA256SUMS)).ok()?;
    let entries = parse_sha256sums(&target.join(SHA256SUMS), &sums).ok()?;
    let bytes = || size_of_files(target, &entries);
    (json.get("session")?.as_str()? == session).then(bytes)
}

fn size_of_files(target: &Path, sums: &[SumEntry]) -> u64 {
    let names = sums.iter().map(|sum| sum.path.as_str()).chain([SHA256SUMS, EXPORT_JSON]);
    names.filter_map(|name| std::fs::metadata(target.join(name)).ok()).map(|meta| meta.len()).sum()
}

fn seal(agent: &Arc<Agent>, oids: &[u32], pg_dump_version: String) -> Result<u64, Failure> {
    let Progress::Done(ready) = agent.view.borrow().instance.clone() else {
        return Err(Failure::new("the instance is not ready"));
    };
    let request = &agent.assignment.request;
    refuse_faults(agent, oids)?;
    let report = agent.mount()?.report()?;
    if report.decoded_again_bytes > report.decoded_bytes / 4 {
        agent.tell(format!(
            "{} MB were decoded again because the cache was too small; --cache-size makes it larger",
            report.decoded_again_bytes / 1_000_000
        ));
    }
    let target = target(agent)?;
    let sums_of = |name: &str| {
        let kept = target.kept_sums(name).map_err(moving)?;
        kept.ok_or_else(|| {
            Failure::new(format!("the checksums of {name} are no longer in the target"))
        })
    };
    let mut sums: Vec<SumEntry> = Vec::new();
    let mut databases = Vec::new();
    for database in &ready.databases {
        let directory = file_name_for_database(&database.name);
        let entries = sums_of(&directory)?;
        let note = target.kept_note(&directory).map_err(moving)?;
        databases.push(Database {
            name: database.name.clone(),
            directory,
            database_bytes: database.bytes,
            dump_files: entries.len(),
            unlogged_tables: database.unlogged_tables.clone(),
            verified: note.and_then(|note| serde_json::from_str(&note).ok()).unwrap_or_default(),
        });
        sums.extend(entries);
    }
    if request.globals {
        sums.extend(sums_of(GLOBALS_SQL)?);
    }
    if request.replace {
        target.remove_replaced().map_err(moving)?;
        for database in &ready.databases {
            let directory = file_name_for_database(&database.name);
            let own: Vec<String> = sums
                .iter()
                .filter_map(|sum| {
                    sum.path.strip_prefix(&format!("{directory}/")).map(str::to_owned)
                })
                .collect();
            let names: Vec<&str> = own.iter().map(String::as_str).collect();
            target.publish_database(&database.name, &names).map_err(moving)?;
        }
    }
    if request.globals {
        target.publish_file(GLOBALS_SQL).map_err(moving)?;
    }
    let json = export_json(agent, &ready, databases, pg_dump_version);
    let mut json = serde_json::to_vec_pretty(&json).expect("it is plain data");
    json.push(b'\n');
    sums.sort_by(|a, b| a.path.cmp(&b.path));
    target.write_sha256sums(&sums).map_err(moving)?;
    target.write_export_json(&json).map_err(moving)?;
    let bytes = target.export_bytes(&sums).map_err(moving)?;
    target.remove_staging().map_err(moving)?;
    if request.keep_dump {
        let host = request.staging.as_ref().map(|host| format!("{host}:")).unwrap_or_default();
        agent.tell(match keep_dump(agent) {
            Ok(kept) => format!("the dump stays in `{host}{}`, yours to remove", kept.display()),
            Err(err) => format!("the dump could not be kept: {err}"),
        });
    }
    Ok(bytes)
}

/// Takes the dump out of the session's hands, which removes all else that it made: another name, and no marker.
fn keep_dump(agent: &Agent) -> io::Result<PathBuf> {
    let dump = &agent.assignment.place.dump_directory;
    let kept = dump.with_file_name(format!("pgthaw-{}-kept", agent.assignment.session));
    renameat_with(CWD, dump, CWD, &kept, RenameFlags::NOREPLACE)?;
    std::fs::remove_file(kept.join(OsStr::from_bytes(MARKER_FILE.to_bytes())))?;
    Ok(kept)
}

fn export_json(
    agent: &Agent,
    ready: &InstanceReady,
    databases: Vec<Database>,
    pg_dump_version: String,
) -> ExportJson {
    let assignment = &agent.assignment;
    let (request, facts) = (&assignment.request, &assignment.facts);
    let time = |seconds: i64| Timestamp::from_second(seconds).ok();
    let end = assignment.recovery_end.as_ref().unwrap_or(&ready.recovery_end);
    ExportJson {
        format: 1,
        pgthaw_version: env!("CARGO_PKG_VERSION"),
        session: assignment.session.clone(),
        completed_at: Timestamp::now(),
        repository: Repository {
            kind: facts.kind.clone(),
            path: request.repository.path.display().to_string(),
            stanza: facts.stanza.clone(),
        },
        backup: Backup {
            id: facts.backup.id.clone(),
            started_at: time(facts.backup.started_at),
            stopped_at: facts.backup.stopped_at.and_then(time),
        },
        recovery: Recovery {
            target: match request.recovery {
                pgthaw_session::RecoveryChoice::EndOfBackup => "end-of-backup",
                pgthaw_session::RecoveryChoice::Latest => "latest",
            },
            lsn: end.lsn.clone(),
            timeline: end.timeline,
            last_transaction: end.last_transaction.clone(),
        },
        postgres_version: ready.server_version.clone(),
        pg_dump_version,
        pg_dump_arguments: request.pg_dump_arguments.clone(),
        isolation: ready.isolation.clone(),
        globals: request.globals,
        role_passwords: request.role_passwords,
        source_verified_whole: request.verify_source,
        databases,
        rolled_back_transactions: ready.rolled_back.clone(),
        warnings: ready.warnings.clone(),
    }
}
