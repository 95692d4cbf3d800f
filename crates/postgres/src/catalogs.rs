//! Databases, tablespaces and the superuser of a cluster, read from its files without a server.
//!
//! Start at [`databases`]. The files come from a callback, so they may lie in a repository. What is read is
//! the state of the files *before* recovery, and therefore a guess: it serves lists, checks and estimates;
//! what exists is decided by `pg_database` after recovery.
//!
//! A row counts as there if its inserter did not abort and its deleter, if there is one, did. Where the row
//! itself does not say so (hint bits), `pg_xact` is asked; a transaction it does not know as aborted counts
//! as committed, so that of a renamed database's two rows exactly one is seen. Locks do not delete.
//!
//! Sources: PostgreSQL's `relmapper.c`, `pg_database.h`, `pg_authid.h`, `pg_tablespace.h` of 12 to 18,
//! `clog.c`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;

use serde::{Deserialize, Serialize};

use crate::bytes::u32_at;
use crate::pages::{self, Column, PageError, Row, Value};
use crate::version::Major;

/// Reads a whole file of the data directory by its relative path, such as `global/1262`.
pub type ReadFile<'a> = &'a mut dyn FnMut(&str) -> io::Result<Vec<u8>>;

/// A row of `pg_database`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatabaseRow {
    /// Its number; its files lie in `base/<oid>`.
    pub oid: u32,
    /// Its name. Bytes that are no UTF-8 are replaced.
    pub name: String,
    /// May be copied by everybody.
    pub is_template: bool,
    /// Accepts connections at all.
    pub allow_connections: bool,
    /// How many connections it accepts; -1 for no limit, -2 for a database whose `DROP DATABASE` was interrupted.
    pub connection_limit: i32,
    /// The number of its character encoding (`pg_encoding_to_char()`).
    pub encoding: u32,
    /// `c` for the C library, `i` for ICU, `b` for built in; `c` before 15.
    pub provider: char,
    /// `LC_COLLATE`; `None` if it could not be read.
    pub collate: Option<String>,
    /// `LC_CTYPE`; `None` if it could not be read.
    pub ctype: Option<String>,
    /// ICU's (15 and later) or the built-in provider's (17 and later) locale.
    pub locale: Option<String>,
    /// The collation's version when the database was made (15 and later).
    pub collation_version: Option<String>,
    /// Its default tablespace: 1663 for `base/`.
    pub tablespace_oid: u32,
}

/// A row of `pg_tablespace`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TablespaceRow {
    /// Its number; its files lie behind `pg_tblspc/<oid>`, except those of `pg_default` and `pg_global`.
    pub oid: u32,
    /// Its name.
    pub name: String,
}

/// A row of `pg_authid`, without its password.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleRow {
    /// Its number; 10 for the superuser that `initdb` made.
    pub oid: u32,
    /// Its name.
    pub name: String,
    /// Whether it is a superuser.
    pub is_superuser: bool,
    /// Whether it may log in.
    pub can_login: bool,
}

/// Why a catalog cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// A file cannot be read.
    #[error("read {file}")]
    Read {
        /// Its path in the data directory.
        file: String,
        /// Why.
        source: io::Error,
    },
    /// `pg_filenode.map` is damaged.
    #[error("global/pg_filenode.map is damaged: {0}")]
    Map(&'static str),
    /// A page cannot be read.
    #[error("read page {page} of {file}")]
    Page {
        /// The file's path in the data directory.
        file: String,
        /// The page's number in this file, from 0.
        page: usize,
        /// Why.
        source: PageError,
    },
}

impl CatalogError {
    /// Returns what the operator can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Read { .. } => "check that the backup is whole and readable",
            Self::Map(_) | Self::Page { .. } => {
                "a page may be half written before recovery: name the databases with -d, they are looked up again after it; if that fails too, choose another backup"
            }
        }
    }
}

/// The number of the superuser that `initdb` made (`BOOTSTRAP_SUPERUSERID`).
pub const BOOTSTRAP_SUPERUSER: u32 = 10;

const PG_TABLESPACE: u32 = 1213;
const PG_AUTHID: u32 = 1260;
const PG_DATABASE: u32 = 1262;

/// Returns the cluster's databases, templates too, in the order of their numbers.
///
/// # Errors
/// [`CatalogError`] if a file is missing or a page cannot be understood.
pub fn databases(read: ReadFile<'_>, major: Major) -> Result<Vec<DatabaseRow>, CatalogError> {
    let layout = database_layout(major);
    let table = table(read, PG_DATABASE, layout)?;
    let database = |row: &Fields| {
        let text = |name| row.text(name);
        Some(DatabaseRow {
            oid: row.word("oid")?,
            name: text("datname")?,
            is_template: row.byte("datistemplate")? != 0,
            allow_connections: row.byte("datallowconn")? != 0,
            connection_limit: row.word("datconnlimit")?.cast_signed(),
            encoding: row.word("encoding")?,
            provider: row.byte("datlocprovider").map_or('c', char::from),
            collate: text("datcollate"),
            ctype: text("datctype"),
            locale: text("daticulocale").or_else(|| text("datlocale")),
            collation_version: text("datcollversion"),
            tablespace_oid: row.word("dattablespace")?,
        })
    };
    Ok(table.iter().filter_map(database).collect())
}

/// Returns the cluster's tablespaces with `pg_default` and `pg_global`, in the order of their numbers.
///
/// # Errors
/// [`CatalogError`] if a file is missing or a page cannot be understood.
pub fn tablespaces(read: ReadFile<'_>) -> Result<Vec<TablespaceRow>, CatalogError> {
    let table = table(read, PG_TABLESPACE, &[("oid", Column::Word), ("spcname", Column::Name)])?;
    let tablespace =
        |row: &Fields| Some(TablespaceRow { oid: row.word("oid")?, name: row.text("spcname")? });
    Ok(table.iter().filter_map(tablespace).collect())
}

/// Returns the cluster's roles in the order of their numbers.
///
/// # Errors
/// [`CatalogError`] if a file is missing or a page cannot be understood.
pub fn roles(read: ReadFile<'_>) -> Result<Vec<RoleRow>, CatalogError> {
    const LAYOUT: [(&str, Column); 7] = [
        ("oid", Column::Word),
        ("rolname", Column::Name),
        ("rolsuper", Column::Byte),
        ("rolinherit", Column::Byte),
        ("rolcreaterole", Column::Byte),
        ("rolcreatedb", Column::Byte),
        ("rolcanlogin", Column::Byte),
    ];
    let role = |row: &Fields| {
        let flag = |name| row.byte(name).map(|byte| byte != 0);
        Some(RoleRow {
            oid: row.word("oid")?,
            name: row.text("rolname")?,
            is_superuser: flag("rolsuper")?,
            can_login: flag("rolcanlogin")?,
        })
    };
    Ok(table(read, PG_AUTHID, &LAYOUT)?.iter().filter_map(role).collect())
}

/// Returns the superuser that `initdb` made, whatever it is called now; `None` if its row was not found.
///
/// # Errors
/// [`CatalogError`] if a file is missing or a page cannot be understood.
pub fn superuser(read: ReadFile<'_>) -> Result<Option<RoleRow>, CatalogError> {
    Ok(roles(read)?.into_iter().find(|role| role.oid == BOOTSTRAP_SUPERUSER))
}

/// Returns the columns of `pg_database` up to the last one that is read.
fn database_layout(major: Major) -> &'static [(&'static str, Column)] {
    const TO_14: &[(&str, Column)] = &[
        ("oid", Column::Word),
        ("datname", Column::Name),
        ("datdba", Column::Word),
        ("encoding", Column::Word),
        ("datcollate", Column::Name),
        ("datctype", Column::Name),
        ("datistemplate", Column::Byte),
        ("datallowconn", Column::Byte),
        ("datconnlimit", Column::Word),
        ("datlastsysoid", Column::Word),
        ("datfrozenxid", Column::Word),
        ("datminmxid", Column::Word),
        ("dattablespace", Column::Word),
    ];
    const IN_15: &[(&str, Column)] = &[
        ("oid", Column::Word),
        ("datname", Column::Name),
        ("datdba", Column::Word),
        ("encoding", Column::Word),
        ("datlocprovider", Column::Byte),
        ("datistemplate", Column::Byte),
        ("datallowconn", Column::Byte),
        ("datconnlimit", Column::Word),
        ("datfrozenxid", Column::Word),
        ("datminmxid", Column::Word),
        ("dattablespace", Column::Word),
        ("datcollate", Column::Text),
        ("datctype", Column::Text),
        ("daticulocale", Column::Text),
        ("datcollversion", Column::Text),
    ];
    const IN_16: &[(&str, Column)] = &[
        ("oid", Column::Word),
        ("datname", Column::Name),
        ("datdba", Column::Word),
        ("encoding", Column::Word),
        ("datlocprovider", Column::Byte),
        ("datistemplate", Column::Byte),
        ("datallowconn", Column::Byte),
        ("datconnlimit", Column::Word),
        ("datfrozenxid", Column::Word),
        ("datminmxid", Column::Word),
        ("dattablespace", Column::Word),
        ("datcollate", Column::Text),
        ("datctype", Column::Text),
        ("daticulocale", Column::Text),
        ("daticurules", Column::Text),
        ("datcollversion", Column::Text),
    ];
    const FROM_17: &[(&str, Column)] = &[
        ("oid", Column::Word),
        ("datname", Column::Name),
        ("datdba", Column::Word),
        ("encoding", Column::Word),
        ("datlocprovider", Column::Byte),
        ("datistemplate", Column::Byte),
        ("datallowconn", Column::Byte),
        ("dathasloginevt", Column::Byte),
        ("datconnlimit", Column::Word),
        ("datfrozenxid", Column::Word),
        ("datminmxid", Column::Word),
        ("dattablespace", Column::Word),
        ("datcollate", Column::Text),
        ("datctype", Column::Text),
        ("datlocale", Column::Text),
        ("daticurules", Column::Text),
        ("datcollversion", Column::Text),
    ];
    match major.number() {
        ..=14 => TO_14,
        15 => IN_15,
        16 => IN_16,
        _ => FROM_17,
    }
}

/// A row's values by their columns' names.
struct Fields {
    layout: &'static [(&'static str, Column)],
    values: Vec<Value>,
    xmin: u32,
}

impl Fields {
    fn get(&self, name: &str) -> Option<&Value> {
        let index = self.layout.iter().position(|(column, _)| *column == name)?;
        self.values.get(index)
    }

    fn word(&self, name: &str) -> Option<u32> {
        if let Some(Value::Word(word)) = self.get(name) { Some(*word) } else { None }
    }

    fn byte(&self, name: &str) -> Option<u8> {
        if let Some(Value::Byte(byte)) = self.get(name) { Some(*byte) } else { None }
    }

    fn text(&self, name: &str) -> Option<String> {
        if let Some(Value::Text(text)) = self.get(name) { Some(text.clone()) } else { None }
    }
}

/// Reads the rows of a shared catalog that are there, one for each `oid`, in the order of these.
fn table(
    read: ReadFile<'_>,
    oid: u32,
    layout: &'static [(&'static str, Column)],
) -> Result<Vec<Fields>, CatalogError> {
    let columns: Vec<Column> = layout.iter().map(|(_, column)| *column).collect();
    let map = read_file(read, "global/pg_filenode.map")?;
    let filenode = filenode(&map, oid)?;
    let mut transactions = Transactions::default();
    let mut found: HashMap<u32, Fields> = HashMap::new();
    for segment in 0.. {
        let file = if segment == 0 {
            format!("global/{filenode}")
        } else {
            format!("global/{filenode}.{segment}")
        };
        let bytes = match read(&file) {
            Err(error) if segment > 0 && error.kind() == io::ErrorKind::NotFound => break,
            Err(source) => return Err(CatalogError::Read { file, source }),
            Ok(bytes) => bytes,
        };
        let page_size = pages::page_size(&bytes).unwrap_or(8192);
        transactions.page_size = page_size;
        for (page, bytes) in bytes.chunks(page_size).enumerate() {
            let bad = |source| CatalogError::Page { file: file.clone(), page, source };
            for row in pages::rows(bytes).map_err(bad)? {
                if !transactions.see(read, &row)? {
                    continue;
                }
                let values = row.values(&columns).map_err(bad)?;
                let fields = Fields { layout, values, xmin: row.xmin };
                let Some(oid) = fields.word("oid") else { continue };
                let newer = found.get(&oid).is_none_or(|other| is_newer(fields.xmin, other.xmin));
                if newer {
                    found.insert(oid, fields);
                }
            }
        }
    }
    let mut rows: Vec<(u32, Fields)> = found.into_iter().collect();
    rows.sort_unstable_by_key(|(oid, _)| *oid);
    Ok(rows.into_iter().map(|(_, fields)| fields).collect())
}

/// Compares transaction numbers as PostgreSQL does: modulo 2^32, except the first three.
fn is_newer(one: u32, other: u32) -> bool {
    match one < 3 || other < 3 {
        true => one > other,
        false => one.wrapping_sub(other).cast_signed() > 0,
    }
}

fn read_file(read: ReadFile<'_>, file: &str) -> Result<Vec<u8>, CatalogError> {
    read(file).map_err(|source| CatalogError::Read { file: file.into(), source })
}

/// Returns the name of a mapped catalog's file, by the bytes of `pg_filenode.map`.
fn filenode(map: &[u8], oid: u32) -> Result<u32, CatalogError> {
    const MAGIC: u32 = 0x0059_2717;
    let checksum_at = match map.len() {
        512 => 504, // up to 15: 62 entries
        524 => 520, // from 16: 64 entries
        _ => return Err(CatalogError::Map("it has an unexpected size")),
    };
    if u32_at(map, 0) != Some(MAGIC) {
        return Err(CatalogError::Map("it has no magic number"));
    }
    if u32_at(map, checksum_at) != Some(crc32c::crc32c(&map[..checksum_at])) {
        return Err(CatalogError::Map("its checksum is wrong"));
    }
    let count = u32_at(map, 4).unwrap_or_default() as usize;
    let mut entries = map[8..checksum_at].chunks_exact(8).take(count);
    let entry = entries.find(|entry| u32_at(entry, 0) == Some(oid));
    entry
        .and_then(|entry| u32_at(entry, 4))
        .ok_or(CatalogError::Map("a shared catalog is not in it"))
}

/// What is known about transactions, by `pg_xact`'s files, each read once.
#[derive(Default)]
struct Transactions {
    page_size: usize,
    files: HashMap<u32, Vec<u8>>,
}

impl Transactions {
    /// Returns whether the row counts as there.
    fn see(&mut self, read: ReadFile<'_>, row: &Row<'_>) -> Result<bool, CatalogError> {
        const XMIN_COMMITTED: u16 = 0x0100;
        const XMIN_INVALID: u16 = 0x0200;
        const XMAX_LOCK: u16 = 0x0040 | 0x0010; // exclusive or key-shared; both together: shared
        const XMAX_EXCLUSIVE: u16 = 0x0040;
        const XMAX_LOCK_ONLY: u16 = 0x0080;
        const XMAX_COMMITTED: u16 = 0x0400;
        const XMAX_INVALID: u16 = 0x0800;
        const XMAX_IS_MULTI: u16 = 0x1000;
        let has = |bit| row.infomask & bit != 0;
        let inserted =
            has(XMIN_COMMITTED) || (!has(XMIN_INVALID) && self.may_be_committed(read, row.xmin)?);
        let locked_only =
            has(XMAX_LOCK_ONLY) || row.infomask & (XMAX_IS_MULTI | XMAX_LOCK) == XMAX_EXCLUSIVE;
        let deleted = match row.xmax {
            0 => false,
            _ if has(XMAX_INVALID) || locked_only => false,
            _ if has(XMAX_COMMITTED) || has(XMAX_IS_MULTI) => true,
            xmax => self.may_be_committed(read, xmax)?,
        };
        Ok(inserted && !deleted)
    }

    /// Returns whether a transaction is not known to have aborted. A missing file or page says nothing.
    fn may_be_committed(&mut self, read: ReadFile<'_>, xid: u32) -> Result<bool, CatalogError> {
        const ABORTED: u8 = 2;
        if xid < 3 {
            return Ok(xid != 0); // bootstrap and frozen
        }
        let per_file = u32::try_from(self.page_size).unwrap_or(8192) * 4 * 32; // two bits each, 32 pages per file
        let number = xid / per_file;
        let bytes = match self.files.entry(number) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => {
                let file = format!("pg_xact/{number:04X}");
                match read(&file) {
                    Ok(bytes) => unknown.insert(bytes),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        unknown.insert(Vec::new())
                    }
                    Err(source) => return Err(CatalogError::Read { file, source }),
                }
            }
        };
        let place = xid % per_file;
        let status = bytes.get((place / 4) as usize).map(|byte| byte >> (2 * (place % 4)) & 3);
        Ok(status != Some(ABORTED))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::tests::{page, row_bytes};
    use proptest::prelude::*;

    const XMIN_COMMITTED: u16 = 0x0100;
    const XMAX_INVALID: u16 = 0x0800;

    /// Returns a `pg_filenode.map` of the given size that maps `pg_tablespace` to file 7.
    fn map(size: usize) -> Vec<u8> {
        let mut map = vec![0; size];
        for (offset, word) in
            [(0, 0x0059_2717_u32), (4, 2), (8, 1262), (12, 1262), (16, PG_TABLESPACE), (20, 7)]
        {
            map[offset..offset + 4].copy_from_slice(&word.to_le_bytes());
        }
        let at = if size == 512 { 504 } else { 520 };
        let checksum = crc32c::crc32c(&map[..at]);
        map[at..at + 4].copy_from_slice(&checksum.to_le_bytes());
        map
    }

    fn tablespace(oid: u32, name: &str, xmin: u32, xmax: u32, infomask: u16) -> Vec<u8> {
        let mut data = vec![0; 68];
        data[..4].copy_from_slice(&oid.to_le_bytes());
        data[4..4 + name.len()].copy_from_slice(name.as_bytes());
        row_bytes(xmin, xmax, infomask, 2, &[], &data)
    }

    /// Returns the names seen when the catalog has these files and `pg_xact` these bytes.
    fn names(files: &[(&str, Vec<u8>)]) -> Result<Vec<String>, CatalogError> {
        let mut read = |wanted: &str| {
            let found = files.iter().find(|(name, _)| *name == wanted);
            found.map(|(_, bytes)| bytes.clone()).ok_or_else(|| io::ErrorKind::NotFound.into())
        };
        Ok(tablespaces(&mut read)?.into_iter().map(|row| row.name).collect())
    }

    #[test]
    fn sees_rows_as_documented() {
        // transactions 8 to 11: in progress, committed, aborted, committed
        let pg_xact = vec![0, 0, 0b01_10_01_00];
        let cases = [
            ("frozen", 2, 0, XMIN_COMMITTED | 0x0200, true),
            ("by initdb, without hints", 1, 0, XMAX_INVALID, true),
            ("hint: inserted", 10, 0, XMIN_COMMITTED | XMAX_INVALID, true),
            ("hint: insert aborted", 9, 0, 0x0200, false),
            ("pg_xact: insert committed", 9, 0, XMAX_INVALID, true),
            ("pg_xact: insert aborted", 10, 0, XMAX_INVALID, false),
            ("pg_xact: insert in progress", 8, 0, XMAX_INVALID, true),
            ("pg_xact: too short to know", 4000, 0, XMAX_INVALID, true),
            ("hint: deleted", 9, 11, XMIN_COMMITTED | 0x0400, false),
            ("hint: delete aborted", 9, 11, XMIN_COMMITTED | XMAX_INVALID, true),
            ("pg_xact: deleted", 9, 11, XMIN_COMMITTED, false),
            ("pg_xact: delete aborted", 9, 10, XMIN_COMMITTED, true),
            ("locked for key share", 9, 11, XMIN_COMMITTED | 0x0080 | 0x0010, true),
            ("locked exclusively", 9, 11, XMIN_COMMITTED | 0x0080 | 0x0040, true),
            ("locked exclusively, as before 9.3", 9, 11, XMIN_COMMITTED | 0x0040, true),
            ("updated by one of several", 9, 11, XMIN_COMMITTED | 0x1000, false),
        ];
        for (name, xmin, xmax, infomask, want) in cases {
            let table = page(&[tablespace(5, "seen", xmin, xmax, infomask)]);
            let files = [
                ("global/pg_filenode.map", map(524)),
                ("global/7", table),
                ("pg_xact/0000", pg_xact.clone()),
            ];
            assert_eq!(names(&files).unwrap().len(), usize::from(want), "{name}");
        }
    }

    #[test]
    fn a_row_seen_twice_counts_once() {
        let old = tablespace(5, "old", u32::MAX - 1, 0, XMIN_COMMITTED | XMAX_INVALID);
        let new = tablespace(5, "new", 4, 0, XMIN_COMMITTED | XMAX_INVALID);
        for rows in [[old.clone(), new.clone()], [new, old]] {
            let files = [("global/pg_filenode.map", map(512)), ("global/7", page(&rows))];
            assert_eq!(names(&files).unwrap(), ["new"]);
        }
    }

    #[test]
    fn reads_all_pages_and_segments() {
        let one = |oid, name| page(&[tablespace(oid, name, 2, 0, XMIN_COMMITTED)]);
        let first = [one(9, "i"), vec![0; 8192], one(3, "c")].concat();
        let files = [
            ("global/pg_filenode.map", map(512)),
            ("global/7", first),
            ("global/7.1", one(5, "e")),
        ];
        assert_eq!(names(&files).unwrap(), ["c", "e", "i"]);
    }

    #[test]
    fn says_what_is_wrong() {
        let table = || page(&[tablespace(5, "x", 2, 0, XMIN_COMMITTED)]);
        let mut flipped = map(512);
        flipped[300] ^= 1;
        let mut unmapped = map(512);
        unmapped[16] = 0;
        let checksum = crc32c::crc32c(&unmapped[..504]);
        unmapped[504..508].copy_from_slice(&checksum.to_le_bytes());
        let half = [table(), table()[..4096].to_vec()].concat();
        let cases = [
            ("no map", vec![], "read global/pg_filenode.map"),
            ("a short map", vec![("global/pg_filenode.map", vec![0; 10])], "unexpected size"),
            ("an empty map", vec![("global/pg_filenode.map", vec![0; 512])], "no magic number"),
            ("a damaged map", vec![("global/pg_filenode.map", flipped)], "checksum is wrong"),
            ("a map without the table", vec![("global/pg_filenode.map", unmapped)], "not in it"),
            ("no table", vec![("global/pg_filenode.map", map(512))], "read global/7"),
            (
                "half a page",
                vec![("global/pg_filenode.map", map(512)), ("global/7", half)],
                "read page 1 of global/7",
            ),
        ];
        for (name, files, want) in cases {
            let error = names(&files).unwrap_err();
            assert!(error.to_string().contains(want), "{name}: {error}");
            assert!(!error.hint().is_empty());
        }
    }

    proptest! {
        #[test]
        fn no_map_panics(mut map in prop_oneof![Just(map(512)), Just(map(524))], at in 0_usize..512, byte: u8) {
            map[at] = byte;
            let _ = filenode(&map, PG_DATABASE);
            let end = map.len() - 4;
            let checksum = crc32c::crc32c(&map[..end]);
            map[end..].copy_from_slice(&checksum.to_le_bytes());
            let _ = filenode(&map, PG_DATABASE);
        }
    }
}
