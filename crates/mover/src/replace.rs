//! Taking an earlier export away, and nothing else.

use std::collections::BTreeSet;
use std::io::Read;

use rustix::fs::FileType;
use rustix::io::Errno;

use crate::directory::Directory;
use crate::error::MoveError;
use crate::names::{EXPORT_JSON, SHA256SUMS};
use crate::sums::parse_sha256sums;

/// Longest listing that is read, in bytes: a hundred times that of a database of 20,000 tables.
const LISTING_MAX: u64 = 256 << 20;

/// The earlier export's listing while its files are being removed. No database has such a name.
const REMOVING: &str = ".replacing-SHA256SUMS";
/// The earlier export's `export.json` while its files are being removed.
const REMOVING_EXPORT: &str = ".replacing-export.json";
/// The earlier export's listing once its files are gone: they must not be looked for a second time, because
/// the new export's files have the same names.
const REMOVED: &str = ".replaced-SHA256SUMS";

/// A complete export that a target directory holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EarlierExport {
    /// Relative paths of its files, as its `SHA256SUMS` lists them.
    pub files: Vec<String>,
    /// What lies in its databases' directories without being listed; `--replace` refuses then.
    pub foreign: Vec<String>,
    /// The session that made it, as its `export.json` says.
    pub session: Option<String>,
}

impl EarlierExport {
    /// Returns the export in `dir`: there is one if both `export.json` and `SHA256SUMS` are there.
    pub(crate) fn find(dir: &Directory) -> Result<Option<Self>, MoveError> {
        if dir.kind(EXPORT_JSON)? != Some(FileType::RegularFile) {
            return Ok(None);
        }
        let Some(files) = read_listing(dir, SHA256SUMS, dir)? else { return Ok(None) };
        let foreign = foreign(dir, &files)?;
        Ok(Some(Self { files, foreign, session: session(dir)? }))
    }
}

/// Reads which session made the export in `dir`, if its `export.json` tells.
fn session(dir: &Directory) -> Result<Option<String>, MoveError> {
    #[derive(serde::Deserialize)]
    struct ExportJson {
        session: String,
    }
    /// Far more than an `export.json` of thousands of databases takes, in bytes.
    const LONGEST: u64 = 64 << 20;
    let Some(file) = dir.find_file(EXPORT_JSON)? else { return Ok(None) };
    let json: Result<ExportJson, _> =
        serde_json::from_reader(std::io::BufReader::new(file.take(LONGEST)));
    Ok(json.ok().map(|json| json.session))
}

/// Removes the earlier export from `dir`; what is left to do is kept in `staging`.
///
/// `export.json` goes away first, so that at no moment an incomplete export looks complete.
pub(crate) fn remove_replaced(dir: &Directory, staging: &Directory) -> Result<(), MoveError> {
    if staging.kind(REMOVED)?.is_some() {
        return Ok(());
    }
    if staging.kind(REMOVING)?.is_none() {
        let Some(export) = EarlierExport::find(dir)? else { return Ok(()) };
        if let Some(path) = export.foreign.first() {
            return Err(MoveError::Foreign { path: dir.path().join(path) });
        }
        dir.rename(SHA256SUMS, staging, REMOVING)?;
    }
    if dir.kind(EXPORT_JSON)?.is_some() {
        dir.rename(EXPORT_JSON, staging, REMOVING_EXPORT)?;
    }
    staging.sync()?;
    dir.sync()?;

    let files = read_listing(staging, REMOVING, dir)?.unwrap_or_default();
    for path in &files {
        let (parents, name) = split(path);
        if let Some(parent) = walk(dir, parents)? {
            parent.remove_file(name)?;
        }
    }
    for path in directories_of(&files).into_iter().rev() {
        let (parents, name) = split(&path); // longer paths come later in the set, so the innermost go first
        if let Some(parent) = walk(dir, parents)? {
            parent.remove_if_empty(name)?;
        }
    }
    dir.sync()?;
    staging.rename(REMOVING, staging, REMOVED)?;
    staging.sync()
}

/// Reads the listing `name`, whose paths are meant below `dir`.
fn read_listing(
    at: &Directory,
    name: &str,
    dir: &Directory,
) -> Result<Option<Vec<String>>, MoveError> {
    let Some(file) = at.find_file(name)? else { return Ok(None) };
    let path = dir.path().join(SHA256SUMS);
    let bad = |reason: &'static str| {
        let reason = reason.into();
        MoveError::BadListing { path: path.clone(), line: 0, reason }
    };
    let mut bytes = Vec::new();
    file.take(LISTING_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|err| at.error("read", name, err))?;
    if bytes.len() as u64 > LISTING_MAX {
        return Err(bad("absurdly long"));
    }
    let text = String::from_utf8(bytes).map_err(|_| bad("not UTF-8"))?;
    Ok(Some(parse_sha256sums(&path, &text)?.into_iter().map(|entry| entry.path).collect()))
}

/// Returns what lies in the directories of `files` without being one of them.
fn foreign(dir: &Directory, files: &[String]) -> Result<Vec<String>, MoveError> {
    let directories = directories_of(files);
    let listed: BTreeSet<&str> = files.iter().chain(&directories).map(String::as_str).collect();
    let mut foreign = Vec::new();
    for path in &directories {
        let Some(found) = walk(dir, path)? else { continue };
        let entries = found.names()?.into_iter().map(|name| format!("{path}/{name}"));
        foreign.extend(entries.filter(|entry| !listed.contains(entry.as_str())));
    }
    Ok(foreign)
}

/// Returns every directory above `files`, parents before children.
fn directories_of(files: &[String]) -> BTreeSet<String> {
    files
        .iter()
        .flat_map(|path| path.match_indices('/').map(|(at, _)| path[..at].to_owned()))
        .collect()
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

/// Opens the directory at the relative `path` below `dir`, through no link; `None` if a part is missing.
fn walk(dir: &Directory, path: &str) -> Result<Option<Directory>, MoveError> {
    let mut found = dir.try_clone()?;
    for part in path.split('/').filter(|part| !part.is_empty()) {
        found = match found.find_directory(part) {
            Ok(Some(below)) => below,
            Ok(None) => return Ok(None),
            Err(MoveError::Target { path, source, .. }) if is_no_directory(&source) => {
                return Err(MoveError::Foreign { path });
            }
            Err(err) => return Err(err),
        };
    }
    Ok(Some(found))
}

fn is_no_directory(err: &std::io::Error) -> bool {
    matches!(Errno::from_io_error(err), Some(Errno::NOTDIR | Errno::LOOP))
}
