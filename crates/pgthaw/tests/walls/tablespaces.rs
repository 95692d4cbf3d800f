//! Exports beside the production cluster whose tablespaces the backup's WAL makes: the rows are right, and production does
//! not change.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use pgthaw_testkit::{
    BackupOptions, BackupType, PgBackRest, Scratch, User, chown_tree, copy_tree, postgres_programs,
    run,
};

use crate::production::{Production, differences};
use crate::support::{Pgthaw, text, wait_for};

/// Rows by table, tables by database.
type Rows = BTreeMap<String, BTreeMap<String, Vec<String>>>;

/// Production, and what was backed up and archived of it at some time.
struct Story {
    production: Production,
    with_manifest: PathBuf,
    without_manifest: PathBuf,
    pgbackrest: PgBackRest,
    archive: PathBuf,
    /// At the end of the base backups, and of the archived WAL.
    rows: [Rows; 2],
    locations: [BTreeMap<String, String>; 2],
    /// A directory of ours among programs; none if only root could make it.
    among_programs: Option<PathBuf>,
}

/// What the databases are called that are exported at the end of the archive; the first is there at the end of the backup.
const DATABASES: [&str; 4] = ["app", "moved", "there", "copied"];

impl Story {
    fn happen() -> Self {
        let production = Production::new("allow_in_place_tablespaces = on");
        let archive = production.directory("archive");
        let pgbackrest = PgBackRest::create(
            production.server(),
            &production.directory("pgbackrest"),
            "demo",
            "lz4",
        );
        let keep = format!(" && cp %p {}/%f", archive.display());
        let push = production.sql("postgres", "show archive_command");
        let archive_with = |command: &str| {
            let command = command.replace('\'', "''");
            production.sql("postgres", &format!("alter system set archive_command = '{command}'"));
            production.sql("postgres", "select pg_reload_conf()");
        };
        archive_with(&(push + &keep));
        let mut this = Self {
            with_manifest: PathBuf::new(),
            without_manifest: PathBuf::new(),
            among_programs: None,
            rows: Default::default(),
            locations: Default::default(),
            production,
            pgbackrest,
            archive,
        };
        this.before();
        this.backups();
        (this.rows[0], this.locations[0]) = this.known(&["app"]);
        this.after();
        this.production.server().archive_all();
        (this.rows[1], this.locations[1]) = this.known(&DATABASES);
        let production = &this.production;
        let command = "alter system set archive_command = '/bin/true'";
        production.sql("postgres", command);
        production.sql("postgres", "select pg_reload_conf()");
        this.later();
        this
    }

    /// Makes a tablespace with a table of rows that tell where they belong.
    fn tablespace(&self, name: &str, location: &Path) {
        self.production.directory(location);
        let location = location.display().to_string().replace('\'', "''");
        self.production.sql("app", &format!("create tablespace \"{name}\" location '{location}'"));
        self.production.sql(
            "app",
            &format!("create table \"t_{name}\" tablespace \"{name}\" as select i, '{name}' v from generate_series(1, 500) i"),
        );
    }

    fn remove(&self, name: &str) {
        self.production.sql("app", &format!("drop table \"t_{name}\""));
        self.production.sql("app", &format!("drop tablespace \"{name}\""));
    }

    fn place(&self, name: &str) -> PathBuf {
        self.production.scratch.join("ts").join(name)
    }

    fn before(&self) {
        let production = &self.production;
        production.sql("postgres", "create database app");
        production.sql("postgres", "create database moved");
        production.sql("moved", "create table m as select generate_series(1, 100) i");
        self.tablespace("old", &self.place("old"));
    }

    /// Two base backups at a time and one by pgBackRest; tablespaces come and go while they run.
    fn backups(&mut self) {
        let old = self.place("old");
        let slow = ["--checkpoint=fast", "--max-rate=12M"];
        let (with, mut first) = self.production.base_backup("with", &[&old], &slow);
        let without = [&slow[..], &["--no-manifest"]].concat();
        let (without, mut second) = self.production.base_backup("without", &[&old], &without);
        let mut running = [&mut first, &mut second].map(|command| command.spawn().unwrap());
        let streaming = "select count(*) = 2 from pg_stat_progress_basebackup where phase = 'streaming database files'";
        wait_for("two base backups", || {
            (self.production.sql("postgres", streaming) == "t").then_some(())
        });
        self.tablespace("during", &self.place("during"));
        self.tablespace("gone during", &self.place("gone during"));
        self.remove("gone during");
        for child in &mut running {
            assert!(child.try_wait().unwrap().is_none(), "a backup ended too early");
        }
        for child in &mut running {
            assert!(child.wait().unwrap().success());
        }
        let options = BackupOptions { kind: BackupType::Full, compress: "lz4", bundle: true };
        self.pgbackrest.backup(&options);
        (self.with_manifest, self.without_manifest) = (with, without);
    }

    fn after(&mut self) {
        self.tablespace("after", &self.place("after"));
        self.tablespace("dropped", &self.place("dropped"));
        self.remove("dropped");
        self.tablespace("first", &self.place("again"));
        self.remove("first");
        self.tablespace("again", &self.place("again"));
        self.tablespace("one", &self.place("parent/one"));
        self.tablespace("two", &self.place("parent/two"));
        self.tablespace("nested", &self.place("after/nested"));
        self.tablespace("odd", &self.place("a b"));
        self.tablespace("inside", &self.production.data().join("inside"));
        self.production.directory("ts/real");
        symlink(self.place("real"), self.place("link")).unwrap();
        self.tablespace("linked", &self.place("link"));
        let production = &self.production;
        production.sql("app", "create tablespace place location ''");
        production.sql("app", "create table t_place tablespace place as select 1 i");
        production.directory("ts/spare");
        let spare = format!("create tablespace spare location '{}'", self.place("spare").display());
        production.sql("app", &spare);
        production.sql("app", "create database there tablespace spare");
        production.sql("there", "create table t as select generate_series(1, 50) i");
        production.sql("app", "create database copied tablespace spare strategy file_copy");
        production.sql("copied", "create table c as select generate_series(1, 60) i");
        production.sql("app", "alter database moved set tablespace spare");
        production.sql("app", "alter table t_old set tablespace \"one\"");
        if User::current().uid == 0 {
            let directory = format!("/usr/local/pgthaw-test-{}", std::process::id());
            self.among_programs = Some(directory.clone().into());
            self.tablespace("programs", &Path::new(&directory).join("ts"));
            self.production.elsewhere.push(directory.into());
        } else {
            eprintln!("no tablespace below /usr/local: only root can make one");
        }
    }

    /// What no export may see.
    fn later(&self) {
        for table in ["t_old", "t_during", "t_after", "t_again", "t_inside", "t_linked"] {
            self.production.sql(
                "app",
                &format!("delete from {table} where i <= 100; insert into {table} values (0, 'future'); update {table} set v = 'future' where i > 450"),
            );
            self.production.sql("app", &format!("vacuum {table}"));
        }
        self.production.sql("postgres", "checkpoint");
    }

    /// All rows and locations that production has now.
    fn known(&self, databases: &[&str]) -> (Rows, BTreeMap<String, String>) {
        let production = &self.production;
        let tables = "select tablename from pg_tables where schemaname = 'public'";
        let table = |database: &str, table: &str| {
            let rows = production.sql(database, &format!("copy \"{table}\" to stdout"));
            let mut rows: Vec<_> = rows.lines().map(str::to_owned).collect();
            rows.sort();
            (table.to_owned(), rows)
        };
        let database = |database: &&str| {
            let tables = production.sql(database, tables);
            ((*database).to_owned(), tables.lines().map(|name| table(database, name)).collect())
        };
        let locations = "select spcname || '=' || case when spcname = 'place' then '' else pg_tablespace_location(oid) end
             from pg_tablespace where oid > 16384";
        let locations = production.sql("postgres", locations);
        let locations = locations.lines().map(|line| line.split_once('=').unwrap());
        (
            databases.iter().map(database).collect(),
            locations.map(|(name, path)| (name.into(), path.into())).collect(),
        )
    }
}

impl Drop for Story {
    fn drop(&mut self) {
        self.production.stop();
        if let Some(directory) = &self.among_programs {
            let _ = fs::remove_dir_all(directory);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Source {
    Manifest,
    NoManifest,
    PgBackRest,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Who {
    Root,
    /// The account that runs production.
    Owner,
    /// One that has copies of the backup.
    Other,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    source: Source,
    who: Who,
    latest: bool,
    running: bool,
}

impl Case {
    fn every() -> Vec<Self> {
        let mut all = Vec::new();
        for source in [Source::Manifest, Source::NoManifest, Source::PgBackRest] {
            for who in [Who::Root, Who::Owner, Who::Other] {
                for latest in [false, true] {
                    for running in [false, true] {
                        all.push(Self { source, who, latest, running });
                    }
                }
            }
        }
        all
    }

    /// Exports, and compares rows and locations.
    fn export(self, story: &Story) {
        let (current, owner) = (User::current(), User::cluster_owner());
        let user = match self.who {
            Who::Root => current,
            Who::Owner => owner,
            Who::Other => User::ordinary(),
        };
        let pgthaw = Pgthaw::of(user.clone());
        let copies = Scratch::new();
        let theirs = |path: &Path, name: &str| match self.who {
            Who::Other => {
                let copy = copies.join(name);
                copy_tree(path, &copy);
                chown_tree(&user, &copy);
                copy
            }
            _ => path.to_owned(),
        };
        let repository = match self.source {
            Source::Manifest => theirs(&story.with_manifest, "backup"),
            Source::NoManifest => theirs(&story.without_manifest, "backup"),
            Source::PgBackRest => theirs(&story.pgbackrest.path(), "repository"),
        };
        if self.who == Who::Other && self.source != Source::PgBackRest {
            // the link in a copy leads to what this account cannot read; another one leads to production
            let links = fs::read_dir(repository.join("pg_tblspc")).unwrap();
            for link in links.map(|link| link.unwrap().path()) {
                let leads = fs::read_link(&link).unwrap();
                if leads.starts_with(story.production.scratch.join("backups")) {
                    let there = theirs(&leads, "tablespace");
                    fs::remove_file(&link).unwrap();
                    symlink(there, &link).unwrap();
                }
            }
        }
        let archive = theirs(&story.archive, "archive").display().to_string();
        let mut more = Vec::new();
        if self.latest {
            more.push("--target-latest");
            if self.source != Source::PgBackRest {
                more.extend(["--wal-archive", &archive]);
            }
        }
        let databases = if self.latest { &DATABASES[..] } else { &DATABASES[..1] };
        let (leftovers, target) = (pgthaw.leftovers(), pgthaw.target("export"));
        let mut named = Vec::new();
        if self.source == Source::NoManifest {
            // nothing tells which links lead to the backup's own copies, and which to production
            let arguments = pgthaw.export_arguments(&repository, databases, &target);
            let arguments: Vec<&str> =
                arguments.iter().map(String::as_str).chain(more.iter().copied()).collect();
            let (_, said) = pgthaw.expect(1, &arguments);
            assert!(said.contains("/pg_tblspc/") && said.contains("=DIR`"), "{said}");
            for link in fs::read_dir(repository.join("pg_tblspc")).unwrap() {
                let link = link.unwrap().path();
                let (oid, leads) = (link.file_name().unwrap(), fs::read_link(&link).unwrap());
                let own = [story.production.scratch.join("backups"), copies.path().to_owned()];
                let copy = own.iter().any(|own| leads.starts_with(own));
                let place = if copy { leads.display().to_string() } else { "none".into() };
                named.push(format!("--tablespace={}={place}", oid.to_str().unwrap()));
            }
        }
        more.extend(named.iter().map(String::as_str));
        pgthaw.export(&repository, databases, &target, &more);
        let at = usize::from(self.latest);
        let found: Rows = databases
            .iter()
            .map(|database| ((*database).to_owned(), dumped(&target.join(database))))
            .collect();
        assert!(found == story.rows[at], "{self:?}: {}", differing(&story.rows[at], &found));
        let globals = fs::read_to_string(target.join("globals.sql")).unwrap();
        // a base backup knows of its tablespaces only where pg_basebackup put them
        let is_known = |name: &str| name != "old" || self.source == Source::PgBackRest;
        for (name, location) in story.locations[at].iter().filter(|(name, _)| is_known(name)) {
            let location = location.replace('\'', "''");
            let quoted = if name.contains(' ') { format!("\"{name}\"") } else { name.clone() };
            let line = format!("CREATE TABLESPACE {quoted} OWNER postgres LOCATION '{location}';");
            assert!(globals.contains(&line), "{self:?}: {line} is not in {globals}");
        }
        let made = globals.matches("CREATE TABLESPACE").count();
        assert_eq!(made, story.locations[at].len(), "{self:?}: {globals}");
        assert_eq!(leftovers.check(), [""; 0], "{self:?}");
    }
}

/// Reads the rows of a dump in directory format, sorted.
fn dumped(dump: &Path) -> BTreeMap<String, Vec<String>> {
    let mut restore = Command::new(postgres_programs().join("pg_restore"));
    let sql = text(&run(restore.args(["--data-only", "--file=-"]).arg(dump)).stdout);
    let mut tables = BTreeMap::new();
    let mut lines = sql.lines();
    while let Some(line) = lines.next() {
        let Some(rest) = line.strip_prefix("COPY public.") else { continue };
        let name = rest.split(" (").next().unwrap().trim_matches('"').to_owned();
        let rows = lines.by_ref().take_while(|line| *line != "\\.").map(str::to_owned);
        let mut rows: Vec<_> = rows.collect();
        rows.sort();
        tables.insert(name, rows);
    }
    tables
}

fn differing(want: &Rows, found: &Rows) -> String {
    let mut lines = String::new();
    for (database, tables) in want {
        let none = BTreeMap::new();
        let found = found.get(database).unwrap_or(&none);
        for name in tables.keys().chain(found.keys()) {
            let (want, is) = (tables.get(name), found.get(name));
            if want != is {
                let count = |rows: Option<&Vec<String>>| rows.map(Vec::len);
                lines +=
                    &format!("{database}.{name}: {:?} rows, not {:?}; ", count(is), count(want));
            }
        }
    }
    lines
}

fn exports_beside_production(cases: &[Case]) {
    let mut story = Story::happen();
    let is_root = User::current().uid == 0;
    if !is_root {
        eprintln!("all exports are made as the account that runs the test: it is not root");
    }
    // started and stopped until that changes nothing more
    for _ in 0..2 {
        story.production.stop();
        story.production.start();
    }
    story.production.stop();
    for running in [false, true] {
        let cases = cases.iter().filter(|case| case.running == running);
        let cases: Vec<_> = cases.filter(|case| is_root || case.who == Who::Owner).collect();
        let before = story.production.state(!running);
        if running {
            story.production.start();
        }
        for case in cases {
            case.export(&story);
            if !running {
                let after = story.production.state(true);
                assert_eq!(differences(&before, &after), [""; 0], "{case:?}");
            }
        }
        if running {
            let log = story.production.server().log();
            story.production.stop();
            let after = story.production.state(false);
            assert_eq!(differences(&before, &after), [""; 0]);
            let serving = log.rsplit("ready to accept connections").next().unwrap();
            // the check that it has started
            assert_eq!(serving.matches("connection received").count(), 1, "{serving}");
        }
    }
}

#[test]
fn tablespaces_that_wal_makes_are_dumped_and_production_beside_does_not_change() {
    use Source::{Manifest, NoManifest, PgBackRest};
    use Who::{Other, Owner, Root};
    let case = |source, who, latest, running| Case { source, who, latest, running };
    exports_beside_production(&[
        case(Manifest, Root, false, true),
        case(Manifest, Root, true, true),
        case(Manifest, Other, true, true),
        case(NoManifest, Owner, true, false),
        case(PgBackRest, Root, true, false),
        case(Manifest, Owner, false, false),
    ]);
}

#[test]
#[ignore = "36 exports: cargo test --package pgthaw --test walls -- --ignored every_kind_of_backup"]
fn every_kind_of_backup_leaves_production_as_it_is() {
    exports_beside_production(&Case::every());
}
