//! What can go wrong when a repository is opened, each with the object it is about and what helps.

use std::io;
use std::path::PathBuf;

use crate::location::Kind;
use crate::reader::ReadError;

/// A repository, a backup or an object in it that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The kernel refused; its text names the path.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A file of the backup that must be read to open it.
    #[error("`{path}` cannot be read: {source}")]
    Content {
        /// The stored file.
        path: PathBuf,
        /// Why.
        source: ReadError,
    },
    /// Nothing lies at the path of the repository.
    #[error("repository `{path}` does not exist")]
    NoSuchRepository {
        /// The path that was asked for.
        path: PathBuf,
    },
    /// The directory holds nothing at all.
    #[error("repository `{path}` is empty")]
    Empty {
        /// The repository.
        path: PathBuf,
    },
    /// The directory holds something else.
    #[error("`{path}` is no repository that pgthaw knows: {found}")]
    NotARepository {
        /// The path that was asked for.
        path: PathBuf,
        /// What was looked for there.
        found: String,
    },
    /// An option that goes with another kind of repository.
    #[error("{option} does not go with a {kind} repository")]
    OptionOfOtherKind {
        /// The option as it is typed.
        option: &'static str,
        /// The repository's kind.
        kind: Kind,
    },
    /// A repository with several stanzas, and none was named.
    #[error("repository `{path}` holds several stanzas: {}", known.join(", "))]
    SeveralStanzas {
        /// The repository.
        path: PathBuf,
        /// The stanzas that are there.
        known: Vec<String>,
    },
    /// The stanza is not there.
    #[error("no stanza `{stanza}` in repository `{path}`; {}", those_there("stanza", known))]
    UnknownStanza {
        /// The repository.
        path: PathBuf,
        /// What was asked for.
        stanza: String,
        /// The stanzas that are there.
        known: Vec<String>,
    },
    /// The backup is not there.
    #[error("no backup `{id}` in repository `{path}`; {}", those_there("backup", known))]
    UnknownBackup {
        /// The repository.
        path: PathBuf,
        /// What was asked for.
        id: String,
        /// The backups that are there, oldest first.
        known: Vec<String>,
    },
    /// A backup that its tool has not finished.
    #[error(
        "backup `{id}` in repository `{path}` is unfinished; {}",
        those_there("finished backup", known)
    )]
    Unfinished {
        /// The repository.
        path: PathBuf,
        /// What was asked for.
        id: String,
        /// The finished backups, oldest first.
        known: Vec<String>,
    },
    /// A repository without any backup.
    #[error("repository `{path}` holds no backup")]
    NoBackups {
        /// The repository.
        path: PathBuf,
    },
    /// Something this version does not read.
    #[error("{object}: {what} is not read yet")]
    Unsupported {
        /// The backup or file it was found in.
        object: String,
        /// The feature, by its name.
        what: String,
    },
    /// A file of the repository that contradicts itself.
    #[error("`{path}` is damaged: {problem}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A file of the repository and the copy that stands in for it, both unusable.
    #[error("`{path}` is damaged: {problem}; and so is its copy `{copy}`: {copy_problem}")]
    BothDamaged {
        /// The main file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// Its copy.
        copy: PathBuf,
        /// What is wrong with the copy.
        copy_problem: String,
    },
    /// A file that must be there is not.
    #[error("`{path}` is missing{}", wanted(for_what))]
    Missing {
        /// The file or directory.
        path: PathBuf,
        /// What needs it; empty when the path says it.
        for_what: String,
    },
    /// A stored object whose size is not what the backup's manifest says.
    #[error("`{path}` holds {found} bytes, but {expected} belong to it by the backup's manifest")]
    WrongSize {
        /// The object.
        path: PathBuf,
        /// Bytes that are there.
        found: u64,
        /// Bytes that must be there.
        expected: u64,
    },
    /// Files that the backup's manifest does not list.
    #[error("backup `{backup}` holds files that its backup_manifest does not list: {}", files.join(", "))]
    NotInManifest {
        /// The backup's directory.
        backup: PathBuf,
        /// The first few of them.
        files: Vec<String>,
    },
    /// A symlink that is no tablespace and not `pg_wal`.
    #[error("`{path}` is a symlink to `{target}`, which leads out of the backup")]
    LeadsOut {
        /// The symlink.
        path: PathBuf,
        /// Where it points to.
        target: PathBuf,
    },
    /// A tablespace's or `pg_wal`'s link whose directory is not there.
    #[error("`{path}` leads to `{target}`, which is no directory that can be read: {source}")]
    DeadLink {
        /// The symlink.
        path: PathBuf,
        /// Where it leads to.
        target: PathBuf,
        /// Why it cannot be opened.
        source: io::Error,
    },
    /// A tablespace's link that nothing proves to lead to the backup's own copy.
    #[error(
        "`{path}` leads to `{target}`, and nothing proves that the backup's copy of that tablespace lies there: there is no backup_manifest"
    )]
    UnprovenLink {
        /// The symlink.
        path: PathBuf,
        /// Where it leads to.
        target: PathBuf,
        /// The tablespace.
        oid: u32,
    },
    /// A `--tablespace` of which the backup knows nothing.
    #[error("backup `{path}` has no tablespace {oid} (--tablespace)")]
    UnknownTablespace {
        /// The backup.
        path: PathBuf,
        /// What was named.
        oid: u32,
    },
    /// A server runs on what should be a backup.
    #[error("{0}: it is no backup")]
    InUse(String),
    /// A WAL segment that recovery needs.
    #[error("WAL segment {segment} is missing in {places}: recovery needs it")]
    MissingWal {
        /// The segment's name.
        segment: String,
        /// Where it was looked for.
        places: Places,
    },
    /// A gap in the WAL, with more of it behind.
    #[error(
        "WAL segment {segment} is missing in {places}, but later ones are there (up to {later})"
    )]
    WalHole {
        /// The first missing segment.
        segment: String,
        /// The last one that is there.
        later: String,
        /// Where it was looked for.
        places: Places,
    },
    /// Two different files that claim to be one segment.
    #[error("WAL segment {segment} lies twice in `{path}`: {first} and {second}")]
    WalTwice {
        /// The segment's name.
        segment: String,
        /// The directory.
        path: PathBuf,
        /// One file.
        first: String,
        /// The other one.
        second: String,
    },
    /// A timeline's history, without which PostgreSQL refuses that timeline.
    #[error("the history file {name} is missing in {places}: recovery on that timeline needs it")]
    MissingHistory {
        /// `<timeline>.history`.
        name: String,
        /// Where it was looked for.
        places: Places,
    },
    /// A label that `backup_manifest` lists.
    #[error("`{path}` is missing (backup_manifest lists it)")]
    LabelMissing {
        /// Where it must be.
        path: PathBuf,
    },
    /// `--backup-label` with a file that `backup_manifest` does not list.
    #[error("`{path}` is not this backup's label: its {what} is not what backup_manifest says")]
    LabelDiffers {
        /// The file that was given.
        path: PathBuf,
        /// `size` or `checksum`.
        what: String,
    },
    /// `--atomic-snapshot` for a backup that has a label.
    #[error("backup `{path}` has a backup_label, which --atomic-snapshot would contradict")]
    SnapshotWithLabel {
        /// The backup's directory.
        path: PathBuf,
    },
    /// `--backup-label` for a backup that has one.
    #[error("backup `{path}` has its own backup_label, which differs from the file given")]
    LabelGivenTwice {
        /// The backup's directory.
        path: PathBuf,
    },
}

impl SourceError {
    /// Returns what the operator can do about it; printed under the error as `hint: …`.
    pub fn hint(&self) -> Option<String> {
        if let Self::UnprovenLink { oid, .. } = self {
            return Some(format!(
                "add `--tablespace {oid}=DIR`, where DIR is the backup's own copy of that tablespace (a copied link still leads to the original), \
                 or `--tablespace {oid}=none` if it was created while the backup ran, so that WAL creates it again"
            ));
        }
        let text = match self {
            Self::Io(source) => match source.kind() {
                io::ErrorKind::PermissionDenied => {
                    "run pgthaw as the owner of the repository, or as root, where reading runs as that owner; \
                     an owner who cannot read this file needs its mode or its owner changed"
                }
                io::ErrorKind::NotFound => "check that the repository is complete and mounted",
                _ => return None,
            },
            Self::Content { source, .. } => source.hint(),
            Self::NoSuchRepository { .. } => "check the path, and that its file system is mounted",
            Self::Empty { .. } => "check that the repository's file system is mounted",
            Self::NotARepository { .. } => {
                "name a pgBackRest repository (what `repo1-path` says) or a directory made by pg_basebackup"
            }
            Self::OptionOfOtherKind { .. } => "leave the option out",
            Self::SeveralStanzas { .. } => "choose one with --stanza",
            Self::UnknownStanza { .. } => "`--stanza` takes one of those",
            Self::UnknownBackup { .. } => "`pgthaw backups` lists them",
            Self::Unfinished { .. } => "choose a finished backup, or let the backup tool end first",
            Self::NoBackups { .. } => "check the path, or take a backup first",
            Self::Unsupported { .. } => {
                "choose another backup, or restore this one with its own tool"
            }
            Self::Damaged { .. } | Self::BothDamaged { .. } => {
                "choose another backup, or check the repository with its own tool"
            }
            Self::Missing { .. } | Self::WrongSize { .. } => {
                "the repository is incomplete: choose another backup, or check it with its own tool"
            }
            Self::NotInManifest { .. } => {
                "the directory was changed after the backup; `pg_verifybackup` tells the same: use an untouched copy"
            }
            Self::UnprovenLink { .. } => return None, // told above
            Self::UnknownTablespace { .. } => {
                "its pg_tblspc directory names the tablespaces by their OIDs"
            }
            Self::InUse(_) => {
                "take a backup of it (pg_basebackup, pgBackRest), or stop the server and copy all of it"
            }
            Self::LeadsOut { .. } => {
                "only tablespace links and a pg_wal link are followed: copy the file into its place"
            }
            Self::DeadLink { .. } => {
                "mount or restore that directory, or let the link lead to the backup's copy of it"
            }
            Self::MissingWal { places, .. } | Self::MissingHistory { places, .. } => {
                match places.kind {
                    Kind::BaseBackup => {
                        "name a directory that holds it with --wal-archive, or choose another backup"
                    }
                    Kind::PgBackRest => {
                        "bring it back into the stanza's archive, or choose another backup"
                    }
                }
            }
            Self::WalHole { .. } => {
                "bring the missing segment, or recover to the end of the backup"
            }
            Self::WalTwice { .. } => "find out with the backup tool which of them is right",
            Self::LabelMissing { .. } => {
                "if the label was kept elsewhere, name it with --backup-label; else choose another backup"
            }
            Self::LabelDiffers { .. } => "name the label that this backup was taken with",
            Self::SnapshotWithLabel { .. } => {
                "leave --atomic-snapshot out: recovery follows the label, and does not rest on that promise"
            }
            Self::LabelGivenTwice { .. } => "leave --backup-label out",
        };
        Some(text.into())
    }

    /// Whether the command was wrong rather than the repository: it then ends with exit code 2.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::NoSuchRepository { .. }
                | Self::NotARepository { .. }
                | Self::Empty { .. }
                | Self::UnknownBackup { .. }
                | Self::Unfinished { .. }
                | Self::UnknownStanza { .. }
                | Self::SeveralStanzas { .. }
                | Self::OptionOfOtherKind { .. }
                | Self::UnknownTablespace { .. }
                | Self::LabelGivenTwice { .. }
                | Self::LabelDiffers { .. }
                | Self::SnapshotWithLabel { .. }
        )
    }
}

/// Where WAL was looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// The directories, for people.
    pub shown: String,
    /// The kind of repository that they belong to.
    pub kind: Kind,
}

impl std::fmt::Display for Places {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.shown)
    }
}

fn those_there(what: &str, known: &[String]) -> String {
    if known.is_empty() {
        format!("there is no {what}")
    } else {
        format!("there are: {}", known.join(", "))
    }
}

fn wanted(for_what: &str) -> String {
    if for_what.is_empty() { String::new() } else { format!(" ({for_what})") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_name_only_options_that_go_with_the_repository() {
        let hint = |kind| {
            let places = Places { shown: "`/archive`".into(), kind };
            let segment = "000000010000000000000005".to_owned();
            let history = SourceError::MissingHistory { name: "2".into(), places: places.clone() };
            let segment = SourceError::MissingWal { segment, places };
            assert_eq!(history.hint(), segment.hint());
            segment.hint().unwrap()
        };
        assert!(hint(Kind::BaseBackup).contains("--wal-archive"));
        assert!(!hint(Kind::PgBackRest).contains("--"), "{}", hint(Kind::PgBackRest));
    }
}
