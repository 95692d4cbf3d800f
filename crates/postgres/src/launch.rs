//! How the server's programs are run: configuration files, log, command line, environment, namespaces, user.
//!
//! [`crate::instance`] owns the running server; this file prepares it, and runs single-user mode.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{OpenOptionsExt, fchown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;

use crate::instance::InstanceError;
use crate::isolation::{Entry, Isolation};
use crate::log::explain_failure;
use crate::process;
use crate::settings::{InstancePlan, PORT, settings};

pub(crate) fn log_path(plan: &InstancePlan) -> PathBuf {
    plan.instance_directory.join("postgres.log")
}

/// Writes the three configuration files and removes a killed server's socket.
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
    for name in [format!(".s.PGSQL.{PORT}"), format!(".s.PGSQL.{PORT}.lock")] {
        let path = plan.instance_directory.join(name);
        remove_if_there(&path).map_err(|source| InstanceError::File { path, source })?;
    }
    Ok(())
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

/// Opens the log for appending; root does not follow a link that the other account might have put there.
pub(crate) fn open_log(plan: &InstancePlan) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_CLOEXEC;
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(0o600).custom_flags(flags);
    let log = options.open(log_path(plan))?;
    if !log.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    give_to(plan, &log)?;
    Ok(log)
}

/// Prepares the server's command: settings, environment, namespaces, user. The caller adds standard input.
pub(crate) fn server_command(
    plan: &InstancePlan,
    isolation: &Isolation,
    log: &File,
) -> io::Result<Command> {
    let mut command = Command::new(&plan.binaries.postgres);
    base_command(plan, isolation, &mut command);
    command.arg("-D").arg(&plan.data_directory);
    for (name, value) in settings(plan) {
        command.arg("-c").arg(format!("{name}={value}"));
    }
    command.stdout(log.try_clone()?).stderr(log.try_clone()?);
    Ok(command)
}

/// Sets what every way of running the server shares: environment, directory, namespaces, user.
fn base_command(plan: &InstancePlan, isolation: &Isolation, command: &mut Command) {
    clean_environment(command, &plan.marker);
    if let Some(locale_path) = &plan.locale_path {
        command.env("LOCPATH", locale_path);
    }
    command.current_dir(&plan.instance_directory);
    if let Some(entry) = Entry::prepare(isolation) {
        // SAFETY: `enter` makes only async-signal-safe calls; it runs before the user changes.
        unsafe { command.pre_exec(move || entry.enter()) };
    }
    if let Some(user) = &plan.os_user {
        user.run_as(command);
    }
}

/// Leaves nothing of our caller's environment: no `PG…`, no locale, no library paths.
pub(crate) fn clean_environment(command: &mut Command, marker: &str) {
    command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").env("LC_ALL", "C");
    command.env("PGTHAW_SESSION", marker);
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
    let mut command = Command::new(&plan.binaries.postgres);
    base_command(plan, isolation, &mut command);
    command.args(["--single", "-D"]).arg(&plan.data_directory);
    for (name, value) in settings(plan) {
        command.arg("-c").arg(format!("{name}={value}"));
    }
    command.args(["-c", "exit_on_error=on"]).arg(database);
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    command.stderr(log.try_clone().map_err(in_log)?);
    let mut child = process::spawn(command, Signal::KILL).map_err(spawn_failed)?;
    if let Some(mut input) = child.take_stdin() {
        // one line fits into the pipe; a server that has ended is told by its status
        let _ = writeln!(input, "{sql}");
    }
    let pid = child.id().pid;
    let status = child.wait().await.map_err(|source| InstanceError::Wait { pid, source })?;
    if status.success() {
        return Ok(());
    }
    let mut said = String::new();
    let read = File::open(&log_path).and_then(|mut file| {
        file.seek(SeekFrom::Start(log_start))?;
        file.read_to_string(&mut said)
    });
    read.map_err(in_log)?;
    Err(InstanceError::Ended { status, failure: Box::new(explain_failure(&said)) })
}
