//! Formats: what the bytes of a repository mean.
//!
//! Owns pgBackRest's files, `pg_basebackup`'s directories, the WAL that goes with a backup, and the choice of what a
//! mounted cluster shows. Both formats end in the same [`crate::repository::Backup`].

pub(crate) mod basebackup;
pub(crate) mod control;
pub(crate) mod hex;
pub(crate) mod history;
pub(crate) mod label;
pub(crate) mod objects;
pub(crate) mod pgbackrest;
pub(crate) mod presented;
pub(crate) mod recovery;
pub(crate) mod relation;
pub(crate) mod wal;
