//! What tests need from the real world (development only): clusters that hold a bit of everything, backups of
//! them by the real tools, servers to load dumps into, hosts in a lab, and detectors for what was left behind.
//!
//! Everything panics with the failed command's own words: a test has nothing better to do. Every guard ends
//! its own processes by pid and removes its files when it is dropped.
//!
//! Start at [`Fixture`] for ready-made repositories, at [`Cluster`] for one of one's own, at [`Lab`] for several
//! hosts, at [`Canaries`] for what no export may touch.

mod canary;
mod cluster;
mod fingerprint;
mod fixture;
mod fresh;
mod held_disk;
mod kept;
mod lab;
mod large;
mod leftovers;
mod measure;
mod pg_basebackup;
mod pgbackrest;
mod scratch;
mod server;
mod traffic;
mod tree;
mod user;

pub use canary::{Canaries, Look, Snapshot};
pub use cluster::{Cluster, ClusterOptions, ODD_NAME, Scale};
pub use fingerprint::{Fingerprint, PgbenchSums, fingerprint, is_moved_by_traffic, pgbench_sums};
pub use fixture::Fixture;
pub use fresh::{FreshServer, restore_dump_into_fresh_server};
pub use held_disk::HeldDisk;
pub use lab::{Host, HostLeftovers, HostPlan, HostProcess, Lab, Proxy, ProxyOptions};
pub use large::LargeBackup;
pub use leftovers::Leftovers;
pub use measure::{Usage, claim_memory, measure};
pub use pg_basebackup::{BaseBackup, BaseBackupOptions, WalMethod};
pub use pgbackrest::{BackupOptions, BackupType, PgBackRest, RestoreTarget};
pub use scratch::Scratch;
pub use server::{PGOPTIONS, Server, postgres_programs};
pub use traffic::Traffic;
pub use tree::{chown_tree, copy_tree, tree_hash};
pub use user::{User, run};
