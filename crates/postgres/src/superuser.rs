//! A superuser to dump with: the cluster's own, or a temporary one.
//!
//! The bootstrap superuser (OID 10 of `pg_authid`) may be renamed or not allowed to log in. When no known
//! name will do, PostgreSQL's single-user mode makes a role of ours in the write layer; `globals.sql` leaves
//! it out ([`crate::globals::rewrite`]).

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

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
    /// What the user named (`--superuser`); no other is used then.
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
/// [`InstanceError`] if the role that the user named will not do, or no role will and none can be made.
pub async fn ensure_superuser(
    instance: &mut Instance,
    candidates: &Candidates<'_>,
) -> Result<Superuser, InstanceError> {
    let own = temporary_role(&instance.plan().marker);
    let databases = databases(candidates);
    let mut names = vec![candidates.guessed.unwrap_or("postgres"), "postgres", own.as_str()];
    names.dedup();
    if let Some(name) = candidates.named {
        let Some(reason) = why_not(&instance.endpoint(name), &databases).await? else {
            return Ok(Superuser { name: name.into(), temporary: name == own });
        };
        let mut known = Vec::new();
        for other in names {
            let endpoint = instance.endpoint(other);
            if why_not(&endpoint, &databases).await?.is_none() {
                known = superusers(&endpoint, &databases).await?;
                known.retain(|known| *known != own);
                break;
            }
        }
        return Err(InstanceError::NotSuperuser { name: name.into(), reason, known });
    }
    for name in names {
        if why_not(&instance.endpoint(name), &databases).await?.is_none() {
            return Ok(Superuser { name: name.into(), temporary: name == own });
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

/// Asks in the first database that can be entered whether the role is superuser; returns why it is not to be used, if so.
async fn why_not(endpoint: &Endpoint, databases: &[&str]) -> Result<Option<String>, SqlError> {
    let no_superuser = || Some("it is no superuser".to_owned());
    match enter(endpoint, databases).await {
        Ok(client) => {
            let query = "SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = session_user";
            let row = client.query_opt(query, &[]).await;
            let row = row.map_err(failed("ask whether a role is superuser"))?;
            Ok(if row.is_some_and(|row| row.get(0)) { None } else { no_superuser() })
        }
        // no such role, or one that may not log in
        Err(error) if error.code().is_some_and(|code| code.starts_with("28")) => {
            Ok(error.server().map(|said| said.message().to_owned()))
        }
        // others may not set our options
        Err(error) if error.code() == Some("42501") => Ok(no_superuser()),
        Err(error) => Err(error),
    }
}

/// Connects to the first database that can be entered.
async fn enter(endpoint: &Endpoint, databases: &[&str]) -> Result<Client, SqlError> {
    let (first, others) = databases.split_first().unwrap_or((&"template1", &[]));
    let mut entered = endpoint.connect(first).await;
    for database in others {
        match &entered {
            // no such database, or it accepts no connections
            Err(error) if matches!(error.code(), Some("3D000" | "55000")) => {
                entered = endpoint.connect(database).await;
            }
            _ => break,
        }
    }
    entered
}

/// Lists the superusers that may log in.
async fn superusers(endpoint: &Endpoint, databases: &[&str]) -> Result<Vec<String>, SqlError> {
    let client = enter(endpoint, databases).await?;
    let query =
        "SELECT rolname FROM pg_catalog.pg_roles WHERE rolsuper AND rolcanlogin ORDER BY rolname";
    let rows = client.query(query, &[]).await.map_err(failed("list the superusers"))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
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
    *instance = Instance::start(plan)?;
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
