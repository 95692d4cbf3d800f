//! Every pg_dump installed here, against the table of its options: one that brings an option which nobody has judged makes
//! this fail.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use pgthaw_postgres::dump::{ArgumentError, given_options, validate_user_arguments};

/// Ends every pg_dump before it does anything: with no name before `=` it is an abbreviation of all options.
const ALL: &str = "--=";

/// What a pg_dump says about its options.
#[derive(Debug, Default, PartialEq)]
struct Options {
    /// Long names without dashes.
    long: BTreeSet<String>,
    letters: BTreeSet<char>,
    /// By long name whether it takes a value; of documented ones only.
    takes_value: BTreeMap<String, bool>,
}

impl Options {
    /// Reads `--help`.
    fn documented(help: &str) -> Self {
        let mut found = Self::default();
        for line in help.lines().map(str::trim_start).filter(|line| line.starts_with('-')) {
            for word in line.split("  ").next().unwrap_or_default().split(", ") {
                match word.strip_prefix("--") {
                    Some(long) => {
                        let (name, has_value) = match long.split_once('=') {
                            Some((name, _)) => (name, true),
                            None => (long.split(' ').next().unwrap_or(long), false),
                        };
                        found.long.insert(name.into());
                        found.takes_value.insert(name.into(), has_value);
                    }
                    None => found.letters.extend(word.chars().nth(1)),
                }
            }
        }
        found
    }

    /// Asks the program, for the undocumented ones too.
    fn of(program: &Path) -> Self {
        let mut found = Self::documented(&said(program, &["--help"]));
        let all = said(program, &[ALL]);
        let (_, names) =
            all.split_once("possibilities:").unwrap_or_else(|| panic!("glibc's words: {all}"));
        let names = names.lines().next().unwrap_or_default().split_whitespace();
        found.long.extend(names.map(|name| name.trim_matches(['\'', '-']).to_owned()));
        let is_known = |letter: &char| {
            // Twice: the first one may be the letter's value.
            !said(program, &[&format!("-{letter}"), ALL, ALL]).contains("invalid option")
        };
        let letters = ('0'..='z').filter(char::is_ascii_alphanumeric);
        let hidden = letters.filter(|letter| !found.letters.contains(letter)).filter(is_known);
        found.letters.extend(hidden.collect::<Vec<_>>());
        found
    }

    /// Returns what the table does not know or knows otherwise.
    fn unjudged(&self) -> Vec<String> {
        let name_of = |word: String| {
            let given = given_options(std::slice::from_ref(&word));
            given.first().map(|given| given.name)
        };
        let mut found = Vec::new();
        for name in &self.long {
            let judged = name_of(format!("--{name}")).is_some_and(|judged| judged == name);
            if !judged {
                found.push(format!("--{name}"));
            }
        }
        for letter in &self.letters {
            if name_of(format!("-{letter}")).is_none() {
                found.push(format!("-{letter}"));
            }
        }
        for (name, takes_value) in &self.takes_value {
            let alone = validate_user_arguments(&[format!("--{name}")]);
            let other = match alone {
                Ok(()) => *takes_value,
                Err(ArgumentError::NoValue(_)) => !*takes_value,
                Err(_) => false, // refused, or reported above
            };
            if other {
                found.push(format!("--{name}: whether it takes a value"));
            }
        }
        found
    }
}

fn said(program: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    // Should it get as far as a connection, there is nobody.
    command.args(arguments).env("LC_ALL", "C").env("PGHOST", "/nonexistent");
    let output = command.stdin(Stdio::null()).output().expect("pg_dump runs");
    String::from_utf8([output.stdout, output.stderr].concat()).expect("ASCII")
}

/// Every pg_dump where packages and PATH have one; Debian's wrapper only runs one of them.
fn installed() -> BTreeSet<PathBuf> {
    let below = |parent: &str| {
        std::fs::read_dir(parent).into_iter().flatten().flatten().map(|entry| entry.path())
    };
    let debian = below("/usr/lib/postgresql").map(|dir| dir.join("bin"));
    let rpm = below("/usr").map(|dir| dir.join("bin"));
    let named = std::env::var_os("PGTHAW_TEST_PG_BIN").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let dirs = debian.chain(rpm).chain(named).chain(path);
    dirs.filter_map(|dir| std::fs::canonicalize(dir.join("pg_dump")).ok())
        .filter(|program| program.is_file() && !program.ends_with("pg_wrapper"))
        .collect()
}

#[test]
fn every_option_of_every_installed_pg_dump_is_judged() {
    let programs = installed();
    assert!(!programs.is_empty(), "no pg_dump is installed");
    for program in programs {
        let options = Options::of(&program);
        assert!(
            options.long.contains("binary-upgrade") && options.letters.contains(&'R'),
            "undocumented options are not found: {options:?}"
        );
        let version = said(&program, &["--version"]);
        let name = program.display();
        assert_eq!(
            options.unjudged(),
            [""; 0],
            "of {name}, {version}: judge them in dump_arguments.rs"
        );
    }
}

#[test]
fn an_option_that_nobody_has_judged_is_found() {
    let help = "Options:\n  -y, --yes-to-all=WHAT        with a letter\n  --tab                        like an abbreviation\n\
                \x20 --inserts=HOW                with a value by now\n  --section                    without one\n\
                \x20 -t, --table=PATTERN          as ever\n  --include-foreign-data=PATTERN\n\n";
    assert_eq!(
        Options::documented(help).unjudged(),
        [
            "--tab",
            "--yes-to-all",
            "-y",
            "--inserts: whether it takes a value",
            "--section: whether it takes a value"
        ]
    );
}
