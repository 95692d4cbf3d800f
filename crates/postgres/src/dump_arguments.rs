//! pg_dump's command line: what we put there, and what a user may add (`-- PG_DUMP_ARG…`).
//!
//! [`arguments`] is pure. [`validate_user_arguments`] reads the user's part as `getopt_long` does
//! (abbreviated long options, clustered short ones, separate values) and refuses what would change where
//! the dump goes, its format or the connection, and what would bring rows that are not in the backup.
//!
//! [`OPTIONS`] judges every option; one that is not in it is refused, so that an option of a future pg_dump is not
//! passed on before somebody has judged it. `tests/real_pg_dump.rs` compares the table with each pg_dump installed here.

use std::ffi::OsString;

use crate::dump::DumpPlan;
use crate::version::Major;

/// An argument or a compression that cannot be passed on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentError {
    /// pgthaw decides about that itself.
    #[error("pg_dump's option {option} cannot be passed on: {why}")]
    Refused {
        /// The option, in full.
        option: String,
        /// Why, or what to use instead.
        why: &'static str,
    },
    /// Not an option of any pg_dump whose options are judged here.
    #[error(
        "`{0}` is not an option of pg_dump 12 to 18; pgthaw passes on only options that it knows"
    )]
    Unknown(String),
    /// An abbreviation of several options.
    #[error("`{given}` may stand for several options of pg_dump: {}", candidates.join(", "))]
    Ambiguous {
        /// What was given.
        given: String,
        /// What it may stand for.
        candidates: Vec<String>,
    },
    /// An option that takes a value stands last.
    #[error("pg_dump's option {0} needs a value")]
    NoValue(String),
    /// An option that takes no value got one.
    #[error("pg_dump's option {0} takes no value")]
    UnwantedValue(String),
    /// A word that belongs to no option: pg_dump would take it for a database.
    #[error("`{0}` belongs to no option; databases are chosen with -d")]
    Positional(String),
    /// A compression that this pg_dump does not know.
    #[error(
        "pg_dump {major} cannot compress with `{value}`: it knows gzip only (`gzip:LEVEL`, 0 to 9, `none`)"
    )]
    OldCompression {
        /// The value of `-Z`.
        value: String,
        /// The program's version.
        major: Major,
    },
    /// No compression at all.
    #[error("`{0}` is no compression: METHOD[:LEVEL] with gzip, lz4, zstd or none, or 0 to 9")]
    BadCompression(String),
}

impl ArgumentError {
    /// Returns what the operator can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::OldCompression { .. } => {
                Some("lz4 and zstd need pg_dump 16 or newer; compress the delivered files yourself")
            }
            Self::Unknown(_) => Some("see `pg_dump --help` of the backup's major version"),
            _ => None,
        }
    }
}

/// What to do with an option of pg_dump.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rule {
    Allow,
    Refuse(&'static str),
}

use Rule::{Allow, Refuse};

const OUTPUT: Rule = Refuse("pgthaw decides where the dump goes (--to, --dump-dir)");
const FORMAT: Rule = Refuse("pgthaw always dumps in the directory format");
const CONNECTION: Rule = Refuse("pgthaw connects to its own instance");
const JOBS: Rule = Refuse("use pgthaw's own -j");
const COMPRESS: Rule = Refuse("use pgthaw's own -Z");
const NO_DUMP: Rule = Refuse("it ends pg_dump without a dump");
const LOCKS: Rule = Refuse("pgthaw sets it itself");
const UPGRADE: Rule = Refuse("its output is for pg_upgrade only");
const SNAPSHOT: Rule = Refuse("the instance has no snapshots of others");
const PLAIN: Rule = Refuse("it is for the plain format only");
const FOREIGN_DATA: Rule = Refuse("it dumps rows of a live foreign server, not of the backup");
const FILTER: Rule = Refuse(
    "its file can ask for rows of a live foreign server, and is read on the machine where pg_dump runs; \
     use -n, -t, -T and --exclude-table-data",
);

/// An option: its long name, its letter, whether it takes a value, what to do with it.
struct Known(&'static str, Option<char>, bool, Rule);

/// Every option of pg_dump 12 to 18 (`long_options` in `src/bin/pg_dump/pg_dump.c`), the undocumented ones too.
#[rustfmt::skip]
const OPTIONS: &[Known] = &[
    Known("file", Some('f'), true, OUTPUT),
    Known("format", Some('F'), true, FORMAT),
    Known("jobs", Some('j'), true, JOBS),
    Known("verbose", Some('v'), false, Allow),
    Known("version", Some('V'), false, NO_DUMP),
    Known("compress", Some('Z'), true, COMPRESS),
    Known("lock-wait-timeout", None, true, LOCKS),
    Known("no-sync", None, false, Allow),
    Known("sync-method", None, true, Allow),
    Known("help", Some('?'), false, NO_DUMP),
    Known("data-only", Some('a'), false, Allow),
    Known("large-objects", Some('b'), false, Allow),
    Known("blobs", None, false, Allow),
    Known("no-large-objects", Some('B'), false, Allow),
    Known("no-blobs", None, false, Allow),
    Known("clean", Some('c'), false, Allow),
    Known("create", Some('C'), false, Allow),
    Known("extension", Some('e'), true, Allow),
    Known("encoding", Some('E'), true, Allow),
    Known("schema", Some('n'), true, Allow),
    Known("exclude-schema", Some('N'), true, Allow),
    Known("no-owner", Some('O'), false, Allow),
    Known("no-reconnect", Some('R'), false, Allow),
    Known("schema-only", Some('s'), false, Allow),
    Known("superuser", Some('S'), true, Allow),
    Known("table", Some('t'), true, Allow),
    Known("exclude-table", Some('T'), true, Allow),
    Known("no-privileges", Some('x'), false, Allow),
    Known("no-acl", None, false, Allow),
    Known("binary-upgrade", None, false, UPGRADE),
    Known("attribute-inserts", None, false, Allow),
    Known("column-inserts", None, false, Allow),
    Known("disable-dollar-quoting", None, false, Allow),
    Known("disable-triggers", None, false, Allow),
    Known("enable-row-security", None, false, Allow),
    Known("exclude-extension", None, true, Allow),
    Known("exclude-table-and-children", None, true, Allow),
    Known("exclude-table-data", None, true, Allow),
    Known("exclude-table-data-and-children", None, true, Allow),
    Known("extra-float-digits", None, true, Allow),
    Known("filter", None, true, FILTER),
    Known("if-exists", None, false, Allow),
    Known("include-foreign-data", None, true, FOREIGN_DATA),
    Known("inserts", None, false, Allow),
    Known("load-via-partition-root", None, false, Allow),
    Known("no-comments", None, false, Allow),
    Known("no-data", None, false, Allow),
    Known("no-policies", None, false, Allow),
    Known("no-publications", None, false, Allow),
    Known("no-schema", None, false, Allow),
    Known("no-security-labels", None, false, Allow),
    Known("no-statistics", None, false, Allow),
    Known("no-subscriptions", None, false, Allow),
    Known("no-synchronized-snapshots", None, false, SNAPSHOT),
    Known("no-table-access-method", None, false, Allow),
    Known("no-tablespaces", None, false, Allow),
    Known("no-toast-compression", None, false, Allow),
    Known("no-unlogged-table-data", None, false, Allow),
    Known("on-conflict-do-nothing", None, false, Allow),
    Known("quote-all-identifiers", None, false, Allow),
    Known("restrict-key", None, true, PLAIN),
    Known("rows-per-insert", None, true, Allow),
    Known("section", None, true, Allow),
    Known("sequence-data", None, false, Allow),
    Known("serializable-deferrable", None, false, Allow),
    Known("snapshot", None, true, SNAPSHOT),
    Known("statistics", None, false, Allow),
    Known("statistics-only", None, false, Allow),
    Known("strict-names", None, false, Allow),
    Known("table-and-children", None, true, Allow),
    Known("use-set-session-authorization", None, false, Allow),
    Known("with-statistics", None, false, Allow),
    Known("dbname", Some('d'), true, Refuse("databases are chosen with pgthaw's own -d")),
    Known("host", Some('h'), true, CONNECTION),
    Known("port", Some('p'), true, CONNECTION),
    Known("username", Some('U'), true, CONNECTION),
    Known("no-password", Some('w'), false, CONNECTION),
    Known("password", Some('W'), false, CONNECTION),
    Known("role", None, true, Allow),
];

/// Checks what a user wants to pass on to pg_dump.
///
/// # Errors
/// [`ArgumentError`] names the first argument that cannot be passed on.
pub fn validate_user_arguments(arguments: &[String]) -> Result<(), ArgumentError> {
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        if word == "--" || word == "-" || !word.starts_with('-') {
            return Err(ArgumentError::Positional(word.clone()));
        }
        let takes_next = match word.strip_prefix("--") {
            Some(long) => long_option(long)?,
            None => short_options(&word[1..])?,
        };
        if let Some(option) = takes_next
            && words.next().is_none()
        {
            return Err(ArgumentError::NoValue(option));
        }
    }
    Ok(())
}

/// Checks `name` or `name=value`; returns the option if the next word is its value.
fn long_option(text: &str) -> Result<Option<String>, ArgumentError> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (text, None),
    };
    let known = find_long(name)?;
    let option = format!("--{}", known.0);
    match (known.3, known.2, value) {
        (Refuse(why), ..) => Err(ArgumentError::Refused { option, why }),
        (Allow, false, Some(_)) => Err(ArgumentError::UnwantedValue(option)),
        (Allow, true, None) => Ok(Some(option)),
        (Allow, ..) => Ok(None),
    }
}

/// Finds the option that `name` stands for, in full or abbreviated.
fn find_long(name: &str) -> Result<&'static Known, ArgumentError> {
    let exact = OPTIONS.iter().find(|known| known.0 == name);
    let beginning: Vec<&Known> = OPTIONS.iter().filter(|known| known.0.starts_with(name)).collect();
    match (exact, beginning.as_slice()) {
        (Some(known), _) => Ok(known),
        (None, [known]) => Ok(known),
        (None, []) => Err(ArgumentError::Unknown(format!("--{name}"))),
        (None, several) => {
            let candidates = several.iter().map(|known| format!("--{}", known.0)).collect();
            Err(ArgumentError::Ambiguous { given: format!("--{name}"), candidates })
        }
    }
}

/// An option of pg_dump that was given, in whatever form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    /// Its long name, without the dashes.
    pub name: &'static str,
    /// Its value, if it takes one.
    pub value: Option<String>,
}

/// Returns what valid `arguments` say: one entry for each option, also for those that stand together behind one `-`.
pub fn given_options(arguments: &[String]) -> Vec<Given> {
    let mut given = Vec::new();
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        if let Some(long) = word.strip_prefix("--") {
            let (name, value) = match long.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (long, None),
            };
            let Ok(known) = find_long(name) else { continue };
            let value = if known.2 { value.or_else(|| words.next().cloned()) } else { None };
            given.push(Given { name: known.0, value });
            continue;
        }
        let mut letters = word.strip_prefix('-').unwrap_or_default().chars();
        while let Some(letter) = letters.next() {
            let known = OPTIONS.iter().find(|known| known.1 == Some(letter));
            let Some(known) = known else { break };
            let rest = letters.as_str();
            let value = match (known.2, rest.is_empty()) {
                (false, _) => None,
                (true, true) => words.next().cloned(),
                (true, false) => Some(rest.to_owned()),
            };
            given.push(Given { name: known.0, value });
            if known.2 {
                break;
            }
        }
    }
    given
}

/// Returns valid `arguments` with every long option in full. What stands for one option here may stand for another in a
/// newer pg_dump, which would get it unjudged.
fn unabbreviated(arguments: &[String]) -> Vec<OsString> {
    let mut full = Vec::new();
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let (name, value) = match word.split_once('=') {
            Some((name, value)) => (name, format!("={value}")),
            None => (word.as_str(), String::new()),
        };
        let known = name.strip_prefix("--").and_then(|name| find_long(name).ok());
        full.push(
            known.map_or_else(|| word.into(), |known| format!("--{}{value}", known.0).into()),
        );
        let takes_next = match known {
            Some(known) => known.2 && value.is_empty(),
            None => matches!(short_options(&word[1..]), Ok(Some(_))),
        };
        if takes_next {
            full.extend(words.next().map(OsString::from));
        }
    }
    full
}

/// Checks the letters behind one `-`; returns the option if the next word is its value.
fn short_options(letters: &str) -> Result<Option<String>, ArgumentError> {
    let mut rest = letters.chars();
    while let Some(letter) = rest.next() {
        let option = format!("-{letter}");
        let known = OPTIONS.iter().find(|known| known.1 == Some(letter));
        match known.map(|known| (known.3, known.2)) {
            None => return Err(ArgumentError::Unknown(option)),
            Some((Refuse(why), _)) => return Err(ArgumentError::Refused { option, why }),
            Some((Allow, true)) => return Ok(rest.as_str().is_empty().then_some(option)),
            Some((Allow, false)) => {}
        }
    }
    Ok(None)
}

/// Returns pg_dump's arguments.
///
/// # Errors
/// [`ArgumentError`] if the user's part or the compression cannot be passed on.
pub fn arguments(plan: &DumpPlan) -> Result<Vec<OsString>, ArgumentError> {
    validate_user_arguments(&plan.arguments)?;
    let mut arguments: Vec<OsString> = vec!["--format=directory".into()];
    let mut output = OsString::from("--file=");
    output.push(&plan.output);
    arguments.push(output);
    arguments.push(format!("--jobs={}", plan.jobs.max(1)).into());
    arguments.extend(["--no-sync".into(), "--verbose".into(), "--no-password".into()]);
    let milliseconds = plan.lock_wait_timeout.as_millis().clamp(1, i32::MAX as u128);
    arguments.push(format!("--lock-wait-timeout={milliseconds}").into());
    if let Some(value) = &plan.compress {
        let value = compression(value, plan.binaries.major)?;
        arguments.push(format!("--compress={value}").into());
    }
    if let Some(encoding) = &plan.encoding {
        arguments.push(format!("--encoding={encoding}").into());
    }
    arguments.extend(unabbreviated(&plan.arguments)); // a later --encoding wins
    let connection = plan.endpoint.connection_string(&plan.database);
    arguments.push(format!("--dbname={connection}").into());
    Ok(arguments)
}

/// Returns the value of `-Z` as this major's pg_dump takes it.
fn compression(value: &str, major: Major) -> Result<String, ArgumentError> {
    let bad = || ArgumentError::BadCompression(value.into());
    let (method, detail) = match value.split_once(':') {
        Some((method, detail)) => (method, Some(detail)),
        None => (value, None),
    };
    let level = |text: &str| text.parse::<u8>().ok().filter(|level| *level <= 9).ok_or_else(bad);
    if method.bytes().all(|byte| byte.is_ascii_digit()) && detail.is_none() {
        return level(method).map(|level| level.to_string());
    }
    if !["none", "gzip", "lz4", "zstd"].contains(&method) || detail == Some("") {
        return Err(bad());
    }
    if major.number() >= 16 {
        return Ok(value.into());
    }
    match (method, detail) {
        ("none", None) => Ok("0".into()),
        ("gzip", None) => Ok("6".into()),
        ("gzip", Some(detail)) => {
            level(detail.strip_prefix("level=").unwrap_or(detail)).map(|level| level.to_string())
        }
        _ => Err(ArgumentError::OldCompression { value: value.into(), major }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::binaries::Binaries;
    use crate::connection::Endpoint;
    use proptest::prelude::*;
    use std::path::PathBuf;
    use std::time::Duration;

    fn check(words: &[&str]) -> Result<(), ArgumentError> {
        validate_user_arguments(&words.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn options_are_told_by_their_full_names() {
        let words = ["-Oat", "a b", "--sect", "data", "--no-blobs", "-nx", "--table=y=z", "-B"];
        let given = given_options(&words.map(String::from));
        let given: Vec<_> =
            given.iter().map(|given| (given.name, given.value.as_deref().unwrap_or("-"))).collect();
        let want = [
            ("no-owner", "-"),
            ("data-only", "-"),
            ("table", "a b"),
            ("section", "data"),
            ("no-blobs", "-"),
            ("schema", "x"),
            ("table", "y=z"),
            ("no-large-objects", "-"),
        ];
        assert_eq!(given, want);
    }

    #[test]
    fn what_may_be_passed_on() {
        for words in [
            &[][..],
            &["-t", "orders"],
            &["-torders"],
            &["-t", "-f"], // the value of -t, as getopt takes it
            &["--table", "--file=x"],
            &["--table=a b", "-n", "public"],
            &["-Ox", "-cC"],
            &["-Oxt", "orders"],
            &["-Oxtf"], // -O -x -t f
            &["--schema", "x"],
            &["--schema-only"],
            &["--no-pub"],
            &["--exclude-table-data=x", "--inserts", "--rows-per-insert=10"],
            &["-E", "LATIN1"],
            &["-vv"],
        ] {
            assert_eq!(check(words), Ok(()), "{words:?}");
        }
    }

    #[test]
    fn what_would_change_output_format_connection_or_source_is_refused() {
        for words in [
            &["-f", "x"][..],
            &["-fx"],
            &["-Of", "x"],
            &["-Oxf/etc/passwd"],
            &["--file=x"],
            &["--file", "x"],
            &["-Fc"],
            &["-F", "c"],
            &["--form=c"],
            &["-h", "example.org"],
            &["-vhexample.org"],
            &["--host=x"],
            &["--ho=x"],
            &["-p1"],
            &["--port=1"],
            &["-Ux"],
            &["--user=x"],
            &["-d", "host=x"],
            &["--dbname=x"],
            &["--db", "x"],
            &["-W"],
            &["-w"],
            &["--passw"],
            &["-j9"],
            &["--jo=3"],
            &["-Z9"],
            &["--compress=lz4"],
            &["--lock-wait-timeout=1"],
            &["--help"],
            &["-?"],
            &["-V"],
            &["--version"],
            &["--snapshot=x"],
            &["--binary-upgrade"],
            &["-t", "a", "--file=x"],
            &["--include-foreign-data=*"],
            &["--include-foreign-data", "live"],
            &["--include-f=*"],
            &["--inc", "*"],
            &["--filter=x"],
            &["--filter", "-"],
            &["--filt", "x"],
            &["-O", "--filte=/etc/passwd"],
        ] {
            assert!(
                matches!(check(words), Err(ArgumentError::Refused { .. })),
                "{words:?}: {:?}",
                check(words)
            );
        }
        for words in [&["mydb"][..], &["--", "x"], &["-"], &[""], &["-O", "x"], &["-t", "a", "b"]] {
            assert!(matches!(check(words), Err(ArgumentError::Positional(_))), "{words:?}");
        }
        for words in
            [&["--f"][..], &["--fil", "x"], &["--no-p"], &["--exclude-table-d"], &["--sch"]]
        {
            let result = check(words);
            let wanted = matches!(result, Err(ArgumentError::Ambiguous { .. }));
            assert!(wanted, "{words:?}: {result:?}");
        }
        assert!(matches!(check(&["--nothing"]), Err(ArgumentError::Unknown(_))));
        assert!(matches!(check(&["-y"]), Err(ArgumentError::Unknown(_))));
        assert!(matches!(check(&["-t"]), Err(ArgumentError::NoValue(_))));
        assert!(matches!(check(&["--table"]), Err(ArgumentError::NoValue(_))));
        assert!(matches!(check(&["--inserts=1"]), Err(ArgumentError::UnwantedValue(_))));
    }

    #[test]
    fn a_refusal_names_the_option_and_the_reason() {
        let said = |words: &[&str]| check(words).unwrap_err().to_string();
        assert_eq!(
            said(&["--include-f=*"]),
            "pg_dump's option --include-foreign-data cannot be passed on: it dumps rows of a live foreign server, not of the backup"
        );
        let filter = said(&["--filt", "x"]);
        assert!(
            filter.contains("--filter cannot") && filter.contains("live foreign server"),
            "{filter}"
        );
        assert!(said(&["--of-pg-dump-99"]).starts_with("`--of-pg-dump-99` is not an option"));
    }

    #[test]
    fn long_options_are_passed_on_in_full() {
        let given =
            ["-Ot", "--sch", "--exclude-e=x", "--exclude-table-data=a=b", "--sect", "--inser"];
        let given = [&given[..], &["--role", "--sect"], &["-vv"]].concat();
        // The word after `-t`, `--section` and `--role` is a value, whatever it looks like.
        let want = [
            "-Ot",
            "--sch",
            "--exclude-extension=x",
            "--exclude-table-data=a=b",
            "--section",
            "--inser",
        ];
        let want = [&want[..], &["--role", "--sect"], &["-vv"]].concat();
        let given: Vec<String> = given.into_iter().map(String::from).collect();
        assert_eq!(unabbreviated(&given), want);
    }

    #[test]
    fn compression_as_each_major_takes_it() {
        let old = |value: &str| {
            let major = Major::try_from(15).unwrap();
            Err(ArgumentError::OldCompression { value: value.into(), major })
        };
        let bad = |value: &str| Err(ArgumentError::BadCompression(value.into()));
        let good = |value: &str| Ok(value.to_string());
        let cases = [
            ("0", good("0"), good("0")),
            ("9", good("9"), good("9")),
            ("10", bad("10"), bad("10")),
            ("none", good("0"), good("none")),
            ("gzip", good("6"), good("gzip")),
            ("gzip:3", good("3"), good("gzip:3")),
            ("gzip:level=3", good("3"), good("gzip:level=3")),
            ("gzip:x", bad("gzip:x"), good("gzip:x")), // pg_dump tells
            ("lz4", old("lz4"), good("lz4")),
            ("zstd:5", old("zstd:5"), good("zstd:5")),
            ("none:1", old("none:1"), good("none:1")),
            ("zstd:", bad("zstd:"), bad("zstd:")),
            ("rot13", bad("rot13"), bad("rot13")),
            ("", bad(""), bad("")),
            ("--file=x", bad("--file=x"), bad("--file=x")),
        ];
        for (value, fifteen, sixteen) in cases {
            assert_eq!(compression(value, Major::try_from(15).unwrap()), fifteen, "{value} of 15");
            assert_eq!(compression(value, Major::try_from(16).unwrap()), sixteen, "{value} of 16");
        }
    }

    #[test]
    fn the_command_line() {
        let directory = PathBuf::from("/bin");
        let major = Major::try_from(17).unwrap();
        let plan = DumpPlan {
            binaries: Binaries {
                postgres: directory.join("postgres"),
                pg_dump: directory.join("pg_dump"),
                pg_dumpall: directory.join("pg_dumpall"),
                psql: None,
                version: "17.1".into(),
                major,
                directory,
            },
            endpoint: Endpoint {
                socket_directory: "/s o".into(),
                port: 5432,
                user: "o'b".into(),
                major,
                server: None,
            },
            database: "-Fc x='1'".into(),
            output: "/dump/a b".into(),
            jobs: 0,
            compress: Some("zstd:3".into()),
            encoding: Some("UTF8".into()),
            arguments: vec!["-T".into(), "x".into()],
            os_user: None,
            lock_wait_timeout: Duration::from_secs(600),
            marker: String::new(),
            confinement: crate::root::Confinement::Unisolated,
        };
        let words = arguments(&plan).unwrap();
        let words: Vec<&str> = words.iter().map(|word| word.to_str().unwrap()).collect();
        let want = [
            "--format=directory",
            "--file=/dump/a b",
            "--jobs=1",
            "--no-sync",
            "--verbose",
            "--no-password",
            "--lock-wait-timeout=600000",
            "--compress=zstd:3",
            "--encoding=UTF8",
            "-T",
            "x",
            r"--dbname=host='/s o' port=5432 user='o\'b' dbname='-Fc x=\'1\''",
        ];
        assert_eq!(words, want);
        let bad = DumpPlan { arguments: vec!["-fx".into()], ..plan };
        assert!(arguments(&bad).is_err());
    }

    proptest! {
        #[test]
        fn no_word_panics_or_smuggles_a_file(words in proptest::collection::vec("-{0,2}[a-zA-Z=?é -]{0,8}", 0..5)) {
            let _ = validate_user_arguments(&words);
            let mut smuggling = words.clone();
            smuggling.insert(0, "--file=x".into());
            prop_assert!(validate_user_arguments(&smuggling).is_err());
        }
    }
}
