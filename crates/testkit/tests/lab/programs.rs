//! What hosts are for: FUSE mounts of ordinary users, and PostgreSQL.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pgthaw_mountfs::{FileSystem, Lower, Owner, ServeOptions, Tree, mount_as_user, serve};
use pgthaw_testkit::{HostLeftovers, HostPlan, Lab, postgres_programs, run};
use rustix::process::Signal;

use crate::{possible, stdout, until};

/// Bytes that are all the same.
struct Sevens;

impl Lower for Sevens {
    fn try_read_at(&self, _: usize, _: u64, buf: &mut [u8]) -> Option<std::io::Result<()>> {
        buf.fill(b'7');
        Some(Ok(()))
    }

    fn read_at(&self, file: usize, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.try_read_at(file, offset, buf).expect("it never waits")
    }
}

/// Where the child below mounts.
const MOUNTPOINT: &str = "PGTHAW_TEST_MOUNTPOINT";

#[test]
#[ignore = "run by another test, inside of a host"]
fn serve_a_mount() {
    let Some(mountpoint) = std::env::var_os(MOUNTPOINT).map(PathBuf::from) else { return };
    let mut tree = Tree::new();
    tree.file("file", 0, 10, 0).unwrap();
    let owner =
        Owner { uid: rustix::process::getuid().as_raw(), gid: rustix::process::getgid().as_raw() };
    let layer = mountpoint.with_extension("layer");
    let fs = FileSystem::new(tree, Arc::new(Sevens), &layer, owner, Box::new(|_| {})).unwrap();
    let device = mount_as_user(&mountpoint).unwrap();
    serve(Arc::new(fs), device, ServeOptions::default()).unwrap();
}

#[test]
fn an_ordinary_user_mounts_with_fuse() {
    if !possible() {
        return;
    }
    let program = std::env::current_exe().unwrap();
    let lab = Lab::with([HostPlan::new("staging").program(&program)]);
    let host = lab.host("staging");
    let leftovers = HostLeftovers::before(host);
    run(host.command("dba", "mkdir").arg("/var/tmp/mount"));
    let start = || {
        let mut child = host.command("dba", program.file_name().unwrap());
        child.args(["--ignored", "--exact", "programs::serve_a_mount"]);
        let child = child.env(MOUNTPOINT, "/var/tmp/mount").spawn().unwrap();
        until("the mount", || {
            let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", host.init())).unwrap();
            mounts.contains(" /var/tmp/mount ")
        });
        child
    };
    let mut child = start();
    let text = run(host.command("dba", "cat").arg("/var/tmp/mount/file"));
    assert_eq!(stdout(&text), "7777777777");
    let mounts = |path: &Path| fs::read_to_string(path).unwrap().contains("/var/tmp/mount");
    assert!(!mounts(Path::new("/proc/self/mountinfo")), "the machine has no part in it");
    run(host.command("dba", "fusermount3").args(["-u", "/var/tmp/mount"]));
    assert!(child.wait().unwrap().success());

    // Dead and still mounted, it is found and holds up nobody.
    let mut child = start();
    let server = host.processes().into_iter().find(|it| it.arguments.contains("serve_a_mount"));
    server.unwrap().signal(Signal::KILL);
    child.wait().unwrap();
    let found = leftovers.check_within(std::time::Duration::ZERO);
    assert!(found.contains(&"mount /var/tmp/mount".to_owned()), "{found:?}");
    host.reboot();
    run(host.command("dba", "rm").args(["-r", "/var/tmp/mount", "/var/tmp/mount.layer"]));
    assert_eq!(leftovers.check(), Vec::<String>::new());
}

#[test]
fn an_ordinary_user_runs_postgresql() {
    if !possible() {
        return;
    }
    let lab = Lab::new(&["staging", "target"]);
    let staging = lab.host("staging");
    let leftovers = HostLeftovers::before(staging);
    let bin = postgres_programs();
    let data = "/var/tmp/pgdata";
    run(staging.command("dba", bin.join("initdb")).args(["--no-sync", "--auth=trust", "-D", data]));
    let pg_ctl = |action: &[&str]| {
        let mut command = staging.command("dba", bin.join("pg_ctl"));
        command.args(["-D", data, "--wait", "--silent", "--log=/var/tmp/log"]).args(action);
        run(&mut command);
    };
    pg_ctl(&["start", "--options=-c unix_socket_directories=/tmp -c listen_addresses=*"]);
    staging.script(&format!("echo host all all 10.77.0.0/16 trust >> {data}/pg_hba.conf"));
    pg_ctl(&["reload"]);
    let mut psql = lab.host("target").command("ops", bin.join("psql"));
    psql.args(["-h", "staging", "-U", "dba", "-Atc", "SELECT inet_client_addr()", "postgres"]);
    assert_eq!(stdout(&run(&mut psql)), "10.77.0.2");
    let found: BTreeSet<_> =
        leftovers.check_within(std::time::Duration::ZERO).into_iter().collect();
    let has = |begin: &str| found.iter().any(|line| line.starts_with(begin));
    for what in [
        "process ",
        "shared memory segment ",
        "listening on 0.0.0.0:5432",
        "socket /tmp/.s.PGSQL.5432",
        "file /tmp/.s.PGSQL.5432",
        "file /dev/shm/PostgreSQL.",
        "file /var/tmp/pgdata",
    ] {
        assert!(has(what), "{what} in {found:#?}");
    }
    pg_ctl(&["stop", "--mode=fast"]);
    run(staging.command("dba", "rm").args(["-r", data, "/var/tmp/log"]));
    assert_eq!(leftovers.check(), Vec::<String>::new());
}
