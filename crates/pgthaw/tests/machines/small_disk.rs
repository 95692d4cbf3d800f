//! A staging server whose disk is smaller than the dump, and a slow way to the target.

use pgthaw_testkit::HostPlan;
use rustix::process::Signal;

use crate::lab::{Machines, assert_nothing_left, possible};

/// Bytes of the disk: the largest table is 9.5 MB without compression, the whole dump 17.5 MB.
const DISK: u64 = 12_000_000;
/// Options of an export that dumps there without compression.
const DUMP: [&str; 6] = ["--dump-dir", "/small", "-Z", "none", "-j", "1"];
/// What a session says when pg_dump stands still.
const STANDS: &str = "is nearly full";

fn machines() -> Machines {
    let staging = HostPlan::new("staging").disk("/small", DISK);
    Machines::planned(
        HostPlan::new("mount"),
        staging.disk_options("/small", "mode=1777"),
        HostPlan::new("target"),
    )
}

/// Starts an export over a link that carries `rate` bytes per second, and waits until pg_dump stands still.
fn start_until_pg_dump_stands(machines: &Machines, rate: u64) -> std::process::Child {
    let export = machines.start(&DUMP);
    machines.wait_for_step("recover"); // the program has been carried over
    machines.lab.throttle("staging", "target", Some(rate));
    machines.wait_until("pg_dump to stand still", || machines.journal().contains(STANDS));
    export
}

/// Whether every pg_dump on the staging server stands still (proc_pid_stat(5)).
fn stands_still(machines: &Machines) -> bool {
    let dumps = machines.processes("staging", "pg_dump");
    let stopped = |pid: i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
    };
    !dumps.is_empty() && dumps.iter().all(|dump| stopped(dump.pid))
}

#[test]
fn a_dump_larger_than_the_disk_waits_for_the_target() {
    if !possible() {
        return;
    }
    let machines = machines();
    let leftovers = machines.leftovers();
    let export = start_until_pg_dump_stands(&machines, 3_000_000);
    assert!(stands_still(&machines));
    machines.ended(export, 0);
    machines.lab.throttle("staging", "target", None);
    assert_eq!(machines.session()["attempts"], 1);
    machines.assert_delivered();
    assert_nothing_left(&leftovers, "a small disk");
}

#[test]
fn a_pg_dump_that_stands_still_ends_with_its_session() {
    if !possible() {
        return;
    }
    let machines = machines();
    let leftovers = machines.leftovers();
    let export = start_until_pg_dump_stands(&machines, 100_000);
    for agent in machines.processes("staging", "pgthaw internal agent") {
        agent.signal(Signal::KILL);
    }
    machines.ended(export, 1);
    assert_eq!(machines.session()["state"], "failed");
    assert!(machines.processes("staging", "pg_dump").is_empty(), "after its agent was killed");
    machines.lab.throttle("staging", "target", None);
    let id = machines.session()["id"].as_str().unwrap().to_owned();
    machines.expect(0, &["retry", &id]);
    machines.assert_delivered();
    assert_nothing_left(&leftovers, "agent killed, then a retry");

    let export = start_until_pg_dump_stands(&machines, 100_000);
    let id = machines.session()["id"].as_str().unwrap().to_owned();
    machines.expect(0, &["cancel", &id]);
    machines.ended(export, 1);
    machines.lab.throttle("staging", "target", None);
    assert_nothing_left(&leftovers, "canceled");
}
