//! How PostgreSQL's programs are run on a backup: configuration files, log, command line, environment, and the root of
//! their own in which they run.
//!
//! [`crate::instance`] owns the running server; this file prepares it, and runs single-user mode. Every program that
//! works on what a backup holds is started by [`Launch::start`].

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, fchown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;

use crate::binaries::Binaries;
use crate::connection::Endpoint;
use crate::instance::InstanceError;
use crate::isolation::{Entry, Isolation};
use crate::log::explain_failure;
use crate::os_user::OsUser;
use crate::process::{self, Child};
use crate::root::host::Host;
use crate::root::layout::{Access, Account, LayoutError, View, layout};
use crate::root::{self, Confinement, Program, RootPlan, Streams, ids_of};
use crate::settings::{InstancePlan, PORT, settings};

/// A program that works on what a backup holds, and everything it is started with.
pub(crate) struct Launch<'a> {
    /// The programs it belongs to.
    pub(crate) binaries: &'a Binaries,
    /// The program.
    pub(crate) program: &'a Path,
    /// Its arguments.
    pub(crate) arguments: Vec<OsString>,
    /// Its environment beside the little that every program gets.
    pub(crate) environment: Vec<(OsString, OsString)>,
    /// Where it starts.
    pub(crate) directory: &'a Path,
    /// Who runs it; none for ourselves.
    pub(crate) os_user: Option<&'a OsUser>,
    /// The session's marker.
    pub(crate) marker: &'a str,
    /// What walls it in.
    pub(crate) confinement: &'a Confinement,
    /// What its root shows beside programs.
    pub(crate) view: View,
    /// Libraries that it loads, as `shared_preload_libraries` names them.
    pub(crate) libraries: Vec<&'a str>,
    /// What it gets of namespaces where it has no root of its own; none for clients.
    pub(crate) isolation: Option<&'a Isolation>,
    /// What it gets when our process ends, where it has no root of its own; there it is always SIGKILL.
    pub(crate) death_signal: Signal,
}

impl Launch<'_> {
    /// Starts the program.
    ///
    /// # Errors
    /// What could not be started, built or found.
    pub(crate) fn start(self, streams: Streams) -> io::Result<Child> {
        let account = Account::of(self.os_user);
        let environment = self.environment(&account.name);
        let Confinement::Root(helper) = self.confinement else {
            let mut command = Command::new(self.program);
            command.args(&self.arguments).env_clear().envs(environment).current_dir(self.directory);
            command.stdin(streams.stdin).stdout(streams.stdout).stderr(streams.stderr);
            if let Some(entry) = self.isolation.and_then(Entry::prepare) {
                // SAFETY: `enter` makes only async-signal-safe calls; it runs before the user changes.
                unsafe { command.pre_exec(move || entry.enter()) };
            }
            if let Some(user) = self.os_user {
                user.run_as(&mut command);
            }
            return process::spawn(command, self.death_signal);
        };
        let steps = self.steps(&account).map_err(io::Error::other)?.0;
        let program = Program {
            path: self.program.into(),
            arguments: self.arguments,
            environment,
            directory: self.directory.into(),
        };
        let plan = RootPlan { steps, program: Some(program), ids: ids_of(self.os_user) };
        root::start(helper, &plan, self.marker, streams).map_err(io::Error::other)
    }

    /// What its root holds, and the directories that must be there in the session's mount before.
    fn steps(
        &self,
        account: &Account,
    ) -> Result<(Vec<root::layout::Step>, Vec<PathBuf>), LayoutError> {
        steps(self.binaries, &self.libraries, self.os_user, account, &self.view)
    }

    /// Nothing of our caller's environment: no `PG…`, no locale, no library paths.
    fn environment(&self, name: &str) -> Vec<(OsString, OsString)> {
        let home = match (self.confinement, self.os_user) {
            (Confinement::Unisolated, Some(user)) => user.home.clone(),
            _ => "/".into(),
        };
        let fixed: [(&str, OsString); 6] = [
            ("PATH", "/usr/local/bin:/usr/bin:/bin".into()),
            ("LC_ALL", "C".into()),
            ("PGTHAW_SESSION", self.marker.into()),
            ("HOME", home.into()),
            ("USER", name.into()),
            ("LOGNAME", name.into()),
        ];
        let fixed = fixed.into_iter().map(|(name, value)| (name.into(), value));
        fixed.chain(self.environment.iter().cloned()).collect()
    }
}

/// What a root for `binaries` with `view` holds on this machine, and the directories that must be there in the session's
/// mount before.
pub(crate) fn steps(
    binaries: &Binaries,
    libraries: &[&str],
    os_user: Option<&OsUser>,
    account: &Account,
    view: &View,
) -> Result<(Vec<root::layout::Step>, Vec<PathBuf>), LayoutError> {
    layout(&Host::look(Some(binaries), libraries, os_user), view, account)
}

/// What the server's root shows.
pub(crate) fn server_view(plan: &InstancePlan) -> View {
    let mut shown: Vec<(PathBuf, Access)> =
        plan.cluster_directories.iter().map(|path| (path.clone(), Access::Write)).collect();
    shown.push((plan.instance_directory.clone(), Access::Read));
    shown.push((plan.socket_directory(), Access::Write));
    let locales = plan.locale_path.iter();
    let locales = locales.filter(|path| !path.starts_with(&plan.instance_directory));
    shown.extend(locales.map(|path| (path.clone(), Access::Read)));
    View { shown, locations: plan.locations.clone() }
}

/// What the root of pg_dump, or of another client, shows: the socket's directory, and where it writes.
pub(crate) fn client_view(endpoint: &Endpoint, output: Option<&Path>) -> View {
    let mut shown = vec![(endpoint.socket_directory.clone(), Access::Read)];
    shown.extend(output.map(|directory| (directory.to_owned(), Access::Write)));
    View { shown, locations: Vec::new() }
}

pub(crate) fn log_path(plan: &InstancePlan) -> PathBuf {
    plan.instance_directory.join("postgres.log")
}

/// Writes the three configuration files and makes the socket's directory, empty.
pub(crate) fn write_configuration(plan: &InstancePlan) -> Result<(), InstanceError> {
    let files = [
        ("postgresql.conf", "# all settings of this instance are on its command line\n"),
        (
            "pg_hba.conf",
            "# only who may enter this socket's directory gets here\nlocal all all trust\n",
        ),
        ("pg_ident.conf", ""),
    ];
    for (name, content) in files {
        let path = plan.instance_directory.join(name);
        let write = || {
            remove_if_there(&path)?;
            let mut file =
                OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            give_to(plan, &file)?;
            file.write_all(content.as_bytes())
        };
        write().map_err(|source| InstanceError::File { path: path.clone(), source })?;
    }
    let path = plan.socket_directory();
    make_socket_directory(plan).map_err(|source| InstanceError::File { path, source })
}

/// Makes the directory of the socket, or empties the one of a start before.
fn make_socket_directory(plan: &InstancePlan) -> io::Result<()> {
    let path = plan.socket_directory();
    match fs::DirBuilder::new().mode(0o700).create(&path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let directory = open_directory(&path)?;
    for name in [format!(".s.PGSQL.{PORT}"), format!(".s.PGSQL.{PORT}.lock"), "external.pid".into()]
    {
        // In the opened directory: by its path, what was left of an earlier start could lead us to another one.
        match rustix::fs::unlinkat(&directory, name.as_str(), rustix::fs::AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    directory.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
    give_to(plan, &directory)
}

fn open_directory(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_DIRECTORY | libc::O_CLOEXEC);
    options.open(path)
}

/// Takes the socket's directory away from the account that runs PostgreSQL, once the socket is there: code in the backup can
/// then neither put something else in its place nor fill our disk there. Only root can.
pub(crate) fn close_socket_directory(plan: &InstancePlan) -> io::Result<()> {
    if plan.os_user.is_none() || !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let directory = open_directory(&plan.socket_directory())?;
    fchown(&directory, Some(0), Some(0))?;
    directory.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o711))
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Gives a file that root made to the account that runs PostgreSQL.
fn give_to(plan: &InstancePlan, file: &File) -> io::Result<()> {
    match &plan.os_user {
        Some(user) => fchown(file, Some(user.uid), Some(user.gid)),
        None => Ok(()),
    }
}

/// Opens the log for appending and reading; root does not follow a link that the other account might have put there.
/// It is read through this descriptor only: what has its name later need not be the log.
pub(crate) fn open_log(plan: &InstancePlan) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_CLOEXEC;
    let mut options = OpenOptions::new();
    options.append(true).read(true).create(true).mode(0o600).custom_flags(flags);
    let log = options.open(log_path(plan))?;
    if !log.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    give_to(plan, &log)?;
    Ok(log)
}

/// The most of a log that is read, in bytes: code in a backup may have written it.
const LOG_LIMIT: u64 = 64 << 20;

/// Reads what the log holds from byte `start` on.
pub(crate) fn read_log(log: &File, start: u64) -> io::Result<String> {
    let length = log.metadata()?.len().saturating_sub(start).min(LOG_LIMIT);
    let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    let mut read = 0;
    while read < bytes.len() {
        match log.read_at(&mut bytes[read..], start + read as u64)? {
            0 => break, // it was cut in the meantime
            more => read += more,
        }
    }
    bytes.truncate(read);
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Starts the server, or single-user mode, with `first` and `last` around the settings.
pub(crate) fn start_server(
    plan: &InstancePlan,
    isolation: &Isolation,
    (first, last): (&[&str], &[&str]),
    streams: Streams,
    death_signal: Signal,
) -> io::Result<Child> {
    let mut arguments: Vec<OsString> = first.iter().map(Into::into).collect();
    arguments.extend(["-D".into(), plan.data_directory.clone().into()]);
    for (name, value) in settings(plan) {
        arguments.extend(["-c".into(), format!("{name}={value}").into()]);
    }
    arguments.extend(last.iter().map(Into::into));
    let locale = plan.locale_path.iter().map(|path| ("LOCPATH".into(), path.clone().into()));
    let launch = Launch {
        binaries: &plan.binaries,
        program: &plan.binaries.postgres,
        arguments,
        environment: locale.collect(),
        directory: &plan.instance_directory,
        os_user: plan.os_user.as_ref(),
        marker: &plan.marker,
        confinement: &plan.confinement,
        view: server_view(plan),
        libraries: plan.preload.iter().map(|preload| preload.library.as_str()).collect(),
        isolation: Some(isolation),
        death_signal,
    };
    launch.start(streams)
}

/// Runs one SQL command in single-user mode on a cluster whose server was stopped.
///
/// No role's or database's settings apply there, and anybody may log in.
///
/// # Errors
/// [`InstanceError`] if the command fails; the server's words are in the error.
pub(crate) async fn run_single_user(
    plan: &InstancePlan,
    isolation: &Isolation,
    database: &str,
    sql: &str,
) -> Result<(), InstanceError> {
    let program = plan.binaries.postgres.clone();
    let spawn_failed = |source| InstanceError::Spawn { program: program.clone(), source };
    let log_path = log_path(plan);
    let in_log = |source| InstanceError::File { path: log_path.clone(), source };
    let log = open_log(plan).map_err(in_log)?;
    let log_start = log.metadata().map_err(in_log)?.len();
    let streams = Streams {
        stdin: Stdio::piped(),
        stdout: Stdio::null(),
        stderr: log.try_clone().map_err(in_log)?.into(),
    };
    let around = (&["--single"][..], &["-c", "exit_on_error=on", database][..]);
    let mut child =
        start_server(plan, isolation, around, streams, Signal::KILL).map_err(spawn_failed)?;
    if let Some(mut input) = child.take_stdin() {
        // one line fits into the pipe; a server that has ended is told by its status
        let _ = writeln!(input, "{sql}");
    }
    let pid = child.id().pid;
    let status = child.wait().await.map_err(|source| InstanceError::Wait { pid, source })?;
    if status.success() {
        return Ok(());
    }
    let said = read_log(&log, log_start).map_err(in_log)?;
    Err(InstanceError::Ended { status, failure: Box::new(explain_failure(&said)) })
}
