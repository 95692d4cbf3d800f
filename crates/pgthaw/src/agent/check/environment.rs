//! What the check knows of this machine: gathered once, changing nothing, before anything is judged.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use pgthaw_mover::{
    EXPORT_JSON, MoveError, SHA256SUMS, TargetDirectory, TargetReport, file_name_for_database,
};
use pgthaw_postgres::binaries::{self, Binaries};
use pgthaw_postgres::connection::Endpoint;
use pgthaw_postgres::dump::{DumpPlan, arguments, validate_user_arguments};
use pgthaw_postgres::isolation::{Isolation, try_root};
use pgthaw_postgres::locale::{Installed, Sources};
use pgthaw_postgres::os_user::OsUser;
use pgthaw_postgres::root::Confinement;
use pgthaw_postgres::version::Major;
use pgthaw_session::observed::Failure;
use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::io::Errno;

use super::kernel::Kernel;
use super::logind::Logind;
use crate::agent::place::{DEFAULT_WORK_DIRECTORY, DUMP_DIRECTORIES, ROOTS_MOUNTS};
use crate::agent::space::{Room, choose_dump_dir, free_bytes};
use crate::leftovers;
use crate::wire::{CheckPart, CheckTask};

/// A directory that cannot be made, because `/proc` takes none: `pg_dump` looks at its options before it tries.
const IMPOSSIBLE_OUTPUT: &str = "/proc/pgthaw-check";
/// What `pg_dump` says when its options are fine.
const OPTIONS_ARE_FINE: &str = "could not create directory";

/// What the check knows of this machine.
#[derive(Debug)]
pub struct Environment {
    /// Whether we are root.
    pub root: bool,
    /// The account that runs PostgreSQL.
    pub os_user: Result<OsUser, Failure>,
    /// PostgreSQL's programs.
    pub programs: Result<Programs, Failure>,
    /// Whether `pg_dump` takes the user's compression and further arguments.
    pub dump_arguments: Result<(), Failure>,
    /// Mounting.
    pub fuse: Fuse,
    /// The kernel.
    pub kernel: Kernel,
    /// How far the instance can be cut off, or why it cannot have a root of its own.
    pub isolation: Result<Isolation, String>,
    /// The directory that gets the session's private directory.
    pub work: Directory,
    /// The directory that gets the dump; none if none can be looked at.
    pub dump: Option<Directory>,
    /// The target.
    pub target: Target,
    /// Everything of the repository and beside it that is read, links resolved.
    pub read: Vec<PathBuf>,
    /// The locales of the C library.
    pub locales: Result<Locales, Failure>,
    /// What logind does, for an ordinary user.
    pub logind: Option<Logind>,
}

/// PostgreSQL's programs.
#[derive(Debug)]
pub struct Programs {
    /// Where they are.
    pub binaries: Binaries,
    /// The block size they are built for, in bytes, where that can be told.
    pub block_size: Option<u32>,
    /// Libraries of `--preload` that are not there, and where they were looked for.
    pub missing_libraries: Vec<(String, PathBuf)>,
}

/// The locales of the C library.
#[derive(Debug)]
pub struct Locales {
    /// Those that are installed.
    pub installed: Installed,
    /// What others can be built from.
    pub sources: Sources,
}

/// What mounting needs.
#[derive(Debug)]
pub struct Fuse {
    /// Whether we can open `/dev/fuse`.
    pub device: Result<(), Failure>,
    /// Whether an ordinary user's helper is there.
    pub helper: Result<(), Failure>,
    /// Why the account that runs PostgreSQL would not reach the mount.
    pub mountpoint_problem: Option<String>,
    /// The kernel fails a request that is not answered for so many seconds.
    pub request_timeout: Option<u64>,
    /// The kernel panics when a process waits for so many seconds.
    pub hung_task_panic: Option<u64>,
}

/// A directory in which a private one is to be made.
#[derive(Debug)]
pub struct Directory {
    /// As the user named it.
    pub path: PathBuf,
    /// With links resolved, as far as it exists.
    pub real: PathBuf,
    /// Why no private directory can be made in it.
    pub problem: Option<String>,
    /// What its file system has left.
    pub room: Option<Room>,
}

/// The target directory.
#[derive(Debug)]
pub struct Target {
    /// With links resolved, as far as it exists.
    pub real: PathBuf,
    /// What is there.
    pub report: Result<TargetReport, Failure>,
    /// What its file system has left.
    pub room: Option<Room>,
}

impl Environment {
    /// Looks at this machine for `task`.
    pub fn look(task: &CheckTask) -> Self {
        let root = rustix::process::geteuid().is_root();
        let request = &task.request;
        let os_user = OsUser::for_postgres(request.os_user.as_deref());
        let os_user = os_user.map_err(|err| Failure::new(said(&err)).hint(err.hint()));
        let programs = programs(task, os_user.as_ref().ok());
        let dump_arguments = dump_arguments(task, programs.as_ref().ok(), os_user.as_ref().ok());
        // Root's children run under other accounts, which have to get through to their own directories.
        let postgres = os_user.as_ref().ok().filter(|_| root);
        let repository = request.repository_beside_instance();
        let reader = repository.and_then(|path| fs::metadata(path).ok());
        let reader = reader.filter(|meta| root && meta.uid() != 0);
        let reader = reader.and_then(|meta| OsUser::look_up(&meta.uid().to_string()).ok());
        let isolation = isolation(programs.as_ref().ok(), postgres);
        let work = request.work_dir.clone().unwrap_or_else(|| DEFAULT_WORK_DIRECTORY.into());
        Self {
            root,
            programs,
            dump_arguments,
            fuse: fuse(postgres),
            kernel: Kernel::look(),
            isolation,
            work: Directory::look(&work, None, &[postgres, reader.as_ref()]),
            dump: dump_parent(task).map(|path| Directory::look(&path, postgres, &[postgres])),
            target: Target::look(task),
            read: read_here(task).map(resolved).collect(),
            locales: locales(),
            logind: OsUser::current()
                .ok()
                .filter(|_| !root)
                .and_then(|user| Logind::look(&user.name)),
            os_user,
        }
    }
}

/// What is read of the repository and beside it on this machine.
fn read_here(task: &CheckTask) -> impl Iterator<Item = &Path> {
    let (request, repository) = (&task.request, &task.request.repository);
    let here = match task.part {
        CheckPart::Everything | CheckPart::Staging => request.staging.is_none(),
        CheckPart::Target => request.target_machine().is_none(),
    };
    let all = [&repository.path]
        .into_iter()
        .chain(&repository.wal_archives)
        .chain(&repository.backup_label)
        .chain(task.facts.further_roots.iter().map(|(_, path)| path));
    let elsewhere = request.read_from_staging.iter().filter(|_| task.part != CheckPart::Target);
    all.filter(move |_| here).chain(elsewhere.filter(move |_| !here)).map(PathBuf::as_path)
}

fn locales() -> Result<Locales, Failure> {
    let installed = Installed::here().map_err(|err| {
        Failure::new(format!("list the installed locales: {err}"))
            .hint("install the package that brings `locale` (libc-bin, glibc-common)")
    })?;
    Ok(Locales { installed, sources: Sources::here() })
}

/// An error with its causes.
fn said(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        text = format!("{text}: {source}");
        cause = source.source();
    }
    text
}

fn programs(task: &CheckTask, os_user: Option<&OsUser>) -> Result<Programs, Failure> {
    let major = Major::try_from(task.facts.start.major);
    let major = major.map_err(|err| Failure::new(said(&err)).hint(err.hint()))?;
    let user = match os_user {
        Some(user) => user.clone(),
        None => OsUser::current().map_err(|err| Failure::new(said(&err)).hint(err.hint()))?,
    };
    let binaries = binaries::find(major, task.request.pg_bin.as_deref(), &user);
    let binaries = binaries.map_err(|err| Failure::new(said(&err)).hint(err.hint()))?;
    let block_size = binaries.build_sizes(&user).ok().map(|sizes| sizes.block_size);
    let missing = |library: &String| {
        binaries.missing_library(library, &user).map(|path| (library.clone(), path))
    };
    let missing_libraries = task.request.preload.iter().filter_map(missing).collect();
    Ok(Programs { binaries, block_size, missing_libraries })
}

/// Tries whether PostgreSQL can have a root of its own here, by building one.
fn isolation(programs: Option<&Programs>, os_user: Option<&OsUser>) -> Result<Isolation, String> {
    let helper = crate::internal::root_helper();
    try_root(&helper, programs.map(|programs| &programs.binaries), os_user)?;
    Ok(Isolation::of(&Confinement::Root(helper)))
}

/// Lets `pg_dump` itself judge the user's compression and arguments, by an output that cannot be made.
fn dump_arguments(
    task: &CheckTask,
    programs: Option<&Programs>,
    os_user: Option<&OsUser>,
) -> Result<(), Failure> {
    let request = &task.request;
    let refused = |err: &pgthaw_postgres::dump::ArgumentError| Failure {
        hint: err.hint().map(Into::into),
        ..Failure::new(err.to_string())
    };
    let Some(programs) = programs else {
        return validate_user_arguments(&request.pg_dump_arguments).map_err(|err| refused(&err));
    };
    let nowhere = Endpoint {
        socket_directory: IMPOSSIBLE_OUTPUT.into(),
        port: 1,
        user: "pgthaw".into(),
        major: programs.binaries.major,
        server: None,
    };
    let plan = DumpPlan {
        binaries: programs.binaries.clone(),
        endpoint: nowhere,
        database: "pgthaw".into(),
        output: IMPOSSIBLE_OUTPUT.into(),
        jobs: request.jobs,
        compress: request.compress.clone(),
        encoding: None,
        arguments: request.pg_dump_arguments.clone(),
        os_user: None,
        lock_wait_timeout: Duration::from_secs(1),
        marker: String::new(),
        confinement: Confinement::Unisolated, // there is no instance: it only reads its own options
    };
    let arguments = arguments(&plan).map_err(|err| refused(&err))?;
    let mut command = Command::new(&programs.binaries.pg_dump);
    command.args(arguments).env_clear().env("LC_ALL", "C").current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null());
    if let Some(user) = os_user {
        user.run_as(&mut command);
    }
    match command.output() {
        Ok(output) => pg_dump_said(&String::from_utf8_lossy(&output.stderr)),
        Err(err) => {
            Err(Failure::new(format!("start `{}`: {err}", programs.binaries.pg_dump.display())))
        }
    }
}

/// Reads `pg_dump`'s messages after a try that cannot get further than its options.
fn pg_dump_said(messages: &str) -> Result<(), Failure> {
    if messages.contains(OPTIONS_ARE_FINE) {
        return Ok(());
    }
    let first = messages.lines().find(|line| !line.is_empty()).unwrap_or("it says nothing");
    let message =
        format!("pg_dump does not take its arguments: {}", first.trim_start_matches("pg_dump: "));
    Err(Failure::new(message).hint("see `pg_dump --help` of the backup's major version"))
}

fn fuse(postgres: Option<&OsUser>) -> Fuse {
    let device = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let device = device.map(drop).map_err(|err| {
        let hint = match err.kind() {
            std::io::ErrorKind::PermissionDenied => {
                "install the package fuse3, whose udev rule opens the device to all"
            }
            _ => "load the kernel module with `modprobe fuse`; a container needs `--device /dev/fuse`",
        };
        Failure::new(format!("FUSE cannot be used: open `/dev/fuse`: {err}")).hint(hint)
    });
    let helper = match rustix::process::geteuid().is_root() {
        true => Ok(()),
        false => helper(),
    };
    let mountpoint_problem = postgres.and_then(|user| {
        let nearest = nearest_existing(Path::new(ROOTS_MOUNTS))?;
        let enters = user.can_enter(nearest).unwrap_or(true);
        (!enters).then(|| {
            format!(
                "the account {} cannot enter `{}`, where the mount will be",
                user.name,
                nearest.display()
            )
        })
    });
    Fuse {
        device,
        helper,
        mountpoint_problem,
        request_timeout: request_timeout(
            number("/proc/sys/fs/fuse/default_request_timeout"),
            number("/proc/sys/fs/fuse/max_request_timeout"),
        ),
        hung_task_panic: number("/proc/sys/kernel/hung_task_panic")
            .filter(|panics| *panics != 0)
            .and_then(|_| number("/proc/sys/kernel/hung_task_timeout_secs"))
            .filter(|seconds| *seconds != 0),
    }
}

/// Looks for an ordinary user's `fusermount3`, which has to be setuid root.
fn helper() -> Result<(), Failure> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/bin", "/bin"].map(PathBuf::from);
    let places = std::env::split_paths(&path).chain(usual).map(|place| place.join("fusermount3"));
    let Some((found, meta)) =
        places.filter_map(|path| fs::metadata(&path).ok().map(|meta| (path, meta))).next()
    else {
        return Err(Failure::new("there is no `fusermount3`").hint("install the package fuse3"));
    };
    match meta.uid() == 0 && meta.permissions().mode() & 0o4000 != 0 {
        true => Ok(()),
        false => Err(Failure::new(format!("`{}` is not setuid root", found.display()))
            .hint("install the package fuse3 anew")),
    }
}

/// The time after which the kernel fails a request whose file system sets none itself; 0 means never (sysctl/fs.rst).
fn request_timeout(default: Option<u64>, max: Option<u64>) -> Option<u64> {
    let set = |value: Option<u64>| value.filter(|seconds| *seconds != 0);
    match (set(default), set(max)) {
        (Some(default), Some(max)) => Some(default.min(max)),
        (default, max) => default.or(max),
    }
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Chooses where the dump would be kept, as the agent will.
fn dump_parent(task: &CheckTask) -> Option<PathBuf> {
    if let Some(named) = &task.request.dump_dir {
        return Some(named.clone());
    }
    let rooms = DUMP_DIRECTORIES.map(PathBuf::from).into_iter();
    let rooms: Vec<_> =
        rooms.filter_map(|path| free_bytes(&path).ok().map(|free| (path, free))).collect();
    choose_dump_dir(&rooms).map(Path::to_path_buf)
}

impl Directory {
    /// Looks at `path`; the private directory in it will belong to `owner`, and all of `accounts` have to reach it.
    fn look(path: &Path, owner: Option<&OsUser>, accounts: &[Option<&OsUser>]) -> Self {
        let room = Room::at(path);
        let problem = match fs::metadata(path) {
            Err(err) => Some(err.to_string()),
            Ok(meta) if !meta.is_dir() => Some("it is no directory".into()),
            Ok(_) if room.as_ref().is_ok_and(|room| room.read_only) => {
                Some("its file system is mounted read-only".into())
            }
            Ok(_) => write_problem(path)
                .or_else(|| {
                    let owner = owner.map(|owner| (owner.uid, owner.gid));
                    leftovers::check_parent(&path.join("pgthaw"), owner)
                        .err()
                        .map(|err| err.to_string())
                })
                .or_else(|| {
                    let shut_out = |account: &&&OsUser| !account.can_enter(path).unwrap_or(true);
                    let account = accounts.iter().flatten().find(shut_out)?;
                    Some(format!("the account {} cannot enter it", account.name))
                }),
        };
        Self { path: path.into(), real: resolved(path), problem, room: room.ok() }
    }
}

fn write_problem(path: &Path) -> Option<String> {
    match accessat(CWD, path, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS) {
        Ok(()) => None,
        Err(Errno::ACCESS) => Some("you may not write there".into()),
        Err(errno) => Some(errno.to_string()),
    }
}

impl Target {
    fn look(task: &CheckTask) -> Self {
        let path = &task.request.target;
        let report = inspect(task).map_err(|err| Failure {
            hint: err.hint().map(Into::into),
            ..Failure::new(said(&err))
        });
        let room = nearest_existing(path).and_then(|nearest| Room::at(nearest).ok());
        Self { real: resolved(path), report, room }
    }
}

/// Looks at the target; what this session has put there is no obstacle.
fn inspect(task: &CheckTask) -> Result<TargetReport, MoveError> {
    let (path, request) = (&task.request.target, &task.request);
    let session = task.session.as_deref().unwrap_or_default();
    let mut report = TargetDirectory::inspect(path, session, &[])?;
    // A replaced export's names are given to the new one only when that is complete.
    let begun = report.ours || !task.delivered.is_empty();
    if request.replace || task.session.is_none() || !begun {
        return Ok(report);
    }
    let delivered = task.delivered.iter().map(|name| file_name_for_database(name));
    let mut own: Vec<String> =
        delivered.chain(TargetDirectory::kept_names(path, session)?).collect();
    // These two come last, and the directory was empty when the session began.
    own.extend([SHA256SUMS, EXPORT_JSON].map(str::to_owned));
    let own: Vec<&str> = own.iter().map(String::as_str).collect();
    let above = std::mem::take(&mut report.other_sessions);
    let mut report = TargetDirectory::inspect(path, session, &own)?;
    report.other_sessions = above;
    Ok(report)
}

/// The nearest of `path` and its parents that exists.
fn nearest_existing(path: &Path) -> Option<&Path> {
    path.ancestors().find(|path| path.exists())
}

/// Resolves the links of the part of `path` that exists.
fn resolved(path: &Path) -> PathBuf {
    let Some(nearest) = nearest_existing(path) else { return path.into() };
    let real = nearest.canonicalize().unwrap_or_else(|_| nearest.into());
    match path.strip_prefix(nearest) {
        Ok(rest) if !rest.as_os_str().is_empty() => real.join(rest),
        _ => real,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_pg_dump_says() {
        let fine = "pg_dump: error: could not create directory \"/proc/pgthaw-check\": No such file or directory\n";
        assert_eq!(pg_dump_said(fine), Ok(()));
        let cases = [
            ("pg_dump: error: unrecognized compression algorithm: \"x\"\n", "error: unrecognized"),
            (
                "pg_dump: unrecognized option '--filter'\npg_dump: hint: Try",
                "unrecognized option '--filter'",
            ),
            ("", "it says nothing"),
        ];
        for (messages, want) in cases {
            let failure = pg_dump_said(messages).unwrap_err();
            assert!(failure.message.contains(want), "{failure}");
        }
    }

    #[test]
    fn the_shorter_timeout_counts() {
        let cases = [
            (None, None, None),
            (Some(0), Some(0), None),
            (Some(60), Some(0), Some(60)),
            (Some(0), Some(90), Some(90)),
            (Some(60), Some(90), Some(60)),
            (Some(90), Some(60), Some(60)),
        ];
        for (default, max, want) in cases {
            assert_eq!(request_timeout(default, max), want, "{default:?} {max:?}");
        }
    }

    #[test]
    fn looks_at_directories() {
        let scratch = tempfile::tempdir().unwrap();
        let (file, open) = (scratch.path().join("file"), scratch.path().join("open"));
        fs::write(&file, "").unwrap();
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        let problem = |path: &Path| Directory::look(path, None, &[]).problem;
        assert_eq!(problem(scratch.path()), None);
        assert_eq!(problem(&file).unwrap(), "it is no directory");
        assert!(problem(&open).unwrap().contains("not sticky"));
        assert!(problem(&scratch.path().join("missing")).unwrap().contains("No such file"));
        assert_eq!(problem(Path::new("/proc")).is_some(), !rustix::process::geteuid().is_root());
        fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o700)).unwrap();
        if let (true, Ok(postgres)) =
            (rustix::process::geteuid().is_root(), OsUser::look_up("postgres"))
        {
            let problem =
                Directory::look(scratch.path(), Some(&postgres), &[Some(&postgres)]).problem;
            assert_eq!(problem.unwrap(), "the account postgres cannot enter it");
        }
    }

    #[test]
    fn resolves_what_exists() {
        let scratch = tempfile::tempdir().unwrap();
        let real = scratch.path().canonicalize().unwrap();
        fs::create_dir(real.join("a")).unwrap();
        std::os::unix::fs::symlink(real.join("a"), real.join("link")).unwrap();
        assert_eq!(resolved(&real.join("link")), real.join("a"));
        assert_eq!(resolved(&real.join("link/new/er")), real.join("a/new/er"));
        assert_eq!(nearest_existing(&real.join("link/new")).unwrap(), real.join("link"));
    }
}
