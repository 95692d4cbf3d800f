//! Exports that begin again by themselves.

use rustix::process::{Pid, Signal, kill_process};

use crate::lab::{Attack, Judge, Victim};

const DATABASES: [&str; 2] = ["sales", "crm"];

#[test]
fn what_died_is_begun_again() {
    let mut judge = Judge::new();
    for victim in [Victim::Agent, Victim::Mount, Victim::Postmaster, Victim::PgDump] {
        let case = format!("{victim:?} killed");
        let mut attack = Attack::begin(&DATABASES, &["--retries", "1"]);
        attack.wait_for_step("dump");
        assert!(attack.kill(victim), "{case}");
        assert_eq!(attack.cli_ends().code(), Some(0), "{case}\n{}", attack.words());
        assert_eq!(attack.count("attempt"), 2, "{case}");
        assert!(attack.said().contains("attempt 2"), "{case}: {}", attack.said());
        attack.assert_nothing_left(&case);
        judge.assert_equal(&case, &attack.target, &DATABASES);
    }
}

#[test]
fn it_gives_up_after_so_many_times() {
    let mut attack = Attack::begin(&DATABASES, &["--retries", "1"]);
    for attempt in 1..=2 {
        attack.wait_until("the attempt", || attack.count("attempt") == attempt);
        attack.wait_for_step("recover");
        assert!(attack.kill(Victim::Agent), "attempt {attempt}");
    }
    assert_eq!(attack.cli_ends().code(), Some(1), "{}", attack.words());
    assert_eq!(attack.count("attempt"), 2);
    attack.assert_failed_cleanly("given up");
    attack.retry();
    attack.assert_nothing_left("given up");
    Judge::new().assert_equal("given up", &attack.target, &DATABASES);
}

#[test]
fn ctrl_c_ends_the_rest_before_the_next_attempt() {
    let mut attack = Attack::begin(&DATABASES, &["--retries", "5"]);
    attack.wait_for_step("dump");
    assert!(attack.kill(Victim::Agent));
    attack.wait_until("the rest", || attack.count("gave_up") == 1);
    let cli = Pid::from_raw(attack.cli.id().cast_signed()).unwrap();
    kill_process(cli, Signal::INT).unwrap();
    assert_eq!(attack.cli_ends().code(), Some(130), "{}", attack.words());
    assert_eq!(attack.ended_session()["state"], "failed");
    assert_eq!(attack.count("attempt"), 1);
    attack.retry();
    attack.assert_nothing_left("stopped");
}

#[test]
fn an_agent_without_a_server_ends_and_leaves_nothing() {
    let mut attack = Attack::begin(&DATABASES, &["--lease", "30s"]);
    attack.wait_for_step("dump");
    attack.kill(Victim::CommandLine);
    attack.cli_ends();
    assert!(attack.kill(Victim::Server));
    assert!(!attack.pids(Victim::Agent).is_empty(), "it goes on without them");
    attack.wait_until("the lease's end", || attack.pids(Victim::Agent).is_empty());
    attack.assert_failed_cleanly("the lease's end");
    assert_eq!(attack.ended_session()["state"], "failed", "the next server finds it out");
    attack.retry();
    attack.assert_nothing_left("retried");
    Judge::new().assert_equal("retried", &attack.target, &DATABASES);
}
