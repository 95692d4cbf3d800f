//! `globals.sql`: roles and tablespaces of the whole cluster, as the original cluster had them.
//!
//! pg_dumpall prints where the tablespaces are *mounted* and knows our temporary role; [`rewrite`] puts the
//! original locations back and leaves the role out. [`dump`] runs the program.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::process::Stdio;

use rustix::process::Signal;
use tokio::io::AsyncReadExt;

use crate::binaries::Binaries;
use crate::connection::{Endpoint, program_options};
use crate::inspect::literal;
use crate::launch::{Launch, client_view};
use crate::os_user::OsUser;
use crate::root::{Confinement, Streams};

/// The most that pg_dumpall may write, in bytes: a million roles with their settings. Code and roles of a backup decide how much it is.
const MOST_BYTES: u64 = 256 << 20;
/// The most of its messages that is kept, in bytes.
const MOST_WORDS: u64 = 64 << 10;

/// Why there is no `globals.sql`.
#[derive(Debug, thiserror::Error)]
pub enum GlobalsError {
    /// pg_dumpall could not be run.
    #[error("run `pg_dumpall`")]
    Run {
        /// What failed.
        source: std::io::Error,
    },
    /// pg_dumpall failed.
    #[error("pg_dumpall ended with {status}: {said}")]
    Failed {
        /// How it ended.
        status: std::process::ExitStatus,
        /// Its last words.
        said: String,
    },
    /// A name or setting that is no UTF-8.
    #[error("the cluster's roles or tablespaces have names that are not UTF-8")]
    NotUtf8,
    /// A literal or a quoted name without an end.
    #[error("pg_dumpall's output cannot be understood near byte {0}")]
    Unreadable(usize),
    /// A tablespace whose original location nobody knows.
    #[error("the original location of the tablespace \"{0}\" is not known")]
    UnknownTablespace(String),
    /// The mount's path would have been delivered.
    #[error("globals.sql would hold the mount's path `{0}`")]
    MountPathLeft(String),
    /// The temporary role would have been delivered.
    #[error("globals.sql would hold the temporary role \"{0}\"")]
    TemporaryRoleLeft(String),
}

/// What [`dump`] needs.
#[derive(Clone, Debug)]
pub struct GlobalsPlan<'a> {
    /// The programs of the cluster's major version.
    pub binaries: &'a Binaries,
    /// The instance, as a superuser.
    pub endpoint: &'a Endpoint,
    /// A database to connect to.
    pub database: &'a str,
    /// Who runs pg_dumpall; `None` for ourselves.
    pub os_user: Option<&'a OsUser>,
    /// Leave password hashes out (`--no-role-passwords`).
    pub no_role_passwords: bool,
    /// Letters and digits for psql's `\restrict`, for programs that know it; theirs would be random. It guards
    /// against names in the cluster that look like psql commands, so its owner must not be able to guess it.
    pub restrict_key: &'a str,
    /// The session's marker, for the environment.
    pub marker: &'a str,
    /// What walls pg_dumpall in.
    pub confinement: &'a Confinement,
}

/// Runs pg_dumpall and returns what it prints. The text may hold password hashes.
///
/// # Errors
/// [`GlobalsError`] if it cannot be run or fails.
pub async fn dump(plan: &GlobalsPlan<'_>) -> Result<String, GlobalsError> {
    let mut arguments = vec!["--globals-only".to_string(), "--encoding=UTF8".into()];
    if plan.no_role_passwords {
        arguments.push("--no-role-passwords".into());
    }
    if run(plan, &["--help".into()]).await?.contains("--restrict-key") {
        arguments.push(format!("--restrict-key={}", plan.restrict_key));
    }
    arguments.push(format!("--dbname={}", plan.endpoint.connection_string(plan.database)));
    run(plan, &arguments).await
}

async fn run(plan: &GlobalsPlan<'_>, arguments: &[String]) -> Result<String, GlobalsError> {
    let failed = |source| GlobalsError::Run { source };
    let launch = Launch {
        binaries: plan.binaries,
        program: &plan.binaries.pg_dumpall,
        arguments: arguments.iter().map(Into::into).collect(),
        environment: vec![("PGOPTIONS".into(), program_options(plan.endpoint.major).into())],
        directory: Path::new("/"),
        os_user: plan.os_user,
        marker: plan.marker,
        confinement: plan.confinement,
        view: client_view(plan.endpoint, None),
        libraries: Vec::new(),
        isolation: None,
        death_signal: Signal::KILL,
    };
    let streams = Streams { stdout: Stdio::piped(), stderr: Stdio::piped(), ..Streams::null() };
    let mut child = launch.start(streams).map_err(failed)?;
    let (mut text, mut said) = (Vec::new(), Vec::new());
    let mut output = child.take_stdout().map_err(failed)?;
    let mut errors = child.take_stderr().map_err(failed)?;
    let read = async {
        let whole = async {
            let read = (&mut output).take(MOST_BYTES).read_to_end(&mut text).await;
            if text.len() as u64 == MOST_BYTES || read.is_err() {
                child.signal(Signal::KILL);
            }
            read
        };
        let words = async {
            (&mut errors).take(MOST_WORDS).read_to_end(&mut said).await?;
            // what follows is read, so that nobody waits, and forgotten
            tokio::io::copy(&mut errors, &mut tokio::io::sink()).await
        };
        tokio::try_join!(whole, words).map(drop)
    };
    let read = read.await;
    if read.is_err() {
        child.signal(Signal::KILL);
    }
    if text.len() as u64 == MOST_BYTES {
        let _ = child.wait().await; // it was killed
        return Err(failed(std::io::Error::other(format!(
            "it writes more than {} MiB of roles and tablespaces",
            MOST_BYTES >> 20
        ))));
    }
    read.map_err(failed)?;
    let status = child.wait().await.map_err(failed)?;
    if !status.success() {
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        return Err(GlobalsError::Failed { status, said });
    }
    String::from_utf8(text).map_err(|_| GlobalsError::NotUtf8)
}

/// Puts the original locations of the tablespaces back and removes the temporary role.
///
/// `locations` maps a tablespace's name to its original location. Text that is not changed stays byte for
/// byte.
///
/// # Errors
/// [`GlobalsError`] if a location is not known, or `mountpoint` or the role's name would still occur.
pub fn rewrite(
    text: &str,
    locations: &BTreeMap<String, String>,
    mountpoint: &Path,
    temporary_role: Option<&str>,
) -> Result<String, GlobalsError> {
    let mut result = String::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        let statement = statement(text, at)?;
        let whole = &text[at..statement.end];
        match Kind::of(text, &statement.tokens) {
            Kind::Role(name) if Some(name.as_str()) == temporary_role => {
                result.push_str(&text[at..statement.start()]); // comments before it stay
                if whole.ends_with('\n') && !result.is_empty() && !result.ends_with('\n') {
                    result.push('\n');
                }
            }
            Kind::Tablespace { name, location } => {
                let unknown = || GlobalsError::UnknownTablespace(name.clone());
                let value = locations.get(&name).ok_or_else(unknown)?;
                result.push_str(&text[at..location.start]);
                result.push_str(literal(value).trim_start());
                result.push_str(&text[location.end..statement.end]);
            }
            Kind::Role(_) | Kind::Other => result.push_str(whole),
        }
        at = statement.end;
    }
    let mount = mountpoint.display().to_string();
    if !mount.is_empty() && result.contains(&mount) {
        return Err(GlobalsError::MountPathLeft(mount));
    }
    match temporary_role {
        Some(role) if result.contains(role) => Err(GlobalsError::TemporaryRoleLeft(role.into())),
        _ => Ok(result),
    }
}

/// A piece of SQL text.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    /// A key word or a name without quotes.
    Word(Range<usize>),
    /// A quoted name, with its quotes.
    Name(Range<usize>),
    /// A string literal, with quotes and the E before them.
    String(Range<usize>),
    /// Anything else: one character, a comment is left out.
    Other,
}

/// A statement with what follows it up to the end of the line.
struct Statement {
    /// Its tokens, each with its place.
    tokens: Vec<(usize, Token)>,
    end: usize,
}

impl Statement {
    fn start(&self) -> usize {
        self.tokens.first().map_or(self.end, |(start, _)| *start)
    }
}

/// Reads one statement, or one line with a command of psql, that begins at `at`.
fn statement(text: &str, at: usize) -> Result<Statement, GlobalsError> {
    let bytes = text.as_bytes();
    let mut tokens = Vec::new();
    let mut at = at;
    while let Some(&byte) = bytes.get(at) {
        let start = at;
        let token = match byte {
            b if b.is_ascii_whitespace() => {
                at += 1;
                continue;
            }
            b'-' if bytes[at..].starts_with(b"--") => {
                at = line_end(bytes, at);
                continue;
            }
            b'\\' if tokens.is_empty() => {
                return Ok(Statement { tokens, end: line_end(bytes, at) });
            }
            b';' => {
                at += 1;
                let rest_of_line = line_end(bytes, at);
                let blank = bytes[at..rest_of_line].iter().all(u8::is_ascii_whitespace);
                return Ok(Statement { tokens, end: if blank { rest_of_line } else { at } });
            }
            b'"' => {
                at = quoted_end(bytes, at, b'"', false).ok_or(GlobalsError::Unreadable(start))?;
                Token::Name(start..at)
            }
            b'\'' => {
                at = quoted_end(bytes, at, b'\'', false).ok_or(GlobalsError::Unreadable(start))?;
                Token::String(start..at)
            }
            b'E' | b'e' if bytes.get(at + 1) == Some(&b'\'') => {
                let end = quoted_end(bytes, at + 1, b'\'', true);
                at = end.ok_or(GlobalsError::Unreadable(start))?;
                Token::String(start..at)
            }
            b if is_word(b) => {
                while bytes.get(at).copied().is_some_and(is_word) {
                    at += 1;
                }
                Token::Word(start..at)
            }
            _ => {
                at += 1;
                Token::Other
            }
        };
        tokens.push((start, token));
    }
    Ok(Statement { tokens, end: bytes.len() })
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$') || byte >= 0x80
}

/// Returns the place after the line that holds `at`.
fn line_end(bytes: &[u8], at: usize) -> usize {
    let rest = bytes.get(at..).unwrap_or_default();
    rest.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |length| at + length + 1)
}

/// Returns the place after a quoted piece that begins at `at`; `None` without an end.
fn quoted_end(bytes: &[u8], at: usize, quote: u8, backslashes: bool) -> Option<usize> {
    let mut at = at + 1;
    loop {
        match *bytes.get(at)? {
            b'\\' if backslashes => at += 2,
            byte if byte == quote && bytes.get(at + 1) == Some(&quote) => at += 2,
            byte if byte == quote => return Some(at + 1),
            _ => at += 1,
        }
    }
}

/// What a statement is, as far as it matters here.
enum Kind {
    /// `CREATE`, `ALTER` or `COMMENT ON ROLE`: the role's name.
    Role(String),
    /// `CREATE TABLESPACE` with a location that is not inside the data directory.
    Tablespace {
        name: String,
        location: Range<usize>,
    },
    Other,
}

impl Kind {
    fn of(text: &str, tokens: &[(usize, Token)]) -> Self {
        let word = |index: usize| match tokens.get(index) {
            Some((_, Token::Word(range))) => text[range.clone()].to_ascii_uppercase(),
            _ => String::new(),
        };
        let name = |index: usize| match tokens.get(index) {
            Some((_, Token::Word(range))) => Some(text[range.clone()].to_ascii_lowercase()),
            Some((_, Token::Name(range))) => {
                Some(text[range.start + 1..range.end - 1].replace("\"\"", "\""))
            }
            _ => None,
        };
        match (word(0).as_str(), word(1).as_str()) {
            ("CREATE" | "ALTER", "ROLE") => name(2).map_or(Self::Other, Self::Role),
            ("COMMENT", "ON") if word(2) == "ROLE" => name(3).map_or(Self::Other, Self::Role),
            ("CREATE", "TABLESPACE") => {
                let location = (3..tokens.len()).find(|at| word(*at) == "LOCATION");
                match (name(2), location.and_then(|at| tokens.get(at + 1))) {
                    // an empty location: PostgreSQL's own directory (allow_in_place_tablespaces)
                    (Some(name), Some((_, Token::String(range))))
                        if &text[range.clone()] != "''" =>
                    {
                        Self::Tablespace { name, location: range.clone() }
                    }
                    _ => Self::Other,
                }
            }
            _ => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MOUNT: &str = "/run/media/pgthaw/s1";

    fn locations(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, location)| (name.to_string(), location.to_string())).collect()
    }

    fn put_back(text: &str) -> Result<String, GlobalsError> {
        let known = locations(&[
            ("fast", "/srv/fast"),
            ("odd \"one", "/srv/o'dd"),
            ("back", r"C:\data"),
            ("Upper", "/srv/upper"),
        ]);
        rewrite(text, &known, Path::new(MOUNT), Some("pgthaw_ab12"))
    }

    #[test]
    fn locations_are_put_back() {
        let cases = [
            (
                "CREATE TABLESPACE fast OWNER postgres LOCATION '/run/media/pgthaw/s1/tablespaces/16385';\n",
                "CREATE TABLESPACE fast OWNER postgres LOCATION '/srv/fast';\n",
            ),
            (
                "CREATE TABLESPACE \"odd \"\"one\" OWNER \"LOCATION\" LOCATION '/run/media/pgthaw/s1/tablespaces/1';\n",
                "CREATE TABLESPACE \"odd \"\"one\" OWNER \"LOCATION\" LOCATION '/srv/o''dd';\n",
            ),
            (
                "CREATE TABLESPACE back OWNER x LOCATION E'/run/media\\\\pgthaw\\'/s1';\n",
                "CREATE TABLESPACE back OWNER x LOCATION E'C:\\\\data';\n",
            ),
            (
                "CREATE TABLESPACE inplace OWNER x LOCATION '';\n",
                "CREATE TABLESPACE inplace OWNER x LOCATION '';\n",
            ),
            (
                "COMMENT ON ROLE a IS 'CREATE TABLESPACE fast OWNER x LOCATION ''/x'';\n';\n",
                "COMMENT ON ROLE a IS 'CREATE TABLESPACE fast OWNER x LOCATION ''/x'';\n';\n",
            ),
            (
                "-- it's a comment; CREATE TABLESPACE\n\nSET a = 'b';\n",
                "-- it's a comment; CREATE TABLESPACE\n\nSET a = 'b';\n",
            ),
            (
                "\\restrict a'b\n\nSET x = 1;\n\\unrestrict a'b\n",
                "\\restrict a'b\n\nSET x = 1;\n\\unrestrict a'b\n",
            ),
            ("", ""),
            ("SELECT 1", "SELECT 1"),
        ];
        for (text, want) in cases {
            assert_eq!(put_back(text).unwrap(), want);
        }
    }

    #[test]
    fn the_temporary_role_is_left_out() {
        let text = "\
-- Roles
--

CREATE ROLE app;
ALTER ROLE app WITH LOGIN;
CREATE ROLE pgthaw_ab12;
ALTER ROLE pgthaw_ab12 WITH SUPERUSER INHERIT LOGIN;
COMMENT ON ROLE app IS 'x';
CREATE ROLE postgres;
";
        let want = "\
-- Roles
--

CREATE ROLE app;
ALTER ROLE app WITH LOGIN;
COMMENT ON ROLE app IS 'x';
CREATE ROLE postgres;
";
        assert_eq!(put_back(text).unwrap(), want);
        let first = "--\n-- Roles\n--\n\nCREATE ROLE \"pgthaw_ab12\";\nCREATE ROLE app;\n";
        assert_eq!(put_back(first).unwrap(), "--\n-- Roles\n--\n\nCREATE ROLE app;\n");
    }

    #[test]
    fn what_would_tell_of_us_is_an_error() {
        let cases = [
            (
                "CREATE TABLESPACE other OWNER x LOCATION '/run/media/pgthaw/s1/tablespaces/2';\n",
                "other",
            ),
            ("ALTER TABLESPACE fast SET (x = '/run/media/pgthaw/s1/y');\n", MOUNT),
            ("-- /run/media/pgthaw/s1\n", MOUNT),
            ("GRANT app TO pgthaw_ab12;\n", "pgthaw_ab12"),
            ("SET a = 'x\n", "near byte 8"),
            ("SET a = E'x\\'\n", "near byte 8"),
            ("SET \"a\n", "near byte 4"),
            ("SET a = E'\\", "near byte 8"),
        ];
        for (text, named) in cases {
            let error = put_back(text).unwrap_err();
            assert!(error.to_string().contains(named), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn other_text_stays_as_it_is(text in "([a-zA-Z;\n ]|'[a-z'' ]{0,5}'|\"[a-z ]{0,5}\"|--[a-z']{0,5}\n|E'(\\\\.|[a-z]){0,4}'|é){0,40}") {
            if let Ok(same) = rewrite(&text, &BTreeMap::new(), Path::new(MOUNT), None) {
                prop_assert_eq!(same, text);
            }
        }

        #[test]
        fn any_location_comes_back(location in "[ -~é\n]{1,30}") {
            let text = "CREATE TABLESPACE t OWNER x LOCATION '/old';\nCREATE TABLESPACE t OWNER x LOCATION '/old';\n";
            let done = rewrite(text, &locations(&[("t", &location)]), Path::new(MOUNT), None).unwrap();
            let again = rewrite(&done, &locations(&[("t", "/old")]), Path::new(MOUNT), None).unwrap();
            prop_assert_eq!(again, text, "{}", done);
        }
    }
}
