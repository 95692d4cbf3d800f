//! Connections to an instance over its Unix socket.
//!
//! A role's or database's own settings beat the server's configuration and command line; what a client
//! sends when it connects beats them. So every connection, pg_dump's too, sends [`session_options`].

use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use rustix::fs::{FileType, Mode, OFlags};
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio_postgres::error::DbError;
use tokio_postgres::{Client, NoTls};

use crate::process::ProcessId;
use crate::version::Major;

/// What each connection sets for itself: name, value, first major that knows it.
const SESSION: [(&str, &str, u32); 16] = [
    ("session_preload_libraries", "", 0),
    ("local_preload_libraries", "", 0),
    ("zero_damaged_pages", "off", 0),
    ("ignore_checksum_failure", "off", 0),
    ("ignore_system_indexes", "off", 0),
    ("default_transaction_read_only", "off", 0),
    ("role", "none", 0),
    ("row_security", "off", 0),
    ("statement_timeout", "0", 0),
    ("lock_timeout", "0", 0),
    ("idle_in_transaction_session_timeout", "0", 0),
    ("search_path", "", 0),
    ("log_statement", "none", 0),
    ("idle_session_timeout", "0", 14),
    ("transaction_timeout", "0", 17),
    ("event_triggers", "off", 17),
];

/// Returns the `options` of our own connections.
pub fn session_options(major: Major) -> String {
    options(major, |_| true)
}

/// Returns the `PGOPTIONS` of pg_dump and pg_dumpall.
///
/// They set `search_path` themselves, but for one moment: patterns such as `-t orders` are looked up with the
/// path the role and database have, so they mean what they would mean on the original cluster.
pub fn program_options(major: Major) -> String {
    options(major, |name| name != "search_path")
}

fn options(major: Major, wanted: impl Fn(&str) -> bool) -> String {
    let known = SESSION.iter().filter(|(name, _, since)| *since <= major.number() && wanted(name));
    known.map(|(name, value, _)| format!("-c {name}={value}")).collect::<Vec<_>>().join(" ")
}

/// Where an instance answers, and as whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The directory of the socket.
    pub socket_directory: PathBuf,
    /// The number in the socket's name.
    pub port: u16,
    /// The role.
    pub user: String,
    /// The server's major version.
    pub major: Major,
    /// The postmaster that we started, and its account's number: nobody else is talked to. None if it is not known.
    pub server: Option<(ProcessId, u32)>,
}

/// A connection or a query that failed.
#[derive(Debug, thiserror::Error)]
#[error("{purpose}: {}", cause.words())]
pub struct SqlError {
    /// What was asked for: "list the databases".
    pub purpose: String,
    /// Why it was not answered.
    pub cause: SqlCause,
}

/// Why a query was not answered.
#[derive(Debug)]
pub enum SqlCause {
    /// The server's or the client's error.
    Sql(tokio_postgres::Error),
    /// The socket.
    Socket(io::Error),
    /// Another process than the server that we started answers there.
    Stranger(String),
}

impl SqlCause {
    fn words(&self) -> String {
        match self {
            Self::Sql(error) => words(error),
            Self::Socket(error) => error.to_string(),
            Self::Stranger(what) => what.clone(),
        }
    }
}

impl SqlError {
    /// Returns the server's own error, if the server answered at all.
    pub fn server(&self) -> Option<&DbError> {
        match &self.cause {
            SqlCause::Sql(error) => error.as_db_error(),
            SqlCause::Socket(_) | SqlCause::Stranger(_) => None,
        }
    }

    /// Returns the server's SQLSTATE, if the server answered at all.
    pub fn code(&self) -> Option<&str> {
        self.server().map(|error| error.code().code())
    }
}

/// Returns the server's own words, or else the client's with their cause.
fn words(error: &tokio_postgres::Error) -> String {
    use std::error::Error;
    match (error.as_db_error(), error.source()) {
        (Some(server), _) => match server.detail() {
            Some(detail) => format!("{}: {} ({detail})", server.severity(), server.message()),
            None => format!("{}: {}", server.severity(), server.message()),
        },
        (None, Some(source)) => format!("{error}: {source}"),
        (None, None) => error.to_string(),
    }
}

/// Turns a client error into a [`SqlError`] with the query's purpose.
pub(crate) fn failed(purpose: impl Into<String>) -> impl FnOnce(tokio_postgres::Error) -> SqlError {
    move |error| SqlError { purpose: purpose.into(), cause: SqlCause::Sql(error) }
}

impl Endpoint {
    /// Connects to a database. The connection ends when the client is dropped.
    ///
    /// # Errors
    /// [`SqlError`] if there is no server or it refuses.
    pub async fn connect(&self, database: &str) -> Result<Client, SqlError> {
        let mut config = tokio_postgres::Config::new();
        config
            .user(&self.user)
            .dbname(database)
            .application_name("pgthaw")
            .options(session_options(self.major));
        let purpose = format!("connect to the database \"{database}\" as \"{}\"", self.user);
        let stream = match self.reach().await {
            Ok(stream) => stream,
            Err(cause) => return Err(SqlError { purpose, cause }),
        };
        let connected = config.connect_raw(stream, NoTls).await;
        let (client, connection) = connected.map_err(failed(purpose))?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("a connection to the instance ended: {error}");
            }
        });
        Ok(client)
    }

    /// Reaches the socket, and makes sure before the first byte that it is the server's that we started: code in a backup can
    /// put a link to another server's socket, or a socket of its own, in the place of the instance's.
    async fn reach(&self) -> Result<UnixStream, SqlCause> {
        let path = self.socket_directory.join(format!(".s.PGSQL.{}", self.port));
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let socket = rustix::fs::open(&path, flags, Mode::empty());
        let socket = socket.map_err(|errno| SqlCause::Socket(errno.into()))?;
        let kind = rustix::fs::fstat(&socket).map(|stat| FileType::from_raw_mode(stat.st_mode));
        if kind != Ok(FileType::Socket) {
            let what = format!("`{}` is not the socket that PostgreSQL made", path.display());
            return Err(SqlCause::Stranger(what));
        }
        // by its descriptor: what has the name by now may be another
        let stream = UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await;
        let stream = stream.map_err(SqlCause::Socket)?;
        let Some((server, uid)) = self.server else { return Ok(stream) };
        // who called listen(2), in our own process namespace (unix(7), SO_PEERCRED)
        let peer = stream.peer_cred().map_err(SqlCause::Socket)?;
        let pid = peer.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
        if peer.uid() == uid && pid == server.pid && server.is_alive() {
            return Ok(stream);
        }
        Err(SqlCause::Stranger(format!(
            "process {pid} of user {} answers at `{}`, and not the server, process {} of user {uid}",
            peer.uid(),
            path.display(),
            server.pid
        )))
    }

    /// Returns a connection string for PostgreSQL's own programs, such as pg_dump's `--dbname`.
    ///
    /// Every value is quoted, so no name can be taken for an option or another parameter.
    pub fn connection_string(&self, database: &str) -> String {
        let directory = self.socket_directory.display().to_string();
        format!(
            "host={} port={} user={} dbname={}",
            quoted(&directory),
            self.port,
            quoted(&self.user),
            quoted(database)
        )
    }
}

/// Quotes a value of a connection string (PostgreSQL manual, "Keyword/Value Connection Strings").
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_major_gets_the_options_it_knows() {
        for (major, without, with) in [
            (12, "idle_session_timeout", "row_security=off"),
            (14, "event_triggers", "idle_session_timeout=0"),
            (16, "transaction_timeout", "role=none"),
            (17, "nothing", "event_triggers=off"),
        ] {
            let options = session_options(Major::try_from(major).unwrap());
            assert!(!options.contains(without), "{major}: {options}");
            assert!(options.contains(with), "{major}: {options}");
            assert!(options.contains("-c session_preload_libraries= -c"), "{options}");
            assert!(options.contains("search_path="), "{options}");
            assert!(!program_options(Major::OLDEST).contains("search_path"), "patterns need it");
        }
    }

    #[test]
    fn a_connection_string_holds_any_name() {
        let endpoint = Endpoint {
            socket_directory: "/a b/c'd".into(),
            port: 5432,
            user: "o'\\x".into(),
            major: Major::OLDEST,
            server: None,
        };
        let text = endpoint.connection_string("--host=evil user=x");
        assert_eq!(text, r"host='/a b/c\'d' port=5432 user='o\'\\x' dbname='--host=evil user=x'");
    }
}
