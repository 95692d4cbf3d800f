//! The check before anything is touched: may this account do what the export needs, and is there room?
//!
//! Owns the findings, each with its remedy. What is read from the machine is gathered first ([`Environment`]), then
//! judged without I/O, so that all errors and warnings are told at once. Errors are certainties and refuse the export;
//! estimates are warnings with their figures. Leaves it to the repository's side whether a backup can be read at all.
//! Start at [`run`].

mod databases;
mod directories;
mod environment;
mod kernel;
mod logind;

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use pgthaw_mover::TargetDirectory;
use pgthaw_session::ExportRequest;
use pgthaw_session::observed::Failure;

use self::environment::{Environment, Fuse};
use crate::wire::{CheckPart, CheckReport, CheckTask};

/// The block size that PostgreSQL is nearly always built with, and the only one that is read, in bytes.
const BLOCK_SIZE: u32 = 8192;

/// Checks whether this machine's part in the export of `task` can be done. Changes nothing.
pub fn run(task: &CheckTask) -> CheckReport {
    CheckReport { clock: Some(Timestamp::now()), ..judge(&Environment::look(task), task) }
}

/// Returns the directories that have to be made for `path` to exist, the outermost first, itself last.
pub fn missing_directories(path: &Path) -> Vec<PathBuf> {
    TargetDirectory::missing(path)
}

/// Says everything there is to say about an export of `task` in `environment`.
fn judge(environment: &Environment, task: &CheckTask) -> CheckReport {
    let mut report = CheckReport::default();
    if task.part == CheckPart::Target {
        directories::judge(&mut report, environment, task, &databases::chosen(task));
        return report;
    }
    for note in &task.facts.notes {
        report.warning(note, None);
    }
    for (what, path) in &task.facts.further_roots {
        report.passed.push(format!("{what} is read from `{}`", path.display()));
    }
    let chosen = databases::judge(&mut report, task);
    programs(&mut report, environment, task);
    fuse(&mut report, &environment.fuse, environment.root, task.request.stall_timeout);
    kernel::judge(&mut report, &environment.kernel);
    isolation(&mut report, environment, &task.request);
    databases::locales(&mut report, &environment.locales, &chosen);
    directories::judge(&mut report, environment, task, &chosen);
    if let Some(logind) = &environment.logind {
        logind::judge(&mut report, logind, environment.isolation.is_ok());
    }
    report
}

fn add_failure(report: &mut CheckReport, failure: &Failure) {
    report.error(&failure.message, failure.hint.clone());
}

/// PostgreSQL's programs, the account that runs them, and what the user passes on to `pg_dump`.
fn programs(report: &mut CheckReport, environment: &Environment, task: &CheckTask) {
    let blocks = task.facts.start.block_size;
    if blocks != BLOCK_SIZE {
        let text =
            format!("the cluster has blocks of {blocks} bytes; only {BLOCK_SIZE} are supported");
        report.error(text, Some("restore this backup with its own tool".into()));
    }
    match &environment.os_user {
        Ok(user) if environment.root => {
            report.passed.push(format!("PostgreSQL runs as the account {}", user.name));
        }
        Ok(_) => {}
        Err(failure) => add_failure(report, failure),
    }
    match &environment.programs {
        Ok(programs) => {
            let (version, directory) =
                (&programs.binaries.version, programs.binaries.directory.display());
            report.passed.push(format!("PostgreSQL {version} in {directory}"));
            if let Some(built) =
                programs.block_size.filter(|built| *built != blocks && blocks == BLOCK_SIZE)
            {
                let text = format!(
                    "PostgreSQL in {directory} is built for blocks of {built} bytes, the cluster has {blocks}"
                );
                report.error(text, Some("name programs built alike with --pg-bin".into()));
            }
            for (library, path) in &programs.missing_libraries {
                let text = format!(
                    "the library {library} of --preload is not there (`{}`)",
                    path.display()
                );
                report.error(text, Some("install the package that brings it".into()));
            }
        }
        Err(failure) => add_failure(report, failure),
    }
    if let Err(failure) = &environment.dump_arguments {
        report.usage_error(&failure.message, failure.hint.clone());
    }
}

/// Whether this account may mount, and what the kernel does to those who wait for a mount.
fn fuse(report: &mut CheckReport, fuse: &Fuse, root: bool, stall_timeout: u64) {
    if let Err(failure) = &fuse.device {
        add_failure(report, failure);
    }
    if let Err(failure) = &fuse.helper {
        add_failure(report, failure);
    }
    if let Some(problem) = &fuse.mountpoint_problem {
        report.error(problem, Some("let all accounts enter that directory (mode 0755)".into()));
    }
    if fuse.device.is_ok() && fuse.helper.is_ok() && fuse.mountpoint_problem.is_none() {
        let how = if root { "as root" } else { "with fusermount3" };
        report.passed.push(format!("FUSE can be used {how}"));
    }
    let is_shorter = |seconds: &u64| *seconds < stall_timeout;
    if let Some(seconds) = fuse.request_timeout.filter(is_shorter) {
        let text = format!(
            "the kernel gives up a mount after {seconds} s without an answer; a repository may need longer (--stall-timeout {stall_timeout} s)"
        );
        let remedy = "raise fs.fuse.default_request_timeout and fs.fuse.max_request_timeout, or set them to 0";
        report.warning(text, Some(remedy.into()));
    }
    if let Some(seconds) = fuse.hung_task_panic.filter(is_shorter) {
        let text = format!(
            "the kernel panics when a process waits for {seconds} s (kernel.hung_task_panic), and a repository that does \
             not answer makes processes wait"
        );
        report.warning(
            text,
            Some("set kernel.hung_task_panic to 0 for the time of the export".into()),
        );
    }
}

/// Whether PostgreSQL can have a root of its own: without one, code in the backup reaches what its account reaches here.
fn isolation(report: &mut CheckReport, environment: &Environment, request: &ExportRequest) {
    let reason = match &environment.isolation {
        Ok(isolation) => {
            report.passed.push(format!("PostgreSQL will be {}", isolation.describe()));
            return;
        }
        Err(reason) => reason,
    };
    if request.allow_unisolated {
        let text = format!(
            "PostgreSQL will not be isolated from this machine, because the kernel refuses a root of its own ({reason}): code in the backup can \
             reach everything that its account can reach here (--allow-unisolated)"
        );
        report.warning(text, None);
        return;
    }
    let allow = if environment.root {
        "in a container, give it the capability CAP_SYS_ADMIN and a seccomp and AppArmor profile that allow mounts"
    } else {
        "start pgthaw as root, or allow unprivileged user namespaces: user.max_user_namespaces above 0, and where the kernel has them \
         kernel.unprivileged_userns_clone=1 and kernel.apparmor_restrict_unprivileged_userns=0"
    };
    let text = format!(
        "the kernel refuses PostgreSQL a root of its own, which keeps code in the backup away from this machine: {reason}"
    );
    let remedy = format!(
        "{allow}; or, if you trust everybody who was superuser in that cluster, export with --allow-unisolated"
    );
    report.error(text, Some(remedy));
}

#[cfg(test)]
mod tests;
