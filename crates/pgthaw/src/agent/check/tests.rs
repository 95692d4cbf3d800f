//! A table per topic: what a change of an environment in which all is well makes the check say.

use std::path::PathBuf;

use pgthaw_mover::{
    Access, EarlierExport, SumEntry, TargetDirectory, TargetReport, TargetState, Trust,
};
use pgthaw_postgres::binaries::Binaries;
use pgthaw_postgres::isolation::Isolation;
use pgthaw_postgres::locale::{Installed, Sources};
use pgthaw_postgres::os_user::OsUser;
use pgthaw_postgres::version::Major;
use pgthaw_session::{ExportRequest, MoverChoice, RecoveryChoice, RepositoryChoice};
use pgthaw_source::repository::{BackupInfo, BackupType};

use super::environment::{Directory, Locales, Programs, Target};
use super::kernel::Kernel;
use super::*;
use crate::agent::space::{Medium, Room};
use crate::wire::{BackupDatabase, BackupFacts, StartFacts};

const GB: u64 = 1 << 30;

fn database(name: &str, bytes: u64) -> BackupDatabase {
    BackupDatabase {
        oid: 16_384,
        name: name.into(),
        bytes,
        relations: 100,
        largest_relation: bytes,
        template: name.starts_with("template"),
        allows_connections: name != "template0",
        damaged: false,
        collate: Some("C.UTF-8".into()),
        ctype: Some("C.UTF-8".into()),
    }
}

fn task() -> CheckTask {
    let backup = BackupInfo {
        id: "20261122-101112F".into(),
        backup_type: BackupType::Full,
        started_at: 0,
        stopped_at: Some(60),
        size: 5 * GB,
        stored_size: None,
        postgres_major: 15,
        prior: None,
        damaged: false,
        annotations: Default::default(),
        archived_until: None,
        start_lsn: None,
        stop_lsn: None,
        unusable: None,
    };
    let start = StartFacts {
        major: 15,
        archive_recovery: true,
        crash_recovery: false,
        timeline: 1,
        max_prepared_transactions: 0,
        block_size: 8192,
        checkpoint: "0/3000060".into(),
        last_segment: None,
        segment_size: 16 << 20,
    };
    let facts = BackupFacts {
        kind: "pgbackrest".into(),
        stanza: None,
        backup,
        databases: vec![
            database("template1", 0),
            database("template0", 0),
            database("postgres", 0),
            database("crm", 2 * GB),
            database("sales", 3 * GB),
        ],
        tablespaces: Vec::new(),
        start,
        page_checksums: true,
        further_roots: vec![("tablespace 16385".into(), "/tablespaces/a".into())],
        wal_bytes: GB,
        superuser: None,
        notes: Vec::new(),
        files: 1000,
        bytes: 5 * GB,
    };
    let request = ExportRequest {
        repository: RepositoryChoice {
            name: None,
            path: "/backups".into(),
            kind: None,
            stanza: None,
            wal_archives: Vec::new(),
            backup_label: None,
            atomic_snapshot: false,
            tablespaces: Vec::new(),
        },
        backup: None,
        databases: vec!["crm".into()],
        all: false,
        exclude_databases: Vec::new(),
        staging: None,
        read_from_staging: None,
        target_host: None,
        target_caller: None,
        ssh_agent_of: None,
        requester: None,
        as_asked: None,
        target: "/srv/monday".into(),
        replace: false,
        replaces_only: None,
        recovery: RecoveryChoice::EndOfBackup,
        jobs: 2,
        compress: None,
        pg_dump_arguments: Vec::new(),
        globals: true,
        role_passwords: true,
        dump_dir: None,
        work_dir: None,
        stall_timeout: 1800,
        cache_size: None,
        pg_bin: None,
        os_user: None,
        superuser: None,
        preload: Vec::new(),
        allow_damaged: false,
        allow_unisolated: false,
        verify_source: false,
        retries: 3,
        retry_for: 3600,
        lease: 86400,
        mover: MoverChoice::default(),
        keep_dump: false,
    };
    let part = CheckPart::Everything;
    CheckTask { part, session: None, request, facts, delivered: Vec::new() }
}

fn disk(device: u64) -> Option<Room> {
    Some(Room {
        device,
        bytes: 100 * GB,
        kept_free: 0,
        inodes: Some(1_000_000),
        read_only: false,
        medium: Medium::Disk,
    })
}

/// A machine on which nothing is wrong; work and dump directory share a file system.
fn environment() -> Environment {
    let bin = PathBuf::from("/usr/lib/postgresql/15/bin");
    let directory = |path: &str| Directory {
        path: path.into(),
        real: path.into(),
        problem: None,
        room: disk(1),
    };
    Environment {
        root: false,
        os_user: Ok(OsUser {
            name: "dba".into(),
            uid: 1000,
            gid: 1000,
            groups: vec![1000],
            home: "/home/dba".into(),
        }),
        programs: Ok(Programs {
            binaries: Binaries {
                postgres: bin.join("postgres"),
                pg_dump: bin.join("pg_dump"),
                pg_dumpall: bin.join("pg_dumpall"),
                psql: None,
                version: "15.18".into(),
                major: Major::try_from(15).unwrap(),
                directory: bin,
            },
            block_size: Some(8192),
            missing_libraries: Vec::new(),
        }),
        dump_arguments: Ok(()),
        fuse: Fuse {
            device: Ok(()),
            helper: Ok(()),
            mountpoint_problem: None,
            request_timeout: None,
            hung_task_panic: None,
        },
        isolation: Ok(Isolation::UserRoot),
        work: directory("/var/tmp"),
        dump: Some(directory("/var/tmp")),
        target: Target {
            real: "/srv/monday".into(),
            report: Ok(TargetReport {
                state: TargetState::Absent { missing: vec!["/srv/monday".into()] },
                access: Access::Writable,
                free: 100 * GB,
                ours: false,
                other_sessions: Vec::new(),
                trust: Trust::default(),
            }),
            room: disk(2),
        },
        read: vec!["/backups".into(), "/tablespaces/a".into()],
        locales: Ok(Locales {
            installed: Installed::from_names(["C.utf8"]),
            sources: Sources::default(),
        }),
        kernel: Kernel { release: "6.1.0".into(), lacks: Vec::new() },
        logind: None,
    }
}

/// What a case wants to hear.
#[derive(Debug, Clone, Copy)]
enum Want {
    /// A line among those that passed.
    Passed(&'static str),
    /// One finding: a warning.
    Warning(&'static str),
    /// One finding: an error of the machine or the backup.
    Error(&'static str),
    /// One finding: an error of the request.
    Usage(&'static str),
}
use Want::{Error, Passed, Usage, Warning};

type Case = (&'static str, fn(&mut Environment, &mut CheckTask), Want);

/// Judges each case and looks for what it wants, and that nothing else is found.
fn run_cases(cases: &[Case]) {
    for (name, change, want) in cases {
        let (mut environment, mut task) = (environment(), task());
        change(&mut environment, &mut task);
        let report = judge(&environment, &task);
        let (error, usage, text) = match want {
            Passed(text) => {
                assert!(
                    report.passed.iter().any(|line| line.contains(text)),
                    "{name}: {:#?}",
                    report.passed
                );
                assert_eq!(report.findings, [], "{name}");
                continue;
            }
            Warning(text) => (false, false, text),
            Error(text) => (true, false, text),
            Usage(text) => (true, true, text),
        };
        let [finding] = &report.findings[..] else { panic!("{name}: {:#?}", report.findings) };
        assert_eq!((finding.error, finding.usage), (error, usage), "{name}: {finding:?}");
        assert!(finding.message.contains(text), "{name}: {finding:?}");
        assert_eq!(report.refused(), error, "{name}");
    }
}

fn state(environment: &mut Environment, state: TargetState) {
    environment.target.report.as_mut().unwrap().state = state;
}

fn earlier(foreign: &[&str]) -> TargetState {
    let foreign = foreign.iter().map(|name| (*name).to_owned()).collect();
    TargetState::HoldsExport(EarlierExport {
        files: vec!["crm/toc.dat".into()],
        foreign,
        session: Some("before".into()),
    })
}

#[test]
fn says_what_is_well() {
    let report = judge(&environment(), &task());
    assert_eq!(report.findings, []);
    let want = [
        "tablespace 16385 is read from `/tablespaces/a`",
        "1 database of 2.0 GB to export",
        "PostgreSQL 15.18 in /usr/lib/postgresql/15/bin",
        "FUSE can be used with fusermount3",
        "PostgreSQL will be isolated in a root of its own, in a user namespace",
        "work directory `/var/tmp`",
        "dump directory `/var/tmp`",
        "target `/srv/monday` will be made",
        "100.0 GB free in `/var/tmp`; up to 7.0 GB may be needed (write layer 5.0 GB, dump 2.0 GB)",
        "100.0 GB free in `/srv/monday`; up to 2.0 GB may be needed (delivery 2.0 GB)",
    ];
    assert_eq!(report.passed, want);
}

#[test]
fn judges_the_choice_of_databases() {
    run_cases(&[
        (
            "all but templates",
            |_, t| (t.request.all, t.request.databases) = (true, Vec::new()),
            Passed("3 databases of 5.0 GB"),
        ),
        (
            "all but some",
            |_, t| {
                (t.request.all, t.request.databases) = (true, Vec::new());
                t.request.exclude_databases = vec!["s*".into()];
            },
            Passed("2 databases of 2.0 GB"),
        ),
        (
            "a template by name",
            |_, t| t.request.databases = vec!["template1".into()],
            Passed("1 database of 0 bytes"),
        ),
        (
            "unknown",
            |_, t| t.request.databases.push("crn".into()),
            Usage("20261122-101112F holds no database \"crn\""),
        ),
        (
            "unknown, but the WAL may bring it",
            |_, t| {
                t.request.databases.push("new".into());
                t.request.recovery = RecoveryChoice::Latest;
            },
            Warning("\"new\" was not there"),
        ),
        ("none", |_, t| t.request.databases.clear(), Usage("no database")),
        (
            "all excluded",
            |_, t| {
                (t.request.all, t.request.databases) = (true, Vec::new());
                t.request.exclude_databases = vec!["*".into()];
            },
            Usage("no database"),
        ),
        (
            "template0",
            |_, t| t.request.databases = vec!["template0".into()],
            Usage("does not accept connections"),
        ),
        (
            "template0 never changes",
            |_, t| {
                t.request.databases = vec!["template0".into()];
                t.request.recovery = RecoveryChoice::Latest;
            },
            Usage("does not accept connections"),
        ),
        (
            "closed, but the WAL may open it",
            |_, t| {
                t.facts.databases[3].allows_connections = false;
                t.request.recovery = RecoveryChoice::Latest;
            },
            Warning("unless recovery changes that"),
        ),
        ("damaged", |_, t| t.facts.databases[3].damaged = true, Error("\"crm\" had damaged pages")),
        (
            "damaged and allowed",
            |_, t| (t.facts.databases[3].damaged, t.request.allow_damaged) = (true, true),
            Warning("may be missing"),
        ),
        (
            "another one is damaged",
            |_, t| t.facts.databases[4].damaged = true,
            Passed("1 database"),
        ),
        (
            "not told by the backup",
            |_, t| t.facts.databases.clear(),
            Warning("does not tell its databases"),
        ),
        (
            "a note of the source",
            |_, t| t.facts.notes.push("read from the copy".into()),
            Warning("read from the copy"),
        ),
    ]);
}

#[test]
fn judges_programs_and_accounts() {
    run_cases(&[
        ("root", |e, _| e.root = true, Passed("PostgreSQL runs as the account dba")),
        (
            "no such account",
            |e, _| e.os_user = Err(Failure::new("there is no account \"x\"")),
            Error("no account \"x\""),
        ),
        (
            "no programs",
            |e, _| e.programs = Err(Failure::new("PostgreSQL 15 is not installed")),
            Error("not installed"),
        ),
        (
            "another block size",
            |_, t| t.facts.start.block_size = 16_384,
            Error("blocks of 16384 bytes; only 8192"),
        ),
        (
            "programs of another block size",
            |e, _| e.programs.as_mut().unwrap().block_size = Some(32_768),
            Error("built for blocks of 32768"),
        ),
        (
            "sizes not told",
            |e, _| e.programs.as_mut().unwrap().block_size = None,
            Passed("PostgreSQL 15.18"),
        ),
        (
            "a library that is not there",
            |e, _| {
                let missing = ("x".to_owned(), "/usr/lib/postgresql/15/lib/x".into());
                e.programs.as_mut().unwrap().missing_libraries.push(missing);
            },
            Error("the library x of --preload is not there (`/usr/lib/postgresql/15/lib/x`)"),
        ),
        (
            "bad -Z",
            |e, _| e.dump_arguments = Err(Failure::new("`x` is no compression")),
            Usage("no compression"),
        ),
        (
            "missing locale",
            |_, t| t.facts.databases[3].ctype = Some("de_DE.UTF-8".into()),
            Error("database \"crm\" needs the locale de_DE.UTF-8"),
        ),
        (
            "missing locale that can be built",
            |e, t| {
                let sources = &mut e.locales.as_mut().unwrap().sources;
                sources.localedef = true;
                sources.definitions.insert("de_DE".into());
                sources.charsets.insert("utf8".into(), "UTF-8".into());
                t.facts.databases[3].ctype = Some("de_DE.UTF-8".into());
                t.facts.databases[3].collate = Some("de_DE.UTF-8".into());
            },
            Warning("the locale de_DE.UTF-8 is not installed here and is built"),
        ),
        (
            "locale of another database",
            |_, t| t.facts.databases[4].ctype = Some("x".into()),
            Passed("1 database"),
        ),
        (
            "locales not told",
            |e, _| e.locales = Err(Failure::new("list the installed locales")),
            Error("locales"),
        ),
    ]);
}

#[test]
fn judges_the_kernel() {
    run_cases(&[
        (
            "no device",
            |e, _| e.fuse.device = Err(Failure::new("open `/dev/fuse`")),
            Error("/dev/fuse"),
        ),
        (
            "no helper",
            |e, _| e.fuse.helper = Err(Failure::new("there is no `fusermount3`")),
            Error("fusermount3"),
        ),
        (
            "mount out of reach",
            |e, _| e.fuse.mountpoint_problem = Some("cannot enter `/run`".into()),
            Error("cannot enter"),
        ),
        ("as root", |e, _| e.root = true, Passed("FUSE can be used as root")),
        (
            "short timeout",
            |e, _| e.fuse.request_timeout = Some(60),
            Warning("after 60 s without an answer"),
        ),
        ("long timeout", |e, _| e.fuse.request_timeout = Some(1800), Passed("FUSE")),
        (
            "timeout shorter than asked for",
            |e, task| {
                (e.fuse.request_timeout, task.request.stall_timeout) = (Some(1800), 7200);
            },
            Warning("--stall-timeout 7200 s"),
        ),
        ("panic", |e, _| e.fuse.hung_task_panic = Some(120), Warning("waits for 120 s")),
        (
            "too old",
            |e, _| {
                e.kernel = Kernel { release: "4.18.0".into(), lacks: vec!["openat2"] };
            },
            Error("the kernel, Linux 4.18.0, lacks openat2"),
        ),
        (
            "no root of its own",
            |e, _| e.isolation = Err("make a user namespace: refused".into()),
            Error(
                "refuses PostgreSQL a root of its own, which keeps code in the backup away from this machine: make a user namespace: refused",
            ),
        ),
        (
            "no root of its own, accepted",
            |e, task| {
                e.isolation = Err("make a user namespace: refused".into());
                task.request.allow_unisolated = true;
            },
            Warning("not be isolated from this machine, because the kernel refuses"),
        ),
    ]);
}

#[test]
fn judges_private_directories() {
    run_cases(&[
        (
            "work",
            |e, _| e.work.problem = Some("it is no directory".into()),
            Error("work directory `/var/tmp` cannot be used: it is"),
        ),
        (
            "work and dump are one",
            |e, _| {
                e.work.problem = Some("it is no directory".into());
                e.dump.as_mut().unwrap().problem = e.work.problem.clone();
            },
            Error("the work directory"),
        ),
        (
            "dump",
            |e, _| {
                let dump = e.dump.as_mut().unwrap();
                (dump.path, dump.problem) =
                    ("/dump".into(), Some("you may not write there".into()));
            },
            Error("dump directory `/dump` cannot be used: you may not"),
        ),
        ("no dump directory", |e, _| e.dump = None, Error("no directory for the dump")),
        (
            "on another machine",
            |e, _| e.work.room.as_mut().unwrap().medium = Medium::Network,
            Warning("another machine"),
        ),
        (
            "in memory",
            |e, _| e.dump.as_mut().unwrap().room.as_mut().unwrap().medium = Medium::Memory,
            Warning("in memory"),
        ),
        (
            "long path",
            |e, _| e.work.path = format!("/{}", "x".repeat(60)).into(),
            Usage("too long by 5 bytes"),
        ),
        (
            "just not too long",
            |e, _| e.work.path = format!("/{}", "x".repeat(55)).into(),
            Passed("work directory `/xxx"),
        ),
    ]);
}

#[test]
fn judges_the_target() {
    run_cases(&[
        ("empty", |e, _| state(e, TargetState::Empty), Passed("`/srv/monday` is empty")),
        (
            "of this session",
            |e, _| {
                state(e, TargetState::Empty);
                e.target.report.as_mut().unwrap().ours = true;
            },
            Passed("this session's files"),
        ),
        (
            "with parents",
            |e, _| {
                state(e, TargetState::Absent { missing: vec!["/srv".into(), "/srv/monday".into()] })
            },
            Passed("will be made, from `/srv` on"),
        ),
        (
            "not empty",
            |e, _| state(e, TargetState::HoldsOther(vec!["a".into(), "b".into()])),
            Usage("it holds `a`, `b`"),
        ),
        ("an export", |e, _| state(e, earlier(&[])), Usage("holds an earlier export")),
        (
            "an export to replace",
            |e, t| {
                state(e, earlier(&[]));
                t.request.replace = true;
            },
            Passed("will be replaced"),
        ),
        (
            "an export with other people's files",
            |e, t| {
                state(e, earlier(&["crm/notes.txt"]));
                t.request.replace = true;
            },
            Usage("`crm/notes.txt` is none of its files"),
        ),
        (
            "no directory",
            |e, _| state(e, TargetState::NotADirectory("/srv".into())),
            Usage("`/srv` is no directory"),
        ),
        (
            "somebody else's export",
            |e, t| {
                e.target.report.as_mut().unwrap().state = earlier(&[]);
                (t.request.replace, t.request.replaces_only) = (true, Some(vec!["own".into()]));
            },
            Usage("was not made by a session of the same caller"),
        ),
        (
            "one's own export",
            |e, t| {
                e.target.report.as_mut().unwrap().state = earlier(&[]);
                (t.request.replace, t.request.replaces_only) = (true, Some(vec!["before".into()]));
            },
            Passed("will be replaced"),
        ),
        (
            "of another session",
            |e, _| e.target.report.as_mut().unwrap().other_sessions.push("x".into()),
            Usage("session x"),
        ),
        (
            "of another account",
            |e, _| {
                let trust = &mut e.target.report.as_mut().unwrap().trust;
                trust.objection = Some(("/srv".into(), "belongs to another account".into()));
            },
            Error("`/srv` belongs to another account, who could exchange what is delivered"),
        ),
        (
            "written by a group",
            |e, _| {
                let trust = &mut e.target.report.as_mut().unwrap().trust;
                trust.warnings.push("`/srv` may be written by the group 9".into());
            },
            Warning("`/srv` may be written by the group 9"),
        ),
        (
            "read-only",
            |e, _| e.target.report.as_mut().unwrap().access = Access::ReadOnly,
            Error("mounted read-only"),
        ),
        (
            "not permitted",
            |e, _| e.target.report.as_mut().unwrap().access = Access::NotPermitted,
            Error("may not write"),
        ),
        (
            "unreadable",
            |e, _| e.target.report = Err(Failure::new("open `/srv`")),
            Error("open `/srv`"),
        ),
    ]);
}

#[test]
fn keeps_the_directories_apart() {
    run_cases(&[
        (
            "target in the repository",
            |e, _| e.target.real = "/backups/x".into(),
            Usage("lies inside `/backups`"),
        ),
        (
            "target is the repository",
            |e, _| e.target.real = "/backups".into(),
            Usage("lies inside `/backups`"),
        ),
        (
            "target in a tablespace",
            |e, _| e.target.real = "/tablespaces/a/x".into(),
            Usage("lies inside `/tablespaces/a`"),
        ),
        (
            "repository in the target",
            |e, _| e.read[0] = "/srv/monday/backups".into(),
            Usage("which is only read, lies inside the target"),
        ),
        (
            "work in the repository",
            |e, _| e.work.real = "/backups/work".into(),
            Usage("the work directory"),
        ),
        (
            "dump in the repository",
            |e, _| e.dump.as_mut().unwrap().real = "/backups".into(),
            Usage("the dump directory"),
        ),
        (
            "dump is the target",
            |e, _| e.dump.as_mut().unwrap().real = "/srv/monday".into(),
            Usage("lies inside the target"),
        ),
        ("alike names", |e, _| e.target.real = "/backups2".into(), Passed("target")),
        (
            "target beside the work directory's own",
            |e, _| e.target.real = "/var/tmp/x".into(),
            Passed("target"),
        ),
    ]);
}

#[test]
fn judges_room() {
    fn room(environment: &mut Environment, change: impl Fn(&mut Room)) {
        change(environment.work.room.as_mut().unwrap());
        change(environment.dump.as_mut().unwrap().room.as_mut().unwrap());
    }
    run_cases(&[
        (
            "just enough",
            |e, _| room(e, |room| room.bytes = 7 * GB),
            Passed("7.0 GB free in `/var/tmp`; up to 7.0 GB"),
        ),
        (
            "not for both",
            |e, _| room(e, |room| room.bytes = 7 * GB - 1),
            Warning("7.0 GB free in `/var/tmp`; up to 7.0 GB"),
        ),
        (
            "all three together",
            |e, _| {
                room(e, |room| room.bytes = 8 * GB);
                e.target.room = e.work.room;
            },
            Warning("8.0 GB free in `/var/tmp` and `/srv/monday`; up to 9.0 GB"),
        ),
        (
            "finished tables leave",
            |_, t| t.facts.databases[3].largest_relation = GB / 2,
            Passed(
                "up to 6.0 GB may be needed (write layer 5.0 GB, tables dumped at a time 1.0 GB)",
            ),
        ),
        (
            "finished tables stay",
            |_, t| {
                t.facts.databases[3].largest_relation = GB / 2;
                t.request.keep_dump = true;
            },
            Passed("up to 7.0 GB may be needed (write layer 5.0 GB, dump 2.0 GB)"),
        ),
        (
            "delivered databases need nothing",
            |e, t| {
                room(e, |room| room.bytes = 3 * GB);
                t.delivered.push("crm".into());
            },
            Passed("up to 3.0 GB may be needed (write layer 3.0 GB, dump 0 bytes)"),
        ),
        ("full", |e, _| room(e, |room| room.bytes = 0), Error("no room left in `/var/tmp`")),
        ("no inodes", |e, _| room(e, |room| room.inodes = Some(0)), Error("no inodes")),
        (
            "few inodes",
            |e, _| room(e, |room| room.inodes = Some(99)),
            Warning("99 files can still be made"),
        ),
        (
            "inodes not counted",
            |e, _| room(e, |room| room.inodes = None),
            Passed("100.0 GB free in `/var/tmp`"),
        ),
        ("absurd sizes", |_, t| t.facts.wal_bytes = u64::MAX, Warning("up to 16.0 EB")),
        (
            "enough without what the write layer leaves free",
            |e, _| room(e, |room| (room.bytes, room.kept_free) = (8 * GB, GB)),
            Passed(
                "8.0 GB free in `/var/tmp` (the write layer leaves the last 1.0 GB free); up to 7.0 GB",
            ),
        ),
        (
            "not enough without it",
            |e, _| room(e, |room| (room.bytes, room.kept_free) = (8 * GB - 1, GB)),
            Warning("(the write layer leaves the last 1.0 GB free); up to 7.0 GB"),
        ),
        (
            "nothing but what stays free",
            |e, _| room(e, |room| (room.bytes, room.kept_free) = (GB, GB)),
            Error("no room left in `/var/tmp` (the write layer leaves the last 1.0 GB free)"),
        ),
        (
            "only the write layer leaves something free",
            |e, _| {
                let target = e.target.room.as_mut().unwrap();
                (target.bytes, target.kept_free) = (2 * GB, GB);
            },
            Passed("2.0 GB free in `/srv/monday`; up to 2.0 GB"),
        ),
        (
            "target full",
            |e, _| e.target.room.as_mut().unwrap().bytes = 0,
            Error("no room left in `/srv/monday`"),
        ),
    ]);
}

#[test]
fn tells_everything_at_once() {
    let (mut environment, mut task) = (environment(), task());
    environment.programs = Err(Failure::new("no PostgreSQL"));
    environment.fuse.device = Err(Failure::new("no FUSE"));
    environment.target.room.as_mut().unwrap().bytes = GB;
    state(&mut environment, TargetState::HoldsOther(vec!["x".into()]));
    task.request.databases.push("unknown".into());
    let report = judge(&environment, &task);
    assert_eq!(report.findings.iter().filter(|finding| finding.error).count(), 4, "{report:#?}");
    assert_eq!(report.findings.len(), 5);
}

#[test]
fn what_this_session_delivered_is_no_obstacle() {
    let scratch = tempfile::tempdir().unwrap();
    let mut task = task();
    task.request.target = scratch.path().join("export");
    task.session = Some("s".into());
    let target = TargetDirectory::create(&task.request.target, "s").unwrap();
    let staged = target.database("crm").unwrap();
    std::fs::write(staged.path().join("toc.dat"), "toc").unwrap();
    target.keep_sums("crm", &[SumEntry { path: "crm/toc.dat".into(), sha256: [0; 32] }]).unwrap();
    target.publish_database("crm", &["toc.dat"]).unwrap();

    let seen = |task: &CheckTask| Environment::look(task).target.report.unwrap();
    let own = seen(&task);
    assert!(
        own.ours && own.state == TargetState::Empty,
        "published, but not in the journal: {own:?}"
    );
    task.session = Some("other".into());
    let others = seen(&task);
    assert_eq!((others.ours, others.other_sessions), (false, vec!["s".to_owned()]));
    assert_eq!(others.state, TargetState::HoldsOther(vec!["crm".into()]));
}

#[test]
fn looks_at_this_machine() {
    let scratch = tempfile::tempdir_in("/var/tmp").unwrap();
    let mut task = task();
    task.request.repository.path = scratch.path().join("repository");
    std::fs::create_dir(&task.request.repository.path).unwrap();
    task.request.target = task.request.repository.path.join("target");
    let report = run(&task);
    let inside = report.findings.iter().find(|finding| finding.message.contains("lies inside"));
    assert!(inside.is_some_and(|finding| finding.usage), "{report:#?}");
    assert!(report.passed.iter().any(|line| line.contains("free in")), "{report:#?}");
    assert!(!task.request.target.exists(), "nothing is made");
}
