//! The work directory, the dump directory and the target: can they be used, do they get in each other's way or in the
//! repository's, and is there room?

use std::path::Path;

use pgthaw_mover::{Access, EarlierExport, TargetReport, TargetState, Trust};
use pgthaw_session::ExportRequest;

use super::environment::{Directory, Environment};
use crate::agent::space::{Medium, Room, human_size};
use crate::wire::{BackupDatabase, CheckPart, CheckReport, CheckTask};

/// WAL takes up to so much room in the write layer: images of pages are stored compressed in it, and written whole.
const WAL_FACTOR: u64 = 3;
/// Longest path of a Unix socket, in bytes: `sun_path` less its end (unix(7)).
const SOCKET_PATH_MAX: usize = 107;
/// A session's id, as long as they are, for a check without a session.
const SAMPLE_ID: &str = "20260101-000000-abcd";

/// Judges the three directories.
pub fn judge(
    report: &mut CheckReport,
    environment: &Environment,
    task: &CheckTask,
    chosen: &[&BackupDatabase],
) {
    if task.part != CheckPart::Target {
        private(report, &environment.work, "work", "--work-dir");
        match &environment.dump {
            Some(dump) if dump.path != environment.work.path || dump.problem.is_none() => {
                private(report, dump, "dump", "--dump-dir");
            }
            Some(_) => {} // the same directory, with the problem just told
            None => report.error(
                "no directory for the dump can be used",
                Some("name one with --dump-dir".into()),
            ),
        }
        socket_path(report, &environment.work.path, task.session.as_deref());
    }
    if task.part != CheckPart::Staging {
        match &environment.target.report {
            Ok(target) => self::target(report, target, task),
            Err(failure) => report.error(&failure.message, failure.hint.clone()),
        }
    }
    nesting(report, environment, task);
    room(report, environment, task, chosen);
}

/// A directory in which a private one is to be made.
fn private(report: &mut CheckReport, directory: &Directory, what: &str, option: &str) {
    let path = directory.path.display();
    let remedy = Some(format!("name another directory with {option}"));
    if let Some(problem) = &directory.problem {
        report.error(format!("the {what} directory `{path}` cannot be used: {problem}"), remedy);
        return;
    }
    report.passed.push(format!("{what} directory `{path}`"));
    let medium = match directory.room.map(|room| room.medium) {
        Some(Medium::Network) => "lies on another machine (NFS or SMB): slow, and gone with it",
        Some(Medium::Fuse) => "lies on a FUSE file system, and depends on its daemon",
        Some(Medium::Memory) => "lies in memory (tmpfs): what is written there takes memory away",
        Some(Medium::Disk) | None => return,
    };
    report.warning(format!("the {what} directory `{path}` {medium}"), remedy);
}

/// Paths of Unix sockets are short; PostgreSQL would refuse to start.
fn socket_path(report: &mut CheckReport, work: &Path, session: Option<&str>) {
    let session = session.unwrap_or(SAMPLE_ID);
    let socket = work.join(format!("pgthaw-{session}")).join("instance/.s.PGSQL.5432");
    let length = socket.as_os_str().len();
    if length > SOCKET_PATH_MAX {
        let path = work.display();
        let text = format!(
            "the path of the work directory `{path}` is too long by {} bytes",
            length - SOCKET_PATH_MAX
        );
        report
            .usage_error(text, Some("name a directory with a shorter path with --work-dir".into()));
    }
}

fn target(report: &mut CheckReport, seen: &TargetReport, task: &CheckTask) {
    let path = task.request.target.display();
    if let Some(other) = seen.other_sessions.first() {
        let text = format!("target `{path}` belongs to session {other}");
        let remedy = format!(
            "`pgthaw retry {other}` or `pgthaw cancel {other}`; if there is no such session, remove `{path}/.pgthaw-{other}`"
        );
        report.usage_error(text, Some(remedy));
    }
    match &seen.state {
        TargetState::Absent { missing } => {
            let made = missing.first().filter(|first| **first != task.request.target);
            let from =
                made.map(|first| format!(", from `{}` on", first.display())).unwrap_or_default();
            report.passed.push(format!("target `{path}` will be made{from}"));
        }
        TargetState::Empty if seen.ours => {
            report.passed.push(format!("target `{path}` holds this session's files"))
        }
        TargetState::Empty => report.passed.push(format!("target `{path}` is empty")),
        TargetState::NotADirectory(obstacle) => {
            let text = format!("target `{path}`: `{}` is no directory", obstacle.display());
            report.usage_error(text, Some("name another directory with --to".into()));
        }
        TargetState::HoldsExport(export)
            if task.request.replace && !may_replace(&task.request, export) =>
        {
            let text = format!(
                "the export in target `{path}` was not made by a session of the same caller"
            );
            report.usage_error(text, Some("name another directory with --to".into()));
        }
        TargetState::HoldsExport(export) if task.request.replace => match export.foreign.first() {
            None => report.passed.push(format!("the export in target `{path}` will be replaced")),
            Some(foreign) => {
                let text = format!(
                    "the export in target `{path}` cannot be replaced: `{foreign}` is none of its files"
                );
                report.usage_error(
                    text,
                    Some("move it away, or name another directory with --to".into()),
                );
            }
        },
        TargetState::HoldsExport(_) => {
            let text = format!("target `{path}` holds an earlier export");
            report.usage_error(
                text,
                Some("replace it with --replace, or name another directory with --to".into()),
            );
        }
        TargetState::HoldsOther(names) => {
            let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
            let text = format!("target `{path}` is not empty: it holds {}", names.join(", "));
            report.usage_error(text, Some("name a new or empty directory with --to".into()));
        }
    }
    if let Some((directory, why)) = &seen.trust.objection {
        let text = format!(
            "target `{path}`: `{}` {why}, who could exchange what is delivered",
            directory.display()
        );
        report.error(text, Some(Trust::remedy().into()));
    }
    for warning in &seen.trust.warnings {
        report.warning(format!("target `{path}`: {warning}"), None);
    }
    let obstacle = match seen.access {
        Access::Writable => return,
        Access::ReadOnly => "its file system is mounted read-only",
        Access::NotPermitted => "you may not write there",
    };
    if !matches!(seen.state, TargetState::NotADirectory(_)) {
        report.error(
            format!("target `{path}` cannot be written: {obstacle}"),
            Some(
                "name another directory with --to, or begin as an account that may write there"
                    .into(),
            ),
        );
    }
}

/// Whether the export may be replaced by who asks.
fn may_replace(request: &ExportRequest, export: &EarlierExport) -> bool {
    let Some(allowed) = &request.replaces_only else { return true };
    export.session.as_ref().is_some_and(|session| allowed.contains(session))
}

/// Nothing is made inside the repository, and the target keeps nothing but the export.
fn nesting(report: &mut CheckReport, environment: &Environment, task: &CheckTask) {
    let (target, real_target) = (task.request.target.as_path(), &environment.target.real);
    let work = &environment.work;
    let made = [
        Some(("target", target, real_target, "--to")),
        Some(("work directory", work.path.as_path(), &work.real, "--work-dir")),
        environment
            .dump
            .as_ref()
            .map(|dump| ("dump directory", dump.path.as_path(), &dump.real, "--dump-dir")),
    ];
    let here = |what: &str| match task.part {
        CheckPart::Everything => true,
        CheckPart::Staging => what != "target",
        CheckPart::Target => what == "target",
    };
    for (what, path, real, option) in made.into_iter().flatten().filter(|made| here(made.0)) {
        if let Some(read) = environment.read.iter().find(|read| real.starts_with(read)) {
            let text = format!(
                "the {what} `{}` lies inside `{}`, which is only read",
                path.display(),
                read.display()
            );
            report.usage_error(text, Some(format!("name another directory with {option}")));
        } else if what == "target"
            && let Some(read) = environment.read.iter().find(|read| read.starts_with(real))
        {
            let text = format!(
                "`{}`, which is only read, lies inside the target `{}`",
                read.display(),
                path.display()
            );
            report.usage_error(text, Some("name another directory with --to".into()));
        } else if what != "target" && here("target") && real.starts_with(real_target) {
            let text = format!(
                "the {what} `{}` lies inside the target `{}`",
                path.display(),
                target.display()
            );
            report.usage_error(text, Some(format!("name another directory with {option}")));
        }
    }
}

/// What the write layer is called in messages.
const WRITE_LAYER: &str = "write layer";

/// Something that takes room.
struct Need<'a> {
    what: &'static str,
    path: &'a Path,
    room: Room,
    bytes: u64,
    /// At least so many files.
    files: u64,
}

/// Compares the room that there is with estimates; what shares a file system shares its room.
fn room(
    report: &mut CheckReport,
    environment: &Environment,
    task: &CheckTask,
    chosen: &[&BackupDatabase],
) {
    let left: Vec<_> =
        chosen.iter().filter(|database| !task.delivered.contains(&database.name)).collect();
    let databases = left.iter().map(|database| database.bytes).fold(0, u64::saturating_add);
    let files = left.iter().map(|database| database.relations).fold(0, u64::saturating_add);
    let layer = task.facts.wal_bytes.saturating_mul(WAL_FACTOR).saturating_add(databases);
    let need = |what, path, room: Option<Room>, bytes, files| {
        room.map(|room| Need { what, path, room, bytes, files })
    };
    let work = &environment.work;
    let (dump_need, what) = dump_need(&left, databases, task);
    let dump = environment
        .dump
        .as_ref()
        .and_then(|dump| need(what, &dump.path, dump.room, dump_need, files));
    let staging = [need(WRITE_LAYER, &work.path, work.room, layer, 0), dump];
    let target = &environment.target;
    let delivery = need("delivery", &task.request.target, target.room, databases, files);
    let mut needs: Vec<Need> = match task.part {
        CheckPart::Everything => staging.into_iter().chain([delivery]).flatten().collect(),
        CheckPart::Staging => staging.into_iter().flatten().collect(),
        CheckPart::Target => delivery.into_iter().collect(),
    };
    while let Some(first) = needs.first() {
        let device = first.room.device;
        let (together, rest): (Vec<_>, Vec<_>) =
            needs.into_iter().partition(|need| need.room.device == device);
        judge_room(report, &together);
        needs = rest;
    }
}

/// The bytes that the dump's directory has to hold at a time, of all `bytes` that are dumped, and what they are. Files leave it as soon as
/// the target has them, so that it is the tables that are written at a time, each about as long as its relation.
fn dump_need(left: &[&&BackupDatabase], bytes: u64, task: &CheckTask) -> (u64, &'static str) {
    let jobs = u64::from(task.request.jobs);
    let at_a_time = |database: &BackupDatabase| database.largest_relation.saturating_mul(jobs);
    let at_a_time = left.iter().map(|database| at_a_time(database).min(database.bytes)).max();
    match at_a_time {
        Some(at_a_time) if at_a_time < bytes && !task.request.keep_dump => {
            (at_a_time, "tables dumped at a time")
        }
        _ => (bytes, "dump"),
    }
}

/// Judges needs that share a file system; there is at least one.
fn judge_room(report: &mut CheckReport, needs: &[Need]) {
    let room = needs[0].room;
    let mut paths: Vec<String> =
        needs.iter().map(|need| format!("`{}`", need.path.display())).collect();
    paths.dedup();
    let paths = paths.join(" and ");
    let remedy = || {
        Some(
            "make room there, or name other directories with --work-dir, --dump-dir and --to"
                .to_owned(),
        )
    };
    // A write layer leaves the last of it free, whatever else lies there.
    let kept = if needs.iter().any(|need| need.what == WRITE_LAYER) { room.kept_free } else { 0 };
    let available = room.bytes.saturating_sub(kept);
    let stays_free = match kept {
        0 => String::new(),
        kept => format!(" (the write layer leaves the last {} free)", human_size(kept)),
    };
    if available == 0 {
        report.error(format!("there is no room left in {paths}{stays_free}"), remedy());
        return;
    }
    if room.inodes == Some(0) {
        report
            .error(format!("no more files can be made in {paths} (no inodes are left)"), remedy());
        return;
    }
    let bytes = needs.iter().map(|need| need.bytes).fold(0, u64::saturating_add);
    let parts: Vec<String> =
        needs.iter().map(|need| format!("{} {}", need.what, human_size(need.bytes))).collect();
    let text = format!(
        "{} free in {paths}{stays_free}; up to {} may be needed ({})",
        human_size(room.bytes),
        human_size(bytes),
        parts.join(", ")
    );
    match bytes > available {
        true => report.warning(text, remedy()),
        false => report.passed.push(text),
    }
    let files = needs.iter().map(|need| need.files).fold(0, u64::saturating_add);
    if let Some(inodes) = room.inodes.filter(|inodes| *inodes < files) {
        let text =
            format!("{inodes} files can still be made in {paths}; up to {files} may be needed");
        report.warning(text, remedy());
    }
}
