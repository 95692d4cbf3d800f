//! A staging server that sees the repository itself.

use std::path::Path;
use std::process::Command;

use pgthaw_testkit::{Fixture, HostPlan, Scratch};

use crate::lab::{Machines, assert_nothing_left, possible};
use crate::support::assert_equal;

/// A copy of the fixture's repository that every account of every host may read.
fn readable_copy(scratch: &Scratch, name: &str) -> std::path::PathBuf {
    let copy = scratch.join(name);
    pgthaw_testkit::copy_tree(&Fixture::get().lz4.path, &copy);
    let made = Command::new("chmod").args(["-R", "a+rX"]).arg(&copy).status().unwrap();
    assert!(made.success());
    copy
}

#[test]
fn the_staging_server_reads_the_repository_itself() {
    if !possible() {
        return;
    }
    let scratch = Scratch::new();
    let (same, other) = (readable_copy(&scratch, "same"), readable_copy(&scratch, "other"));
    let label = Fixture::get().lz4.labels.last().unwrap().clone();
    let backups = other.join("backup");
    let stanza = std::fs::read_dir(&backups).unwrap().next().unwrap().unwrap().file_name();
    let manifest = backups.join(&stanza).join(&label).join("backup.manifest");
    let mut text = std::fs::read(&manifest).unwrap();
    text.push(b'\n');
    std::fs::write(&manifest, text).unwrap();

    let program = Path::new(env!("CARGO_BIN_EXE_pgthaw"));
    let mount = HostPlan::new("mount").share(&same, "/repo");
    let staging = HostPlan::new("staging").share(&same, "/mnt/repo").share(&other, "/mnt/other");
    // Installed there, so that only what the session needs goes over the link.
    let machines = Machines::planned(mount, staging.program(program), HostPlan::new("target"));
    let arguments = |verb, read_from: &'static str| {
        let from =
            ["--read-from", read_from, "--staging", "dba@staging", "--to", "dba@staging:out"];
        [&[verb, "/repo", "-d", "crm", "-d", "sales"], &from[..]].concat()
    };
    let leftovers = machines.leftovers();
    let mut over_the_link = Vec::new();
    for read_from in ["mount-server", "staging:/mnt/repo"] {
        let before = machines.lab.bytes("mount", "staging");
        machines.expect(0, &arguments("export", read_from));
        over_the_link.push(machines.lab.bytes("mount", "staging") - before);
        let scratch = Scratch::new();
        let fetched = machines.fetch("staging", "/home/dba/out", scratch.path());
        assert_equal(&fetched, &machines.fixture.expected, &["crm", "sales"]);
        std::fs::remove_dir_all(machines.host("staging").path("/home/dba/out")).unwrap();
    }
    eprintln!("bytes to the staging server: {over_the_link:?}");
    assert!(over_the_link[1] > 0 && over_the_link[1] < over_the_link[0] / 10, "{over_the_link:?}");

    for (read_from, why) in [
        ("staging:/mnt/other", "backup.manifest` is another".to_owned()),
        ("staging:/home", format!("{label}/backup.manifest` is missing")),
        ("staging", "repository `/repo`".to_owned()),
    ] {
        let (out, err) = machines.expect(1, &arguments("check", read_from));
        let said = format!("{out}{err}");
        assert!(said.contains("staging: ") && said.contains(&why), "{read_from}: {said}");
        assert!(said.contains("--read-from staging:DIR"), "{read_from}: {said}");
    }
    assert_nothing_left(&leftovers, "read from staging");
}
