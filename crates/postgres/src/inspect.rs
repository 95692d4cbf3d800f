//! What a recovered instance says about itself: databases, prepared transactions, relations, libraries.
//!
//! Names read before recovery are a guess; these are the facts. Each function is one question with one
//! query; only [`roll_back_prepared`] changes anything, in the write layer.

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use crate::connection::{Endpoint, SqlError, failed};
use crate::version::Major;

/// A database after recovery.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Database {
    /// Its number.
    pub oid: u32,
    /// Its name.
    pub name: String,
    /// Whether it is a template.
    pub is_template: bool,
    /// Whether it accepts connections; pg_dump needs one.
    pub allows_connections: bool,
    /// -1 without a limit; -2: `DROP DATABASE` was interrupted, it can only be dropped.
    pub connection_limit: i32,
    /// Its encoding's name, such as `UTF8`.
    pub encoding: String,
}

/// Lists the databases, by name.
///
/// # Errors
/// [`SqlError`] if the query fails.
pub async fn databases(client: &Client) -> Result<Vec<Database>, SqlError> {
    let query = "SELECT oid, datname::text, datistemplate, datallowconn, datconnlimit,
                        pg_catalog.pg_encoding_to_char(encoding)::text
                 FROM pg_catalog.pg_database ORDER BY datname";
    let rows = client.query(query, &[]).await.map_err(failed("list the databases"))?;
    let database = |row: &tokio_postgres::Row| Database {
        oid: row.get(0),
        name: row.get(1),
        is_template: row.get(2),
        allows_connections: row.get(3),
        connection_limit: row.get(4),
        encoding: row.get(5),
    };
    Ok(rows.iter().map(database).collect())
}

/// Returns a database's size in bytes as `pg_database_size()` reports it: the server stats each file.
///
/// # Errors
/// [`SqlError`] if the query fails.
pub async fn database_size(client: &Client, oid: u32) -> Result<u64, SqlError> {
    let query = "SELECT pg_catalog.pg_database_size($1::oid)";
    let row = client.query_one(query, &[&oid]).await.map_err(failed("ask a database's size"))?;
    Ok(count(row.get(0)))
}

fn count(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

/// A transaction that was prepared and neither committed nor rolled back. Its locks block pg_dump for ever.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreparedTransaction {
    /// Its name.
    pub gid: String,
    /// Its database.
    pub database: String,
    /// Its owner.
    pub owner: String,
    /// When it was prepared, in UTC.
    pub prepared: String,
}

/// Lists the prepared transactions of all databases, oldest first.
///
/// # Errors
/// [`SqlError`] if the query fails.
pub async fn prepared_transactions(client: &Client) -> Result<Vec<PreparedTransaction>, SqlError> {
    let query = "SELECT gid, database::text, owner::text,
                        pg_catalog.to_char(prepared AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.MS\"+00\"')
                 FROM pg_catalog.pg_prepared_xacts ORDER BY prepared, gid";
    let rows = client.query(query, &[]).await.map_err(failed("list the prepared transactions"))?;
    let transaction = |row: &tokio_postgres::Row| PreparedTransaction {
        gid: row.get(0),
        database: row.get(1),
        owner: row.get(2),
        prepared: row.get(3),
    };
    Ok(rows.iter().map(transaction).collect())
}

/// Rolls prepared transactions back, each in its own database, where alone that is possible.
///
/// # Errors
/// [`SqlError`] names the first that cannot be rolled back; the others before it are.
pub async fn roll_back_prepared(
    endpoint: &Endpoint,
    transactions: &[PreparedTransaction],
) -> Result<(), SqlError> {
    for transaction in transactions {
        let PreparedTransaction { gid, database, .. } = transaction;
        let client = endpoint.connect(database).await?;
        let command = format!("ROLLBACK PREPARED {}", literal(gid));
        let purpose = format!("roll back the prepared transaction \"{gid}\" of \"{database}\"");
        client.batch_execute(&command).await.map_err(failed(purpose))?;
    }
    Ok(())
}

/// Writes a string literal that means the same whatever `standard_conforming_strings` is.
pub(crate) fn literal(text: &str) -> String {
    let doubled = text.replace('\'', "''");
    match doubled.contains('\\') {
        true => format!(" E'{}'", doubled.replace('\\', "\\\\")),
        false => format!("'{doubled}'"),
    }
}

/// Lists the unlogged tables of the client's database, as `schema.table`: they are empty after recovery.
///
/// # Errors
/// [`SqlError`] if the query fails.
pub async fn unlogged_tables(client: &Client) -> Result<Vec<String>, SqlError> {
    let query = "SELECT pg_catalog.format('%I.%I', n.nspname, c.relname)
                 FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                 WHERE c.relpersistence = 'u' AND c.relkind IN ('r', 'm') ORDER BY 1";
    let rows = client.query(query, &[]).await.map_err(failed("list the unlogged tables"))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// How much pg_dump has to do in a database.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relations {
    /// Ordinary tables: each has data of its own.
    pub tables: u64,
    /// Partitioned tables: their partitions count as tables.
    pub partitioned: u64,
    /// Materialized views: filled again by pg_restore.
    pub materialized_views: u64,
    /// Foreign tables: their data lies elsewhere.
    pub foreign: u64,
    /// Locks pg_dump may hold at a time: tables, views and sequences outside of the system's schemas.
    pub locked: u64,
}

/// Counts the relations of the client's database.
///
/// # Errors
/// [`SqlError`] if the query fails.
pub async fn relations(client: &Client) -> Result<Relations, SqlError> {
    let query = "SELECT count(*) FILTER (WHERE relkind = 'r'), count(*) FILTER (WHERE relkind = 'p'),
                        count(*) FILTER (WHERE relkind = 'm'), count(*) FILTER (WHERE relkind = 'f'),
                        count(*)
                 FROM pg_catalog.pg_class
                 WHERE relkind IN ('r', 'p', 'm', 'f', 'v', 'S') AND relpersistence <> 't'
                   AND relnamespace NOT IN (SELECT oid FROM pg_catalog.pg_namespace
                       WHERE nspname IN ('pg_catalog', 'information_schema', 'pg_toast'))";
    let row = client.query_one(query, &[]).await.map_err(failed("count the relations"))?;
    Ok(Relations {
        tables: count(row.get(0)),
        partitioned: count(row.get(1)),
        materialized_views: count(row.get(2)),
        foreign: count(row.get(3)),
        locked: count(row.get(4)),
    })
}

/// A tablespace as the instance sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tablespace {
    /// Its number.
    pub oid: u32,
    /// Its name.
    pub name: String,
    /// Where it is mounted; empty for the two built-in ones.
    pub location: String,
}

/// Lists the tablespaces, by number.
///
/// # Errors
/// [`SqlError`] if the query fails.
pub async fn tablespaces(client: &Client) -> Result<Vec<Tablespace>, SqlError> {
    let query = "SELECT oid, spcname::text, pg_catalog.pg_tablespace_location(oid)
                 FROM pg_catalog.pg_tablespace ORDER BY oid";
    let rows = client.query(query, &[]).await.map_err(failed("list the tablespaces"))?;
    let tablespace = |row: &tokio_postgres::Row| Tablespace {
        oid: row.get(0),
        name: row.get(1),
        location: row.get(2),
    };
    Ok(rows.iter().map(tablespace).collect())
}

/// A library that functions of a database name and that cannot be loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingLibrary {
    /// Its name in `pg_proc.probin`, such as `$libdir/postgis-3`.
    pub library: String,
    /// How many functions need it.
    pub functions: u64,
    /// The server's words.
    pub error: String,
    /// Packages that bring it, where known.
    pub packages: Option<String>,
}

/// Tries every library that functions of a database name; returns those that are not there.
///
/// A library that is there but refuses to be loaded this late (it wants `shared_preload_libraries`) does not
/// count as missing. Loading one may end the connection; the rest is tried on a new one.
///
/// # Errors
/// [`SqlError`] if the libraries cannot be listed or the server cannot be reached.
pub async fn missing_libraries(
    endpoint: &Endpoint,
    database: &str,
) -> Result<Vec<MissingLibrary>, SqlError> {
    let query = "SELECT probin, count(*) FROM pg_catalog.pg_proc
                 WHERE probin IS NOT NULL GROUP BY probin ORDER BY probin";
    let mut client = endpoint.connect(database).await?;
    let rows = client.query(query, &[]).await.map_err(failed("list the functions' libraries"))?;
    let mut missing = Vec::new();
    for row in rows {
        let library: String = row.get(0);
        if client.is_closed() {
            client = endpoint.connect(database).await?;
        }
        let load = format!("LOAD {}", literal(&library));
        let Err(error) = client.batch_execute(&load).await else { continue };
        let error = failed(format!("load the library \"{library}\""))(error);
        // undefined_file: the file or something it needs is not there
        if error.code() == Some("58P01") {
            missing.push(MissingLibrary {
                packages: packages(&library, endpoint.major),
                functions: count(row.get(1)),
                error: error.to_string(),
                library,
            });
        }
    }
    Ok(missing)
}

/// Extensions that come with PostgreSQL, in its contrib package.
const CONTRIB: [&str; 32] = [
    "adminpack",
    "amcheck",
    "autoinc",
    "bloom",
    "btree_gin",
    "btree_gist",
    "citext",
    "cube",
    "dblink",
    "dict_int",
    "dict_xsyn",
    "earthdistance",
    "fuzzystrmatch",
    "hstore",
    "insert_username",
    "_int",
    "isn",
    "lo",
    "ltree",
    "moddatetime",
    "pageinspect",
    "pg_buffercache",
    "pg_stat_statements",
    "pg_trgm",
    "pgcrypto",
    "pgrowlocks",
    "pgstattuple",
    "postgres_fdw",
    "refint",
    "tablefunc",
    "unaccent",
    "uuid-ossp",
];

/// Libraries of other projects: beginning of the name, Debian's and PGDG's package without the major.
const OTHERS: [(&str, &str, &str); 14] = [
    ("postgis", "postgresql-{}-postgis-3", "postgis3*_{}"),
    ("rtpostgis", "postgresql-{}-postgis-3", "postgis3*_{}"),
    ("address_standardizer", "postgresql-{}-postgis-3", "postgis3*_{}"),
    ("libpgrouting", "postgresql-{}-pgrouting", "pgrouting_{}"),
    ("vector", "postgresql-{}-pgvector", "pgvector_{}"),
    ("timescaledb", "timescaledb-2-postgresql-{}", "timescaledb-2-postgresql-{}"),
    ("citus", "postgresql-{}-citus", "citus_{}"),
    ("pg_cron", "postgresql-{}-cron", "pg_cron_{}"),
    ("pg_partman", "postgresql-{}-partman", "pg_partman_{}"),
    ("pglogical", "postgresql-{}-pglogical", "pglogical_{}"),
    ("pgaudit", "postgresql-{}-pgaudit", "pgaudit_{}"),
    ("hll", "postgresql-{}-hll", "hll_{}"),
    ("plpython", "postgresql-plpython3-{}", "postgresql{}-plpython3"),
    ("plperl", "postgresql-plperl-{}", "postgresql{}-plperl"),
];

/// Returns the packages that bring a library, for Debian and for RHEL with PGDG's repository.
fn packages(library: &str, major: Major) -> Option<String> {
    let name = library.rsplit('/').next().unwrap_or(library);
    let name = name.strip_suffix(".so").unwrap_or(name);
    let fill = |pattern: &str| pattern.replace("{}", &major.to_string());
    if CONTRIB.contains(&name) {
        // Debian's server package brings contrib since version 10
        return Some(fill("Debian: postgresql-{}; RHEL: postgresql{}-contrib"));
    }
    let (_, debian, rhel) = OTHERS.iter().find(|(beginning, ..)| name.starts_with(beginning))?;
    Some(format!("Debian: {}; RHEL: {}", fill(debian), fill(rhel)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_packages() {
        let cases = [
            ("$libdir/pg_trgm", Some("Debian: postgresql-15; RHEL: postgresql15-contrib")),
            ("$libdir/postgis-3.so", Some("Debian: postgresql-15-postgis-3; RHEL: postgis3*_15")),
            ("vector", Some("Debian: postgresql-15-pgvector; RHEL: pgvector_15")),
            ("/opt/own/thing.so", None),
            ("", None),
        ];
        for (library, want) in cases {
            let major = Major::try_from(15).unwrap();
            assert_eq!(packages(library, major).as_deref(), want, "{library}");
        }
    }

    #[test]
    fn literals_hold_any_text() {
        assert_eq!(literal("a'b"), "'a''b'");
        assert_eq!(literal(r"a\'b"), r" E'a\\''b'");
    }
}
