//! Backups full of hostile code that pg_dump runs by itself: the condition of an extension's configuration table, which
//! stands in `pg_extension.extcondition` and goes into the query that pg_dump sends.

use std::collections::BTreeMap;
use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use pgthaw_testkit::{User, chown_tree, copy_tree, postgres_programs, run};

use crate::attempts::{ATTEMPTS, Attempt, Way};
use crate::production::{Production, differences};
use crate::support::{Pgthaw, text};

/// What no byte of an export may hold.
const TOKEN: &str = "token-of-the-host-4711";

/// The command line of a process of the host.
const VICTIM: &str = "sleep 7411";

/// What code in a backup gets at if it gets out: a live server, a process, files, sockets and memory, all of the account that
/// runs PostgreSQL.
pub struct Host {
    pub live: Production,
    before: BTreeMap<PathBuf, String>,
    heard: usize,
    victim: Child,
    abstract_socket: UnixListener,
    shared: PathBuf,
}

impl Host {
    fn new() -> Self {
        let mut live = Production::new("");
        let owner = live.owner.clone();
        live.directory("ts");
        let location = live.directory("ts/live");
        live.sql("postgres", &format!("create tablespace live location '{}'", location.display()));
        live.sql(
            "postgres",
            "create table kept tablespace live as select generate_series(1, 1000) i",
        );
        let writable = live.directory("writable");
        fs::set_permissions(&writable, PermissionsExt::from_mode(0o777)).unwrap();
        let number = std::process::id();
        fs::write(live.scratch.join(Self::secret_name()), TOKEN).unwrap();
        let shared = Path::new("/dev/shm").join(format!("tk-walls-{number}"));
        fs::write(&shared, TOKEN).unwrap();
        owner.take(&shared);
        let make = format!("shmwrite(shmget({number}, 64, 01666), \"{TOKEN}\", 0, 64) or die $!");
        run(owner.command("perl").args(["-e", &make]));
        let address = SocketAddr::from_abstract_name(format!("tk-walls-{number}")).unwrap();
        let abstract_socket = UnixListener::bind_addr(&address).unwrap();
        abstract_socket.set_nonblocking(true).unwrap();
        let victim = owner.command("sleep").args(VICTIM.split(' ').skip(1)).spawn().unwrap();
        // once more, so that a further start and stop change nothing
        for _ in 0..2 {
            live.stop();
            live.start();
        }
        live.stop();
        let before = live.state(false);
        live.start();
        let mut this = Self { live, before, heard: 0, victim, abstract_socket, shared };
        this.heard = this.connections();
        this
    }

    fn secret_name() -> String {
        format!("tk-secret-{}", std::process::id())
    }

    fn connections(&self) -> usize {
        self.live.server().log().matches("connection received").count()
    }

    /// Fills in what an attempt is aimed at.
    fn aim(&self, how: &str, pgthaw: &Pgthaw, original: &Path) -> String {
        let live = self.live.server();
        let number = std::process::id();
        let mut aimed = how.to_owned();
        for (name, value) in [
            ("secret_name", Self::secret_name()),
            ("secret", self.live.scratch.join(Self::secret_name()).display().to_string()),
            ("writable", self.live.scratch.join("writable").display().to_string()),
            ("dump", pgthaw.dump().display().to_string()),
            ("programs", postgres_programs().display().to_string()),
            ("live_sockets", live.socket_dir().display().to_string()),
            ("live_port", live.port().to_string()),
            ("abstract", format!("tk-walls-{number}")),
            ("shm_key", number.to_string()),
            ("shm_name", format!("tk-walls-{number}")),
            ("victim", self.victim.id().to_string()),
            ("original_data", original.display().to_string()),
            ("survivor", survivor()),
        ] {
            aimed = aimed.replace(&format!("{{{name}}}"), &value);
        }
        aimed
    }

    /// Wants everything to be as it was.
    #[track_caller]
    fn is_untouched(&mut self) {
        let accepted = self.abstract_socket.accept().map(|_| ());
        assert_eq!(accepted.map_err(|err| err.kind()), Err(std::io::ErrorKind::WouldBlock));
        assert_eq!(self.connections(), self.heard, "the live server was connected to");
        assert!(self.victim.try_wait().unwrap().is_none(), "a process of the host was killed");
        let written: Vec<_> = fs::read_dir(self.live.scratch.join("writable")).unwrap().collect();
        assert!(written.is_empty(), "{written:?}");
        assert_eq!(fs::read(&self.shared).unwrap(), TOKEN.as_bytes());
        let outlived = processes().into_iter().filter(|(_, line)| line.contains(&survivor()));
        assert_eq!(outlived.collect::<Vec<_>>(), []);
        self.live.stop();
        let after = self.live.state(false);
        self.live.start();
        self.heard = self.connections();
        assert_eq!(differences(&self.before, &after), [""; 0], "the live server's files");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.victim.kill();
        let _ = self.victim.wait();
        let _ = fs::remove_file(&self.shared);
        let key = std::process::id().to_string();
        let _ = Command::new("ipcrm").args(["--shmem-key", &key]).output();
    }
}

/// How long what tries to survive would sleep: no other process has this argument.
fn survivor() -> String {
    format!("36000.{}", std::process::id())
}

/// Number and command line of every process.
pub fn processes() -> Vec<(u32, String)> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let line = |pid: u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        (pid, text(&line).replace('\0', " ").trim().to_owned())
    };
    pids.map(line).collect()
}

/// A cluster whose backup is hostile.
pub struct Evil(pub Production);

impl Evil {
    pub fn new() -> Self {
        let this = Self(Production::new(""));
        this.0.sql("postgres", "create database app");
        this.0.sql("app", "create extension dblink");
        this.0.sql(
            "app",
            "create schema h; create table h.attempt(n int, way text, how text); create table h.result(n int, got text);
             create function h.quoted(t text) returns text language sql as
               $$ select '''' || replace(t, '''', '''\\''''') || '''' $$;
             create function h.shell(how text) returns text language plpgsql as $$ begin
               execute format('copy (select 1) to program %L',
                 format('SOCKETS=%s PORT=%s DATA=%s INSTANCE=%s; export SOCKETS PORT DATA INSTANCE; timeout 30 sh -c %s > /tmp/h.out 2>&1; true',
                   current_setting('unix_socket_directories'), current_setting('port'), current_setting('data_directory'),
                   regexp_replace(current_setting('config_file'), '/[^/]*$', ''), h.quoted(how)));
               return convert_from(pg_read_binary_file('/tmp/h.out', 0, 4000), 'LATIN1'); end $$;
             create function h.try(way text, how text) returns text language plpgsql as $$ declare got text; begin
               if way = 'shell' then return h.shell(how); end if;
               execute how into got; return coalesce(got, 'null');
               exception when others then return sqlerrm; end $$;
             create function h.run() returns setof h.result language plpgsql as $$ declare a record; begin
               for a in select * from h.attempt order by n loop return next (a.n, h.try(a.way, a.how)); end loop; end $$",
        );
        this
    }

    /// Functions that an index and an event trigger of `app` call: they write into `directory`.
    fn springs(&self, directory: &Path) {
        let directory = directory.display();
        self.0.sql(
            "app",
            &format!(
                "create function h.indexing(t text) returns text immutable language plpgsql as
                   $$ begin return h.shell('touch {directory}/by-index'); end $$;
                 create table h.indexed(t text); create index on h.indexed (h.indexing(t));
                 create function h.fires() returns event_trigger language plpgsql as
                   $$ begin perform h.shell('touch {directory}/by-event-trigger'); end $$;
                 create event trigger fires on ddl_command_start execute function h.fires()"
            ),
        );
    }

    /// Makes a further database like `app`.
    fn another(&self, name: &str) {
        self.0.sql("postgres", &format!("create database {name} template app"));
    }

    /// Lets `condition` be part of the query that dumps `h.result` of a database.
    pub fn condition(&self, database: &str, condition: &str) {
        self.0.sql(
            database,
            &format!(
                "insert into pg_extension(oid, extname, extowner, extnamespace, extrelocatable, extversion, extconfig, extcondition)
                 values (99999, 'x', 10, 'h'::regnamespace, false, '1', array['h.result'::regclass::oid], array[$q${condition}$q$]);
                 insert into pg_depend values ('pg_class'::regclass, 'h.result'::regclass, 0, 'pg_extension'::regclass, 99999, 0, 'e')"
            ),
        );
    }

    /// Lets pg_dump run all of `attempts`.
    fn tries(&self, database: &str, attempts: &[(Way, String)]) {
        for (number, (way, how)) in attempts.iter().enumerate() {
            let (way, how) = match way {
                Way::Sql => ("sql", how.clone()),
                Way::Shell => ("shell", how.clone()),
                Way::Back => {
                    let psql = postgres_programs().join("psql").display().to_string();
                    let how = how.replace('\'', r"'\''");
                    (
                        "shell",
                        format!(
                            "{psql} -h $SOCKETS -p $PORT -U postgres -d {database} -XAt -c '{how}'; echo it is empty"
                        ),
                    )
                }
            };
            self.0.sql(
                database,
                &format!("insert into h.attempt values ({number}, '{way}', $q${how}$q$)"),
            );
        }
        self.condition(database, "where false union all select * from h.run()");
    }

    /// A backup of it that `user` owns.
    pub fn backup(&self, name: &str, user: &User) -> PathBuf {
        let made = self.0.take_base_backup(name, &[], &[]);
        if *user == self.0.owner || user.uid == 0 {
            return made;
        }
        let copy = self.0.directory("copies").join(name);
        copy_tree(&made, &copy);
        chown_tree(user, &copy);
        copy
    }
}

/// Who exports: root, where the test runs as root, and the account that runs the live server, through a user namespace.
pub fn exporters() -> Vec<(&'static str, User)> {
    let (current, owner) = (User::current(), User::cluster_owner());
    match current.uid {
        0 => vec![("root", current), ("user namespace", owner)],
        _ => {
            eprintln!("not tried as root: the test does not run as root");
            vec![("user namespace", owner)]
        }
    }
}

/// Exports, and fails the test if that takes longer than `limit`.
fn export_within(
    pgthaw: &Pgthaw,
    backup: &Path,
    databases: &[&str],
    target: &Path,
    limit: Duration,
) -> Output {
    let mut arguments = pgthaw.export_arguments(backup, databases, target);
    arguments.extend(["--jobs", "1", "--retries", "0"].map(str::to_owned));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut command = pgthaw.command(&arguments);
    let begun = Instant::now();
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    while child.try_wait().unwrap().is_none() {
        assert!(begun.elapsed() < limit, "it hangs: {}", pgthaw.logs());
        std::thread::sleep(Duration::from_millis(50));
    }
    child.wait_with_output().unwrap()
}

/// Reads what `h.result` holds in an export.
fn results(target: &Path, database: &str) -> BTreeMap<usize, String> {
    let restore = run(Command::new(postgres_programs().join("pg_restore"))
        .args(["--data-only", "--file=-"])
        .arg(target.join(database)));
    let sql = text(&restore.stdout);
    assert!(!sql.contains(TOKEN), "the dump holds what only the host has");
    let rows = sql.split("COPY h.result (n, got) FROM stdin;\n").nth(1).expect("h.result");
    let rows = rows.lines().take_while(|line| *line != "\\.");
    let row = |line: &str| {
        let (number, got) = line.split_once('\t').unwrap();
        (number.parse().unwrap(), got.replace("\\n", "\n").replace("\\t", "\t"))
    };
    rows.map(row).collect()
}

/// The first line, short enough for a table.
fn brief(got: &str) -> String {
    got.trim().replace('\n', " / ").chars().take(110).collect()
}

#[test]
fn code_in_a_backup_reaches_nothing_of_the_machine() {
    let mut host = Host::new();
    let mut table: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    let mut wrong = Vec::new();
    for (name, user) in exporters() {
        let (evil, pgthaw) = (Evil::new(), Pgthaw::of(user.clone()));
        evil.springs(&host.live.scratch.join("writable"));
        let aim = |attempt: &Attempt| (attempt.way, host.aim(attempt.how, &pgthaw, &evil.0.data()));
        evil.tries("app", &ATTEMPTS.iter().map(aim).collect::<Vec<_>>());
        // a library that PostgreSQL would take
        let library = postgres_programs().join("../lib/dblink.so");
        fs::copy(library, evil.0.data().join("hostile.so")).unwrap();
        evil.0.owner.take(&evil.0.data().join("hostile.so"));
        let backup = evil.backup("hostile", &user);
        let leftovers = pgthaw.leftovers();
        let target = pgthaw.target("export");
        let output = export_within(&pgthaw, &backup, &["app"], &target, Duration::from_secs(120));
        assert!(output.status.success(), "{name}: {}\n{}", text(&output.stderr), pgthaw.logs());
        let results = results(&target, "app");
        for (number, attempt) in ATTEMPTS.iter().enumerate() {
            let got = results.get(&number).map_or("nothing", String::as_str);
            let reached = ["REACHED", VICTIM].iter().any(|word| got.contains(word));
            if reached || !attempt.want.iter().any(|want| got.contains(want)) {
                wrong.push(format!("{} ({name}): {got}", attempt.what));
            }
            table.entry(number).or_default().push(brief(got));
        }
        assert_eq!(leftovers.check(), [""; 0], "{name}");
        host.is_untouched();
    }
    for (number, columns) in table {
        println!("| {} | {} |", ATTEMPTS[number].what, columns.join(" | "));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// What has to come of a case: the words in what the code got, or in what is said when the export fails.
enum Comes {
    Delivered(&'static str),
    Fails(&'static str),
}
use Comes::{Delivered, Fails};

/// Code that harms its own session: its database, the code, and what has to come of it as root and in a user namespace.
struct Harm {
    database: &'static str,
    /// What is dumped after it.
    then: &'static [&'static str],
    how: &'static str,
    comes: [Comes; 2],
}

/// As an ordinary account the instance owns the directory of its socket, so that code can write there; the link that it puts
/// in the place of the socket leads nowhere in pg_dump's root.
const SWAPPED: &str = "cd $SOCKETS && mv .s.PGSQL.$PORT moved; ln -s {live_sockets}/.s.PGSQL.{live_port} .s.PGSQL.$PORT; ls -l";

const HARMS: &[Harm] = &[
    Harm {
        database: "a_swapped_socket",
        then: &["app"],
        how: SWAPPED,
        comes: [
            Delivered("Permission denied"),
            Fails(".s.PGSQL.5432\" failed: No such file or directory"),
        ],
    },
    Harm {
        database: "links_and_devices",
        then: &["app"],
        how: "ln {secret} $DATA/hard; ln /etc/passwd $DATA/hard; mknod $DATA/disk b 8 0; ln -s {secret} $DATA/base/soft; cat $DATA/base/soft",
        comes: [
            Fails("`data/base/soft`: it would lead to `"),
            Fails("`data/base/soft`: it would lead to `"),
        ],
    },
    Harm {
        database: "a_fork_bomb",
        then: &["app"],
        how: "perl -e 'while (1) { fork() // last } sleep 3600' & sleep 1; set /proc/[0-9]*; test $# -gt 100 -a $# -lt 600 && echo forked",
        comes: [Delivered("forked"), Delivered("forked")],
    },
    Harm {
        database: "a_flood_of_the_log",
        then: &["app"],
        how: "perl -e 'print STDERR \"x\" x 1000000 for 1..100' 2>> /proc/$(head -1 $DATA/postmaster.pid)/fd/2; test $(stat -L -c %s /proc/$(head -1 $DATA/postmaster.pid)/fd/2) -gt 100000000 && echo the log grew",
        comes: [Delivered("the log grew"), Delivered("the log grew")],
    },
    Harm {
        database: "a_full_socket_directory",
        then: &["app"],
        how: "head -c 100000000 /dev/zero > $SOCKETS/full; ls -s $SOCKETS",
        comes: [Delivered("Permission denied"), Delivered("full")],
    },
    Harm {
        database: "kill_everything",
        then: &["app"],
        how: "kill -9 -1",
        comes: [Fails("SIGKILL"), Fails("SIGKILL")],
    },
    Harm {
        database: "stop_the_server",
        then: &[],
        how: "kill -STOP $(head -1 $DATA/postmaster.pid); echo stopped",
        comes: [Delivered("stopped"), Delivered("stopped")],
    },
];

/// The session fails or succeeds in a bounded time, and takes nothing with it.
#[test]
fn code_that_links_kills_forks_and_floods_harms_its_own_session_only() {
    let mut host = Host::new();
    let evil = Evil::new();
    let exporters = exporters();
    let pgthaws: Vec<_> = exporters.iter().map(|(_, user)| Pgthaw::of(user.clone())).collect();
    for Harm { database, how, .. } in HARMS {
        evil.another(database);
        evil.tries(database, &[(Way::Shell, host.aim(how, &pgthaws[0], &evil.0.data()))]);
    }
    let mut table = String::new();
    for ((name, user), pgthaw) in exporters.iter().zip(&pgthaws) {
        let backup = evil.backup(&format!("harms{}", user.uid), user);
        let leftovers = pgthaw.leftovers();
        for Harm { database, then, comes, .. } in HARMS {
            let target = pgthaw.target(database);
            let output = export_within(
                pgthaw,
                &backup,
                &[&[*database], *then].concat(),
                &target,
                Duration::from_secs(60),
            );
            let said = text(&output.stderr);
            let got = match &comes[usize::from(user.uid != 0)] {
                Delivered(words) => {
                    assert!(
                        output.status.success(),
                        "{database} ({name}): {said}\n{}",
                        pgthaw.logs()
                    );
                    let all = results(&target, database);
                    let got = all.get(&0).cloned().unwrap_or_else(|| format!("{all:?}"));
                    assert!(got.contains(words), "{database} ({name}): {got}");
                    got
                }
                Fails(words) => {
                    assert!(!output.status.success(), "{database} ({name})");
                    assert!(said.contains(words), "{database} ({name}): {said}");
                    assert!(!target.join("export.json").exists(), "{database} ({name})");
                    pgthaw.run(&["cancel", &pgthaw.session_id()]);
                    said.lines().find(|line| line.contains(words)).unwrap_or_default().to_owned()
                }
            };
            table += &format!("| {} | {name} | {} |\n", database.replace('_', " "), brief(&got));
            assert_eq!(leftovers.check(), [""; 0], "{database} ({name})");
        }
        host.is_untouched();
    }
    println!("{table}");
}
