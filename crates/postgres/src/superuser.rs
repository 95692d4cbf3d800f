//! A superuser to dump with: the cluster's own, or a temporary one.
//!
//! The bootstrap superuser (OID 10 of `pg_authid`) may be renamed or not allowed to log in. When no known
//! name will do, PostgreSQL's single-user mode makes a role of ours in the write layer; `globals.sql` leaves
//! it out ([`crate::globals::rewrite`]).

use serde::{Deserialize, Serialize};

use crate::connection::{Endpoint, SqlError, failed};
use crate::instance::{Instance, InstanceError, Recovery, StopMode};
use crate::launch::run_single_user;

/// A role that can dump everything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Superuser {
    /// Its name.
    pub name: String,
    /// We made it: it must not show in anything that is delivered.
    pub temporary: bool,
}

/// Names to try, and databases to try them in.
#[derive(Clone, Debug, Default)]
pub struct Candidates<'a> {
    /// What the user named (`--superuser`).
    pub named: Option<&'a str>,
    /// What the catalogs of the backup say about OID 10.
    pub guessed: Option<&'a str>,
    /// Databases that may be there besides `postgres` and `template1`.
    pub databases: &'a [String],
}

/// Returns the name of the temporary role of a session; the same each time.
pub fn temporary_role(marker: &str) -> String {
    let plain: String = marker.chars().filter(char::is_ascii_alphanumeric).take(40).collect();
    format!("pgthaw_{}", plain.to_ascii_lowercase())
}

/// Finds a role that can log in and is superuser, or makes one.
///
/// To make one the instance is stopped and started again; it is ready when this returns. The recovery's end
/// must be asked for before ([`Instance::recovery_end`]): the second start has none.
///
/// # Errors
/// [`InstanceError`] if no role will do and none can be made.
pub async fn ensure_superuser(
    instance: &mut Instance,
    candidates: &Candidates<'_>,
) -> Result<Superuser, InstanceError> {
    let own = temporary_role(&instance.plan().marker);
    let databases = databases(candidates);
    let names = [candidates.named, candidates.guessed, Some("postgres"), Some(own.as_str())];
    let mut tried: Vec<&str> = Vec::new();
    for name in names.into_iter().flatten() {
        if tried.contains(&name) {
            continue;
        }
        tried.push(name);
        if is_superuser(&instance.endpoint(name), &databases).await? {
            return Ok(Superuser { name: name.into(), temporary: name == own });
        }
        if candidates.named == Some(name) {
            tracing::warn!("the role \"{name}\" cannot log in or is no superuser; trying others");
        }
    }
    make_temporary(instance, &own, &databases).await?;
    Ok(Superuser { name: own, temporary: true })
}

/// Returns the databases to try, each once.
fn databases<'a>(candidates: &Candidates<'a>) -> Vec<&'a str> {
    let mut databases = vec!["template1", "postgres"];
    for name in candidates.databases {
        if !databases.contains(&name.as_str()) {
            databases.push(name);
        }
    }
    databases
}

/// Asks in the first database that can be entered whether the role is superuser.
async fn is_superuser(endpoint: &Endpoint, databases: &[&str]) -> Result<bool, SqlError> {
    let mut refused = None;
    for database in databases {
        match endpoint.connect(database).await {
            Ok(client) => {
                let query = "SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = session_user";
                let row = client.query_opt(query, &[]).await;
                let row = row.map_err(failed("ask whether a role is superuser"))?;
                return Ok(row.is_some_and(|row| row.get(0)));
            }
            // no such database, or it accepts no connections
            Err(error) if matches!(error.code(), Some("3D000" | "55000")) => refused = Some(error),
            // no such role, one that may not log in (28…), or no superuser: others may not set our options
            Err(error) if error.code().is_some_and(|c| c.starts_with("28") || c == "42501") => {
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
    }
    refused.map_or(Ok(false), Err)
}

async fn make_temporary(
    instance: &mut Instance,
    role: &str,
    databases: &[&str],
) -> Result<(), InstanceError> {
    tracing::info!("no known superuser can log in; making a temporary one in the write layer");
    instance.stop(StopMode::Fast).await?;
    let mut plan = instance.plan().clone();
    plan.recovery = Recovery::None; // it was recovered, and `recovery.signal` is gone
    let isolation = instance.isolation().clone();
    let sql = format!("CREATE ROLE \"{role}\" SUPERUSER LOGIN"); // lower-case letters, digits and `_`
    let mut result = Ok(());
    for database in databases {
        result = run_single_user(&plan, &isolation, database, &sql).await;
        let no_database = |error: &InstanceError| match error {
            InstanceError::Ended { failure, .. } => {
                failure.lines.iter().any(|line| line.contains("does not exist"))
            }
            _ => false,
        };
        if !result.as_ref().is_err_and(no_database) {
            break;
        }
    }
    result?;
    *instance = Instance::start_isolated(plan, isolation)?;
    instance.wait_ready(role, |_| ()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_need_no_quotes() {
        assert_eq!(temporary_role("a1B2-c3_d4"), "pgthaw_a1b2c3d4");
        assert!(temporary_role(&"x".repeat(63)).len() < 64);
        let more = ["postgres".to_string(), "crm".into()];
        let candidates = Candidates { databases: &more, ..Candidates::default() };
        assert_eq!(databases(&candidates), ["template1", "postgres", "crm"]);
    }
}
