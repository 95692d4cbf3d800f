//! What a user does to a session: Ctrl-C, a closed terminal, `cancel` at every step, `clean` afterwards.

use std::path::Path;

use pgthaw_testkit::Fixture;
use rustix::process::{Signal, kill_process};
use serde_json::Value;

use crate::lab::{Attack, Judge, STEPS, Victim};
use crate::support::Pgthaw;

const DATABASES: [&str; 2] = ["sales", "crm"];

/// Sends a signal to the command line.
fn signal(attack: &Attack, signal: Signal) {
    kill_process(attack.pids(Victim::CommandLine)[0], signal).unwrap();
}

#[test]
fn ctrl_c_stops_the_session_and_a_retry_completes_it() {
    let mut judge = Judge::new();
    for step in ["mount", "recover", "dump"] {
        let case = format!("Ctrl-C at {step}");
        let mut attack = Attack::begin(&DATABASES, &[]);
        attack.wait_for_step(step);
        signal(&attack, Signal::INT);
        assert_eq!(attack.cli_ends().code(), Some(130), "{case}\n{}", attack.words());
        let (id, said) = (attack.id(), attack.said());
        for command in ["retry", "cancel"] {
            assert!(said.contains(&format!("pgthaw {command} {id}")), "{case}: {said}");
        }
        assert_eq!(attack.ended_session()["state"], "failed", "{case}");
        attack.assert_failed_cleanly(&case);
        attack.retry();
        attack.assert_nothing_left(&case);
        judge.assert_equal(&case, &attack.target, &DATABASES);
    }
}

/// The second Ctrl-C leaves while the session is still being stopped.
#[test]
fn a_second_ctrl_c_leaves_at_once() {
    let mut attack = Attack::begin(&DATABASES, &[]);
    attack.wait_for_step("mount"); // early, so that it cannot have ended before it is stopped
    let agent = attack.pids(Victim::Agent)[0];
    kill_process(agent, Signal::STOP).unwrap(); // so that stopping takes until we have looked
    signal(&attack, Signal::INT);
    attack.wait_until("the first answer", || attack.said().contains("Ctrl-C again"));
    signal(&attack, Signal::INT);
    assert_eq!(attack.cli_ends().code(), Some(130), "{}", attack.words());
    assert!(!attack.pids(Victim::Agent).is_empty(), "the command line waited for the agent");
    kill_process(agent, Signal::CONT).unwrap();
    assert_eq!(attack.ended_session()["state"], "failed");
    attack.assert_failed_cleanly("two Ctrl-C");
    attack.retry();
    attack.assert_nothing_left("two Ctrl-C");
    Judge::new().assert_equal("two Ctrl-C", &attack.target, &DATABASES);
}

#[test]
fn a_closed_terminal_stops_nothing() {
    let mut judge = Judge::new();
    for step in ["mount", "dump"] {
        let case = format!("hung up at {step}");
        let mut attack = Attack::begin(&DATABASES, &[]);
        attack.wait_for_step(step);
        signal(&attack, Signal::HUP);
        attack.cli_ends();
        let session = attack.ended_session();
        assert_eq!(session["state"], "succeeded", "{case}\n{}", attack.words());
        assert_eq!(session["attempts"], 1, "{case}");
        attack.assert_nothing_left(&case);
        judge.assert_equal(&case, &attack.target, &DATABASES);
    }
}

#[test]
fn a_cancel_at_any_step_leaves_the_target_as_it_was() {
    let mut judge = Judge::new();
    for (existed, step) in [false, true].into_iter().flat_map(|e| STEPS.map(|step| (e, step))) {
        let case = format!("canceled at {step}, the target existed: {existed}");
        let pgthaw = Pgthaw::new();
        let target = pgthaw.target("export");
        if existed {
            std::fs::create_dir(&target).unwrap();
        }
        let mut attack = Attack::begin_in(pgthaw, &Fixture::get().lz4.path, &DATABASES, &[]);
        attack.wait_for_step(step);
        let id = attack.id();
        let canceled = attack.pgthaw.run(&["cancel", &id]);
        let code = attack.cli_ends().code();
        let state = attack.ended_session()["state"].clone();
        eprintln!("{case}: cancel {:?}, export {code:?}, {state}", canceled.status.code());
        attack.assert_nothing_left(&case);
        if state == "succeeded" && matches!(step, "deliver" | "clean") {
            assert_ne!(
                canceled.status.code(),
                Some(0),
                "{case}: it came too late and said nothing"
            );
            judge.assert_equal(&case, &attack.target, &DATABASES);
            continue;
        }
        assert_eq!(state, "canceled", "{case}\n{}", attack.words());
        assert_eq!(
            (canceled.status.code(), code),
            (Some(0), Some(1)),
            "{case}\n{}",
            attack.words()
        );
        assert_eq!(target.exists(), existed, "{case}");
        assert_eq!(entries(&target), [""; 0], "{case}");
        let (_, err) = attack.pgthaw.expect(2, &["retry", &id]);
        assert!(err.contains("was canceled"), "{case}: {err}");
    }
}

/// A failed session keeps what it delivered for its retry; a cancel removes that, too.
#[test]
fn a_failed_session_is_canceled() {
    let mut attack = Attack::begin(&DATABASES, &[]);
    attack.wait_until("the first database", || attack.count("database") == 1);
    assert!(attack.kill(Victim::PgDump), "{}", attack.words());
    assert_eq!(attack.cli_ends().code(), Some(1));
    attack.assert_failed_cleanly("one of two");
    assert!(attack.target.join("sales/toc.dat").exists(), "{}", attack.words());
    let id = attack.id();
    attack.pgthaw.expect(0, &["cancel", &id]);
    attack.assert_nothing_left("canceled");
    assert!(!attack.target.exists());
}

/// Nothing was delivered yet, and the directory was there before: the staging directory goes all the same.
#[test]
fn a_cancel_leaves_an_empty_directory_empty() {
    for clean in [false, true] {
        let pgthaw = Pgthaw::new();
        let target = pgthaw.target("export");
        std::fs::create_dir(&target).unwrap();
        let more = ["-t", "no_such_table"];
        let mut attack = Attack::begin_in(pgthaw, &Fixture::get().lz4.path, &["crm"], &more);
        assert_eq!(attack.cli_ends().code(), Some(1));
        assert_eq!(entries(&target).len(), 1, "a retry finds what was staged");
        let id = attack.id();
        match clean {
            true => attack.pgthaw.expect(0, &["clean", "--yes"]),
            false => attack.pgthaw.expect(0, &["cancel", &id]),
        };
        assert_eq!(entries(&target), [""; 0], "{}", attack.words());
        attack.assert_nothing_left("canceled");
        let again = attack.pgthaw.export(&Fixture::get().lz4.path, &["empty"], &target, &[]);
        assert!(again.0.contains("1 database exported"), "{again:?}");
    }
}

/// A directory that was delivered is emptied of what was delivered, and of nothing else.
#[test]
fn a_cancel_leaves_what_was_put_beside_a_delivered_dump() {
    let mut attack = Attack::begin(&["sales", "crm"], &["-t", "customer"]);
    assert_eq!(attack.cli_ends().code(), Some(1), "crm has no such table");
    let notes = attack.target.join("sales/notes.txt");
    std::fs::write(&notes, "mine").unwrap();
    let (_, said) = attack.pgthaw.expect(0, &["cancel", &attack.id()]);
    assert!(said.contains("sales") && said.contains("stays"), "{said}");
    assert_eq!(entries(&attack.target), ["sales"]);
    assert_eq!(entries(notes.parent().unwrap()), ["notes.txt"]);
    attack.assert_nothing_left("canceled");
}

/// What somebody else put under a database's name meanwhile is not removed by a cancel.
#[test]
fn a_cancel_leaves_what_others_put_into_the_target() {
    let mut attack = Attack::begin(&DATABASES, &[]);
    attack.wait_for_step("recover");
    std::fs::create_dir_all(attack.target.join("crm")).unwrap();
    std::fs::write(attack.target.join("crm/precious"), "x").unwrap();
    assert_eq!(attack.cli_ends().code(), Some(1), "{}", attack.words());
    assert!(attack.said().contains("crm"), "{}", attack.said());
    let id = attack.id();
    attack.pgthaw.expect(0, &["cancel", &id]);
    attack.assert_nothing_left("canceled");
    assert_eq!(entries(&attack.target), ["crm"]);
    assert!(attack.target.join("crm/precious").exists());
}

/// One database fails, the other is delivered; the retry dumps only what is missing.
#[test]
fn a_database_that_fails_does_not_hold_back_the_other() {
    let mut attack = Attack::begin(&DATABASES, &[]);
    attack.wait_for_step("dump");
    assert!(attack.kill(Victim::PgDump), "{}", attack.words()); // the dump of `sales`, the first
    assert_eq!(attack.cli_ends().code(), Some(1), "{}", attack.words());
    let session = attack.ended_session();
    assert_eq!(session["databases"][0]["state"], "failed", "{session}");
    assert_eq!(session["databases"][1]["state"], "delivered", "{session}");
    assert!(attack.said().contains("sales"), "{}", attack.said());
    attack.assert_failed_cleanly("sales fails");
    let toc = std::fs::read(attack.target.join("crm/toc.dat")).expect("crm is delivered");
    assert!(!attack.target.join("sales").exists());
    attack.retry();
    assert_eq!(
        std::fs::read(attack.target.join("crm/toc.dat")).unwrap(),
        toc,
        "crm is not dumped again"
    );
    let dumped: Vec<Value> = attack
        .journal()
        .into_iter()
        .rev()
        .take_while(|entry| entry.get("attempt").is_none())
        .filter_map(|entry| entry["database"]["name"].as_str().map(Value::from))
        .collect();
    assert_eq!(dumped, ["sales"]);
    attack.assert_nothing_left("retried");
    Judge::new().assert_equal("retried", &attack.target, &DATABASES);
}

/// Several sessions that were killed: `clean` lists and removes what is theirs, and nothing else.
#[test]
fn clean_removes_what_killed_sessions_left_and_nothing_else() {
    let mut attack = Attack::begin(&DATABASES, &[]);
    attack.wait_until("the first database", || attack.count("database") == 1);
    assert!(attack.kill(Victim::Agent));
    assert_eq!(attack.cli_ends().code(), Some(1));
    let first = attack.id();
    let second = attack.pgthaw.target("second");
    let mut cli = attack.pgthaw.start_export(
        &Fixture::get().lz4.path,
        &["sales"],
        &second,
        &["--retries", "0"],
    );
    attack.wait_until("the second session's staging", || {
        entries(&second).iter().any(|name| name.starts_with(".pgthaw-"))
    });
    for pid in attack.pids(Victim::Agent) {
        kill_process(pid, Signal::KILL).unwrap();
    }
    assert_eq!(cli.wait().unwrap().code(), Some(1));

    // Bystanders with names much like ours.
    let (work, dump) = (attack.pgthaw.work(), attack.pgthaw.dump());
    for lookalike in [work.join("lookalike"), dump.join("lookalike")] {
        std::fs::create_dir(&lookalike).unwrap();
        std::fs::write(lookalike.join("precious"), "x").unwrap();
    }
    let bystander = attack.pgthaw.target(".pgthaw-lookalike");
    std::fs::create_dir(&bystander).unwrap();
    let mount = Bystander::mount(attack.pgthaw.target("bystander"));

    let (listed, _) = attack.pgthaw.expect(0, &["clean", "--dry-run"]);
    let second_id = attack.id();
    for line in [
        format!("would remove directory {}/sales of session {first}\n", attack.target.display()),
        format!(
            "would remove directory {0}/.pgthaw-{first} of session {first}\n",
            attack.target.display()
        ),
        format!(
            "would remove directory {0}/.pgthaw-{second_id} of session {second_id}\n",
            second.display()
        ),
    ] {
        assert!(listed.contains(&line), "{line} is not in\n{listed}");
    }
    assert_eq!(listed.lines().count(), 5, "{listed}"); // and both sessions
    let (_, err) = attack.pgthaw.expect(2, &["clean"]);
    assert!(err.contains("--yes"), "{err}");
    assert!(attack.target.join("sales/toc.dat").exists(), "a dry run removes nothing");

    let (removed, _) = attack.pgthaw.expect(0, &["clean", "--yes"]);
    let done = listed.replace("would remove", "removed").replace("would cancel", "canceled");
    assert_eq!(removed, done);
    assert!(!attack.target.exists() && !second.exists());
    assert!(mount.is_mounted() && bystander.exists());
    assert!(work.join("lookalike/precious").exists() && dump.join("lookalike/precious").exists());
    drop(mount);
    attack.assert_nothing_left("cleaned");
    let (nothing, _) = attack.pgthaw.expect(0, &["clean", "--yes"]);
    assert_eq!(nothing, "nothing is left to remove\n");
}

/// A server that was killed together with its agent left everything as it stood: whoever asks next starts one that clears it away.
#[test]
fn a_file_system_of_somebody_else_in_our_place_is_left_alone() {
    let mut attack = Attack::begin(&DATABASES, &[]);
    attack.wait_for_step("dump");
    for victim in [Victim::CommandLine, Victim::Server, Victim::Agent] {
        assert!(attack.kill(victim));
    }
    attack.cli_ends();
    let session = entries(&attack.pgthaw.work()).pop().expect("the work directory");
    let bystander = Bystander::mount(attack.pgthaw.work().join(session).join("bystander"));
    let ended = attack.ended_session();
    assert_eq!(ended["state"], "failed");
    assert!(ended["error"].as_str().unwrap().contains("a file system is mounted at"), "{ended}");
    assert!(bystander.is_mounted(), "it was unmounted");
    drop(bystander);
    let id = attack.id();
    attack.pgthaw.expect(0, &["cancel", &id]);
    attack.assert_nothing_left("canceled");
    assert!(!attack.target.exists());
}

/// Somebody else's file system.
struct Bystander(std::path::PathBuf);

impl Bystander {
    fn mount(path: std::path::PathBuf) -> Self {
        std::fs::create_dir(&path).unwrap();
        rustix::mount::mount("bystander", &path, "tmpfs", rustix::mount::MountFlags::empty(), None)
            .unwrap();
        Self(path)
    }

    fn is_mounted(&self) -> bool {
        std::fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .contains(&format!(" {} ", self.0.display()))
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH); // a failed test may have lost it
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// The names in a directory, sorted; none if it is not there.
fn entries(directory: &Path) -> Vec<String> {
    let names = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<_> =
        names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
