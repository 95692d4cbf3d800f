//! A small real cluster, its repositories, and the tools that made them.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

const BINARIES: &str = "/usr/lib/postgresql/15/bin";
/// Any number: it only names the socket.
const PORT: &str = "5433";

/// A running cluster with a tablespace, in a directory of its own; stopped when dropped.
pub struct Cluster {
    dir: TempDir,
    running: Vec<PathBuf>,
}

impl Cluster {
    /// Makes and starts one: page checksums, `pg_wal` and `pg_ident.conf` behind links, WAL archived by `cp` and, with
    /// `segment_size` other than "1" (MiB), by pgBackRest, which takes its time for each segment.
    pub fn start(segment_size: &str) -> Self {
        let pgbackrest = segment_size != "1";
        let dir = tempfile::Builder::new().prefix("pgsrc").tempdir_in("/tmp").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let mut cluster = Self { dir, running: Vec::new() };
        cluster.give(&cluster.path(""));
        for name in ["ts", "conf", "log", "lock", "plain", "restored", "base"] {
            fs::create_dir(cluster.path(name)).unwrap();
            cluster.give(&cluster.path(name));
        }
        let segment_size = format!("--wal-segsize={segment_size}");
        let (data, wal) = (cluster.text("pg"), cluster.text("wal"));
        let initdb =
            ["-D", &data, "-X", &wal, "-k", "-U", "postgres", "-A", "trust", &segment_size, "-N"];
        cluster.postgres("initdb", &initdb);
        cluster.configure("gz");
        let settings = format!(
            "listen_addresses=''\nunix_socket_directories='{top}'\nport={PORT}\nfsync=off\narchive_mode=on\n\
             max_wal_size=64MB\narchive_command='{push}cp %p {top}/plain/%f'\n",
            top = cluster.text(""),
            push = if pgbackrest {
                format!(
                    "pgbackrest --config={}/br.conf --stanza=demo archive-push %p && ",
                    cluster.text("")
                )
            } else {
                String::new()
            }
        );
        let file = cluster.path("pg/postgresql.conf");
        fs::write(&file, fs::read_to_string(&file).unwrap() + &settings).unwrap();
        fs::rename(cluster.path("pg/pg_ident.conf"), cluster.path("conf/pg_ident.conf")).unwrap();
        std::os::unix::fs::symlink("../conf/pg_ident.conf", cluster.path("pg/pg_ident.conf"))
            .unwrap();
        cluster.run(cluster.path("pg"));
        if pgbackrest {
            cluster.pgbackrest(&["stanza-create"]);
        }
        cluster
    }

    /// Starts a server on `data`.
    pub fn run(&mut self, data: PathBuf) {
        let log = self.text("log/server.log");
        self.running.push(data.clone());
        self.postgres("pg_ctl", &["-D", data.to_str().unwrap(), "-w", "-s", "-l", &log, "start"]);
    }

    /// Stops the server that was started last.
    pub fn stop(&mut self) {
        if let Some(data) = self.running.pop() {
            self.postgres(
                "pg_ctl",
                &["-D", data.to_str().unwrap(), "-w", "-s", "-m", "fast", "stop"],
            );
        }
    }

    /// A path below the cluster's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        if name.is_empty() { self.dir.path().to_path_buf() } else { self.dir.path().join(name) }
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn give(&self, path: &Path) {
        if is_root() {
            let owner = fs::metadata("/var/lib/postgresql").unwrap();
            use std::os::unix::fs::MetadataExt;
            chown(path, Some(owner.uid()), Some(owner.gid())).unwrap();
        }
    }

    /// Lets pgBackRest compress with `method` from now on, the WAL too.
    pub fn configure(&self, method: &str) {
        let top = self.text("");
        let repositories: String =
            (1..=4).map(|n| format!("repo{n}-path={top}/repo{n}\n")).collect();
        let text = format!(
            "[global]\n{repositories}repo2-bundle=y\nrepo3-bundle=y\nrepo3-bundle-limit=64KiB\nlog-path={top}/log\n\
             lock-path={top}/lock\nlog-level-console=error\nlog-level-file=off\nstart-fast=y\ncompress-type={method}\n\
             [demo]\npg1-path={top}/pg\npg1-socket-path={top}\npg1-port={PORT}\n"
        );
        let file = self.path("br.conf");
        fs::write(&file, text).unwrap();
        self.give(&file);
    }

    /// Runs pgBackRest on the stanza `demo`.
    pub fn pgbackrest(&self, arguments: &[&str]) {
        let config = format!("--config={}", self.text("br.conf"));
        let mut all = vec![config.as_str(), "--stanza=demo"];
        all.extend(arguments);
        self.command("pgbackrest", &all);
    }

    /// Runs one of PostgreSQL's programs.
    pub fn postgres(&self, program: &str, arguments: &[&str]) {
        self.command(&format!("{BINARIES}/{program}"), arguments);
    }

    /// Runs `pg_basebackup` into `base/<name>`, tablespaces beside it.
    pub fn basebackup(&self, name: &str, tablespace: u32, arguments: &[&str]) -> PathBuf {
        let (host, target) = (self.text(""), self.text(&format!("base/{name}")));
        let mapping =
            format!("{}={}", self.text("ts"), self.text(&format!("base/{name}_{tablespace}")));
        let mut all = vec![
            "-h", &host, "-p", PORT, "-U", "postgres", "-c", "fast", "-D", &target, "-T", &mapping,
        ];
        all.extend(arguments);
        self.postgres("pg_basebackup", &all);
        target.into()
    }

    /// Runs SQL and returns what it prints.
    pub fn sql(&self, database: &str, sql: &str) -> String {
        let host = self.text("");
        let arguments = ["-h", &host, "-p", PORT, "-U", "postgres", "-d", database, "-XAtqc", sql];
        let output = self.command(&format!("{BINARIES}/psql"), &arguments);
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Ends the current WAL segment and waits until it is archived.
    pub fn archive(&self) -> String {
        let segment = self.sql("postgres", "SELECT pg_walfile_name(pg_switch_wal())");
        for _ in 0..200 {
            if self.path(&format!("plain/{segment}")).exists() {
                return segment;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        panic!(
            "{segment} was not archived: {}",
            fs::read_to_string(self.path("log/server.log")).unwrap()
        );
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Output {
        let mut command = if is_root() {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=postgres", "--regid=postgres", "--init-groups", program]);
            command
        } else {
            Command::new(program)
        };
        let command = command
            .args(arguments)
            .current_dir(self.dir.path())
            .env("LC_ALL", "C")
            .env("HOME", self.dir.path());
        let out = tempfile::tempfile().unwrap(); // a server keeps a pipe open
        let status = command.stderr(out.try_clone().unwrap()).output_to_file(&out);
        let text = read_back(&out);
        assert!(status.success(), "{program} {arguments:?}: {text}");
        Output { status, stdout: text.into_bytes(), stderr: Vec::new() }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        while let Some(data) = self.running.pop() {
            // An error only means that the server is gone.
            let program = format!("{BINARIES}/pg_ctl");
            let stop = ["-D", data.to_str().unwrap_or_default(), "-s", "-m", "immediate", "stop"];
            let mut command = Command::new("setpriv");
            command
                .args(["--reuid=postgres", "--regid=postgres", "--init-groups", &program])
                .args(stop);
            if !is_root() {
                command = Command::new(&program);
                command.args(stop);
            }
            let _ = command.stderr(std::process::Stdio::null()).status();
        }
    }
}

trait OutputToFile {
    fn output_to_file(&mut self, out: &fs::File) -> std::process::ExitStatus;
}

impl OutputToFile for Command {
    fn output_to_file(&mut self, out: &fs::File) -> std::process::ExitStatus {
        self.stdin(std::process::Stdio::null()).stdout(out.try_clone().unwrap()).status().unwrap()
    }
}

fn read_back(mut file: &fs::File) -> String {
    use std::io::{Read, Seek};
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

/// Whether the test runs as root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Copies a directory, links as links.
pub fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(status.success());
}
