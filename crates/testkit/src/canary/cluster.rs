//! A small production cluster with a tablespace outside its data directory, stopped or running.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use super::Ground;
use super::snapshot::{Allowed, Look, Snapshot};
use crate::kept::Kept;
use crate::server::{Server, postgres_programs};
use crate::tree::{chown_tree, copy_tree};
use crate::user::{User, run};

/// Names a canary's server in the titles of its processes.
pub(super) const CLUSTER_NAME: &str = "production";

/// What a start and a stop change in a data directory of an idle cluster, found by experiment on PostgreSQL 15.
const BY_A_START: [(&str, Allowed); 12] = [
    ("", Allowed::Times), // of postmaster.pid, which comes and goes
    ("postmaster.opts", Allowed::All),
    ("global", Allowed::Times),
    ("global/pg_control", Allowed::All),
    ("pg_dynshmem", Allowed::All), // in /dev/shm it would be taken for what an export left
    ("pg_wal", Allowed::All),      // the checkpoint of the stop
    ("pg_stat", Allowed::All),
    ("pg_logical", Allowed::Times),
    ("pg_logical/replorigin_checkpoint", Allowed::Times),
    ("pg_multixact/offsets/0000", Allowed::Times),
    ("pg_subtrans/0000", Allowed::Times),
    ("pg_xact/0000", Allowed::Times),
];
/// What else is different when the host of a running cluster crashed.
const BY_A_CRASH: (&str, Allowed) = ("postmaster.pid", Allowed::All);

/// Longest time that a server gets to end.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// The cluster that all canaries are copies of.
const KEPT: Kept = Kept {
    name: "tk-canary",
    made_from: &[include_str!("cluster.rs"), include_str!("../server.rs")],
};

#[derive(Debug, Serialize, Deserialize)]
struct Template {
    data: PathBuf,
    tablespace: PathBuf,
}

impl Template {
    /// Makes a cluster of one database, so that a copy is cheap, and stops it.
    fn build(dir: &Path) -> Self {
        let owner = User::cluster_owner();
        let made = Self { data: dir.join("pgdata"), tablespace: dir.join("tablespace") };
        for path in [&made.data, &made.tablespace] {
            fs::create_dir(path).expect("directory in one of ours");
            owner.take(path);
        }
        Server::init(&owner, &made.data, "postgres");
        let server = Server::start(&owner, &made.data, "postgres", "-c autovacuum=off");
        let tablespace = made.tablespace.display();
        for sql in [
            "ALTER DATABASE template0 IS_TEMPLATE false",
            "ALTER DATABASE template1 IS_TEMPLATE false",
            "DROP DATABASE template0",
            "DROP DATABASE template1",
            &format!("CREATE TABLESPACE production LOCATION '{tablespace}'"),
            "CREATE TABLE public.orders AS SELECT n, md5(n::text) FROM generate_series(1, 1000) AS n",
            "CREATE TABLE public.invoices TABLESPACE production AS SELECT * FROM public.orders",
            "VACUUM (FREEZE, ANALYZE)", // nobody who only reads has hint bits to write
            "CHECKPOINT",
        ] {
            server.sql("postgres", sql);
        }
        server.stop("fast");
        drop(server);
        run(owner
            .command(postgres_programs().join("pg_resetwal"))
            .args(["--wal-segsize=1", "--pgdata"])
            .arg(&made.data));
        fs::remove_file(made.data.join("server.log")).expect("the log of the server");
        // A start removes them.
        let databases = fs::read_dir(made.data.join("base")).expect("a data directory").flatten();
        for dir in databases.map(|entry| entry.path()).chain([made.data.join("global")]) {
            let _ = fs::remove_file(dir.join("pg_internal.init"));
        }
        made
    }
}

/// A copy of the template.
#[derive(Debug)]
pub(super) struct CanaryCluster {
    /// Its data directory as its own machine has it.
    data: PathBuf,
    tablespace: PathBuf,
    before: [Snapshot; 2],
    server: Option<Running>,
}

#[derive(Debug)]
struct Running {
    port: u16,
    sockets: PathBuf,
    log: PathBuf,
    /// As its own machine has it.
    pid: i32,
}

impl CanaryCluster {
    /// Makes one that does not run.
    pub fn stopped(ground: &dyn Ground, data: &Path, tablespace: &Path) -> Self {
        copy(ground, data, tablespace);
        Self::new(ground, data, tablespace)
    }

    /// Makes one that runs and is reached by a socket in `sockets`, on `port` or a free one.
    pub fn running(
        ground: &dyn Ground,
        data: &Path,
        tablespace: &Path,
        sockets: &Path,
        port: Option<u16>,
    ) -> Self {
        copy(ground, data, tablespace);
        let port = port.unwrap_or_else(free_port);
        let config = ground.path(&data.join("postgresql.conf"));
        let mut config = fs::File::options().append(true).open(config).expect("made by initdb");
        writeln!(
            config,
            "cluster_name = '{CLUSTER_NAME}'\nlisten_addresses = '127.0.0.1'\nport = {port}\n\
             unix_socket_directories = '{}'\nautovacuum = off\nmax_logical_replication_workers = 0\n\
             log_connections = on\nfsync = off\n\
             dynamic_shared_memory_type = mmap\nshared_buffers = 1MB\nmax_connections = 10",
            sockets.display()
        )
        .expect("write postgresql.conf");
        let mut cluster = Self::new(ground, data, tablespace);
        let log = data.with_extension("log");
        // It looks at postmaster.pid, and does not connect.
        let mut start = ground.command(&postgres_programs().join("pg_ctl"));
        start.args(["start", "--wait", "--silent", "--pgdata"]).arg(data).arg("--log").arg(&log);
        run(&mut start);
        let pid = pid_of(ground, data).expect("a server that is ready");
        cluster.server = Some(Running { port, sockets: sockets.into(), log, pid });
        cluster
    }

    fn new(ground: &dyn Ground, data: &Path, tablespace: &Path) -> Self {
        let before = [data, tablespace].map(|path| Snapshot::of(&ground.path(path), Look::Whole));
        Self { data: data.into(), tablespace: tablespace.into(), before, server: None }
    }

    pub fn data(&self) -> &Path {
        &self.data
    }

    pub fn tablespace(&self) -> &Path {
        &self.tablespace
    }

    /// Returns the directory of the running one's socket, and its port.
    pub fn address(&self) -> Option<(&Path, u16)> {
        self.server.as_ref().map(|server| (server.sockets.as_path(), server.port))
    }

    /// Stops one that runs, and returns a line for each thing that is not as it was. A server that has `crashed` with its
    /// host does not run.
    pub fn check(&mut self, ground: &dyn Ground, crashed: bool) -> Vec<String> {
        let (mut found, mut allowed) = (Vec::new(), Vec::new());
        if let Some(server) = &self.server {
            let pid = pid_of(ground, &self.data);
            if !crashed && pid != Some(server.pid) {
                found.push(format!("the running cluster's server was {}, is {pid:?}", server.pid));
            }
            allowed.extend(BY_A_START);
            allowed.extend(crashed.then_some(BY_A_CRASH));
            let log = fs::read_to_string(ground.path(&server.log)).unwrap_or_default();
            let connections: Vec<_> =
                log.lines().filter(|line| line.contains("connection received")).collect();
            if !connections.is_empty() {
                found.push(format!("{} connections: {connections:?}", connections.len()));
            }
            self.stop(ground);
        }
        found.extend(self.before[0].differences_at(&ground.path(&self.data), &allowed));
        found.extend(self.before[1].differences_at(&ground.path(&self.tablespace), &[]));
        found
    }

    /// Stops one that runs.
    pub fn stop(&mut self, ground: &dyn Ground) {
        let Some(pid) = self.server.as_ref().and_then(|_| pid_of(ground, &self.data)) else {
            return;
        };
        let Some(here) = ground.pid_here(pid).and_then(Pid::from_raw) else { return };
        // An error of a signal only means that it has ended.
        for signal in [Signal::INT, Signal::KILL] {
            let _ = kill_process(here, signal);
            let end = Instant::now() + STOP_LIMIT;
            while Instant::now() < end {
                if pid_of(ground, &self.data).is_none() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// Copies the template for the ground's owner.
fn copy(ground: &dyn Ground, data: &Path, tablespace: &Path) {
    let template = KEPT.get(Template::build);
    let (to, beside) = (ground.path(data), ground.path(tablespace));
    copy_tree(&template.data, &to);
    copy_tree(&template.tablespace, &beside);
    for link in fs::read_dir(to.join("pg_tblspc")).expect("every data directory has one").flatten()
    {
        fs::remove_file(link.path()).expect("a link of the copy");
        symlink(tablespace, link.path()).expect("a link of the copy");
    }
    chown_tree(ground.owner(), &to);
    chown_tree(ground.owner(), &beside);
}

/// Returns the pid of the server on `data`, as its own machine has it, while it runs.
fn pid_of(ground: &dyn Ground, data: &Path) -> Option<i32> {
    let text = fs::read_to_string(ground.path(&data.join("postmaster.pid"))).ok()?;
    let pid = text.lines().next()?.parse().ok()?;
    ground.pid_here(pid).map(|_| pid)
}

fn free_port() -> u16 {
    let free = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr());
    free.expect("free port").port()
}
