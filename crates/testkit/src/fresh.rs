//! Loading a delivered export the way a user would: with psql and pg_restore, into a server of its own.

use std::fs;
use std::ops::Deref;
use std::path::Path;

use crate::scratch::Scratch;
use crate::server::Server;
use crate::user::{User, run};

/// A newly made server with an export in it. Use it as the [`Server`] it is; it is gone when dropped.
#[derive(Debug)]
pub struct FreshServer {
    server: Server,
    dir: Scratch,
}

impl FreshServer {
    /// Makes an empty server. Its superuser is `admin`, so that a `globals.sql` can make every role.
    pub fn new() -> Self {
        let (dir, owner) = (Scratch::new(), User::cluster_owner());
        let data = dir.join("pgdata");
        fs::create_dir(&data).expect("directory in one of ours");
        owner.take(&data);
        Server::init(&owner, &data, "admin");
        let options = "-c max_wal_size=2GB -c autovacuum=off -c full_page_writes=off -c synchronous_commit=off -c shared_preload_libraries=pg_stat_statements";
        Self { server: Server::start(&owner, &data, "admin", options), dir }
    }

    /// Runs a `globals.sql`; the tablespaces it makes get directories of this server.
    pub fn load_globals(&self, globals: &Path) {
        let mut sql = String::new();
        let text = fs::read_to_string(globals)
            .unwrap_or_else(|err| panic!("{}: {err}", globals.display()));
        for (number, line) in text.lines().enumerate() {
            match line
                .strip_prefix("CREATE TABLESPACE ")
                .and_then(|rest| rest.split_once(" LOCATION "))
            {
                Some((rest, _)) => {
                    let location = self.dir.join(format!("tablespace{number}"));
                    fs::create_dir(&location).expect("directory in one of ours");
                    self.owner().take(&location);
                    sql.push_str(&format!(
                        "CREATE TABLESPACE {rest} LOCATION '{}';\n",
                        location.display()
                    ));
                }
                None => sql.extend([line, "\n"]),
            }
        }
        let file = self.dir.join("globals.sql");
        fs::write(&file, sql).expect("file in a directory of ours");
        run(self.psql("postgres").arg("--file").arg(file));
    }

    /// Loads one database from a dump in directory format; it gets the name it was dumped under.
    pub fn load_database(&self, dump: &Path) {
        let mut command = self.client("pg_restore");
        command.args(["--create", "--dbname=postgres", "--jobs=2", "--exit-on-error"]);
        run(command.arg(dump));
    }
}

impl Default for FreshServer {
    fn default() -> Self {
        Self::new()
    }
}

impl Deref for FreshServer {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}

/// Loads an export, `globals.sql` first and then every database in it, into a new server.
pub fn restore_dump_into_fresh_server(export: &Path) -> FreshServer {
    let server = FreshServer::new();
    server.load_globals(&export.join("globals.sql"));
    let entries = fs::read_dir(export).unwrap_or_else(|err| panic!("{}: {err}", export.display()));
    let mut dumps: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    dumps.retain(|path| path.join("toc.dat").exists());
    dumps.sort();
    assert!(!dumps.is_empty(), "no database in {}", export.display());
    for dump in dumps {
        server.load_database(&dump);
    }
    server
}
