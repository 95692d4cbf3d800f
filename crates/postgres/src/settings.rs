//! The settings an instance is started with, as a pure function of its plan.
//!
//! All of them go on the command line, where they beat `postgresql.auto.conf`; the backup's own
//! configuration files are never read. What a role or database sets for itself beats the command line: that
//! is answered per connection ([`crate::connection::session_options`]). Start at [`settings`].

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::binaries::Binaries;
use crate::lsn::{Lsn, SegmentSize};
use crate::os_user::OsUser;
use crate::preload::LIBRARIES;
use crate::root::Confinement;
use crate::root::layout::{Account, LayoutError, Location};

/// The port in the socket's name. No TCP port is opened, and each instance has a directory of its own.
pub const PORT: u16 = 5432;

/// How far an instance replays WAL before it opens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Recovery {
    /// A cleanly shut down cluster, or crash recovery with what lies in `pg_wal`.
    None,
    /// To the point where the backup is consistent.
    EndOfBackup {
        /// The timeline of the backup's last WAL.
        timeline: u32,
    },
    /// To the end of the WAL that is there (`--target-latest`).
    EndOfWal {
        /// The timeline to follow.
        timeline: u32,
    },
    /// Up to and with the record at a position: the same end as an earlier attempt reached.
    Lsn {
        /// The last record to replay, as [`crate::log::RecoveryEnd::redo_done`] told it.
        lsn: Lsn,
        /// The timeline to follow, the one of the first attempt (not the one it opened).
        timeline: u32,
    },
}

impl Recovery {
    /// Returns whether the mounted data directory must hold an (empty) `recovery.signal`.
    ///
    /// Without that file PostgreSQL ignores the recovery target. It removes the file when it has finished.
    pub fn needs_signal_file(&self) -> bool {
        !matches!(self, Self::None)
    }

    fn timeline(&self) -> Option<u32> {
        match self {
            Self::None => None,
            Self::EndOfBackup { timeline }
            | Self::EndOfWal { timeline }
            | Self::Lsn { timeline, .. } => Some(*timeline),
        }
    }
}

/// A library of `shared_preload_libraries`, with settings that keep it from doing anything by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preload {
    /// The library, as `shared_preload_libraries` names it.
    pub library: String,
    /// Its own settings.
    pub settings: Vec<(String, String)>,
}

impl Preload {
    /// A library that the user named (`--preload`), with the settings known for it ([`crate::preload`]).
    pub fn named(library: &str) -> Self {
        let name = library.rsplit('/').next().unwrap_or(library);
        let name = name.strip_suffix(".so").unwrap_or(name);
        let known = LIBRARIES.iter().find(|known| known.name == name);
        let settings = known.map_or(&[][..], |known| known.settings);
        let owned = |(name, value): &(&str, &str)| (name.to_string(), value.to_string());
        Self { library: library.into(), settings: settings.iter().map(owned).collect() }
    }
}

/// Everything that decides how an instance is started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InstancePlan {
    /// The programs, of the cluster's major version.
    pub binaries: Binaries,
    /// The cluster's data directory: lies on the mount, so only PostgreSQL itself looks into it.
    pub data_directory: PathBuf,
    /// Every directory that holds a part of the cluster and that PostgreSQL may write to: the session's mount.
    pub cluster_directories: Vec<PathBuf>,
    /// Where replay of `CREATE TABLESPACE` finds the directories that it needs.
    pub locations: Vec<Location>,
    /// A directory of the account that runs PostgreSQL, 0700: configuration, socket's directory and log.
    pub instance_directory: PathBuf,
    /// Who runs PostgreSQL; `None` for ourselves.
    pub os_user: Option<OsUser>,
    /// How far WAL is replayed.
    pub recovery: Recovery,
    /// At least as many as the cluster had, or as there are files in `pg_twophase`.
    pub max_prepared_transactions: u32,
    /// See [`locks_per_transaction`].
    pub max_locks_per_transaction: u32,
    /// Connections at a time: pg_dump's workers, its leader, and our own.
    pub connections: u32,
    /// Size of the cluster's WAL segments, from `pg_control`.
    pub wal_segment_size: SegmentSize,
    /// Libraries to load at the start.
    pub preload: Vec<Preload>,
    /// A private directory of locales made by `localedef`, if the system lacks one (`LOCPATH`).
    pub locale_path: Option<PathBuf>,
    /// Unguessable; in the environment (`PGTHAW_SESSION`) of all processes. Their titles, which every account of the machine can
    /// read, show [`process_title`] of it.
    pub marker: String,
    /// What walls the instance in.
    pub confinement: Confinement,
}

/// Returns the name (`cluster_name`) that the titles of PostgreSQL's processes show of the session with `marker`: the first eight
/// characters of it, too few to pass for the session.
pub fn process_title(marker: &str) -> String {
    format!("pgthaw-{}", marker.get(..8).unwrap_or(marker))
}

impl InstancePlan {
    /// Returns the directory of the server's socket.
    pub fn socket_directory(&self) -> PathBuf {
        self.instance_directory.join("socket")
    }

    /// Returns the directories that must be there in the session's mount before the start, because a tablespace lay in
    /// another one's directory.
    ///
    /// # Errors
    /// [`LayoutError`] if a location of a tablespace is needed for something else on this machine.
    pub fn directories_in_mount(&self) -> Result<Vec<PathBuf>, LayoutError> {
        let libraries: Vec<&str> =
            self.preload.iter().map(|preload| preload.library.as_str()).collect();
        let view = crate::launch::server_view(self);
        let account = Account::of(self.os_user.as_ref());
        crate::launch::steps(&self.binaries, &libraries, self.os_user.as_ref(), &account, &view)
            .map(|(_, directories)| directories)
    }
}

/// Returns `max_locks_per_transaction` with which a dump of `relations` relations finds room for its locks.
///
/// The lock table has room for that many locks *per slot*, and a slot is one allowed connection or
/// prepared transaction (PostgreSQL manual, "Lock Management"). pg_dump's leader locks every table in one
/// transaction, its workers each lock what they dump; the default of 64 is the least.
pub fn locks_per_transaction(relations: u64, slots: u32) -> u32 {
    let wanted = relations.saturating_mul(5) / 4 + 1000;
    let per_slot = wanted.div_ceil(u64::from(slots.max(1)));
    u32::try_from(per_slot).unwrap_or(i32::MAX as u32).clamp(64, i32::MAX as u32)
}

/// A setting that every instance gets: name, value, and the majors that know it (0: all before, after).
struct Fixed(&'static str, &'static str, u32, u32);

const ALL: u32 = 0;

#[rustfmt::skip]
const FIXED: &[Fixed] = &[
    // nobody else comes in
    Fixed("listen_addresses", "", ALL, ALL),
    Fixed("unix_socket_permissions", "0700", ALL, ALL),
    Fixed("unix_socket_group", "", ALL, ALL),
    Fixed("ssl", "off", ALL, ALL),
    Fixed("bonjour", "off", ALL, ALL),
    // nothing goes out: archives, replication, commands
    Fixed("archive_mode", "off", ALL, ALL),
    Fixed("archive_command", "", ALL, ALL),
    Fixed("archive_library", "", 15, ALL),
    Fixed("archive_timeout", "0", ALL, ALL),
    Fixed("archive_cleanup_command", "", ALL, ALL),
    Fixed("recovery_end_command", "", ALL, ALL),
    Fixed("primary_conninfo", "", ALL, ALL),
    Fixed("primary_slot_name", "", ALL, ALL),
    Fixed("hot_standby_feedback", "off", ALL, ALL),
    Fixed("max_wal_senders", "0", ALL, ALL),
    Fixed("synchronous_standby_names", "", ALL, ALL),
    Fixed("synchronized_standby_slots", "", 17, ALL),
    Fixed("sync_replication_slots", "off", 17, ALL),
    // nobody's code runs unasked
    Fixed("max_worker_processes", "0", ALL, ALL),
    Fixed("max_parallel_workers", "0", ALL, ALL),
    Fixed("max_logical_replication_workers", "0", ALL, ALL),
    Fixed("session_preload_libraries", "", ALL, ALL),
    Fixed("local_preload_libraries", "", ALL, ALL),
    Fixed("dynamic_library_path", "$libdir", ALL, ALL),
    Fixed("summarize_wal", "off", 17, ALL),
    Fixed("restart_after_crash", "off", ALL, ALL),
    // recovery, then promotion; without hot standby the cluster's max_connections need not be met
    Fixed("hot_standby", "off", ALL, ALL),
    Fixed("wal_level", "replica", ALL, ALL),
    Fixed("recovery_target_action", "promote", ALL, ALL),
    Fixed("recovery_target_inclusive", "on", ALL, ALL),
    Fixed("recovery_min_apply_delay", "0", ALL, ALL),
    // it would read pages ahead that the WAL before brings whole: each such read decodes a neighbour's file from its start
    Fixed("recovery_prefetch", "off", 15, ALL),
    Fixed("promote_trigger_file", "", ALL, 15),
    Fixed("ignore_invalid_pages", "off", 13, ALL),
    // replay of a subscriber's commits needs a place for each of its origins; none here is FATAL
    Fixed("max_replication_slots", "1000", ALL, ALL),
    Fixed("max_active_replication_origins", "1000", 18, ALL),
    // damage is never hidden
    Fixed("zero_damaged_pages", "off", ALL, ALL),
    Fixed("ignore_checksum_failure", "off", ALL, ALL),
    Fixed("ignore_system_indexes", "off", ALL, ALL),
    // the write layer is thrown away
    Fixed("fsync", "off", ALL, ALL),
    Fixed("full_page_writes", "off", ALL, ALL),
    Fixed("synchronous_commit", "off", ALL, ALL),
    Fixed("wal_recycle", "off", ALL, ALL),
    Fixed("wal_init_zero", "off", ALL, ALL),
    Fixed("checkpoint_timeout", "1d", ALL, ALL),
    Fixed("autovacuum", "off", ALL, ALL),
    Fixed("autovacuum_freeze_max_age", "2000000000", ALL, ALL),
    Fixed("autovacuum_multixact_freeze_max_age", "2000000000", ALL, ALL),
    Fixed("track_counts", "off", ALL, ALL),
    Fixed("track_commit_timestamp", "off", ALL, ALL),
    // little memory, nothing in /dev/shm
    Fixed("shared_buffers", "64MB", ALL, ALL),
    Fixed("jit", "off", ALL, ALL),
    Fixed("huge_pages", "off", ALL, ALL),
    Fixed("shared_memory_type", "mmap", ALL, ALL),
    Fixed("dynamic_shared_memory_type", "mmap", ALL, ALL),
    Fixed("io_method", "worker", 18, ALL),
    Fixed("superuser_reserved_connections", "0", ALL, ALL),
    Fixed("reserved_connections", "0", 16, ALL),
    // a log that `crate::log` reads; statements may hold data and are left out
    Fixed("logging_collector", "off", ALL, ALL),
    Fixed("log_destination", "stderr", ALL, ALL),
    Fixed("log_min_messages", "log", ALL, ALL),
    Fixed("log_min_error_statement", "panic", ALL, ALL),
    Fixed("log_statement", "none", ALL, ALL),
    Fixed("log_error_verbosity", "default", ALL, ALL),
    Fixed("log_line_prefix", "%m [%p] ", ALL, ALL),
    Fixed("log_timezone", "GMT", ALL, ALL),
    Fixed("timezone", "GMT", ALL, ALL),
    Fixed("lc_messages", "C", ALL, ALL),
    Fixed("update_process_title", "on", ALL, ALL),
];

/// Returns the settings of an instance, name and value, in the order of its command line.
pub fn settings(plan: &InstancePlan) -> Vec<(String, String)> {
    let major = plan.binaries.major.number();
    let known = |fixed: &&Fixed| fixed.2 <= major && (fixed.3 == ALL || major <= fixed.3);
    let mut settings: Vec<(String, String)> =
        FIXED.iter().filter(known).map(|fixed| (fixed.0.into(), fixed.1.into())).collect();
    let mut set = |name: &str, value: String| settings.push((name.into(), value));

    let own = |name: &str| plan.instance_directory.join(name).display().to_string();
    set("config_file", own("postgresql.conf"));
    set("hba_file", own("pg_hba.conf"));
    set("ident_file", own("pg_ident.conf"));
    // an empty name is not "none" for the server, it would complain about it; whatever the backup says is beaten by this one
    set("external_pid_file", own("socket/external.pid"));
    set("unix_socket_directories", list_item(&plan.socket_directory()));
    set("port", PORT.to_string());
    set("cluster_name", process_title(&plan.marker));

    let archive = plan.recovery.needs_signal_file();
    // archive recovery demands a command; the WAL lies in pg_wal, so nothing is ever to be fetched
    set("restore_command", if archive { "false".into() } else { String::new() });
    let lsn = match &plan.recovery {
        Recovery::Lsn { lsn, .. } => lsn.to_string(),
        _ => String::new(),
    };
    let immediate = matches!(plan.recovery, Recovery::EndOfBackup { .. });
    let mut targets = [
        ("recovery_target", if immediate { "immediate".into() } else { String::new() }),
        ("recovery_target_lsn", lsn),
        ("recovery_target_name", String::new()),
        ("recovery_target_time", String::new()),
        ("recovery_target_xid", String::new()),
    ];
    // an empty target after one that is set counts as a second one for PostgreSQL: the empty ones first
    targets.sort_by_key(|(_, value)| !value.is_empty());
    targets.into_iter().for_each(|(name, value)| set(name, value));
    let timeline = plan.recovery.timeline().map(|timeline| timeline.to_string());
    set("recovery_target_timeline", timeline.unwrap_or_else(|| "current".into()));

    set("max_connections", plan.connections.max(1).to_string());
    set("max_prepared_transactions", plan.max_prepared_transactions.to_string());
    set("max_locks_per_transaction", plan.max_locks_per_transaction.max(64).to_string());
    // both must be two segments at least
    let segment_mb = plan.wal_segment_size.bytes() >> 20;
    set("max_wal_size", format!("{}MB", (4 * segment_mb).max(1024)));
    set("min_wal_size", format!("{}MB", (2 * segment_mb).max(32)));

    let libraries: Vec<&str> =
        plan.preload.iter().map(|preload| preload.library.as_str()).collect();
    set("shared_preload_libraries", libraries.join(","));
    plan.preload
        .iter()
        .flat_map(|preload| &preload.settings)
        .for_each(|(name, value)| set(name, value.clone()));
    settings
}

/// Writes a path as an item of a list of directories: in double quotes, those within doubled.
fn list_item(path: &Path) -> String {
    format!("\"{}\"", path.display().to_string().replace('"', "\"\""))
}

/// Returns why a plan cannot be carried out, if so; nothing is touched.
pub(crate) fn objection(plan: &InstancePlan) -> Option<String> {
    let socket = plan.socket_directory().join(format!(".s.PGSQL.{PORT}"));
    let marker = &plan.marker;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    if !plan.data_directory.is_absolute() || !plan.instance_directory.is_absolute() {
        return Some(
            "the data directory and the instance's directory must be absolute paths".into(),
        );
    }
    // sun_path has 108 bytes, the last one for the terminating zero
    if socket.as_os_str().len() > 107 {
        return Some(format!("the socket's path `{}` is longer than 107 bytes", socket.display()));
    }
    if plan.instance_directory.to_str().is_none_or(|path| path.contains(['\n', '\0'])) {
        return Some(
            "the instance's directory has a name PostgreSQL's settings cannot hold".into(),
        );
    }
    if !(8..=63).contains(&marker.len()) || !marker.chars().all(plain) {
        return Some("the marker must be 8 to 63 letters, digits, `-` or `_`".into());
    }
    let library = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | '$');
    let bad = plan
        .preload
        .iter()
        .find(|preload| preload.library.is_empty() || !preload.library.chars().all(library));
    bad.map(|preload| format!("`{}` is no name of a library to preload", preload.library))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::version::Major;

    fn plan(major: u32, recovery: Recovery) -> InstancePlan {
        let directory = PathBuf::from("/usr/lib/postgresql/bin");
        InstancePlan {
            binaries: Binaries {
                postgres: directory.join("postgres"),
                pg_dump: directory.join("pg_dump"),
                pg_dumpall: directory.join("pg_dumpall"),
                psql: None,
                version: format!("{major}.1"),
                major: Major::try_from(major).unwrap(),
                directory,
            },
            data_directory: "/mnt/data".into(),
            cluster_directories: vec!["/mnt".into()],
            locations: Vec::new(),
            instance_directory: "/session/in, \"st\"".into(),
            os_user: None,
            recovery,
            max_prepared_transactions: 7,
            max_locks_per_transaction: 5000,
            connections: 12,
            wal_segment_size: SegmentSize::DEFAULT,
            preload: Vec::new(),
            locale_path: None,
            marker: "marker-0123456789".into(),
            confinement: Confinement::Unisolated,
        }
    }

    fn value(plan: &InstancePlan, name: &str) -> Option<String> {
        let settings = settings(plan);
        let mut values = settings.into_iter().filter(|(found, _)| found == name);
        let value = values.next().map(|(_, value)| value);
        assert!(values.next().is_none(), "{name} is set twice");
        value
    }

    #[test]
    fn each_major_gets_the_isolating_settings_it_knows() {
        let cases: &[(&str, &str, std::ops::RangeInclusive<u32>)] = &[
            ("listen_addresses", "", 12..=18),
            ("archive_mode", "off", 12..=18),
            ("archive_command", "", 12..=18),
            ("archive_library", "", 15..=18),
            ("archive_cleanup_command", "", 12..=18),
            ("recovery_end_command", "", 12..=18),
            ("primary_conninfo", "", 12..=18),
            ("ssl", "off", 12..=18),
            ("logging_collector", "off", 12..=18),
            ("log_destination", "stderr", 12..=18),
            ("log_min_messages", "log", 12..=18),
            ("huge_pages", "off", 12..=18),
            ("restart_after_crash", "off", 12..=18),
            ("sync_replication_slots", "off", 17..=18),
            ("summarize_wal", "off", 17..=18),
            ("io_method", "worker", 18..=18),
            ("lc_messages", "C", 12..=18),
            ("dynamic_shared_memory_type", "mmap", 12..=18),
            ("max_worker_processes", "0", 12..=18),
            ("max_logical_replication_workers", "0", 12..=18),
            ("shared_preload_libraries", "", 12..=18),
            ("session_preload_libraries", "", 12..=18),
            ("hot_standby", "off", 12..=18),
            ("recovery_target_action", "promote", 12..=18),
            ("wal_level", "replica", 12..=18),
            ("max_wal_senders", "0", 12..=18),
            ("promote_trigger_file", "", 12..=15),
            ("fsync", "off", 12..=18),
            ("full_page_writes", "off", 12..=18),
            ("wal_recycle", "off", 12..=18),
            ("wal_init_zero", "off", 12..=18),
            ("autovacuum", "off", 12..=18),
            ("autovacuum_freeze_max_age", "2000000000", 12..=18),
            ("autovacuum_multixact_freeze_max_age", "2000000000", 12..=18),
            ("max_wal_size", "1024MB", 12..=18),
            ("jit", "off", 12..=18),
            ("zero_damaged_pages", "off", 12..=18),
            ("ignore_invalid_pages", "off", 13..=18),
            ("max_active_replication_origins", "1000", 18..=18),
            ("config_file", "/session/in, \"st\"/postgresql.conf", 12..=18),
            ("hba_file", "/session/in, \"st\"/pg_hba.conf", 12..=18),
            ("ident_file", "/session/in, \"st\"/pg_ident.conf", 12..=18),
            ("external_pid_file", "/session/in, \"st\"/socket/external.pid", 12..=18),
            ("unix_socket_directories", "\"/session/in, \"\"st\"\"/socket\"", 12..=18),
            ("max_prepared_transactions", "7", 12..=18),
            ("max_locks_per_transaction", "5000", 12..=18),
            ("max_connections", "12", 12..=18),
        ];
        for major in 12..=18 {
            let plan = plan(major, Recovery::None);
            for (name, want, known) in cases {
                let want = known.contains(&major).then(|| want.to_string());
                assert_eq!(value(&plan, name), want, "{name} of {major}");
            }
        }
    }

    #[test]
    fn recovery_targets() {
        let cases = [
            (Recovery::None, "", "", "", "current", false),
            (Recovery::EndOfBackup { timeline: 3 }, "false", "immediate", "", "3", true),
            (Recovery::EndOfWal { timeline: 17 }, "false", "", "", "17", true),
            (
                Recovery::Lsn { lsn: Lsn(0x1_0000_00AB), timeline: 3 },
                "false",
                "",
                "1/AB",
                "3",
                true,
            ),
        ];
        for (recovery, restore, target, lsn, timeline, signal) in cases {
            assert_eq!(recovery.needs_signal_file(), signal);
            let plan = plan(15, recovery.clone());
            let got = |name| value(&plan, name).unwrap();
            assert_eq!(got("restore_command"), restore, "{recovery:?}");
            assert_eq!(got("recovery_target"), target, "{recovery:?}");
            assert_eq!(got("recovery_target_lsn"), lsn, "{recovery:?}");
            assert_eq!(got("recovery_target_timeline"), timeline, "{recovery:?}");
            assert_eq!(got("recovery_target_time"), "", "{recovery:?}");
            let all = settings(&plan);
            let place = |wanted: bool| {
                let target = |(name, value): &(String, String)| {
                    name.starts_with("recovery_target")
                        && ![
                            "recovery_target_action",
                            "recovery_target_inclusive",
                            "recovery_target_timeline",
                        ]
                        .contains(&name.as_str())
                        && value.is_empty() != wanted
                };
                all.iter().rposition(target)
            };
            assert!(
                place(true).is_none() || place(true) > place(false),
                "the empty targets come first"
            );
        }
    }

    #[test]
    fn wal_sizes_fit_the_segments() {
        for (mib, max, min) in
            [(1, "1024MB", "32MB"), (64, "1024MB", "128MB"), (1024, "4096MB", "2048MB")]
        {
            let mut plan = plan(15, Recovery::None);
            plan.wal_segment_size = SegmentSize::try_from(mib << 20).unwrap();
            assert_eq!(value(&plan, "max_wal_size").as_deref(), Some(max));
            assert_eq!(value(&plan, "min_wal_size").as_deref(), Some(min));
        }
    }

    #[test]
    fn libraries_are_preloaded_with_their_settings() {
        let mut plan = plan(16, Recovery::None);
        plan.preload = vec![Preload::named("$libdir/timescaledb"), Preload::named("own_library")];
        let value = |name| value(&plan, name).unwrap();
        assert_eq!(value("shared_preload_libraries"), "$libdir/timescaledb,own_library");
        assert_eq!(value("timescaledb.max_background_workers"), "0");
        assert_eq!(objection(&plan), None);
        plan.preload = vec![Preload::named("a, b")];
        assert!(objection(&plan).unwrap().contains("a, b"));
    }

    #[test]
    fn impossible_plans_are_refused() {
        let change = |change: fn(&mut InstancePlan)| {
            let mut plan = plan(15, Recovery::None);
            change(&mut plan);
            objection(&plan)
        };
        assert_eq!(change(|_| ()), None);
        assert!(change(|plan| plan.data_directory = "data".into()).is_some());
        assert!(
            change(|plan| plan.instance_directory = format!("/{}", "x".repeat(100)).into())
                .is_some()
        );
        assert!(change(|plan| plan.marker = "short".into()).is_some());
        assert!(change(|plan| plan.marker = "with spaces in it".into()).is_some());
    }

    #[test]
    fn room_for_locks() {
        let cases = [
            (0, 10, 100),
            (400, 10, 150),
            (20_000, 10, 2600),
            (20_000, 0, 26_000),
            (u64::MAX, 1, i32::MAX as u32),
        ];
        for (relations, slots, want) in cases {
            assert_eq!(locks_per_transaction(relations, slots), want, "{relations} in {slots}");
        }
        assert_eq!(locks_per_transaction(0, 1000), 64);
    }
}
