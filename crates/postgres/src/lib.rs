//! Everything that knows PostgreSQL.
//!
//! Facts without a running server: [`version`], [`binaries`], [`control`] (`pg_control` and how a directory
//! is started), [`lsn`], [`catalogs`] (from pages). Leaves reading a backup to its callers: what lies in one comes in as bytes.
//! Programs run as [`os_user`] says.

pub mod binaries;
mod bytes;
pub mod catalogs;
pub mod control;
pub mod lsn;
pub mod os_user;
mod pages;
pub mod version;
