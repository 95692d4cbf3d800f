//! `global/pg_control`: what a cluster says about itself, and how its directory may be started.
//!
//! [`ControlFile::parse`] reads the file, [`what_start`] decides the start, [`mismatches`] compares with
//! the server's build. Layouts are those of PostgreSQL's `pg_control.h` on 64-bit little-endian machines:
//! 12 (1201), 13 to 16 (1300), 17 (1700) and 18 (1800).

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::bytes::{array, u32_at, u64_at};
use crate::lsn::{Lsn, SegmentSize};
use crate::version::Major;

/// The size of `pg_control` in bytes (`PG_CONTROL_FILE_SIZE`).
pub const CONTROL_FILE_SIZE: usize = 8192;

/// What the cluster was doing when `pg_control` was last written (`DBState`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClusterState {
    /// Starting up for the first time.
    StartingUp,
    /// Shut down cleanly.
    ShutDown,
    /// A standby that was shut down cleanly.
    ShutDownInRecovery,
    /// In the middle of a shutdown.
    ShuttingDown,
    /// Replaying its own WAL after a crash.
    InCrashRecovery,
    /// Replaying an archive's or a primary's WAL.
    InArchiveRecovery,
    /// Running.
    InProduction,
}

impl ClusterState {
    fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::StartingUp,
            1 => Self::ShutDown,
            2 => Self::ShutDownInRecovery,
            3 => Self::ShuttingDown,
            4 => Self::InCrashRecovery,
            5 => Self::InArchiveRecovery,
            6 => Self::InProduction,
            _ => return None,
        })
    }
}

impl fmt::Display for ClusterState {
    /// Writes the words of `pg_controldata`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::StartingUp => "starting up",
            Self::ShutDown => "shut down",
            Self::ShutDownInRecovery => "shut down in recovery",
            Self::ShuttingDown => "shutting down",
            Self::InCrashRecovery => "in crash recovery",
            Self::InArchiveRecovery => "in archive recovery",
            Self::InProduction => "in production",
        })
    }
}

/// The contents of `pg_control` that matter here. Its CRC was right.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ControlFile {
    /// The cluster's identity; WAL and backups of one cluster share it.
    pub system_identifier: u64,
    /// The version of this file's layout.
    pub control_version: u32,
    /// The version of the system catalogs; tells the major ([`ControlFile::major`]).
    pub catalog_version: u32,
    /// What the cluster was doing.
    pub state: ClusterState,
    /// When this file was written, in seconds since 1970.
    pub time: i64,
    /// Where the last checkpoint's record lies.
    pub checkpoint: Lsn,
    /// Where replay after that checkpoint begins.
    pub redo: Lsn,
    /// The last checkpoint's timeline.
    pub timeline: u32,
    /// The timeline before, if the last checkpoint began a new one; else the same.
    pub previous_timeline: u32,
    /// Whether full pages were written after the last checkpoint.
    pub full_page_writes: bool,
    /// The next transaction id, with its epoch in the upper half.
    pub next_xid: u64,
    /// When the last checkpoint was made, in seconds since 1970.
    pub checkpoint_time: i64,
    /// Recovery must reach this position before the cluster is consistent; none outside of archive recovery.
    pub min_recovery_point: Option<Lsn>,
    /// The timeline of [`ControlFile::min_recovery_point`]; 0 without one.
    pub min_recovery_point_timeline: u32,
    /// Set while a backup is recovered and its end was not yet reached.
    pub backup_start_point: Option<Lsn>,
    /// The end of a backup taken from a standby, until recovery has reached it.
    pub backup_end_point: Option<Lsn>,
    /// Whether recovery must see the record that ends the backup.
    pub backup_end_required: bool,
    /// `wal_level`: 0 minimal, 1 replica, 2 logical.
    pub wal_level: u32,
    /// Whether hint bits are logged.
    pub wal_log_hints: bool,
    /// `max_connections` of the cluster.
    pub max_connections: u32,
    /// `max_worker_processes` of the cluster.
    pub max_worker_processes: u32,
    /// `max_wal_senders` of the cluster.
    pub max_wal_senders: u32,
    /// `max_prepared_transactions` of the cluster.
    pub max_prepared_transactions: u32,
    /// `max_locks_per_transaction` of the cluster.
    pub max_locks_per_transaction: u32,
    /// Alignment of tuples in bytes: 8 on 64-bit machines.
    pub max_align: u32,
    /// Whether floating-point numbers are stored as IEEE 754 doubles.
    pub ieee_floats: bool,
    /// Bytes per page of data.
    pub block_size: u32,
    /// Pages per file of a large relation.
    pub segment_blocks: u32,
    /// Bytes per page of WAL.
    pub wal_block_size: u32,
    /// Bytes per WAL segment.
    pub wal_segment_size: SegmentSize,
    /// Version of the pages' checksums; 0 without checksums.
    pub data_checksum_version: u32,
}

/// Why `pg_control` cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// Fewer bytes than the layout needs.
    #[error("global/pg_control has {have} bytes, fewer than the {need} its layout needs")]
    Short {
        /// Bytes there are.
        have: usize,
        /// Bytes the layout needs.
        need: usize,
    },
    /// Written by a machine of the other byte order.
    #[error("global/pg_control was written by a big-endian machine")]
    OtherByteOrder,
    /// A layout that is not known.
    #[error(
        "global/pg_control has version {0}, which no supported PostgreSQL writes (1201, 1300, 1700 and 1800 are known)"
    )]
    UnknownVersion(u32),
    /// Damaged, or written by a fork with a layout of its own.
    #[error(
        "global/pg_control is damaged: its checksum is {stored:08X}, {computed:08X} was computed (layout {control_version})"
    )]
    Checksum {
        /// The layout that was tried.
        control_version: u32,
        /// The checksum in the file.
        stored: u32,
        /// The checksum of the file's bytes.
        computed: u32,
    },
    /// A value PostgreSQL never writes, below a right checksum.
    #[error("global/pg_control has {value} as {field}")]
    BadValue {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A catalog version of no release.
    #[error(
        "global/pg_control has catalog version {0}, which no supported release of PostgreSQL writes"
    )]
    UnknownCatalog(u32),
}

impl ControlError {
    /// Returns what the operator can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Short { .. } | Self::Checksum { .. } | Self::BadValue { .. } => {
                "the file was copied while it was written, or is damaged; choose another backup (a fork of PostgreSQL with another layout is not supported)"
            }
            Self::OtherByteOrder => {
                "the dump must be made on a machine of the cluster's architecture"
            }
            Self::UnknownVersion(_) | Self::UnknownCatalog(_) => {
                "only released versions of PostgreSQL 12 to 18 are supported, no betas and no forks with other catalogs"
            }
        }
    }
}

/// Returns where the checksum lies, by layout: only the fields right before it differ.
fn checksum_offset(control_version: u32) -> Option<usize> {
    match control_version {
        1201 | 1300 | 1700 => Some(288),
        1800 => Some(292), // default_char_signedness was inserted before the nonce
        _ => None,
    }
}

impl ControlFile {
    /// Reads the file's bytes.
    ///
    /// # Errors
    /// [`ControlError`] for an unknown layout, a wrong checksum or values PostgreSQL never writes.
    pub fn parse(bytes: &[u8]) -> Result<Self, ControlError> {
        let short = |need| ControlError::Short { have: bytes.len(), need };
        let control_version = u32_at(bytes, 8).ok_or(short(16))?;
        let Some(checksum_at) = checksum_offset(control_version) else {
            let swapped = checksum_offset(control_version.swap_bytes()).is_some();
            return Err(if swapped {
                ControlError::OtherByteOrder
            } else {
                ControlError::UnknownVersion(control_version)
            });
        };
        let stored = u32_at(bytes, checksum_at).ok_or(short(checksum_at + 4))?;
        let computed = crc32c::crc32c(&bytes[..checksum_at]);
        if stored != computed {
            return Err(ControlError::Checksum { control_version, stored, computed });
        }
        let word = |offset| u32_at(bytes, offset).ok_or(short(checksum_at));
        let long = |offset| u64_at(bytes, offset).ok_or(short(checksum_at));
        let flag =
            |offset| array::<1>(bytes, offset).map(|byte| byte[0] != 0).ok_or(short(checksum_at));
        let bad = |field, value: u32| ControlError::BadValue { field, value: value.into() };
        let state = word(16)?;
        let segment_size = word(228)?;
        let control = Self {
            system_identifier: long(0)?,
            control_version,
            catalog_version: word(12)?,
            state: ClusterState::from_number(state).ok_or(bad("state", state))?,
            time: long(24)?.cast_signed(),
            checkpoint: Lsn(long(32)?),
            redo: Lsn(long(40)?),
            timeline: word(48)?,
            previous_timeline: word(52)?,
            full_page_writes: flag(56)?,
            next_xid: long(64)?,
            checkpoint_time: long(104)?.cast_signed(),
            min_recovery_point: Lsn(long(136)?).valid(),
            min_recovery_point_timeline: word(144)?,
            backup_start_point: Lsn(long(152)?).valid(),
            backup_end_point: Lsn(long(160)?).valid(),
            backup_end_required: flag(168)?,
            wal_level: word(172)?,
            wal_log_hints: flag(176)?,
            max_connections: word(180)?,
            max_worker_processes: word(184)?,
            max_wal_senders: word(188)?,
            max_prepared_transactions: word(192)?,
            max_locks_per_transaction: word(196)?,
            max_align: word(204)?,
            ieee_floats: long(208)? == 1_234_567.0_f64.to_bits(),
            block_size: word(216)?,
            segment_blocks: word(220)?,
            wal_block_size: word(224)?,
            wal_segment_size: SegmentSize::try_from(segment_size)
                .map_err(|_| bad("WAL segment size", segment_size))?,
            data_checksum_version: word(252)?,
        };
        let page = |size: u32| size.is_power_of_two() && (1024..=65536).contains(&size);
        match &control {
            control if !page(control.block_size) => Err(bad("block size", control.block_size)),
            control if !page(control.wal_block_size) => {
                Err(bad("WAL block size", control.wal_block_size))
            }
            control if control.segment_blocks == 0 => {
                Err(bad("blocks per segment", control.segment_blocks))
            }
            control if control.timeline == 0 => Err(bad("timeline", control.timeline)),
            _ => Ok(control),
        }
    }

    /// Returns the major version that wrote the cluster.
    ///
    /// # Errors
    /// [`ControlError::UnknownCatalog`] for a catalog version of no release.
    pub fn major(&self) -> Result<Major, ControlError> {
        Major::from_catalog_version(self.catalog_version)
            .filter(|major| major.control_version() == self.control_version)
            .ok_or(ControlError::UnknownCatalog(self.catalog_version))
    }
}

/// The sizes a server was built with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildSizes {
    /// Bytes per page of data (`block_size`).
    pub block_size: u32,
    /// Pages per file of a large relation (`segment_size`).
    pub segment_blocks: u32,
    /// Bytes per page of WAL (`wal_block_size`).
    pub wal_block_size: u32,
}

/// Returns every reason why a server built with `build` cannot run this cluster, in words for the operator.
pub fn mismatches(control: &ControlFile, build: BuildSizes) -> Vec<String> {
    let sizes = [
        ("pages of", "bytes", control.block_size, build.block_size),
        ("relation files of", "pages", control.segment_blocks, build.segment_blocks),
        ("WAL pages of", "bytes", control.wal_block_size, build.wal_block_size),
    ];
    let mut found: Vec<String> = sizes
        .iter()
        .filter(|(_, _, cluster, server)| cluster != server)
        .map(|(what, unit, cluster, server)| format!("the cluster has {what} {cluster} {unit}, the installed server was built for {server}"))
        .collect();
    if control.max_align != 8 || !control.ieee_floats {
        found.push("the cluster was made on another kind of machine (alignment or floating-point format differ)".into());
    }
    found
}

/// How a mounted directory is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StartKind {
    /// A backup with its `backup_label`: archive recovery at least to the end of the backup.
    ArchiveRecovery,
    /// Shut down cleanly: complete as it is.
    CleanShutdown,
    /// A standby's directory: archive recovery at least to `minRecoveryPoint`, never crash recovery.
    StandbyDirectory,
    /// All captured at one instant (`--atomic-snapshot`): crash recovery.
    AtomicSnapshot,
}

/// What lies beside `pg_control` in the data directory, and what the operator said about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartFacts {
    /// The directory has a `backup_label`, or `--backup-label` supplied one.
    pub backup_label: bool,
    /// The directory has a `standby.signal` or `recovery.signal`.
    pub recovery_signal: bool,
    /// `--atomic-snapshot`: data directory, `pg_wal` and all tablespaces were captured at one instant.
    pub atomic_snapshot: bool,
}

/// A directory without `backup_label` that nobody may start just so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error(
    "the data directory has no backup_label and its state is \"{state}\": it is either a snapshot of everything at one instant, or files copied one after another from a running server{signal}, whose tables would be silently wrong; from the outside both look alike",
    signal = if *.recovery_signal { " (it was prepared for recovery: a signal file is there)" } else { "" }
)]
pub struct NoBackupLabel {
    /// What `pg_control` says.
    pub state: ClusterState,
    /// A signal file lies in the directory.
    pub recovery_signal: bool,
}

impl NoBackupLabel {
    /// Returns what the operator can do about it.
    pub fn hint(&self) -> &'static str {
        "if data directory, pg_wal and all tablespaces were captured at one instant (one LVM, ZFS or storage snapshot), say --atomic-snapshot; \
         if it is a copy made between pg_backup_start() and pg_backup_stop(), give the label that pg_backup_stop() returned with --backup-label FILE; \
         otherwise choose another backup"
    }
}

/// Decides how a directory is started, by `pg_control` and what lies beside it.
///
/// A directory without `backup_label` whose server was running is accepted only as an atomic snapshot. That
/// holds for a running standby's directory too: files copied from it one after another may be newer than
/// the `minRecoveryPoint` in the copy of `pg_control`, and then nothing would notice.
///
/// # Errors
/// [`NoBackupLabel`] if it cannot be told from a broken copy.
pub fn what_start(control: &ControlFile, facts: StartFacts) -> Result<StartKind, NoBackupLabel> {
    use ClusterState as S;
    match (facts.backup_label, control.state, facts.atomic_snapshot) {
        (true, _, _) => Ok(StartKind::ArchiveRecovery),
        (false, S::ShutDown, _) => Ok(StartKind::CleanShutdown),
        (false, S::ShutDownInRecovery, _) | (false, S::InArchiveRecovery, true) => {
            Ok(StartKind::StandbyDirectory)
        }
        (false, S::InProduction | S::ShuttingDown | S::InCrashRecovery, true) => {
            Ok(StartKind::AtomicSnapshot)
        }
        (false, state, _) => Err(NoBackupLabel { state, recovery_signal: facts.recovery_signal }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Returns a file of the given layout with a right checksum, changed by `change` before that.
    fn file(control_version: u32, catalog_version: u32, change: impl Fn(&mut [u8])) -> Vec<u8> {
        let mut bytes = vec![0; CONTROL_FILE_SIZE];
        let mut put = |offset: usize, value: &[u8]| {
            bytes[offset..offset + value.len()].copy_from_slice(value)
        };
        put(0, &7_u64.to_le_bytes());
        put(8, &control_version.to_le_bytes());
        put(12, &catalog_version.to_le_bytes());
        put(16, &6_u32.to_le_bytes());
        put(48, &1_u32.to_le_bytes());
        put(204, &8_u32.to_le_bytes());
        put(208, &1_234_567.0_f64.to_le_bytes());
        for (offset, value) in [(216, 8192_u32), (220, 131_072), (224, 8192), (228, 16 << 20)] {
            put(offset, &value.to_le_bytes());
        }
        change(&mut bytes);
        seal(&mut bytes, control_version);
        bytes
    }

    fn seal(bytes: &mut [u8], control_version: u32) {
        let at = checksum_offset(control_version).unwrap_or(288);
        let checksum = crc32c::crc32c(&bytes[..at]);
        bytes[at..at + 4].copy_from_slice(&checksum.to_le_bytes());
    }

    fn control() -> ControlFile {
        ControlFile::parse(&file(1300, 202_209_061, |_| {})).unwrap()
    }

    #[test]
    fn every_major_has_its_layout() {
        for major in Major::all() {
            let bytes = file(major.control_version(), major.catalog_version(), |_| {});
            let control = ControlFile::parse(&bytes).unwrap();
            assert_eq!(control.major(), Ok(major));
            assert_eq!(control.min_recovery_point, None);
            let mut damaged = bytes.clone();
            damaged[230] ^= 1;
            assert!(
                matches!(ControlFile::parse(&damaged), Err(ControlError::Checksum { .. })),
                "{major}"
            );
        }
    }

    #[test]
    fn refuses_what_postgresql_never_writes() {
        let cut = |bytes: Vec<u8>, length: usize| bytes[..length].to_vec();
        let put = |offset: usize, value: u32| {
            file(1300, 202_209_061, move |bytes| {
                bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes())
            })
        };
        let mut swapped = file(1300, 202_209_061, |_| {});
        swapped[8..12].reverse();
        let cases = [
            ("empty", vec![], "has 0 bytes"),
            ("cut", cut(file(1300, 202_209_061, |_| {}), 290), "has 290 bytes"),
            ("a page of zeros", vec![0; 8192], "version 0,"),
            ("a newer layout", file(1905, 1, |_| {}), "version 1905,"),
            ("the other byte order", swapped, "big-endian"),
            ("an unknown state", put(16, 9), "9 as state"),
            ("no WAL segment size", put(228, 0), "0 as WAL segment size"),
            ("no block size", put(216, 0), "0 as block size"),
            ("no pages per file", put(220, 0), "0 as blocks per segment"),
            ("no timeline", put(48, 0), "0 as timeline"),
        ];
        for (name, bytes, want) in cases {
            let error = ControlFile::parse(&bytes).unwrap_err();
            assert!(error.to_string().contains(want), "{name}: {error}");
            assert!(!error.hint().is_empty());
        }
        let beta = ControlFile::parse(&file(1300, 202_209_060, |_| {})).unwrap();
        assert_eq!(beta.major(), Err(ControlError::UnknownCatalog(202_209_060)));
    }

    #[test]
    fn decides_how_to_start() {
        use ClusterState as S;
        let none = StartFacts::default();
        let label = StartFacts { backup_label: true, ..none };
        let atomic = StartFacts { atomic_snapshot: true, ..none };
        let cases = [
            ("a backup", S::InProduction, label, Some(StartKind::ArchiveRecovery)),
            (
                "a backup from a standby",
                S::InArchiveRecovery,
                label,
                Some(StartKind::ArchiveRecovery),
            ),
            (
                "a backup said to be a snapshot",
                S::InProduction,
                StartFacts { backup_label: true, ..atomic },
                Some(StartKind::ArchiveRecovery),
            ),
            ("a clean shutdown", S::ShutDown, none, Some(StartKind::CleanShutdown)),
            ("a snapshot of a clean shutdown", S::ShutDown, atomic, Some(StartKind::CleanShutdown)),
            (
                "a standby that was shut down",
                S::ShutDownInRecovery,
                none,
                Some(StartKind::StandbyDirectory),
            ),
            (
                "a snapshot of a running standby",
                S::InArchiveRecovery,
                atomic,
                Some(StartKind::StandbyDirectory),
            ),
            ("a copy of a running standby", S::InArchiveRecovery, none, None),
            ("a snapshot", S::InProduction, atomic, Some(StartKind::AtomicSnapshot)),
            (
                "a snapshot during shutdown",
                S::ShuttingDown,
                atomic,
                Some(StartKind::AtomicSnapshot),
            ),
            (
                "a snapshot during crash recovery",
                S::InCrashRecovery,
                atomic,
                Some(StartKind::AtomicSnapshot),
            ),
            ("a copy of a running server", S::InProduction, none, None),
            ("a copy during shutdown", S::ShuttingDown, none, None),
            ("a cluster that never started", S::StartingUp, atomic, None),
        ];
        for (name, state, facts, want) in cases {
            let control = ControlFile { state, ..control() };
            assert_eq!(what_start(&control, facts).ok(), want, "{name}");
        }
    }

    #[test]
    fn a_missing_label_is_explained_and_removing_one_never_advised() {
        let error =
            what_start(&control(), StartFacts { recovery_signal: true, ..StartFacts::default() })
                .unwrap_err();
        let words = format!("{error}; {}", error.hint());
        for needed in ["in production", "--atomic-snapshot", "--backup-label FILE", "signal file"] {
            assert!(words.contains(needed), "{needed}: {words}");
        }
        assert!(!words.contains("remov"), "{words}");
    }

    #[test]
    fn tells_what_a_server_cannot_run() {
        let build = BuildSizes { block_size: 8192, segment_blocks: 131_072, wal_block_size: 8192 };
        assert_eq!(mismatches(&control(), build), Vec::<String>::new());
        let other = BuildSizes { block_size: 16384, ..build };
        assert_eq!(
            mismatches(&control(), other),
            ["the cluster has pages of 8192 bytes, the installed server was built for 16384"]
        );
        assert_eq!(mismatches(&ControlFile { max_align: 4, ..control() }, build).len(), 1);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), version in prop::sample::select(vec![1201_u32, 1300, 1700, 1800])) {
            let _ = ControlFile::parse(&bytes);
            if bytes.len() > 300 {
                bytes[8..12].copy_from_slice(&version.to_le_bytes());
                seal(&mut bytes, version);
                let _ = ControlFile::parse(&bytes);
            }
        }
    }
}
