//! Everything that knows PostgreSQL.
//!
//! Facts without a running server: [`version`], [`binaries`], [`control`] (`pg_control` and how a directory
//! is started), [`lsn`], [`catalogs`] (from pages). Leaves reading a backup to its callers: what lies in one comes in as bytes.
//! Programs run as [`os_user`] says.
//!
//! With a server: [`instance`] starts and ends one, cut off from everything ([`settings`], [`root`], [`isolation`]);
//! [`superuser`], [`connection`] and [`inspect`] ask it, [`dump`] and [`globals`] dump it, [`log`] explains
//! what it says.

pub mod binaries;
mod bytes;
pub mod catalogs;
pub mod connection;
pub mod control;
pub mod dump;
mod dump_arguments;
pub mod globals;
pub mod inspect;
pub mod instance;
pub mod isolation;
pub mod label;
mod launch;
pub mod locale;
pub mod log;
pub mod lsn;
pub mod os_user;
mod pages;
pub mod preload;
pub mod process;
pub mod root;
pub mod settings;
pub mod shared_memory;
pub mod superuser;
pub mod version;
pub mod wal;
