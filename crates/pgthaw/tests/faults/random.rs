//! `kill -9` of random processes of ours at random moments, over a loop of exports with one server after the other.
//!
//! `PGTHAW_KILLS` says how many; a usual run does a few.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use pgthaw_testkit::{Fixture, Leftovers};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::lab::Judge;
use crate::support::{Pgthaw, wait_for};

const DATABASES: [&str; 2] = ["sales", "crm"];

/// Kills of a usual run.
const KILLS: u32 = 15;
/// The longest that is waited before a kill, in milliseconds: about as long as an export takes.
const LONGEST: u64 = 4_000;

#[test]
fn random_processes_are_killed() {
    let kills = std::env::var("PGTHAW_KILLS").ok().and_then(|kills| kills.parse().ok());
    let kills: u32 = kills.unwrap_or(KILLS);
    let (mut judge, pgthaw, mut chance) = (Judge::new(), Pgthaw::new(), Chance::new());
    let (leftovers, ours) = (pgthaw.leftovers(), Leftovers::before(&[pgthaw.scratch.path()]));
    let lookalikes = Lookalikes::make(&pgthaw);
    let (mut killed, mut left) = (0, Vec::new());
    for round in 0.. {
        if killed >= kills {
            break;
        }
        let target = pgthaw.target(&format!("round-{round}"));
        let case = format!("round {round}");
        let mut export = pgthaw.start_export(&Fixture::get().lz4.path, &DATABASES, &target, &[]);
        killed += kill_some(&pgthaw, &ours, &mut export, &mut chance);
        export.wait().unwrap();
        let Some(session) = rested(&pgthaw, &target) else {
            assert!(!target.exists(), "{case}: no session, but a target");
            continue; // it was killed before there was a session
        };
        eprintln!("{case}: {}, {}", session["state"], session["error"]);
        if session["state"] != "succeeded" {
            assert_eq!(session["state"], "failed", "{case}: {session}");
            assert_shows_nothing_partial(&case, &target);
            if round % 2 == 0 {
                left.push((session["id"].as_str().unwrap().to_owned(), target));
                continue;
            }
            pgthaw.expect(0, &["retry", session["id"].as_str().unwrap()]);
        }
        judge.assert_equal(&case, &target, &DATABASES);
        assert_eq!(staged(&target), [] as [PathBuf; 0], "{case}");
    }

    // What the sessions left that nobody retried is listed, and nothing else.
    let there: BTreeSet<String> = left
        .iter()
        .flat_map(|(id, target)| {
            let found = staged(target).into_iter().chain(visible(target));
            found.map(move |path| format!("directory {} of session {id}", path.display()))
        })
        .collect();
    let (listed, _) = pgthaw.expect(0, &["clean", "--dry-run"]);
    eprintln!("{killed} processes killed; left by {} sessions:\n{listed}", left.len());
    let lines = listed.lines().filter_map(|line| line.strip_prefix("would remove "));
    assert_eq!(lines.map(str::to_owned).collect::<BTreeSet<_>>(), there, "{}", pgthaw.logs());
    pgthaw.expect(0, &["clean", "--yes"]);
    for (id, target) in &left {
        assert!(!target.exists(), "session {id}: {} is left", target.display());
    }
    lookalikes.assert_untouched();
    drop(lookalikes);
    assert_eq!(leftovers.check(), [""; 0], "{}", pgthaw.logs());
}

/// Kills up to three processes of an export, each after a while; returns how many there were to kill.
fn kill_some(pgthaw: &Pgthaw, ours: &Leftovers, export: &mut Child, chance: &mut Chance) -> u32 {
    let mut killed = 0;
    for _ in 0..1 + chance.below(3) {
        std::thread::sleep(Duration::from_millis(chance.below(LONGEST)));
        if export.try_wait().unwrap().is_some() && killed == 0 {
            break; // it was faster
        }
        let victims = processes(pgthaw, ours);
        let Some((pid, arguments)) =
            victims.get(chance.below(victims.len().max(1) as u64) as usize)
        else {
            break;
        };
        if kill_process(*pid, Signal::KILL).is_ok() {
            eprintln!("killed {}", arguments.chars().take(60).collect::<String>());
            killed += 1;
        }
    }
    killed
}

/// Our processes: those that name this test's directory, and PostgreSQL's, whose titles hold the begin of a session's marker.
fn processes(pgthaw: &Pgthaw, ours: &Leftovers) -> Vec<(Pid, String)> {
    let logs = pgthaw.logs();
    let markers: Vec<&str> = logs
        .split("\"marker\":\"")
        .skip(1)
        .filter_map(|rest| rest.split_once('"').map(|(marker, _)| marker))
        .collect();
    let mut found = ours.processes();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let titled = markers
            .iter()
            .any(|marker| line.starts_with(&format!("postgres: pgthaw-{}:", &marker[..8])));
        if titled && !found.iter().any(|(known, _)| *known == pid) {
            found.push((pid, line));
        }
    }
    // Not what the lookalikes are made of.
    found.retain(|(_, arguments)| !arguments.starts_with("sleep "));
    found.into_iter().filter_map(|(pid, line)| Some((Pid::from_raw(pid)?, line))).collect()
}

/// The session of `target` once nobody works on it; nothing if there is none.
fn rested(pgthaw: &Pgthaw, target: &Path) -> Option<Value> {
    wait_for("the session's end", || {
        let sessions = pgthaw.json(&["sessions"]);
        let own = sessions.as_array()?.iter().find(|session| {
            session["target"].as_str().is_some_and(|path| Path::new(path) == target)
        });
        match own {
            None => Some(None),
            Some(session) if matches!(session["state"].as_str(), Some("succeeded" | "failed")) => {
                Some(Some(session.clone()))
            }
            Some(_) => None,
        }
    })
}

fn assert_shows_nothing_partial(case: &str, target: &Path) {
    assert!(!target.join("export.json").exists(), "{case}: a failed export looks complete");
    for directory in visible(target) {
        assert!(directory.join("toc.dat").exists(), "{case}: {} is not whole", directory.display());
    }
}

/// The session's own directories in a target.
fn staged(target: &Path) -> Vec<PathBuf> {
    directories(target).into_iter().filter(|path| is_hidden(path)).collect()
}

/// The databases that can be seen in a target.
fn visible(target: &Path) -> Vec<PathBuf> {
    directories(target).into_iter().filter(|path| !is_hidden(path)).collect()
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'))
}

fn directories(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

/// Things much like ours that belong to somebody else: directories, a file system of FUSE, a process. (The judge's server is a
/// PostgreSQL of somebody else.)
struct Lookalikes {
    files: Vec<PathBuf>,
    process: Child,
    /// Where a file system of FUSE is mounted, which nobody serves.
    mount: Option<(PathBuf, std::os::fd::OwnedFd)>,
}

impl Lookalikes {
    fn make(pgthaw: &Pgthaw) -> Self {
        let names = ["lookalike-20261122-101112-abcd", "lookalike-dump"];
        let mut files = Vec::new();
        for directory in [pgthaw.work(), pgthaw.dump(), pgthaw.scratch.join("out")] {
            for name in names {
                std::fs::create_dir(directory.join(name)).unwrap();
                files.push(directory.join(name).join("precious"));
                std::fs::write(files.last().unwrap(), "x").unwrap();
            }
        }
        let mountpoint = pgthaw.work().join("lookalike-mount");
        std::fs::create_dir(&mountpoint).unwrap();
        // Somebody's: a process that lives knows of it, and has a marker much like ours.
        let process = Command::new("sleep")
            .arg("100000")
            .env("PGTHAW_SESSION", "0123456789abcdef0123456789abcdef")
            .env("LOOKALIKE", &mountpoint)
            .env("LOOKALIKES", pgthaw.work().join(names[0]))
            .spawn()
            .unwrap();
        let device = pgthaw_mountfs::mount_as_root(&mountpoint).ok(); // an ordinary account has none
        Self { files, process, mount: device.map(|device| (mountpoint, device)) }
    }

    fn assert_untouched(&self) {
        for file in &self.files {
            assert_eq!(std::fs::read(file).unwrap(), b"x", "{}", file.display());
        }
        let process = format!("/proc/{}/cmdline", self.process.id());
        assert!(std::fs::read(process).unwrap().starts_with(b"sleep"), "the process was ended");
        if let Some((mountpoint, _)) = &self.mount {
            let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
            assert!(mounts.contains(&format!(" {} ", mountpoint.display())), "it was unmounted");
        }
    }
}

impl Drop for Lookalikes {
    fn drop(&mut self) {
        let _ = self.process.kill(); // an error only means that a failed test lost it
        let _ = self.process.wait();
        if let Some((mountpoint, _)) = &self.mount {
            let _ = rustix::mount::unmount(mountpoint, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

/// Random numbers; what has failed cannot be repeated exactly anyhow.
struct Chance(u64);

impl Chance {
    fn new() -> Self {
        let now = std::time::UNIX_EPOCH.elapsed().expect("it is later than 1970");
        Self(now.as_nanos() as u64 ^ u64::from(std::process::id()))
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}
