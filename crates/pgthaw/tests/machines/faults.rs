//! Links that are cut and processes that are killed while an export runs over three machines.

use std::time::Duration;

use rustix::process::Signal;

use crate::lab::{Machines, assert_nothing_left, possible};

/// Longer than what either end of a connection needs to notice silence.
const CUT: Duration = Duration::from_secs(35);

/// The dump goes on where reads stalled: the same processes, no second attempt.
#[test]
fn a_link_that_is_cut_is_waited_for() {
    if !possible() {
        return;
    }
    let machines = Machines::new();
    // A dump that goes directly does not need the link to the target.
    for (a, b, options) in
        [("mount", "staging", &[][..]), ("mount", "target", &["--mover-ports", "none"])]
    {
        let leftovers = machines.leftovers();
        let export = machines.start(options);
        machines.wait_for_step("recover");
        let mut agents = Vec::new();
        // A process that the agent starts looks like it until it has become another program.
        machines.wait_until("the agent alone", || {
            let processes = machines.processes("staging", "pgthaw internal agent");
            agents = processes.iter().map(|agent| agent.pid).collect::<Vec<i32>>();
            agents.len() == 1
        });
        machines.lab.cut(a, b);
        std::thread::sleep(CUT);
        let during = machines.session();
        let held = machines.processes("staging", "pgthaw internal agent");
        machines.lab.mend(a, b);
        let case = format!("{a}-{b} cut for {CUT:?}: {during}");
        eprintln!("{case}");
        assert_eq!(during["state"], "waiting", "{case}\n{}", machines.logs());
        assert!(
            during["detail"]
                .as_str()
                .is_some_and(|detail| detail.contains("cannot be reached") || detail.contains(b)),
            "{case}"
        );
        assert_eq!(held.iter().map(|agent| agent.pid).collect::<Vec<_>>(), agents, "{case}");
        machines.ended(export, 0);
        assert_eq!(machines.session()["attempts"], 1, "{case}");
        machines.assert_delivered();
        assert_nothing_left(&leftovers, &case);
    }
}

/// With `--stall-timeout` the wait has an end: the session fails by name, and a retry completes it.
#[test]
fn a_machine_that_is_away_for_too_long_fails_the_session() {
    if !possible() {
        return;
    }
    let machines = Machines::new();
    for (host, step, words) in
        [("staging", "recover", "could not be read"), ("target", "dump", "could not be reached")]
    {
        let case = format!("{host} away at {step}");
        let leftovers = machines.leftovers();
        // A dump that goes directly does not miss the mount server.
        let export = machines.start(&["--stall-timeout", "4s", "--mover-ports", "none"]);
        machines.wait_for_step(step);
        machines.wait_until("reads", || !machines.processes("staging", "postgres: ").is_empty());
        machines.lab.cut("mount", host);
        // The agent of a staging server that is away tells of its failure once it is back.
        let away = if host == "staging" { 10 } else { CUT.as_secs() };
        std::thread::sleep(Duration::from_secs(away));
        machines.lab.mend("mount", host);
        machines.ended(export, 1);
        let session = machines.session();
        assert_eq!(session["state"], "failed", "{case}: {session}");
        let errors = session["databases"].as_array().into_iter().flatten().map(|d| &d["error"]);
        let errors: Vec<_> = errors.chain([&session["error"]]).filter_map(|e| e.as_str()).collect();
        assert!(errors.iter().any(|error| error.contains(words)), "{case}: {session}");
        machines.expect(0, &["retry", session["id"].as_str().unwrap()]);
        machines.assert_delivered();
        assert_nothing_left(&leftovers, &case);
    }
}

/// One process after the other, at the step in which it works.
#[test]
fn processes_on_every_machine_are_killed() {
    if !possible() {
        return;
    }
    let machines = Machines::new();
    // Host, process, step, whether the session goes on by itself.
    let cases = [
        ("mount", "pgthaw serve", "dump", true),
        ("mount", "ssh ", "recover", true),
        ("mount", "pgthaw internal reads", "recover", true),
        ("staging", "pgthaw attach", "recover", true),
        ("staging", "pgthaw attach", "dump", true),
        ("target", "pgthaw attach", "dump", true),
        ("staging", "pgthaw internal agent", "recover", false),
        ("staging", "pgthaw internal agent", "dump", false),
        ("staging", "pgthaw internal mount", "dump", false),
        ("staging", "/usr/lib/postgresql", "dump", false),
    ];
    for (host, victim, step, goes_on) in cases {
        let case = format!("`{victim}` on {host} killed at {step}");
        let leftovers = machines.leftovers();
        let export = machines.start(&[]);
        machines.wait_for_step(step);
        machines.wait_until(&case, || {
            let victims = machines.processes(host, victim);
            victims.iter().for_each(|process| process.signal(Signal::KILL));
            !victims.is_empty()
        });
        if goes_on {
            machines.ended(export, 0);
            assert_eq!(machines.session()["attempts"], 1, "{case}");
        } else {
            machines.ended(export, 1);
            let session = machines.session();
            assert_eq!(session["state"], "failed", "{case}");
            machines.expect(0, &["retry", session["id"].as_str().unwrap()]);
        }
        eprintln!("{case}: fine");
        machines.assert_delivered();
        assert_nothing_left(&leftovers, &case);
    }
}

/// A staging server that fails takes the attempt along; the retry sends nothing again that the target has.
#[test]
fn machines_that_reboot_are_retried() {
    if !possible() {
        return;
    }
    let machines = Machines::new();
    for (host, step) in [("staging", "dump"), ("target", "dump")] {
        let case = format!("{host} rebooted at {step}");
        let leftovers = machines.leftovers();
        let mut export = machines.start(&[]);
        machines.wait_for_step(step);
        machines.host(host).reboot();
        let code = export.wait().unwrap().code();
        let session = machines.session();
        eprintln!("{case}: exit {code:?}, {}", session["state"]);
        if session["state"] != "succeeded" {
            assert_eq!(session["state"], "failed", "{case}: {session}");
            machines.expect(0, &["retry", session["id"].as_str().unwrap()]);
        }
        machines.assert_delivered();
        assert_nothing_left(&leftovers, &case);
    }
}

#[test]
fn a_machine_that_reboots_is_waited_for_and_begun_again() {
    if !possible() {
        return;
    }
    let machines = Machines::new();
    let leftovers = machines.leftovers();
    let export = machines.start(&["--retries", "2"]);
    machines.wait_for_step("dump");
    machines.host("staging").reboot();
    machines.ended(export, 0);
    assert_eq!(machines.session()["attempts"], 2, "{}", machines.logs());
    machines.assert_delivered();
    assert_nothing_left(&leftovers, "staging rebooted");
}

#[test]
fn clean_keeps_to_the_machine_that_is_named() {
    if !possible() {
        return;
    }
    let machines = Machines::new();
    let leftovers = machines.leftovers();
    let export = machines.start(&[]);
    machines.wait_for_step("dump");
    let agents = machines.processes("staging", "pgthaw internal agent");
    agents.iter().for_each(|agent| agent.signal(Signal::KILL));
    machines.ended(export, 1);
    let listed = |host: &str| machines.expect(0, &["clean", host, "--dry-run"]).0;
    assert!(!listed("dba@elsewhere").contains("would remove"));
    let there = listed("ops@target");
    assert!(there.contains("would remove directory ops@target:/home/ops/out/.pgthaw-"), "{there}");
    assert_eq!(listed("dba@staging"), there, "one session, two machines");
    machines.expect(0, &["clean", "dba@elsewhere", "--yes"]);
    assert_eq!(listed("ops@target"), there, "it is still there");
    machines.expect(0, &["clean", "ops@target", "--yes"]);
    assert_nothing_left(&leftovers, "cleaned");
}

#[test]
fn a_cancel_leaves_nothing_on_any_machine() {
    if !possible() {
        return;
    }
    let machines = Machines::new();
    for step in ["mount", "recover", "dump"] {
        let leftovers = machines.leftovers();
        let mut export = machines.start(&[]);
        machines.wait_for_step(step);
        let id = machines.session()["id"].as_str().unwrap().to_owned();
        let canceled = machines.pgthaw(&["cancel", &id]).output().unwrap();
        let code = export.wait().unwrap().code();
        let session = machines.session();
        if session["state"] == "succeeded" {
            machines.assert_delivered(); // it was faster
        } else {
            assert_eq!(
                (canceled.status.code(), code),
                (Some(0), Some(1)),
                "{step}: {session}\n{}",
                machines.logs()
            );
            assert_eq!(session["state"], "canceled", "{step}");
            assert!(!machines.host("target").path("/home/ops/out").exists(), "{step}");
        }
        assert_nothing_left(&leftovers, &format!("canceled at {step}"));
    }
}
