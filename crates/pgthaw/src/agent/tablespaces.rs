//! Tablespaces that replay makes: found in the WAL before PostgreSQL starts, and given a place in its root.
//!
//! Replay of `CREATE TABLESPACE` works at the absolute path that the original server used: it changes that directory's mode, makes
//! directories in it, and leads `pg_tblspc/OID` there. In the instance's root that path is a directory of the session's mount, and
//! the mount takes no other link. The walk through the WAL costs about half a second per GB beside what decoding it costs, which
//! replay would do anyway.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use pgthaw_postgres::inspect;
use pgthaw_postgres::instance::InstancePlan;
use pgthaw_postgres::root::Confinement;
use pgthaw_postgres::root::layout::Location;
use pgthaw_postgres::wal::location_objection;
use pgthaw_session::observed::Failure;

use super::Agent;
use crate::internal::wal::WalTablespace;
use crate::wire::BackupTablespace;

/// The directory of the mount that holds those of the tablespaces that replay makes. They begin empty, whatever the backup holds of
/// such a tablespace: replay makes all of it (12 to 14 remove what is there), and a base backup may hold a link of it that was copied
/// as it was, and that leads to the original's live directory.
const REPLAYED: &str = "replayed";
/// WAL of more bytes than this is worth a line in the log.
const WORTH_A_LINE: u64 = 256 << 20;

/// Finds the tablespaces that replay makes and prepares the mount for them; `plan` gets their locations. Returns them.
///
/// # Errors
/// WAL that cannot be read, a location that cannot be given a place on this machine, or any location without a root of its own.
pub async fn prepare(
    agent: &Arc<Agent>,
    plan: InstancePlan,
) -> Result<(InstancePlan, Vec<WalTablespace>), Failure> {
    let agent = agent.clone();
    let work = tokio::task::spawn_blocking(move || prepare_blocking(&agent, plan));
    work.await.unwrap_or_else(|err| Err(Failure::new(format!("looking through WAL: {err}"))))
}

fn prepare_blocking(
    agent: &Agent,
    mut plan: InstancePlan,
) -> Result<(InstancePlan, Vec<WalTablespace>), Failure> {
    let mount = agent.mount()?;
    let begun = Instant::now();
    let until = agent.assignment.recovery_end.as_ref().filter(|end| end.replayed);
    let found = mount.tablespaces(until.map(|end| end.lsn.clone()))?;
    if found.bytes > WORTH_A_LINE {
        let (megabytes, seconds) = (found.bytes >> 20, begun.elapsed().as_secs_f64());
        agent.tell(format!(
            "looked through {megabytes} MiB of WAL for tablespaces in {seconds:.1} s"
        ));
    }
    if let Some(failure) = found.links.iter().find_map(objection) {
        return Err(failure);
    }
    let outside: Vec<&WalTablespace> =
        found.links.iter().filter(|link| !link.location.is_empty()).collect();
    if let (Confinement::Unisolated, Some(link)) = (&plan.confinement, outside.first()) {
        return Err(Failure::new(format!(
            "the backup's WAL makes the tablespace {} at `{}`, and replay would work at that very path of this machine: \
             PostgreSQL has no root of its own here",
            link.oid,
            link.location.escape_ascii()
        ))
        .hint("run the export where the kernel allows it a root of its own (see `pgthaw check`); --allow-unisolated does not cover this"));
    }
    let mountpoint = &agent.assignment.place.mountpoint;
    plan.locations = locations(&outside, mountpoint);
    let links = outside.iter().map(|link| (link.oid, link.location.clone())).collect();
    let mut directories: Vec<String> =
        outside.iter().map(|link| format!("{REPLAYED}/{}", link.oid)).collect();
    let nested = plan
        .directories_in_mount()
        .map_err(|err| Failure::new(err.to_string()).hint(err.hint()))?;
    for directory in nested {
        let inside = directory.strip_prefix(mountpoint).ok().and_then(Path::to_str);
        directories.push(inside.map(str::to_owned).ok_or_else(|| {
            Failure::new(format!("the tablespace directory `{}` is not UTF-8", directory.display()))
        })?);
    }
    if !directories.is_empty() {
        mount.provide(directories, links)?;
    }
    Ok((plan, found.links))
}

/// Returns why no directory can be given to a tablespace.
fn objection(link: &WalTablespace) -> Option<Failure> {
    let objection = location_objection(&link.location)?;
    let location = link.location.escape_ascii();
    let message = format!(
        "the backup's WAL makes the tablespace {} at `{location}`, and {objection}",
        link.oid
    );
    Some(Failure::new(message).hint("PostgreSQL makes no such tablespace, so that WAL may have been changed on purpose; an export that ends before it (without --target-latest) may be possible"))
}

/// Returns which directory of the mount appears at which path. Of several tablespaces that had one location after each other,
/// the one that is there at the end has it, or else the last.
fn locations(links: &[&WalTablespace], mountpoint: &Path) -> Vec<Location> {
    let mut by_path = BTreeMap::<PathBuf, &WalTablespace>::new();
    for link in links {
        let path: PathBuf =
            Path::new(&OsString::from_vec(link.location.clone())).components().collect();
        let taken = by_path.entry(path).or_insert(link);
        if !taken.remains {
            *taken = link;
        }
    }
    let location = |(location, link): (PathBuf, &WalTablespace)| Location {
        oid: link.oid,
        location,
        directory: mountpoint.join(REPLAYED).join(link.oid.to_string()),
    };
    by_path.into_iter().map(location).collect()
}

/// Returns the location that each tablespace had on the original server, by name.
pub fn original_locations(
    there: Vec<inspect::Tablespace>,
    backup: &[BackupTablespace],
    replayed: &[WalTablespace],
) -> BTreeMap<String, String> {
    let location = |row: &inspect::Tablespace| {
        if row.location.starts_with("pg_tblspc/") {
            return Some(String::new()); // in place (allow_in_place_tablespaces): PostgreSQL tells its own directory
        }
        let made = replayed.iter().find(|link| link.oid == row.oid && link.remains);
        let made = made.and_then(|link| String::from_utf8(link.location.clone()).ok());
        let known = || backup.iter().find(|tablespace| tablespace.oid == row.oid);
        made.or_else(|| Some(known()?.location.clone()))
    };
    there.into_iter().filter_map(|row| Some((row.name.clone(), location(&row)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(oid: u32, location: &str, remains: bool) -> WalTablespace {
        WalTablespace { oid, location: location.into(), remains }
    }

    #[test]
    fn a_location_belongs_to_the_tablespace_that_has_it_at_the_end() {
        let links = [
            link(1, "/srv/a", false),
            link(2, "/srv/a/", true),
            link(3, "/srv/b", false),
            link(4, "/srv//b", false),
            link(5, "/srv/c", true),
            link(6, "/srv/c", false),
        ];
        let links: Vec<&WalTablespace> = links.iter().collect();
        let found = locations(&links, Path::new("/mnt"));
        let found: Vec<(u32, &str, &str)> = found
            .iter()
            .map(|l| (l.oid, l.location.to_str().unwrap(), l.directory.to_str().unwrap()))
            .collect();
        let want = [
            (2, "/srv/a", "/mnt/replayed/2"),
            (4, "/srv/b", "/mnt/replayed/4"),
            (5, "/srv/c", "/mnt/replayed/5"),
        ];
        assert_eq!(found, want);
    }

    #[test]
    fn original_locations_come_from_the_backup_or_its_wal() {
        let row = |oid, name: &str, location: &str| inspect::Tablespace {
            oid,
            name: name.into(),
            location: location.into(),
        };
        let there = vec![
            row(1, "old", "/mnt/tablespaces/1"),
            row(2, "new", "/srv/new"),
            row(3, "place", "pg_tblspc/3"),
            row(4, "unknown", "/mnt/tablespaces/4"),
        ];
        let old = BackupTablespace { oid: 1, name: None, location: "/srv/old".into() };
        let found =
            original_locations(there, &[old], &[link(2, "/srv/new", true), link(4, "/x", false)]);
        let want = [("new", "/srv/new"), ("old", "/srv/old"), ("place", "")];
        let want = want.map(|(name, location)| (name.to_owned(), location.to_owned()));
        assert_eq!(found, BTreeMap::from(want));
    }
}
