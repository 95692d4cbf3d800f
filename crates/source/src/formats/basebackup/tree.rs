//! Walks a plain data directory and its tablespaces.
//!
//! Every tablespace link and a `pg_wal` link is resolved once and becomes one more root; any other symlink leads out
//! and is an error.

use std::path::{Path, PathBuf};

use crate::error::SourceError;
use crate::formats::objects::Objects;
use crate::formats::presented;
use crate::formats::recovery::cluster_path;
use crate::formats::relation::is_oid;
use crate::map::ClusterPath;
use crate::store::{Entry, Kind, Root};

/// What a walk found.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    /// The roots: the data directory first.
    pub roots: Vec<Root>,
    /// Directories that are shown.
    pub directories: Vec<ClusterPath>,
    /// Files that are shown.
    pub files: Vec<Found>,
    /// Tablespaces by OID, with the target of their link; none for a tablespace inside the data directory.
    pub tablespaces: Vec<(u32, Option<PathBuf>)>,
    /// Those of them whose link was not followed.
    pub unfollowed: Vec<u32>,
    /// Where the segments lie: root and directory beneath it.
    pub wal: Option<(u32, String)>,
    /// Where a `pg_wal` link leads.
    pub wal_link: Option<PathBuf>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// A file that was found.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    /// Where it lies in the mounted cluster.
    pub path: ClusterPath,
    /// The root it lies beneath.
    pub root: u32,
    /// Path beneath that root.
    pub relative: String,
    /// Bytes.
    pub size: u64,
    /// Last modification.
    pub modified: i64,
}

/// Walks the data directory `root` and all it links to. `version_directory` is the name of a tablespace's directory
/// for this cluster, `PG_<major>_<catalog version>`; nothing else of a tablespace's location is looked at.
///
/// Where `has_files` says that the backup has no file of a tablespace, its link is not followed: pg_basebackup copies
/// links of tablespaces that were made while it ran as they are, so that they lead to the original's live directory.
///
/// The objects returned hold nothing but the tree's roots, under the tree's own numbers.
///
/// # Errors
/// A symlink that leads out, a dead tablespace link, an incremental backup's file, a name that is no UTF-8.
pub(crate) fn walk(
    root: Root,
    version_directory: &str,
    has_files: &dyn Fn(u32) -> bool,
) -> Result<(Tree, Objects), SourceError> {
    let mut objects = Objects::default();
    objects.add_root(&root);
    let mut tree = Tree { roots: vec![root], ..Tree::default() };
    tree.below(0, "", "data")?;
    for (oid, link) in tree.tablespace_links()? {
        let cluster = format!("tablespaces/{oid}");
        let cluster_directory = format!("{cluster}/{version_directory}");
        tree.directories.push(cluster_path(&cluster_directory)?);
        if link.is_some() && !has_files(oid) {
            tree.unfollowed.push(oid);
            tree.tablespaces.push((oid, link));
            continue;
        }
        let (number, relative) = match &link {
            Some(target) => {
                let number = tree.link(&format!("pg_tblspc/{oid}"), target, &mut objects)?;
                (number, version_directory.to_owned())
            }
            None => (0, format!("pg_tblspc/{oid}/{version_directory}")),
        };
        match tree.root(number).metadata(&relative).map(|entry| entry.kind) {
            Ok(Kind::Directory) => tree.below(number, &relative, &cluster_directory)?,
            Ok(_) | Err(_) => {
                return Err(SourceError::Missing {
                    path: tree.root(number).path().join(&relative),
                    for_what: format!("the files of tablespace {oid}"),
                });
            }
        }
        tree.tablespaces.push((oid, link));
    }
    tree.find_wal(&mut objects)?;
    Ok((tree, objects))
}

impl Tree {
    /// A root by its number, one of those that the walk gave.
    pub(crate) fn root(&self, number: u32) -> &Root {
        &self.roots[number as usize]
    }

    /// Walks one directory and all below it.
    fn below(&mut self, number: u32, relative: &str, cluster: &str) -> Result<(), SourceError> {
        let mut open = vec![(relative.to_owned(), cluster.to_owned())];
        while let Some((relative, cluster)) = open.pop() {
            self.directories.push(cluster_path(&cluster)?);
            if !presented::shows_content_of(&cluster) || cluster == "data/pg_tblspc" {
                continue;
            }
            for entry in self.root(number).list(&relative)? {
                let full = || self.root(number).path().join(&relative).join(&entry.name);
                let Some(name) = entry.name.to_str() else {
                    return Err(SourceError::Damaged {
                        path: full(),
                        problem: "its name is no UTF-8".into(),
                    });
                };
                let relative = if relative.is_empty() {
                    name.to_owned()
                } else {
                    format!("{relative}/{name}")
                };
                let cluster = format!("{cluster}/{name}");
                match entry.kind {
                    Kind::Directory if presented::shows_directory(&cluster) => {
                        open.push((relative, cluster))
                    }
                    Kind::Symlink
                        if cluster == "data/pg_wal" || !presented::shows_file(&cluster) => {}
                    Kind::Symlink => {
                        let target = self.root(number).read_link(&relative)?;
                        return Err(SourceError::LeadsOut { path: full(), target });
                    }
                    Kind::File if name.starts_with("INCREMENTAL.") => {
                        return Err(incremental(&full()));
                    }
                    Kind::File if presented::shows_file(&cluster) => {
                        let path = cluster_path(&cluster)?;
                        let Entry { size, modified, .. } = entry;
                        self.files.push(Found { path, root: number, relative, size, modified });
                    }
                    Kind::Other => {
                        self.notes.push(format!("`{}` is no file and left out", full().display()))
                    }
                    Kind::Directory | Kind::File => {}
                }
            }
        }
        Ok(())
    }

    /// The entries of `pg_tblspc`, by OID.
    fn tablespace_links(&self) -> Result<Vec<(u32, Option<PathBuf>)>, SourceError> {
        let mut links = Vec::new();
        let entries = match self.roots[0].list("pg_tblspc") {
            Ok(entries) => entries,
            Err(err) if crate::formats::objects::is_absent(&err) => return Ok(links),
            Err(err) => return Err(err.into()),
        };
        for entry in entries {
            let Some(oid) =
                entry.name.to_str().filter(|name| is_oid(name)).and_then(|name| name.parse().ok())
            else {
                continue;
            };
            match entry.kind {
                Kind::Symlink => {
                    links.push((oid, Some(self.roots[0].read_link(format!("pg_tblspc/{oid}"))?)))
                }
                Kind::Directory => links.push((oid, None)),
                Kind::File | Kind::Other => {}
            }
        }
        links.sort_unstable_by_key(|(oid, _)| *oid);
        Ok(links)
    }

    /// Opens the directory that the symlink `relative` of the data directory leads to, as one more root.
    fn link(
        &mut self,
        relative: &str,
        target: &Path,
        objects: &mut Objects,
    ) -> Result<u32, SourceError> {
        let path = self.roots[0].path().join(relative);
        let resolved = path.parent().unwrap_or(Path::new("/")).join(target);
        let dead =
            |source| SourceError::DeadLink { path: path.clone(), target: resolved.clone(), source };
        let real = resolved.canonicalize().map_err(dead)?;
        let root = Root::open(&real).map_err(dead)?;
        let number = objects.add_root(&root);
        self.roots.push(root);
        Ok(number)
    }

    fn find_wal(&mut self, objects: &mut Objects) -> Result<(), SourceError> {
        match self.roots[0].metadata("pg_wal") {
            Ok(entry) if entry.kind == Kind::Directory => self.wal = Some((0, "pg_wal".into())),
            Ok(entry) if entry.kind == Kind::Symlink => {
                let target = self.roots[0].read_link("pg_wal")?;
                let number = self.link("pg_wal", &target, objects)?;
                self.wal_link = Some(self.root(number).path().to_path_buf());
                self.wal = Some((number, String::new()));
            }
            Ok(_) => {}
            Err(err) if crate::formats::objects::is_absent(&err) => {}
            Err(err) => return Err(err.into()),
        }
        Ok(())
    }
}

/// The error for a backup that holds only changes.
pub(crate) fn incremental(path: &Path) -> SourceError {
    SourceError::Unsupported {
        object: format!("`{}`", path.display()),
        what: "an incremental pg_basebackup (INCREMENTAL.* files)".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_to_a_tablespace_that_the_backup_does_not_hold_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (data, held, live) =
            (dir.path().join("data"), dir.path().join("held"), dir.path().join("live"));
        for (oid, space) in [(1, &held), (2, &live)] {
            std::fs::create_dir_all(data.join("pg_tblspc")).unwrap();
            std::fs::create_dir_all(space.join("PG_15_1/5")).unwrap();
            std::fs::write(space.join("PG_15_1/5/16400"), "rows").unwrap();
            std::os::unix::fs::symlink(space, data.join(format!("pg_tblspc/{oid}"))).unwrap();
        }
        std::os::unix::fs::symlink("/nowhere", data.join("pg_tblspc/3")).unwrap();
        let (tree, _) = walk(Root::open(&data).unwrap(), "PG_15_1", &|oid| oid == 1).unwrap();
        let files: Vec<&str> = tree.files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(files, ["tablespaces/1/PG_15_1/5/16400"]);
        assert_eq!(tree.unfollowed, [2, 3]);
        for oid in [1, 2, 3] {
            let directory = format!("tablespaces/{oid}/PG_15_1");
            assert!(tree.directories.iter().any(|at| at.as_str() == directory), "{directory}");
        }
        let oids: Vec<u32> = tree.tablespaces.iter().map(|(oid, _)| *oid).collect();
        assert_eq!(oids, [1, 2, 3]);
    }
}
