//! Canaries on hosts: left alone, through a crash and behind a wall they say nothing; what is done to them is told.

use std::path::Path;
use std::time::Instant;

use pgthaw_testkit::{Lab, postgres_programs, run};

use crate::possible;

/// Where the backups in these tests remember a tablespace.
const ORIGINAL: &str = "/var/tmp/cluster/ts_sales";
const OWNERS: [(&str, &str); 2] = [("mount", "ann"), ("staging", "dba")];

#[test]
fn canaries_of_hosts_that_are_left_alone_say_nothing() {
    if !possible() {
        return;
    }
    let lab = Lab::new(&["mount", "staging", "target"]);
    let begin = Instant::now();
    lab.place_canaries(&OWNERS, Path::new(ORIGINAL));
    let placed = begin.elapsed();
    let begin = Instant::now();
    assert_eq!(lab.check_canaries(), [""; 0]);
    eprintln!("placed in {placed:?}, checked in {:?}", begin.elapsed());
}

#[test]
fn a_crash_of_their_host_does_them_no_harm() {
    if !possible() {
        return;
    }
    let lab = Lab::new(&["mount", "staging"]);
    lab.place_canaries(&OWNERS, Path::new(ORIGINAL));
    lab.host("staging").reboot();
    lab.host("mount").crash();
    assert_eq!(lab.check_canaries(), [""; 0]);
}

#[test]
fn what_is_done_to_a_hosts_canaries_is_told() {
    if !possible() {
        return;
    }
    let lab = Lab::new(&["mount", "staging"]);
    lab.place_canaries(&OWNERS, Path::new(ORIGINAL));
    let staging = lab.host("staging");
    staging.script(&format!("touch {ORIGINAL}/new"));
    // By the socket and the port where it looks by default.
    let mut psql = staging.command("ops", postgres_programs().join("psql"));
    run(psql.args(["--no-psqlrc", "--username=postgres", "--command=SELECT 1", "postgres"]));
    let told = lab.check_canaries();
    for words in ["staging: 1 connections", "/cluster/ts_sales/new: is new"] {
        assert!(told.iter().any(|line| line.contains(words)), "{words} is not in {told:#?}");
    }
    assert!(told.iter().all(|line| line.starts_with("staging: ")), "{told:#?}");

    // A host whose programs are gone can still end it.
    let lab = Lab::new(&["mount", "staging"]);
    lab.place_canaries(&OWNERS, Path::new(ORIGINAL));
    lab.host("staging").script("chmod 0 /usr/lib/postgresql; chmod 700 /var/lib/production/public");
    let told = lab.check_canaries();
    assert_eq!(told.len(), 1, "{told:#?}");
    assert!(told[0].ends_with("/public: mode 40755, then 40700"), "{told:#?}");
}

#[test]
#[should_panic(expected = "production was touched:\nmount: ")]
fn a_touched_canary_of_a_host_fails_the_test() {
    if !possible() {
        panic!("production was touched:\nmount: skipped");
    }
    let lab = Lab::new(&["mount"]);
    lab.place_canaries(&OWNERS[..1], Path::new(ORIGINAL));
    lab.host("mount").script("echo x > /var/lib/production/public/writable");
}
