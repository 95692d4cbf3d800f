//! What is known of each delivered database, kept in the staging directory until `SHA256SUMS` and `export.json` are written:
//! the checksums of its files, and a note of the caller's.
//!
//! Both are written just before a database gets its name, so that a retry knows what an attempt that was killed in that
//! moment has published, and need not deliver it again.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::Path;

use crate::copy::sha256_of;
use crate::directory::Directory;
use crate::error::MoveError;
use crate::names::file_name_for_database;
use crate::sums::{SumEntry, format_sha256sums, parse_sha256sums};
use crate::target::TargetDirectory;

/// The directories in the staging directory that hold them. No database's directory begins with a dot.
const SUMS: &str = ".sums";
const NOTES: &str = ".notes";

impl TargetDirectory {
    /// Keeps the checksums of what will be published as `name`, durably.
    ///
    /// # Errors
    /// As the file system says.
    pub fn keep_sums(&self, name: &str, sums: &[SumEntry]) -> Result<(), MoveError> {
        self.keep(SUMS, name, &format_sha256sums(sums))
    }

    /// Returns the checksums kept under `name`; nothing where none were kept.
    ///
    /// # Errors
    /// As the file system says, and [`MoveError::BadListing`].
    pub fn kept_sums(&self, name: &str) -> Result<Option<Vec<SumEntry>>, MoveError> {
        let Some(text) = self.kept(SUMS, name)? else { return Ok(None) };
        parse_sha256sums(&self.staging().join(SUMS).join(name), &text).map(Some)
    }

    /// Keeps a note beside the checksums of `name`, durably.
    ///
    /// # Errors
    /// As the file system says.
    pub fn keep_note(&self, name: &str, note: &str) -> Result<(), MoveError> {
        self.keep(NOTES, name, note)
    }

    /// Returns the note kept under `name`; nothing where there is none.
    ///
    /// # Errors
    /// As the file system says.
    pub fn kept_note(&self, name: &str) -> Result<Option<String>, MoveError> {
        self.kept(NOTES, name)
    }

    fn keep(&self, kind: &str, name: &str, text: &str) -> Result<(), MoveError> {
        let (directory, made) = self.staging().ensure_directory(kind)?;
        directory.remove_file(name)?;
        let mut file = directory.create_file(name)?;
        let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
        written.map_err(|err| directory.error("write", name, err))?;
        directory.sync()?;
        if made { self.staging().sync() } else { Ok(()) }
    }

    fn kept(&self, kind: &str, name: &str) -> Result<Option<String>, MoveError> {
        let Some(directory) = self.staging().find_directory(kind)? else { return Ok(None) };
        let Some(mut file) = directory.find_file(name)? else { return Ok(None) };
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(|err| directory.error("read", name, err))?;
        Ok(Some(text))
    }

    /// Returns the bytes of `database` if an earlier attempt has published it: its checksums were kept, and its files are
    /// those and match them. Nothing if it is not published.
    ///
    /// # Errors
    /// [`MoveError::Exists`] if what has its name is something else.
    pub fn published_before(&self, database: &str) -> Result<Option<u64>, MoveError> {
        let name = file_name_for_database(database);
        if !self.is_published(database)? {
            return Ok(None);
        }
        let foreign = || MoveError::Exists { path: self.path().join(&name) };
        let sums = self.kept_sums(&name)?.ok_or_else(foreign)?;
        let directory = Directory::open(&self.path().join(&name))?;
        let mut there: BTreeSet<String> = directory.names()?.into_iter().collect();
        let mut bytes = 0;
        for sum in &sums {
            let file_name = sum.path.strip_prefix(&format!("{name}/")).ok_or_else(foreign)?;
            let mut file = directory.find_file(file_name)?.ok_or_else(foreign)?;
            let (length, sha256) =
                sha256_of(&mut file).map_err(|err| directory.error("read", file_name, err))?;
            if sha256 != sum.sha256 || !there.remove(file_name) {
                return Err(foreign());
            }
            bytes += length;
        }
        if there.is_empty() { Ok(Some(bytes)) } else { Err(foreign()) }
    }

    /// Returns the names under which `session` has kept checksums in the target at `path`: what it has published, or was about to.
    ///
    /// # Errors
    /// As the file system says.
    pub fn kept_names(path: &Path, session: &str) -> Result<Vec<String>, MoveError> {
        if !Self::missing(path).is_empty() {
            return Ok(Vec::new());
        }
        let staging =
            Directory::open(path)?.find_directory(&crate::target::staging_name(session))?;
        staging.map_or(Ok(Vec::new()), |staging| kept_names_in(&staging))
    }
}

/// The names under which checksums are kept in a staging directory.
pub(crate) fn kept_names_in(staging: &Directory) -> Result<Vec<String>, MoveError> {
    staging.find_directory(SUMS)?.map_or(Ok(Vec::new()), |directory| directory.names())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_was_published_before_a_crash_is_known_again() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("export");
        let target = TargetDirectory::create(&path, "s").unwrap();
        assert_eq!(target.published_before("crm").unwrap(), None);
        let staged = target.database("crm").unwrap();
        fs::write(staged.join("toc.dat"), b"toc").unwrap();
        let sha256 = sha256_of(&mut &b"toc"[..]).unwrap().1;
        assert_eq!(target.kept_note("crm").unwrap(), None);
        target.keep_note("crm", "a note").unwrap();
        assert_eq!(target.kept_note("crm").unwrap().as_deref(), Some("a note"));
        target.keep_sums("crm", &[SumEntry { path: "crm/toc.dat".into(), sha256 }]).unwrap();
        target.publish_database("crm", &["toc.dat"]).unwrap();
        assert_eq!(target.published_before("crm").unwrap(), Some(3));
        assert_eq!(TargetDirectory::kept_names(&path, "s").unwrap(), ["crm"]);
        assert!(TargetDirectory::kept_names(&path, "other").unwrap().is_empty());

        fs::write(path.join("crm/further"), b"").unwrap();
        assert!(
            matches!(target.published_before("crm"), Err(MoveError::Exists { .. })),
            "a file too many"
        );
        fs::remove_file(path.join("crm/further")).unwrap();
        fs::write(path.join("crm/toc.dat"), b"TOC").unwrap();
        assert!(
            matches!(target.published_before("crm"), Err(MoveError::Exists { .. })),
            "another content"
        );
    }
}
