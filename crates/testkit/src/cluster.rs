//! The sample cluster: small, deterministic, and with a bit of everything that makes a dump difficult.

use std::fs;
use std::io::Write;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::server::{Server, postgres_programs};
use crate::user::{User, run};

/// The name of the database that needs quoting in SQL and encoding as a file name.
pub const ODD_NAME: &str = "we ird/\"name\"";

const GLOBALS: &str = include_str!("../sql/globals.sql");
const SALES: &str = include_str!("../sql/sales.sql");
const CRM: &str = include_str!("../sql/crm.sql");
const WAREHOUSE: &str = include_str!("../sql/warehouse.sql");
const ODD_NAMES: &str = include_str!("../sql/odd_names.sql");
const HOSTILE: &str = include_str!("../sql/hostile.sql");

/// How much data a cluster holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// About 150 MB, for tests.
    Tiny,
    /// About 1 GB.
    Small,
    /// About 4.7 GB, of which `crm` is 77 MB, for measurements.
    Medium,
}

/// Numbers of rows, and what else follows from the [`Scale`].
struct Size {
    pgbench: u32,
    customers: u32,
    documents: u32,
    large_objects: u32,
    accounts: u32,
    facts: u32,
}

impl Scale {
    fn size(self) -> Size {
        match self {
            Self::Tiny => Size {
                pgbench: 1,
                customers: 4_000,
                documents: 3,
                large_objects: 4,
                accounts: 1_500,
                facts: 10_000,
            },
            Self::Small => Size {
                pgbench: 10,
                customers: 20_000,
                documents: 80,
                large_objects: 20,
                accounts: 20_000,
                facts: 350_000,
            },
            Self::Medium => Size {
                pgbench: 50,
                customers: 20_000,
                documents: 200,
                large_objects: 100,
                accounts: 40_000,
                facts: 2_400_000,
            },
        }
    }
}

/// What a cluster has beside the sample data.
#[derive(Debug, Clone)]
pub struct ClusterOptions {
    /// The account that runs it.
    pub owner: User,
    /// Whether it has a database called [`ODD_NAME`].
    pub odd_names: bool,
    /// Whether its roles and databases have settings that make a careless dump wrong.
    pub hostile: bool,
    /// Whether it logs each connection.
    pub log_connections: bool,
    /// Further lines of `postgresql.conf`.
    pub settings: String,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        let (owner, settings) = (User::cluster_owner(), String::new());
        Self { owner, odd_names: false, hostile: false, log_connections: true, settings }
    }
}

/// A running sample cluster: databases `sales`, `crm`, `warehouse`, `empty`, and the tablespace `ts_sales`
/// outside of the data directory. Use it as the [`Server`] it is.
#[derive(Debug)]
pub struct Cluster {
    server: Server,
    tablespace: PathBuf,
    scale: Scale,
}

impl Cluster {
    /// Builds one in `dir` (as `dir/pgdata` and `dir/ts_sales`), which the cluster's owner must be able to enter.
    pub fn build(dir: &Path, scale: Scale, options: &ClusterOptions) -> Self {
        let owner = &options.owner;
        let (data, tablespace) = (dir.join("pgdata"), dir.join("ts_sales"));
        for made in [&data, &tablespace] {
            fs::create_dir_all(made)
                .unwrap_or_else(|err| panic!("create {}: {err}", made.display()));
            owner.take(made);
        }
        Server::init(owner, &data, "postgres");
        let mut config = fs::OpenOptions::new()
            .append(true)
            .open(data.join("postgresql.conf"))
            .expect("made by initdb");
        writeln!(
            config,
            "wal_level = replica\nmax_wal_size = 2GB\nshared_buffers = 64MB\nautovacuum = off\nsynchronous_commit = off\n\
             # a restored server must cope with a library that wants to be loaded first\n\
             shared_preload_libraries = 'pg_stat_statements'\nlog_connections = {}\n{}",
            options.log_connections, options.settings
        )
        .expect("write postgresql.conf");

        let cluster =
            Self { server: Server::start(owner, &data, "postgres", ""), tablespace, scale };
        cluster.fill(options);
        cluster
    }

    fn fill(&self, options: &ClusterOptions) {
        let size = self.scale.size();
        let location = self.tablespace.display().to_string();
        self.run_file("postgres", GLOBALS, &[("tablespace", &location)]);
        std::thread::scope(|threads| {
            threads.spawn(|| {
                self.run_file("warehouse", WAREHOUSE, &[("rows", &size.facts.to_string())])
            });
            threads.spawn(|| {
                let mut pgbench = self.client("pgbench");
                pgbench.args([
                    "--initialize",
                    "--quiet",
                    "--init-steps=dtGvpf",
                    "--scale",
                    &size.pgbench.to_string(),
                ]);
                // Its table names are not qualified.
                run(pgbench.env("PGOPTIONS", "-c client_min_messages=warning").arg("sales"));
                let numbers = [size.customers, size.documents, size.large_objects]
                    .map(|number| number.to_string());
                let names = ["customers", "documents", "large_objects"];
                let variables: Vec<_> =
                    names.into_iter().zip(numbers.iter().map(String::as_str)).collect();
                self.run_file("sales", SALES, &variables);
                self.run_file("crm", CRM, &[("accounts", &size.accounts.to_string())]);
            });
        });
        if options.odd_names {
            self.sql("postgres", &format!("CREATE DATABASE \"{}\"", ODD_NAME.replace('"', "\"\"")));
            self.run_file(ODD_NAME, ODD_NAMES, &[]);
        }
        if options.hostile {
            self.run_file("postgres", HOSTILE, &[]);
        }
        self.sql("postgres", "CHECKPOINT");
    }

    fn run_file(&self, database: &str, sql: &str, variables: &[(&str, &str)]) {
        let mut psql = self.psql(database);
        psql.env("PGOPTIONS", "-c client_min_messages=error");
        psql.args(variables.iter().map(|(name, value)| format!("--set={name}={value}")));
        psql.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = psql.spawn().expect("psql starts");
        // An error ends psql before it has read everything; what it says is told below.
        let _ = child.stdin.take().expect("piped").write_all(sql.as_bytes());
        let output = child.wait_with_output().expect("psql ends");
        assert!(output.status.success(), "{database}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Returns the directory of the tablespace `ts_sales`.
    pub fn tablespace(&self) -> &Path {
        &self.tablespace
    }

    /// Returns PostgreSQL's major version.
    pub fn major_version(&self) -> u32 {
        let output =
            run(self.owner().command(postgres_programs().join("postgres")).arg("--version"));
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        let digits = text.trim_start_matches(|char: char| !char.is_ascii_digit());
        digits
            .split(|char: char| !char.is_ascii_digit())
            .next()
            .and_then(|major| major.parse().ok())
            .expect("a version")
    }
}

impl Deref for Cluster {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}
