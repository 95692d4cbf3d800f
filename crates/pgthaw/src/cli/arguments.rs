//! The command line as people type it: commands, options and their help.
//!
//! Owns spelling and help; leaves what the values mean to [`super::values`] and what becomes of them to [`super::requests`].
#![allow(rustdoc::invalid_html_tags)] // the doc comments here are the help that a terminal shows

use std::num::NonZeroU64;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

use pgthaw_session::MoverChoice;
use pgthaw_session::limits::{JOBS_MAX, RETRIES_MAX};

use super::values::{self, Ports, RepositoryName};

/// Exports chosen databases out of a physical PostgreSQL backup without restoring it.
///
/// pgthaw mounts the backup where it lies, starts PostgreSQL on the mount, runs pg_dump and leaves nothing behind. The
/// repository is never written, and the original server is never contacted.
#[derive(Debug, Parser)]
#[command(
    name = "pgthaw",
    version,
    arg_required_else_help = true,
    max_term_width = 100,
    after_help = "\
Examples:
  pgthaw backups /backups/prod
  pgthaw databases /backups/prod
  pgthaw export /backups/prod -d crm --to /srv/exports/monday

Environment:
  PGTHAW_SERVER  the server to ask: ssh://[USER@]HOST[:PORT], or the path of its socket; without it this account's own

Exit codes:
  0    everything was delivered, or what was asked for was done
  1    it failed, or only a part was delivered
  2    wrong usage; also a REPO that is no repository, an unknown backup or database, or a target that is not empty
  130  stopped with Ctrl-C
  143  ended by SIGTERM; a session that was followed goes on"
)]
pub struct Arguments {
    /// Read this configuration instead of /etc/pgthaw/config.toml and ~/.config/pgthaw/config.toml
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// A command.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the backups of a repository
    Backups(BackupsArguments),
    /// List the databases of a backup with their sizes; PostgreSQL is not started
    Databases(DatabasesArguments),
    /// Check whether an export can work, without touching anything
    Check(CheckArguments),
    /// Export databases out of a backup
    Export(ExportArguments),
    /// List the sessions: exports that run, were interrupted or have ended
    Sessions(SessionsArguments),
    /// Show one session
    Session(SessionArguments),
    /// Show what happened in a session, with times
    Log(LogArguments),
    /// Follow a session that is at work
    Attach(AttachArguments),
    /// Go on with a session that failed or was stopped
    Retry(RetryArguments),
    /// Undo a session: stop it and remove everything it made
    Cancel(CancelArguments),
    /// Cancel all interrupted sessions and remove what they left
    Clean(CleanArguments),
    /// Run the server in the foreground
    Serve(ServeArguments),
    /// Print completions for a shell
    Completions(CompletionsArguments),
    /// Write the manual pages
    #[command(hide = true)]
    Man(ManArguments),
    /// Run as a child of pgthaw itself
    #[command(hide = true)]
    Internal(InternalArguments),
}

/// How a result is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Output {
    /// For people
    #[default]
    Text,
    /// For programs: one JSON value
    Json,
}

/// The option that every command with a result takes.
#[derive(Debug, Args)]
pub struct OutputOption {
    /// Print the result as text or as JSON
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t)]
    pub output: Output,
}

/// How a repository is read.
#[derive(Debug, Args, Default)]
#[command(next_help_heading = "Repository options")]
pub struct RepositoryOptions {
    /// Read this stanza of a pgBackRest repository; needed only when there are several
    #[arg(long, value_name = "STANZA", value_parser = values::name)]
    pub stanza: Option<String>,
    /// Look for archived WAL in this directory too (repeatable)
    ///
    /// For backups that do not bring all the WAL they need. Segments may be plain or compressed with gzip, lz4 or zstd.
    #[arg(long, value_name = "DIR", value_parser = values::path, value_hint = ValueHint::DirPath)]
    pub wal_archive: Vec<PathBuf>,
    /// Read a base backup's tablespace in this directory (repeatable)
    ///
    /// For copies without backup_manifest, whose links in pg_tblspc lead to the original server's tablespaces: OID is the link's name, DIR
    /// the backup's own copy, or `none` for a tablespace that was created while the backup ran: its WAL creates it again.
    #[arg(long, value_name = "OID=DIR", value_parser = values::tablespace, value_hint = ValueHint::DirPath)]
    pub tablespace: Vec<(u32, Option<PathBuf>)>,
    /// Data directory, pg_wal and all tablespaces were captured at one instant
    ///
    /// For a directory without backup_label that a snapshot of the storage made. Without this promise such a directory cannot be told
    /// from a broken copy.
    #[arg(long, conflicts_with = "backup_label")]
    pub atomic_snapshot: bool,
    /// Use this backup_label for a backup that was kept without its own
    #[arg(long, value_name = "FILE", value_parser = values::path, value_hint = ValueHint::FilePath)]
    pub backup_label: Option<PathBuf>,
}

/// `pgthaw backups`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pgthaw backups /backups/prod
  pgthaw backups pgbackrest:/var/lib/pgbackrest --stanza main
  pgthaw backups --output json /backups/prod")]
pub struct BackupsArguments {
    /// Where the backups lie: a directory, or KIND:DIR
    ///
    /// The format of a directory is detected: a pgBackRest repository, a directory that pg_basebackup made, or one that holds several of
    /// those. `pgbackrest:DIR` and `basebackup:DIR` name the format. Without REPO the repositories of pgBackRest's own
    /// configuration are listed (/etc/pgbackrest/pgbackrest.conf, /etc/pgbackrest.conf).
    #[arg(value_name = "REPO", value_parser = values::repository, value_hint = ValueHint::DirPath)]
    pub repository: Option<RepositoryName>,
    /// How the result is printed.
    #[command(flatten)]
    pub output: OutputOption,
    /// How the repository is read.
    #[command(flatten)]
    pub reading: RepositoryOptions,
}

/// `pgthaw databases`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pgthaw databases /backups/prod
  pgthaw databases /backups/prod --backup 20261122-101112F")]
pub struct DatabasesArguments {
    /// Where the backup lies: a directory, or KIND:DIR
    #[arg(value_name = "REPO", value_parser = values::repository, value_hint = ValueHint::DirPath)]
    pub repository: RepositoryName,
    /// Look into this backup instead of the newest
    #[arg(long, value_name = "ID", value_parser = values::name)]
    pub backup: Option<String>,
    /// How the result is printed.
    #[command(flatten)]
    pub output: OutputOption,
    /// How the repository is read.
    #[command(flatten)]
    pub reading: RepositoryOptions,
}

/// What is exported, from where, to where and how.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("which").required(true).args(["databases", "all"]))]
pub struct ExportOptions {
    /// Where the backup lies: a directory, or KIND:DIR
    ///
    /// The format of a directory is detected; `pgbackrest:DIR` and `basebackup:DIR` name it.
    #[arg(value_name = "REPO", value_parser = values::repository, value_hint = ValueHint::DirPath)]
    pub repository: RepositoryName,

    /// Export this database (repeatable)
    #[arg(short, long = "dbname", alias = "database", value_name = "NAME", value_parser = values::name)]
    pub databases: Vec<String>,
    /// Export every database that accepts connections, but templates
    #[arg(long)]
    pub all: bool,
    /// Leave out the databases that match this pattern; * and ? stand for any text and any character (repeatable)
    #[arg(long = "exclude-database", value_name = "PATTERN", value_parser = values::name, conflicts_with = "databases")]
    pub exclude_databases: Vec<String>,
    /// Deliver to this directory, which is new or empty
    ///
    /// It gets DIR/<database>/ in pg_dump's directory format, DIR/globals.sql with roles and tablespaces, DIR/SHA256SUMS and, when all is
    /// complete, DIR/export.json.
    ///
    /// TARGET is a directory of this machine, or host:DIR, user@host:DIR or ssh://user@host:port/DIR for one that ssh reaches.
    #[arg(long = "to", value_name = "TARGET", value_parser = values::target, value_hint = ValueHint::DirPath, required = true)]
    pub target: pgthaw_link::Place,
    /// Replace the earlier export in that directory once the new one is verified
    ///
    /// Only files that the earlier export lists in its own export.json and SHA256SUMS are removed.
    #[arg(long)]
    pub replace: bool,

    /// Export from this backup instead of the newest
    #[arg(long, value_name = "ID", value_parser = values::name)]
    pub backup: Option<String>,
    /// Recover to the end of the archived WAL instead of the end of the backup
    #[arg(long)]
    pub target_latest: bool,

    /// How the repository is read.
    #[command(flatten)]
    pub reading: RepositoryOptions,
    /// What pg_dump does.
    #[command(flatten)]
    pub dump: DumpOptions,
    /// Where and how the work is done.
    #[command(flatten)]
    pub work: WorkOptions,
    /// How the dump travels.
    #[command(flatten)]
    pub mover: MoverOptions,
}

/// What pg_dump does.
#[derive(Debug, Args, Default)]
#[command(next_help_heading = "Dump options (as for pg_dump)")]
pub struct DumpOptions {
    /// Dump this many tables at a time; without it as many as there are processors, at most 4
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(JOBS_MAX)))]
    pub jobs: Option<u32>,
    /// Compress as pg_dump does: gzip, lz4, zstd or none with an optional level, or a level alone
    ///
    /// pg_dump of PostgreSQL 15 and older knows gzip only.
    #[arg(short = 'Z', long, value_name = "METHOD[:LEVEL]", value_parser = values::compression)]
    pub compress: Option<String>,
    /// Dump only the tables that match this pattern (repeatable)
    #[arg(short = 't', long, value_name = "PATTERN", value_parser = values::name)]
    pub table: Vec<String>,
    /// Dump only the schemas that match this pattern (repeatable)
    #[arg(short = 'n', long, value_name = "PATTERN", value_parser = values::name)]
    pub schema: Vec<String>,
    /// Leave out the tables that match this pattern (repeatable)
    #[arg(short = 'T', long, value_name = "PATTERN", value_parser = values::name)]
    pub exclude_table: Vec<String>,
    /// Leave out the schemas that match this pattern (repeatable)
    #[arg(short = 'N', long, value_name = "PATTERN", value_parser = values::name)]
    pub exclude_schema: Vec<String>,
    /// Leave out the rows of the tables that match this pattern (repeatable)
    #[arg(long, value_name = "PATTERN", value_parser = values::name)]
    pub exclude_table_data: Vec<String>,
    /// Dump definitions only, no rows
    #[arg(short = 's', long)]
    pub schema_only: bool,
    /// Do not write globals.sql (roles and tablespaces)
    #[arg(long)]
    pub no_globals: bool,
    /// Leave the password hashes of roles out of globals.sql
    #[arg(long, conflicts_with = "no_globals")]
    pub no_role_passwords: bool,
    /// Further arguments for pg_dump, after `--`
    #[arg(last = true, value_name = "PG_DUMP_ARG")]
    pub pg_dump_arguments: Vec<String>,
}

/// Where and how the work is done.
#[derive(Debug, Args, Default)]
#[command(next_help_heading = "Where and how the work is done")]
pub struct WorkOptions {
    /// Mount the backup, start PostgreSQL and dump on this machine, which ssh reaches; without it here
    ///
    /// HOST is written as for ssh: host, user@host, ssh://user@host:port, or an alias of ~/.ssh/config. pgthaw is carried over
    /// where it is not installed; PostgreSQL of the backup's major version and fuse3 have to be there. The directories and
    /// accounts of the options below are that machine's.
    #[arg(long, value_name = "HOST", value_parser = values::host)]
    pub staging: Option<pgthaw_link::Host>,
    /// Let a server elsewhere reach other machines with the keys of this machine's ssh-agent, instead of its own
    #[arg(long)]
    pub forward_ssh_agent: bool,
    /// Who reads the repository for the staging server: mount-server, staging or staging:DIR
    ///
    /// Without it the mount server sends the pages that are asked for. A staging server that sees the same repository itself (NFS, the
    /// same disk) reads it there with `staging`, or at another path with `staging:DIR`; it has to be the same backup.
    #[arg(long, value_name = "WHERE", value_parser = values::read_from)]
    pub read_from: Option<values::ReadFrom>,
    /// Keep the dump here until it is delivered; without it the roomier of /var/tmp and /tmp
    #[arg(long, value_name = "DIR", value_parser = values::path, value_hint = ValueHint::DirPath)]
    pub dump_dir: Option<PathBuf>,
    /// Leave the dump there after it is delivered; its directory is told at the end, and yours to remove
    ///
    /// Without this, files leave as soon as the target has them, so that a dump may be larger than the room there is. It stays after
    /// success only; of an export that took `pgthaw retry`, the databases that the last attempt dumped.
    #[arg(long)]
    pub keep_dump: bool,
    /// Make the session's private directory (mount, write layer, sockets) here instead of in /var/tmp
    #[arg(long, value_name = "DIR", value_parser = values::path, value_hint = ValueHint::DirPath)]
    pub work_dir: Option<PathBuf>,
    /// Wait this long for a machine that cannot be reached, for example 90s, 30min or 2h, before the session fails
    ///
    /// As long as PostgreSQL waits for the repository, or delivery for the target, the session shows `waiting` and goes on by itself.
    /// `pgthaw retry` goes on later.
    #[arg(long, value_name = "TIME", value_parser = values::seconds, default_value = "30min")]
    pub stall_timeout: u64,
    /// Keep this much decoded data in memory, for example 512MB; at least 1MB
    #[arg(long, value_name = "SIZE", value_parser = values::cache_size)]
    pub cache_size: Option<u64>,
    /// Where PostgreSQL's programs of the backup's major version are; without it the usual places and PATH are searched
    #[arg(long, value_name = "DIR", value_parser = values::path, value_hint = ValueHint::DirPath)]
    pub pg_bin: Option<PathBuf>,
    /// Run PostgreSQL and pg_dump as this account when pgthaw runs as root; without it postgres
    #[arg(long, value_name = "USER", value_parser = values::name)]
    pub os_user: Option<String>,
    /// Connect as this superuser of the cluster; without it the one that initdb made
    #[arg(long, value_name = "ROLE", value_parser = values::name)]
    pub superuser: Option<String>,
    /// Preload this library, although the backup's own list is ignored (repeatable)
    #[arg(long, value_name = "LIBRARY", value_parser = values::name)]
    pub preload: Vec<String>,
    /// Run PostgreSQL and pg_dump without a root directory of their own where the kernel refuses one
    ///
    /// Code in the backup (functions, triggers, conditions that pg_dump evaluates) can then read, write and connect to everything
    /// that the account running PostgreSQL can reach on that host. Use this only for backups whose superusers you trust. A backup whose
    /// WAL creates tablespaces is refused even with this option.
    #[arg(long)]
    pub allow_unisolated: bool,
    /// Export databases although the backup tool found damaged pages in them
    #[arg(long)]
    pub allow_damaged: bool,
    /// Read and verify every file of the selected databases whole
    #[arg(long)]
    pub verify_source: bool,
    /// Begin again by itself so many times when a process or a machine died; without it 3 times
    ///
    /// Each time it goes on from what was delivered, after a rest that grows from 2 seconds to a minute. What needs somebody (no room, no
    /// rights, a damaged backup) is never tried again without `pgthaw retry`.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=i64::from(RETRIES_MAX)))]
    pub retries: Option<u32>,
    /// Wait so long for a machine that cannot be reached, and begin again no later, for example 30min or 2h; without it 1h
    #[arg(long, value_name = "TIME", value_parser = values::seconds)]
    pub retry_for: Option<u64>,
    /// End what runs on a machine, and leave nothing there, when pgthaw's server has not been heard of for so long; without it 1d
    #[arg(long, value_name = "TIME", value_parser = values::lease)]
    pub lease: Option<u64>,
}

/// How bytes travel.
#[derive(Debug, Args, Default)]
#[command(next_help_heading = "Between machines")]
pub struct MoverOptions {
    /// Connect machines directly on one of these ports [default: 47000-47099]
    ///
    /// For the dump the target listens on the first free one, or else the staging server, until the other one has connected; for reads
    /// of the repository the staging server does. TLS 1.3, with keys that are made for the connection and exchanged over ssh. Where
    /// firewalls do not allow it, the dump goes through this machine, and both go over ssh; `none` wants just that.
    #[arg(long, value_name = "FIRST-LAST|none", value_parser = values::ports)]
    pub mover_ports: Option<Ports>,
    /// Send at most this much per second, for example 10MB
    #[arg(long, value_name = "RATE", value_parser = values::rate)]
    pub bwlimit: Option<NonZeroU64>,
}

impl MoverOptions {
    /// What a request holds of them.
    pub fn choice(&self) -> MoverChoice {
        let ports = self.mover_ports.map_or(MoverChoice::default().ports, |Ports(ports)| ports);
        MoverChoice { ports, bytes_per_second: self.bwlimit }
    }
}

/// `pgthaw check`.
#[derive(Debug, Args)]
#[command(after_help = "\
All errors and warnings are reported at once, each with its remedy. The exit code is 0 without errors.

Examples:
  pgthaw check /backups/prod -d crm --to /srv/exports/monday
  pgthaw check /backups/prod --all --to /srv/exports/monday --output json")]
pub struct CheckArguments {
    /// How the result is printed.
    #[command(flatten)]
    pub output: OutputOption,
    /// The export to check.
    #[command(flatten)]
    pub export: ExportOptions,
}

/// `pgthaw export`.
#[derive(Debug, Args)]
#[command(after_help = "\
A session does the work in the background. A lost terminal leaves it at work; `pgthaw attach ID` follows it \
again. Ctrl-C stops it and keeps what `pgthaw retry ID` re-uses; a second Ctrl-C leaves it alone at once.

Examples:
  pgthaw export /backups/prod -d crm --to /srv/exports/monday
  pgthaw export /backups/prod -d crm -d sales --to /srv/both -j 4 -Z zstd:3
  pgthaw export /backups/prod --all --exclude-database 'test*' --to /srv/all
  pgthaw export /backups/prod -d crm --to /srv/crm --target-latest
  pgthaw export /backups/prod -d crm --to /srv/crm --backup 20261122-101112F
  pgthaw export pgbackrest:/backups/prod --stanza main -d crm --to /srv/crm
  pgthaw export /backups/prod -d crm -t 'invoice*' --to /srv/crm -- --no-owner
  pgthaw export /backups/prod -d crm --staging dba@db-stage --to ops@files:/srv/crm")]
pub struct ExportArguments {
    /// How the result is printed.
    #[command(flatten)]
    pub output: OutputOption,
    /// Print the session's id and leave it at work
    #[arg(long)]
    pub detach: bool,
    /// Never ask: answer every question with yes
    #[arg(long)]
    pub yes: bool,
    /// What is exported.
    #[command(flatten)]
    pub export: ExportOptions,
}

/// `pgthaw sessions`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pgthaw sessions
  pgthaw sessions --output json")]
pub struct SessionsArguments {
    /// How the result is printed.
    #[command(flatten)]
    pub output: OutputOption,
}

/// `pgthaw session`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pgthaw session 20261122-101112-kqvd
  pgthaw session 20261122-101112-kqvd --bundle report.json")]
pub struct SessionArguments {
    /// The session's id, as `pgthaw sessions` shows it
    #[arg(value_name = "ID", value_parser = values::name)]
    pub id: String,
    /// Write what helps to find the cause of a failure into this new file
    ///
    /// A JSON file with the session's journal, logs, versions and settings. It holds no secret and no rows, but names of machines, paths,
    /// databases and tables: read it before you hand it on.
    #[arg(long, value_name = "FILE", value_parser = values::path, value_hint = ValueHint::FilePath, conflicts_with = "output")]
    pub bundle: Option<PathBuf>,
    /// How the result is printed.
    #[command(flatten)]
    pub output: OutputOption,
}

/// `pgthaw log`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pgthaw log 20261122-101112-kqvd
  pgthaw log -f 20261122-101112-kqvd")]
pub struct LogArguments {
    /// The session's id, as `pgthaw sessions` shows it
    #[arg(value_name = "ID", value_parser = values::name)]
    pub id: String,
    /// Go on printing while the session is at work; Ctrl-C ends the printing, not the session
    #[arg(short, long)]
    pub follow: bool,
    /// How the result is printed.
    #[command(flatten)]
    pub output: OutputOption,
}

/// `pgthaw attach`.
#[derive(Debug, Args)]
#[command(after_help = "\
Ctrl-C stops the session, as it does with `pgthaw export`. `pgthaw log -f ID` only watches.

Example:
  pgthaw attach 20261122-101112-kqvd")]
pub struct AttachArguments {
    /// The session's id, as `pgthaw sessions` shows it
    #[arg(value_name = "ID", value_parser = values::name, required_unless_present_any = ["stdio", "build"])]
    pub id: Option<String>,
    /// Serve another machine's server on standard input and output; ssh starts this
    #[arg(long, conflicts_with_all = ["id", "build"])]
    pub stdio: bool,
    /// With --stdio: serve as this and nothing else, for a line in authorized_keys
    ///
    /// `staging` mounts, starts and dumps; `target` receives exports, with a directory only there and below; `server` asks the server.
    #[arg(long, value_names = ["ROLE", "DIR"], num_args = 1..=2, requires = "stdio")]
    pub only: Vec<String>,
    /// Print which build this is
    #[arg(long, hide = true)]
    pub build: bool,
    /// How the result is printed.
    #[command(flatten)]
    pub output: OutputOption,
}

/// `pgthaw retry`.
#[derive(Debug, Args)]
#[command(after_help = "\
It recovers to the same end as before and keeps the databases that are delivered already. A session that is at work is \
followed; one that has succeeded is left alone.

Example:
  pgthaw retry 20261122-101112-kqvd")]
pub struct RetryArguments {
    /// The session's id, as `pgthaw sessions` shows it
    #[arg(value_name = "ID", value_parser = values::name)]
    pub id: String,
    /// Print the session's id and leave it at work
    #[arg(long)]
    pub detach: bool,
    /// How the result is printed.
    #[command(flatten)]
    pub output: OutputOption,
}

/// `pgthaw cancel`.
#[derive(Debug, Args)]
#[command(after_help = "\
Afterwards nothing of the session is left, neither on this machine nor in the target.

Example:
  pgthaw cancel 20261122-101112-kqvd")]
pub struct CancelArguments {
    /// The session's id, as `pgthaw sessions` shows it
    #[arg(value_name = "ID", value_parser = values::name)]
    pub id: String,
    /// How the result is printed.
    #[command(flatten)]
    pub output: OutputOption,
}

/// `pgthaw clean`.
#[derive(Debug, Args)]
#[command(after_help = "\
Only what pgthaw's own sessions of this account have made is removed. It asks before it does; without a terminal it \
needs --yes.

Examples:
  pgthaw clean --dry-run
  pgthaw clean dba@db-stage --dry-run
  pgthaw clean --yes")]
pub struct CleanArguments {
    /// Clean only sessions with a part on this machine, as they name it
    #[arg(value_name = "HOST", value_parser = values::host)]
    pub host: Option<pgthaw_link::Host>,
    /// Only say what would be removed
    #[arg(long)]
    pub dry_run: bool,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
    /// How the result is printed.
    #[command(flatten)]
    pub output: OutputOption,
}

/// `pgthaw serve`.
#[derive(Debug, Args)]
#[command(after_help = "\
For oneself nobody has to run this: each command starts a server in the background when none runs, and that one ends itself \
when it has nothing left to do. This one stays, and listens for others: on `socket` of the configuration's [service], in systemd's \
runtime directory, or as root on /run/pgthaw/server.sock. The configuration names repositories and hosts and says who may ask for what.

Examples:
  pgthaw serve
  PGTHAW_SERVER=ssh://backup1 pgthaw export prod -d crm --to ./monday")]
pub struct ServeArguments {
    /// End when there is nothing left to do
    #[arg(long, hide = true)]
    pub until_idle: bool,
}

/// `pgthaw completions`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pgthaw completions bash > /etc/bash_completion.d/pgthaw
  pgthaw completions zsh > /usr/local/share/zsh/site-functions/_pgthaw
  pgthaw completions fish > ~/.config/fish/completions/pgthaw.fish")]
pub struct CompletionsArguments {
    /// The shell
    #[arg(value_enum, value_name = "SHELL")]
    pub shell: clap_complete::Shell,
}

/// `pgthaw man`.
#[derive(Debug, Args)]
pub struct ManArguments {
    /// Write one page per command into this directory; without it pgthaw's own page is printed
    #[arg(value_name = "DIR", value_parser = values::path, value_hint = ValueHint::DirPath)]
    pub directory: Option<PathBuf>,
}

/// `pgthaw internal`.
#[derive(Debug, Args)]
pub struct InternalArguments {
    /// Which child
    #[arg(value_enum, value_name = "CHILD")]
    pub child: crate::internal::Child,
    /// What it is to do, where its standard input is taken by something else
    #[arg(value_name = "TASK")]
    pub task: Vec<String>,
}

#[cfg(test)]
#[path = "arguments_tests.rs"]
mod tests;
