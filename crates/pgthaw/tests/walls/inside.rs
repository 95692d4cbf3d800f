//! What the processes of an instance, and of pg_dump, are and see, while an export is held in the middle of a table.
//!
//! The constants are the list that `docs/security.md` prints.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pgthaw_testkit::{User, postgres_programs};

use crate::hostile::{Evil, exporters, processes};
use crate::support::{Pgthaw, wait_for};

/// Mounts of every root: the path inside, and what the mount allows and forbids. One that is marked as optional is there if
/// this machine has such a directory or file (a directory at the top that is a link here is a link inside).
const EVERYWHERE: &[(&str, &str, bool)] = &[
    ("/", "ro,nosuid,nodev,noexec", false),
    // memory: 64 MB, 16 MB
    ("/tmp", "rw,nosuid,nodev,noexec", false),
    ("/dev/shm", "rw,nosuid,nodev,noexec", false),
    ("/dev/null", "rw,nosuid,noexec", false),
    ("/dev/zero", "rw,nosuid,noexec", false),
    ("/dev/full", "rw,nosuid,noexec", false),
    ("/dev/random", "rw,nosuid,noexec", false),
    ("/dev/urandom", "rw,nosuid,noexec", false),
    // the processes of the instance; not in containers that hide parts of /proc
    ("/proc", "ro,nosuid,nodev,noexec", true),
    // programs and libraries
    ("/usr/bin", "ro,nosuid,nodev", true),
    ("/usr/sbin", "ro,nosuid,nodev", true),
    ("/usr/lib", "ro,nosuid,nodev", true),
    ("/usr/lib32", "ro,nosuid,nodev", true),
    ("/usr/lib64", "ro,nosuid,nodev", true),
    ("/usr/libx32", "ro,nosuid,nodev", true),
    ("/usr/libexec", "ro,nosuid,nodev", true),
    ("/usr/share", "ro,nosuid,nodev", true),
    ("/usr/local/bin", "ro,nosuid,nodev", true),
    ("/usr/local/sbin", "ro,nosuid,nodev", true),
    ("/usr/local/lib", "ro,nosuid,nodev", true),
    ("/usr/local/lib64", "ro,nosuid,nodev", true),
    ("/usr/local/libexec", "ro,nosuid,nodev", true),
    ("/usr/local/share", "ro,nosuid,nodev", true),
    ("/bin", "ro,nosuid,nodev", true),
    ("/sbin", "ro,nosuid,nodev", true),
    ("/lib", "ro,nosuid,nodev", true),
    ("/lib32", "ro,nosuid,nodev", true),
    ("/lib64", "ro,nosuid,nodev", true),
    ("/libx32", "ro,nosuid,nodev", true),
    ("/libexec", "ro,nosuid,nodev", true),
    // passwd, group, hosts and nsswitch.conf beside these are written for the root and are not this machine's
    ("/etc/R", "ro,nosuid,nodev,noexec", true),
    ("/etc/alternatives", "ro,nosuid,nodev,noexec", true),
    ("/etc/java", "ro,nosuid,nodev,noexec", true),
    ("/etc/ld.so.cache", "ro,nosuid,nodev,noexec", true),
    ("/etc/ld.so.conf", "ro,nosuid,nodev,noexec", true),
    ("/etc/locale.alias", "ro,nosuid,nodev,noexec", true),
    ("/etc/localtime", "ro,nosuid,nodev,noexec", true),
    ("/etc/perl", "ro,nosuid,nodev,noexec", true),
    ("/etc/python3", "ro,nosuid,nodev,noexec", true),
    ("/etc/ssl/openssl.cnf", "ro,nosuid,nodev,noexec", true),
    ("/etc/tcl", "ro,nosuid,nodev,noexec", true),
    ("/var/cache/postgresql/dicts", "ro,nosuid,nodev,noexec", true),
];

/// Mounts that the server has beside those, and each tablespace that the WAL makes, at its original location.
const OF_THE_SERVER: &[(&str, &str)] = &[
    ("{mount}", "rw,nosuid,nodev,noexec"),
    ("{instance}", "ro,nosuid,nodev,noexec"),
    ("{instance}/socket", "rw,nosuid,nodev,noexec"),
];

/// Mounts that pg_dump has beside those: it reads nothing of the backup but what the server sends.
const OF_PG_DUMP: &[(&str, &str)] =
    &[("{instance}/socket", "ro,nosuid,nodev,noexec"), ("{dump}", "rw,nosuid,nodev,noexec")];

/// What a process inside holds open.
const OPEN: &[&str] = &[
    "/dev/null",
    "pipe:",
    "socket:",
    "anon_inode:",
    "{mount}/",
    "{instance}/postgres.log",
    "{dump}/",
];

/// Namespaces of its own; the user namespace only where no root makes the others.
const NAMESPACES: [&str; 5] = ["ipc", "mnt", "net", "pid", "uts"];

/// Lines of `/proc/PID/status`: no capability, none to be had, and calls that seccomp refuses.
const RIGHTS: [(&str, &str); 7] = [
    ("CapInh", "0000000000000000"),
    ("CapPrm", "0000000000000000"),
    ("CapEff", "0000000000000000"),
    ("CapBnd", "0000000000000000"),
    ("CapAmb", "0000000000000000"),
    ("NoNewPrivs", "1"),
    ("Seccomp", "2"),
];

/// The paths of a session that the lists name.
struct Places {
    mount: PathBuf,
    instance: PathBuf,
    dump: PathBuf,
}

impl Places {
    fn fill(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for (name, path) in
            [("{mount}", &self.mount), ("{instance}", &self.instance), ("{dump}", &self.dump)]
        {
            text = text.replace(name, &path.display().to_string());
        }
        text
    }

    /// What every mount of a root is to be.
    fn mounts(&self, more: &[(&str, &str)]) -> BTreeMap<String, String> {
        let there = |path: &str| match path {
            "/proc" => true,
            _ => fs::symlink_metadata(path).is_ok_and(|found| {
                Path::new(path).exists() && (path.starts_with("/etc") || !found.is_symlink())
            }),
        };
        let everywhere = EVERYWHERE.iter().filter(|(path, _, optional)| !optional || there(path));
        let everywhere = everywhere.map(|(path, options, _)| ((*path).into(), (*options).into()));
        let more = more.iter().map(|(path, options)| (self.fill(path), (*options).into()));
        everywhere.chain(more).collect()
    }
}

/// A process as its directory in `/proc` shows it.
struct Seen {
    pid: u32,
    title: String,
    status: BTreeMap<String, String>,
}

impl Seen {
    fn look(pid: u32, title: String) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let status = status.lines().filter_map(|line| line.split_once(':'));
        let status = status.map(|(name, value)| (name.into(), value.trim().into())).collect();
        Some(Self { pid, title, status })
    }

    fn link(&self, name: &str) -> PathBuf {
        let path = format!("/proc/{}/{name}", self.pid);
        fs::read_link(&path).unwrap_or_else(|err| panic!("{path} ({}): {err}", self.title))
    }

    /// Path and options of each mount, without when times are written.
    fn mounts(&self) -> BTreeMap<String, String> {
        let table = fs::read_to_string(format!("/proc/{}/mountinfo", self.pid)).unwrap();
        let mount = |line: &str| {
            let fields: Vec<&str> = line.split(' ').collect();
            let options = fields[5].split(',').filter(|option| !option.ends_with("atime"));
            (fields[4].to_owned(), options.collect::<Vec<_>>().join(","))
        };
        table.lines().map(mount).collect()
    }

    fn is_wrong(&self, places: &Places, user: &User, own_user: bool) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut compare = |what: &str, is: String, want: String| {
            if is != want {
                wrong.push(format!("{} `{}`: {what} is {is}, not {want}", self.pid, self.title));
            }
        };
        let four = |number: u32| vec![number.to_string(); 4].join("\t");
        compare("user", self.status["Uid"].clone(), four(user.uid));
        compare("group", self.status["Gid"].clone(), four(user.gid));
        for (name, want) in RIGHTS {
            compare(name, self.status[name].clone(), want.into());
        }
        let ours = |name: &str| fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
        for name in NAMESPACES {
            let is_own = self.link(&format!("ns/{name}")) != ours(name);
            compare(&format!("namespace {name} of its own"), is_own.to_string(), "true".into());
        }
        let is_own = self.link("ns/user") != ours("user");
        compare("user namespace of its own", is_own.to_string(), own_user.to_string());

        let is_client = self.title.contains("pg_dump") || self.is_init_of_a_client(places);
        let want = places.mounts(if is_client { OF_PG_DUMP } else { OF_THE_SERVER });
        let mounts = self.mounts();
        let tops = |mounts: &BTreeMap<String, String>| -> BTreeSet<String> {
            let first = |path: &String| path.split('/').nth(1).map(str::to_owned);
            mounts.keys().filter_map(first).filter(|name| !name.is_empty()).collect()
        };
        let (mut entries, linked) =
            (tops(&want), ["bin", "sbin", "lib", "lib32", "lib64", "libx32"]);
        entries.extend(
            linked
                .iter()
                .filter(|name| Path::new("/").join(name).is_symlink())
                .map(|name| (*name).into()),
        );
        let root = fs::read_dir(format!("/proc/{}/root", self.pid)).unwrap().flatten();
        let root: BTreeSet<String> =
            root.map(|entry| entry.file_name().into_string().unwrap()).collect();
        compare("root", format!("{root:?}"), format!("{entries:?}"));
        for path in want.keys().chain(mounts.keys()).collect::<BTreeSet<_>>() {
            let none = "none".to_owned();
            let (is, want) = (mounts.get(path).unwrap_or(&none), want.get(path).unwrap_or(&none));
            // what is mounted below programs here is there too, and so are programs elsewhere
            let programs = path.starts_with("/usr/") || !postgres_programs().starts_with("/usr");
            if !(programs && *want == none && is == "ro,nosuid,nodev") {
                compare(&format!("mount {path}"), is.clone(), want.clone());
            }
        }
        let open = fs::read_dir(format!("/proc/{}/fd", self.pid)).unwrap().flatten();
        for held in open.filter_map(|entry| fs::read_link(entry.path()).ok()) {
            let held = held.display().to_string();
            let is_known = OPEN.iter().any(|start| held.starts_with(&places.fill(start)));
            compare("an open file", held.clone(), if is_known { held } else { "known".into() });
        }
        wrong
    }

    fn is_init_of_a_client(&self, places: &Places) -> bool {
        self.mounts().contains_key(&places.dump.display().to_string())
    }
}

/// Everything that runs in the process namespace of `pid`.
fn namespace_of(pid: u32) -> Vec<Seen> {
    let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let wanted = namespace(pid);
    let all = processes().into_iter().filter(|(pid, _)| namespace(*pid) == wanted);
    all.filter_map(|(pid, title)| Seen::look(pid, title)).collect()
}

/// The part of a command line after `start`, up to `end`.
fn between<'a>(title: &'a str, start: &str, end: &str) -> &'a Path {
    let (_, rest) = title.split_once(start).unwrap_or_else(|| panic!("{start} in {title}"));
    Path::new(rest.split_once(end).unwrap_or_else(|| panic!("{end} in {title}")).0)
}

#[test]
fn processes_of_an_instance_see_what_the_documents_say() {
    let evil = Evil::new();
    evil.0.sql("app", "insert into h.result values (1, 'a row')");
    evil.condition("app", "where pg_sleep(3600) is not null");
    for (name, user) in exporters() {
        let pgthaw = Pgthaw::of(user.clone());
        let backup = evil.backup(&format!("held{}", user.uid), &user);
        let (leftovers, target) = (pgthaw.leftovers(), pgthaw.target("export"));
        let mut child = pgthaw.start_export(&backup, &["app"], &target, &["--jobs", "2"]);
        let work = pgthaw.work().display().to_string();
        let find = |word: &str| {
            let mut all = processes().into_iter();
            all.find(|(_, title)| title.contains(word) && title.contains(&work))
        };
        let (pg_dump, dumping) =
            wait_for("pg_dump", || find("bin/pg_dump --format").filter(|_| child_waits(&find)));
        let (postmaster, serving) = find("bin/postgres -D").expect("the server");
        let places = Places {
            mount: between(&serving, "-D ", "/data ").into(),
            instance: between(&serving, "config_file=", "/postgresql.conf").into(),
            dump: between(&dumping, "--file=", "/app ").into(),
        };
        assert!(places.instance.starts_with(&work) && places.dump.starts_with(pgthaw.dump()));
        let server = namespace_of(postmaster);
        let clients = namespace_of(pg_dump);
        // process 1, postmaster, checkpointer, writers, three connections and more; process 1, leader, two workers
        assert!(
            server.len() >= 8,
            "{:?}",
            server.iter().map(|seen| &seen.title).collect::<Vec<_>>()
        );
        assert_eq!(
            clients.len(),
            4,
            "{:?}",
            clients.iter().map(|seen| &seen.title).collect::<Vec<_>>()
        );
        let runs = if user.uid == 0 { User::cluster_owner() } else { user.clone() };
        let mut wrong = Vec::new();
        for seen in server.iter().chain(&clients) {
            if User::current().uid != 0 && seen.title.starts_with("pgthaw ") {
                eprintln!("process 1 is not looked at: only root may");
                continue;
            }
            wrong.extend(seen.is_wrong(&places, &runs, user.uid != 0));
        }
        assert!(wrong.is_empty(), "{name}: {wrong:#?}");
        pgthaw.run(&["cancel", &pgthaw.session_id()]);
        child.wait().unwrap();
        assert_eq!(leftovers.check(), [""; 0], "{name}");
    }
}

/// Whether a table is being read.
fn child_waits(find: &impl Fn(&str) -> Option<(u32, String)>) -> bool {
    let Some((postmaster, _)) = find("bin/postgres -D") else { return false };
    std::thread::sleep(Duration::from_millis(50));
    namespace_of(postmaster).iter().any(|seen| seen.title.ends_with("[local] COPY"))
}
