//! `kill -9` of every process at every step: table of steps per victim.
//!
//! The step is read from the session's journal; where a step may be over before its victim is met, the row says so.

use pgthaw_testkit::{Fixture, Scratch, User};
use rustix::process::{Signal, kill_process};

use crate::lab::{Attack, Judge, STEPS, Victim};
use crate::support::Pgthaw;

const DATABASES: [&str; 2] = ["sales", "crm"];

/// Kills `victim` at each of `steps`. Without it the attempt fails, except where it had done its part already; `retry` completes.
fn fails_and_is_retried(victim: Victim, steps: &[&str]) {
    let mut judge = Judge::new();
    for step in steps {
        let case = format!("{victim:?} killed at {step}");
        let mut attack = Attack::begin(&DATABASES, &[]);
        attack.wait_for_step(step);
        let caught = attack.kill(victim);
        let exit = attack.cli_ends().code();
        let state = attack.ended_session()["state"].clone();
        eprintln!("{case}: caught {caught}, exit {exit:?}, {state}");
        // Only what has done its part may be missed, or killed in vain.
        let may_be_late = matches!(*step, "deliver" | "clean");
        assert!(caught || may_be_late, "{case}: it was never seen\n{}", attack.words());
        match exit {
            Some(0) if may_be_late => assert_eq!(state, "succeeded", "{case}"),
            _ => {
                assert_eq!(
                    (exit, state.as_str()),
                    (Some(1), Some("failed")),
                    "{case}\n{}",
                    attack.words()
                );
                assert!(attack.said().contains("pgthaw retry"), "{case}: {}", attack.said());
                attack.assert_failed_cleanly(&case);
                attack.retry();
            }
        }
        attack.assert_nothing_left(&case);
        judge.assert_equal(&case, &attack.target, &DATABASES);
    }
}

#[test]
fn the_agent_is_killed() {
    fails_and_is_retried(Victim::Agent, &STEPS);
}

#[test]
fn the_mount_is_killed() {
    fails_and_is_retried(Victim::Mount, &STEPS);
}

#[test]
fn the_postmaster_is_killed() {
    fails_and_is_retried(Victim::Postmaster, &STEPS[1..]);
}

#[test]
fn a_process_of_postgresql_is_killed() {
    fails_and_is_retried(Victim::Startup, &["recover"]);
    fails_and_is_retried(Victim::Backend, &["dump"]);
}

#[test]
fn pg_dump_is_killed() {
    fails_and_is_retried(Victim::PgDump, &["dump"]);
    fails_and_is_retried(Victim::DumpWorker, &["dump"]);
}

#[test]
fn the_command_line_is_killed() {
    let mut judge = Judge::new();
    for step in STEPS {
        let case = format!("the command line killed at {step}");
        let mut attack = Attack::begin(&DATABASES, &[]);
        attack.wait_for_step(step);
        attack.kill(Victim::CommandLine);
        attack.cli_ends();
        let session = attack.ended_session();
        assert_eq!(
            (&session["state"], &session["attempts"]),
            (&"succeeded".into(), &1.into()),
            "{case}"
        );
        attack.assert_nothing_left(&case);
        judge.assert_equal(&case, &attack.target, &DATABASES);
    }
}

/// A command line that follows finds the next server by itself; without one the next command starts it.
#[test]
fn the_server_is_killed() {
    let mut judge = Judge::new();
    for (follower, step) in [true, false].into_iter().flat_map(|f| STEPS.map(|step| (f, step))) {
        let case = format!("the server killed at {step}, followed: {follower}");
        let mut attack = Attack::begin(&DATABASES, &[]);
        attack.wait_for_step(step);
        if !follower {
            attack.kill(Victim::CommandLine);
            attack.cli_ends();
        }
        let agents = attack.pids(Victim::Agent);
        assert!(attack.kill(Victim::Server), "{case}");
        if follower {
            assert_eq!(attack.cli_ends().code(), Some(0), "{case}\n{}", attack.words());
        }
        let session = attack.ended_session();
        assert_eq!(
            (&session["state"], &session["attempts"]),
            (&"succeeded".into(), &1.into()),
            "{case}\n{}",
            attack.words()
        );
        assert_eq!(attack.count("placed"), 1, "{case}: another agent than {agents:?} went on");
        attack.assert_nothing_left(&case);
        judge.assert_equal(&case, &attack.target, &DATABASES);
    }
}

/// Before there is a session nothing is promised but an error, and that nothing is left.
#[test]
fn what_reads_and_checks_is_killed_before_there_is_a_session() {
    for victim in [Victim::Source, Victim::Check, Victim::Server] {
        let case = format!("{victim:?} killed during the check");
        let mut attack = Attack::begin(&DATABASES, &[]);
        if victim == Victim::Server {
            attack
                .wait_until("the repository's reader", || !attack.pids(Victim::Source).is_empty());
        }
        assert!(attack.kill(victim), "{case}");
        assert_eq!(attack.cli_ends().code(), Some(1), "{case}\n{}", attack.words());
        assert!(attack.said().contains("pgthaw: error:"), "{case}: {}", attack.said());
        assert_eq!(attack.pgthaw.json(&["sessions"]), serde_json::json!([]), "{case}");
        attack.assert_nothing_left(&case);
        assert!(!attack.target.exists(), "{case}");
    }
}

/// The check of a retry is a step of a session: what is killed there needs the next retry.
#[test]
fn the_check_of_a_retry_is_killed() {
    let mut judge = Judge::new();
    for victim in [Victim::Source, Victim::Check, Victim::Server] {
        let case = format!("{victim:?} killed at a retry's check");
        let mut attack = Attack::begin(&DATABASES, &[]);
        attack.wait_for_step("dump");
        attack.kill(Victim::PgDump);
        attack.cli_ends();
        attack.ended_session();
        let id = attack.id();
        let retry =
            attack.pgthaw.command(&["retry", &id]).stderr(std::process::Stdio::null()).spawn();
        attack.cli = retry.unwrap();
        attack.wait_until("the second attempt", || attack.count("attempt") == 2);
        assert!(attack.kill(victim), "{case}");
        let exit = attack.cli_ends().code();
        let state = attack.ended_session()["state"].clone();
        if victim == Victim::Server {
            assert_eq!(
                (exit, state.as_str()),
                (Some(0), Some("succeeded")),
                "{case}\n{}",
                attack.words()
            );
        } else {
            assert_eq!(
                (exit, state.as_str()),
                (Some(1), Some("failed")),
                "{case}\n{}",
                attack.words()
            );
            attack.assert_failed_cleanly(&case);
            attack.retry();
        }
        attack.assert_nothing_left(&case);
        judge.assert_equal(&case, &attack.target, &DATABASES);
    }
}

/// Steps are long and kills rare: here the agent dies at moments that nobody has chosen.
#[test]
fn the_agent_is_killed_at_any_moment() {
    let mut judge = Judge::new();
    let full = std::time::Instant::now();
    let mut attack = Attack::begin(&DATABASES, &[]);
    attack.wait_until("an agent", || !attack.pids(Victim::Agent).is_empty());
    let first = full.elapsed();
    assert_eq!(attack.cli_ends().code(), Some(0));
    let last = full.elapsed();
    for part in 0..10 {
        let mut attack = Attack::begin(&DATABASES, &[]);
        attack.wait_until("an agent", || !attack.pids(Victim::Agent).is_empty());
        let after = (last - first) * part / 10;
        let case = format!("the agent killed {after:?} after its start");
        std::thread::sleep(after);
        for pid in attack.pids(Victim::Agent) {
            let _ = kill_process(pid, Signal::KILL); // it may just have ended
        }
        let exit = attack.cli_ends().code();
        let state = attack.ended_session()["state"].clone();
        eprintln!("{case}: exit {exit:?}, {state}");
        if exit != Some(0) {
            assert_eq!(state, "failed", "{case}\n{}", attack.words());
            attack.assert_failed_cleanly(&case);
            attack.retry();
        }
        attack.assert_nothing_left(&case);
        judge.assert_equal(&case, &attack.target, &DATABASES);
    }
}

/// The whole machine of ours at once: whoever comes next cleans up and goes on.
#[test]
fn everything_is_killed_at_once() {
    let mut judge = Judge::new();
    for step in STEPS {
        let case = format!("everything killed at {step}");
        let attack = Attack::begin(&DATABASES, &[]);
        attack.wait_for_step(step);
        for victim in [
            Victim::CommandLine,
            Victim::Server,
            Victim::Agent,
            Victim::Postmaster,
            Victim::PgDump,
            Victim::Mount,
        ] {
            for pid in attack.pids(victim) {
                let _ = kill_process(pid, Signal::KILL); // it may have followed another
            }
        }
        let state = attack.ended_session()["state"].clone();
        if state != "succeeded" {
            assert_eq!(state, "failed", "{case}\n{}", attack.words());
            attack.assert_failed_cleanly(&case);
            attack.retry();
        }
        attack.assert_nothing_left(&case);
        judge.assert_equal(&case, &attack.target, &DATABASES);
    }
}

/// An ordinary account mounts through `fusermount3` and cannot end a mount by force: the ways to clean up are others than root's.
#[test]
fn an_ordinary_users_processes_are_killed() {
    let (mut judge, user, scratch) = (Judge::new(), User::ordinary(), Scratch::new());
    let repository = Fixture::get().lz4.copy_for(&user, &scratch.join("repo")).path;
    let cases: [(&[Victim], &str); 7] = [
        (&[Victim::Agent], "mount"),
        (&[Victim::Mount], "recover"),
        (&[Victim::Agent], "dump"),
        (&[Victim::Mount], "dump"),
        (&[Victim::Postmaster], "dump"),
        (&[Victim::CommandLine, Victim::Server], "dump"),
        (&[Victim::CommandLine, Victim::Server, Victim::Agent], "dump"),
    ];
    for (victims, step) in cases {
        let case = format!("{victims:?} of an ordinary user killed at {step}");
        let attack = Attack::begin_in(Pgthaw::of(user.clone()), &repository, &DATABASES, &[]);
        attack.wait_for_step(step);
        for victim in victims {
            assert!(attack.kill(*victim), "{case}\n{}", attack.words());
        }
        let state = attack.ended_session()["state"].clone();
        if victims.ends_with(&[Victim::Server]) {
            assert_eq!(state, "succeeded", "{case}\n{}", attack.words());
        } else {
            assert_eq!(state, "failed", "{case}\n{}", attack.words());
            attack.assert_failed_cleanly(&case);
            attack.retry();
        }
        attack.assert_nothing_left(&case);
        judge.assert_equal(&case, &attack.target, &DATABASES);
    }
}
