//! Secrets of a cluster get into the files of its export, which are 0600, and nowhere else: no journal, log, bundle, command line or file
//! that others may read holds one of the canaries below.

mod support;

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pgthaw_testkit::{BaseBackupOptions, Cluster, ClusterOptions, Scale, Scratch};
use rustix::process::{Pid, Signal, kill_process};
use support::{Pgthaw, wait_for};

/// A role's password, as PostgreSQL keeps it.
const PASSWORD: &str = "md5ca9a21e5ca9a21e5ca9a21e5ca9a21e5";
/// A password in the backup's own settings, in a subscription, in a row, and in the environment of whoever exports, and there the
/// passphrase of a repository.
const SETTING: &str = "canary-of-a-setting";
const SUBSCRIPTION: &str = "canary-of-a-subscription";
const ROW: &str = "canary-of-a-row";
const ENVIRONMENT: &str = "canary-of-the-environment";
const PASSPHRASE: &str = "canary-of-a-passphrase";
const CANARIES: [&str; 6] = [PASSWORD, SETTING, SUBSCRIPTION, ROW, ENVIRONMENT, PASSPHRASE];
/// What is in the environment of whoever exports.
const VARIABLES: [(&str, &str); 2] =
    [("PGPASSWORD", ENVIRONMENT), ("PGBACKREST_REPO1_CIPHER_PASS", PASSPHRASE)];

fn plant(cluster: &Cluster) {
    let connection = |password: &str| format!("host=127.0.0.1 user=postgres password={password}");
    cluster.sql("postgres", &format!("CREATE ROLE canary LOGIN PASSWORD '{PASSWORD}'"));
    let setting = connection(SETTING);
    cluster.sql("postgres", &format!("ALTER SYSTEM SET primary_conninfo = '{setting}'"));
    cluster.sql(
        "crm",
        &format!(
            "CREATE SUBSCRIPTION canary CONNECTION '{}' PUBLICATION everything \
             WITH (connect = false, slot_name = NONE)",
            connection(SUBSCRIPTION)
        ),
    );
    cluster.sql("crm", "CREATE TABLE public.canary (row text)");
    cluster.sql("crm", &format!("INSERT INTO public.canary VALUES ('{ROW}')"));
}

#[test]
fn canaries_are_seen_nowhere_but_in_the_export() {
    let (scratch, pgthaw) = (Scratch::new(), Pgthaw::new());
    let cluster = Cluster::build(&scratch.join("source"), Scale::Tiny, &ClusterOptions::default());
    plant(&cluster);
    let backup = cluster.base_backup(&scratch.join("backup"), &BaseBackupOptions::default());
    cluster.stop("fast");
    let leftovers = pgthaw.leftovers();
    prove_the_detectors(pgthaw.scratch.path());

    // One attempt that fails in the middle of a dump, and a retry, while somebody looks on.
    let target = pgthaw.target("export");
    let ended = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut seen = BTreeSet::new();
            while !ended.load(Ordering::Relaxed) {
                seen.extend(visible(pgthaw.scratch.path()));
                std::thread::sleep(Duration::from_millis(10));
            }
            seen
        });
        let mut arguments = pgthaw.export_arguments(&backup.dir, &["crm"], &target);
        arguments.extend(["-Z", "0", "--retries", "0"].map(str::to_owned));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut export = pgthaw.command(&arguments);
        export.envs(VARIABLES).stdout(Stdio::null()).stderr(Stdio::null());
        let mut export = export.spawn().unwrap();
        let dump = wait_for("pg_dump", || dump_of(&pgthaw.dump()));
        kill_process(dump, Signal::KILL).unwrap();
        let failed = export.wait().unwrap().code();
        let id = pgthaw.session_id();
        let retried = pgthaw.command(&["retry", &id]).envs(VARIABLES).output();
        ended.store(true, Ordering::Relaxed);
        assert_eq!(failed, Some(1), "{}", pgthaw.logs());
        assert!(retried.unwrap().status.success(), "{}", pgthaw.logs());
        watch.join().unwrap()
    });
    assert_eq!(seen, BTreeSet::new());

    let bundle = pgthaw.target("bundle.json");
    let file = bundle.display().to_string();
    let (out, err) = pgthaw.expect(0, &["session", &pgthaw.session_id(), "--bundle", &file]);
    assert!(out.is_empty() && err.contains("read it before you hand it on"), "{out}{err}");
    assert_bundle_tells(&bundle);
    pgthaw.expect(2, &["session", &pgthaw.session_id(), "--bundle", &file]); // nothing is overwritten

    // Everything that is kept, whoever may read it.
    let kept = files(&pgthaw.scratch.join("state")).into_iter().chain([bundle]);
    let kept: Vec<PathBuf> = kept.collect();
    assert!(kept.iter().any(|path| path.ends_with("journal")), "{kept:?}");
    for path in kept {
        assert_eq!(canaries_in(&std::fs::read(&path).unwrap()), [""; 0], "{}", path.display());
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o077, 0, "{}", path.display());
    }
    // What belongs into the export is there.
    let globals = std::fs::read(target.join("globals.sql")).unwrap();
    assert_eq!(canaries_in(&globals), [PASSWORD]);
    let dumped = files(&target.join("crm")).into_iter();
    let dumped: BTreeSet<_> =
        dumped.flat_map(|path| canaries_in(&std::fs::read(path).unwrap())).collect();
    assert_eq!(dumped, [ROW, SUBSCRIPTION].into());
    assert_eq!(leftovers.check(), [""; 0]);
}

/// What somebody needs who looks for the cause elsewhere.
fn assert_bundle_tells(bundle: &Path) {
    let bundle: serde_json::Value =
        serde_json::from_slice(&std::fs::read(bundle).unwrap()).unwrap();
    let entries: Vec<_> =
        bundle["journal"].as_array().unwrap().iter().map(|r| &r["entry"]).collect();
    assert!(entries[0]["created"]["request"]["databases"][0] == "crm", "{}", entries[0]);
    assert!(entries.iter().any(|entry| entry["gave_up"]["message"].is_string()), "{entries:?}");
    assert!(entries.iter().any(|entry| entry["placed"]["marker"] == "(marker)"), "{entries:?}");
    assert!(bundle["versions"]["pgthaw"].is_string() && bundle["agent_log"].is_array());
}

/// What anybody can see of a canary: in the command lines of all processes, and in files below `directory` that others may read.
fn visible(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        found.extend(canaries_in(&line).iter().map(|canary| {
            format!("{canary} in the command line {}", String::from_utf8_lossy(&line))
        }));
    }
    for path in files(directory) {
        let open = path.metadata().is_ok_and(|found| found.permissions().mode() & 0o004 != 0);
        if open && let Ok(bytes) = std::fs::read(&path) {
            found.extend(
                canaries_in(&bytes).iter().map(|canary| format!("{canary} in {}", path.display())),
            );
        }
    }
    found
}

fn prove_the_detectors(directory: &Path) {
    let (file, hidden) = (directory.join("planted"), directory.join("hidden"));
    std::fs::write(&file, ROW).unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o604)).unwrap();
    std::fs::write(&hidden, SETTING).unwrap();
    std::fs::set_permissions(&hidden, PermissionsExt::from_mode(0o600)).unwrap();
    let mut process = Command::new("sleep").arg0(PASSWORD).arg("1000").spawn().unwrap();
    let seen = wait_for("a planted process", || {
        let seen = visible(directory);
        (seen.len() > 1).then_some(seen)
    });
    process.kill().unwrap();
    process.wait().unwrap();
    assert!(seen.len() == 2 && seen[0].contains("command line"), "{seen:?}");
    assert_eq!(seen[1], format!("{ROW} in {}", file.display()));
    std::fs::remove_file(file).unwrap();
    std::fs::remove_file(hidden).unwrap();
}

fn canaries_in(bytes: &[u8]) -> Vec<&'static str> {
    let holds = |canary: &&str| bytes.windows(canary.len()).any(|part| part == canary.as_bytes());
    CANARIES.into_iter().filter(holds).collect()
}

/// All files below `directory`; the mount of a session is not entered.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && !mounts.contains(&format!(" {} ", path.display())) => {
                files.extend(self::files(&path));
            }
            Ok(kind) if kind.is_file() => files.push(path),
            _ => {}
        }
    }
    files
}

/// The pg_dump that writes below `directory`.
fn dump_of(directory: &Path) -> Option<Pid> {
    std::fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let is_dump = std::fs::read(entry.path().join("comm")).ok()? == b"pg_dump\n";
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let ours = String::from_utf8_lossy(&line).contains(&*directory.to_string_lossy());
        Pid::from_raw(pid).filter(|_| is_dump && ours)
    })
}
