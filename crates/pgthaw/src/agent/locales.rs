//! Locales that the selected databases need and this machine lacks: built by `localedef` into the session's private directory.

use std::path::PathBuf;

use pgthaw_postgres::locale::{Installed, Sources, plan_locales};
use pgthaw_session::observed::Failure;

use super::Agent;
use crate::internal::source::with_causes;
use crate::wire::BackupDatabase;

/// Builds what is missing; returns the directory to use as `LOCPATH`, or nothing where nothing is missing.
///
/// # Errors
/// When a locale is missing that cannot be built.
pub fn build_missing(agent: &Agent) -> Result<Option<PathBuf>, Failure> {
    let installed = Installed::here()
        .map_err(|err| Failure::new(format!("list the installed locales: {err}")))?;
    let selected = agent
        .assignment
        .facts
        .databases
        .iter()
        .filter(|database| agent.assignment.selects(database));
    let plan = plan_locales(selected.map(BackupDatabase::locales), &installed, &Sources::here());
    if let Some(missing) = plan.missing.first() {
        return Err(Failure::new(format!(
            "database `{}` needs the locale {}",
            missing.database, missing.locale
        ))
        .hint(&missing.remedy));
    }
    if plan.build.is_empty() {
        return Ok(None);
    }
    let directory = agent.instance_directory().join("locales");
    let failed =
        |err: std::io::Error| Failure::new(format!("make `{}`: {err}", directory.display()));
    std::fs::create_dir(&directory).map_err(failed)?;
    std::os::unix::fs::chown(&directory, Some(agent.os_user.uid), Some(agent.os_user.gid))
        .map_err(failed)?;
    for build in &plan.build {
        agent.tell(format!("building the locale {} for this export", build.name));
        build
            .build(&directory, &agent.os_user)
            .map_err(|err| Failure::new(with_causes(&err)).hint(err.hint()))?;
    }
    Ok(Some(directory))
}
