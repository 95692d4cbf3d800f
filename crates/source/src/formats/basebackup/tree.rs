//! Walks a plain data directory and its tablespaces.
//!
//! A tablespace's link is resolved once and becomes one more root, where a manifest proves what lies there or the user says so: the
//! link of a copied directory leads to the original's live directory. A `pg_wal` link that leads out is not followed, because nothing
//! proves WAL; any other symlink is an error.

use std::collections::BTreeMap;
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
    /// Where those of them are read that are not read in `pg_tblspc` itself.
    pub followed: BTreeMap<u32, PathBuf>,
    /// Where the segments lie: root and directory beneath it.
    pub wal: Option<(u32, String)>,
    /// Where a `pg_wal` link leads that was not followed, because it leads out of the backup.
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

/// What decides where a tablespace is read.
pub(crate) struct Links<'a> {
    /// What the user said, by OID: a directory, or that the backup holds nothing of it.
    pub named: &'a BTreeMap<u32, Option<PathBuf>>,
    /// Whether the backup has a file of the tablespace by its manifest; where that says no, the link is not followed: pg_basebackup
    /// copies links of tablespaces that were made while it ran as they are, so that they lead to the original's live directory.
    pub has_files: &'a dyn Fn(u32) -> bool,
    /// What is done with a link that leads out of the backup: names, sizes and checksums of a manifest prove what lies there.
    pub leading_out: LeadingOut,
    /// The data directory of the original server, if the backup tells.
    pub original: Option<PathBuf>,
}

/// What is done with a tablespace's link that leads out of the backup and that the user did not name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LeadingOut {
    /// It is followed; what is found is compared with the manifest.
    Follow,
    /// It is an error: a copied link leads to the original's live directory.
    Refuse,
    /// It is left out, where only a size is wanted.
    Skip,
}

/// Where a tablespace is read.
enum Place {
    /// Beneath the data directory.
    Own(String),
    /// In a directory of its own.
    Directory(PathBuf),
    /// Nowhere: the backup holds nothing of it, or it is left out.
    Nowhere,
}

/// Walks the data directory `root` and its tablespaces. `version_directory` is the name of a tablespace's directory
/// for this cluster, `PG_<major>_<catalog version>`; nothing else of a tablespace's location is looked at.
///
/// The objects returned hold nothing but the tree's roots, under the tree's own numbers.
///
/// # Errors
/// A symlink that leads out, a dead tablespace link, one that nothing proves, an incremental backup's file, a name that is no UTF-8.
pub(crate) fn walk(
    root: Root,
    version_directory: &str,
    links: &Links,
) -> Result<(Tree, Objects), SourceError> {
    let mut objects = Objects::default();
    objects.add_root(&root);
    let mut tree = Tree { roots: vec![root], ..Tree::default() };
    tree.below(0, "", "data")?;
    let found = tree.tablespace_links()?;
    if let Some(oid) = links.named.keys().find(|oid| found.iter().all(|(known, _)| known != *oid)) {
        let path = tree.root(0).path().to_path_buf();
        return Err(SourceError::UnknownTablespace { path, oid: *oid });
    }
    for (oid, link) in found {
        let cluster = format!("tablespaces/{oid}");
        let cluster_directory = format!("{cluster}/{version_directory}");
        tree.directories.push(cluster_path(&cluster_directory)?);
        let (number, relative) = match tree.place(oid, link.as_deref(), version_directory, links)? {
            Place::Nowhere => {
                tree.tablespaces.push((oid, link));
                continue;
            }
            Place::Own(relative) => (0, format!("{relative}/{version_directory}")),
            Place::Directory(directory) => {
                let number = tree.link(&format!("pg_tblspc/{oid}"), &directory, &mut objects)?;
                tree.followed.insert(oid, directory);
                (number, version_directory.to_owned())
            }
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

    /// Chooses where a tablespace is read.
    fn place(
        &self,
        oid: u32,
        link: Option<&Path>,
        version_directory: &str,
        links: &Links,
    ) -> Result<Place, SourceError> {
        let data = self.root(0).path();
        if let Some(named) = links.named.get(&oid) {
            return Ok(named.clone().map_or(Place::Nowhere, Place::Directory));
        }
        let Some(target) = link else { return Ok(Place::Own(format!("pg_tblspc/{oid}"))) };
        if !(links.has_files)(oid) {
            return Ok(Place::Nowhere);
        }
        let path = data.join(format!("pg_tblspc/{oid}"));
        let resolved = path.parent().unwrap_or(Path::new("/")).join(target);
        // A tablespace inside the data directory: the copied link leads to the original's, the copy lies beside it.
        let copied =
            links.original.as_ref().and_then(|original| target.strip_prefix(original).ok());
        let copied = copied.and_then(|inside| inside.to_str()).filter(|inside| {
            let directory = self.root(0).metadata(format!("{inside}/{version_directory}"));
            !inside.is_empty() && directory.is_ok_and(|entry| entry.kind == Kind::Directory)
        });
        let inside = || {
            let (real, data) = (resolved.canonicalize().ok()?, data.canonicalize().ok()?);
            let inside = real.strip_prefix(&data).ok()?.to_str()?.to_owned();
            (!inside.is_empty()).then_some(inside)
        };
        if let Some(inside) = copied.map(str::to_owned).or_else(inside) {
            return Ok(Place::Own(inside));
        }
        match links.leading_out {
            LeadingOut::Follow => Ok(Place::Directory(target.to_path_buf())),
            LeadingOut::Skip => Ok(Place::Nowhere),
            LeadingOut::Refuse => {
                let target = resolved.canonicalize().unwrap_or(resolved);
                Err(SourceError::UnprovenLink { path, target, oid })
            }
        }
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
                let data = self.roots[0].path();
                let target = data.join(self.roots[0].read_link("pg_wal")?);
                let within =
                    |real: PathBuf| real.starts_with(data.canonicalize().unwrap_or_default());
                if target.canonicalize().is_ok_and(within) {
                    let number = self.link("pg_wal", &target, objects)?;
                    self.wal = Some((number, String::new()));
                } else {
                    self.wal_link = Some(target);
                }
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
        let named = BTreeMap::new();
        let links = |leading_out| Links {
            named: &named,
            has_files: &|oid| oid == 1,
            leading_out,
            original: None,
        };
        let walked = |leading_out| walk(Root::open(&data).unwrap(), "PG_15_1", &links(leading_out));
        let refused = walked(LeadingOut::Refuse).unwrap_err();
        assert!(matches!(refused, SourceError::UnprovenLink { oid: 1, .. }), "{refused}");
        assert_eq!(walked(LeadingOut::Skip).unwrap().0.files.len(), 0);
        let (tree, _) = walked(LeadingOut::Follow).unwrap();
        let files: Vec<&str> = tree.files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(files, ["tablespaces/1/PG_15_1/5/16400"]);
        assert!(tree.followed.keys().eq([&1]));
        for oid in [1, 2, 3] {
            let directory = format!("tablespaces/{oid}/PG_15_1");
            assert!(tree.directories.iter().any(|at| at.as_str() == directory), "{directory}");
        }
        let oids: Vec<u32> = tree.tablespaces.iter().map(|(oid, _)| *oid).collect();
        assert_eq!(oids, [1, 2, 3]);
    }

    /// A copy (`cp -a`, a restored tar) keeps the links of the original.
    #[test]
    fn without_a_manifest_only_the_backups_own_copies_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let (data, live, copy) =
            (dir.path().join("data"), dir.path().join("original"), dir.path().join("copy"));
        for space in [&data.join("inside"), &live.join("inside"), &live.join("out"), &copy] {
            std::fs::create_dir_all(space.join("PG_15_1")).unwrap();
            std::fs::write(space.join("PG_15_1/file"), space.to_str().unwrap()).unwrap();
        }
        std::fs::create_dir_all(data.join("pg_tblspc")).unwrap();
        let link = |oid: u32, to: &Path| {
            std::os::unix::fs::symlink(to, data.join(format!("pg_tblspc/{oid}"))).unwrap();
        };
        link(1, &live.join("inside")); // the original lay in its data directory
        link(2, Path::new("../inside"));
        link(3, &live.join("out"));
        let original = Some(live.clone());
        let walked = |named: &BTreeMap<u32, Option<PathBuf>>| {
            let original = original.clone();
            let (leading_out, has_files) = (LeadingOut::Refuse, &|_| true);
            let links = Links { named, has_files, leading_out, original };
            walk(Root::open(&data).unwrap(), "PG_15_1", &links).map(|(tree, _)| tree)
        };
        let refused = walked(&BTreeMap::new()).unwrap_err();
        assert!(refused.hint().unwrap().contains("--tablespace 3=DIR"), "{refused}");
        let unknown = walked(&BTreeMap::from([(3, Some(copy.clone())), (4, None)])).unwrap_err();
        assert!(
            matches!(unknown, SourceError::UnknownTablespace { oid: 4, .. }) && unknown.is_usage()
        );
        let tree = walked(&BTreeMap::from([(3, Some(copy.clone()))])).unwrap();
        let read = |oid: u32| {
            let start = format!("tablespaces/{oid}/");
            let file =
                tree.files.iter().find(|file| file.path.as_str().starts_with(&start)).unwrap();
            tree.root(file.root).path().join(&file.relative)
        };
        assert_eq!(read(1), data.join("inside/PG_15_1/file"));
        assert_eq!(read(2), data.join("inside/PG_15_1/file"));
        assert!(walked(&BTreeMap::from([(3, None)])).unwrap().followed.is_empty());
        assert_eq!(read(3), copy.canonicalize().unwrap().join("PG_15_1/file"));
    }
}
