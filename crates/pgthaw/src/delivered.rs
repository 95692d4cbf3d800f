//! What an export itself tells of how to load it; read where it lies.

use std::io::Read;
use std::path::Path;

use pgthaw_mover::{GLOBALS_SQL, file_name_for_database};
use serde::{Deserialize, Serialize};

/// What the last words of an export need besides its status.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivered {
    /// `globals.sql` is there.
    pub globals: bool,
    /// Where `globals.sql` creates tablespaces.
    pub tablespaces: Vec<String>,
    /// What pg_dump was told besides.
    pub pg_dump_arguments: Vec<String>,
    /// Settings of a database or role that would disturb a load of it: database and name; no database for a role's own.
    pub disturbing: Vec<(Option<String>, String)>,
}

/// What databases and roles may set for themselves that makes a load fail, with the value that a session needs instead.
const DISTURBING: [(&str, &str); 4] = [
    ("default_transaction_read_only", "off"),
    ("session_preload_libraries", ""),
    ("local_preload_libraries", ""),
    ("role", "none"),
];
/// Bytes of a `toc.dat` that are looked at: pg_dump sorts a database and its settings before everything in it.
const TOC_HEAD: u64 = 1 << 20;

impl Delivered {
    /// Looks into the export in `target` with these databases, on this machine; what cannot be read counts as not there.
    pub fn look(target: &Path, databases: &[String]) -> Self {
        #[derive(serde::Deserialize)]
        struct ExportJson {
            #[serde(default)]
            pg_dump_arguments: Vec<String>,
        }
        let export = std::fs::read(target.join(pgthaw_mover::EXPORT_JSON)).ok();
        let export: Option<ExportJson> = export.and_then(|json| serde_json::from_slice(&json).ok());
        let globals = std::fs::read(target.join(GLOBALS_SQL)).ok();
        let text = globals.as_deref().map(String::from_utf8_lossy).unwrap_or_default();
        let of_roles = disturbing_settings(&text).map(|name| (None, name.to_owned()));
        let mut disturbing: Vec<_> = of_roles.collect();
        for database in databases {
            let toc = target.join(file_name_for_database(database)).join("toc.dat");
            let mut head = Vec::new();
            let read =
                std::fs::File::open(toc).and_then(|f| f.take(TOC_HEAD).read_to_end(&mut head));
            let text = String::from_utf8_lossy(if read.is_ok() { &head } else { &[] });
            disturbing.extend(
                disturbing_settings(&text).map(|name| (Some(database.clone()), name.to_owned())),
            );
        }
        disturbing.sort();
        disturbing.dedup();
        Self {
            globals: globals.is_some(),
            tablespaces: text.lines().filter_map(tablespace_location).collect(),
            pg_dump_arguments: export.map(|export| export.pg_dump_arguments).unwrap_or_default(),
            disturbing,
        }
    }

    /// The `PGOPTIONS` that a load of `database` needs, with a blank behind it.
    pub fn pgoptions(&self, database: &str) -> String {
        let needed = |name: &str| {
            self.disturbing
                .iter()
                .any(|(of, found)| found == name && of.as_deref().is_none_or(|of| of == database))
        };
        let options = DISTURBING.iter().filter(|(name, _)| needed(name));
        let options: Vec<_> = options.map(|(name, value)| format!("-c {name}={value}")).collect();
        if options.is_empty() {
            String::new()
        } else {
            format!("PGOPTIONS='{}' ", options.join(" "))
        }
    }
}

/// The settings in pg_dump's or pg_dumpall's output that would disturb a load.
fn disturbing_settings(text: &str) -> impl Iterator<Item = &'static str> {
    let names = text.lines().filter_map(|line| {
        // In toc.dat the length of the text stands before it.
        let at = line.find("ALTER DATABASE ").or_else(|| line.find("ALTER ROLE "))?;
        let (_, setting) = line[at..].split_once(" SET ")?;
        DISTURBING.iter().map(|(name, _)| *name).find(|name| {
            setting
                .trim_start_matches('"')
                .strip_prefix(name)
                .is_some_and(|rest| rest.trim_start_matches('"').starts_with([' ', '=']))
        })
    });
    names.collect::<Vec<_>>().into_iter()
}

/// The location in a line `CREATE TABLESPACE … LOCATION '…';`.
fn tablespace_location(line: &str) -> Option<String> {
    let (_, location) = line.strip_prefix("CREATE TABLESPACE ")?.split_once(" LOCATION ")?;
    let location = location.strip_suffix(';')?.trim_start_matches('E');
    Some(location.strip_prefix('\'')?.strip_suffix('\'')?.replace("''", "'"))
}
