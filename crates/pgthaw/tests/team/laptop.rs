//! Exports that are asked for on a laptop, most of them to that laptop.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use rustix::process::Signal;

use crate::lab::{Team, assert_nothing_left, possible};
use crate::support::text;

const TO_LAPTOP: [&str; 5] =
    ["--staging", "stage", "--no-role-passwords", "--to", "/home/ann/monday"];

#[test]
fn a_laptop_asks_and_receives() {
    if !possible() {
        return;
    }
    let team = Team::new();
    let leftovers = team.leftovers();
    let (out, _) = team.expect(0, "ann", &["backups", "prod"]);
    assert!(out.contains("full"), "{out}");
    let (out, _) = team.expect(0, "ann", &["databases", "prod"]);
    assert!(out.contains("crm") && !out.contains("postgres"), "only hers: {out}");
    team.expect(0, "ann", &[&["check", "prod", "-d", "crm"], &TO_LAPTOP[..]].concat());

    // Two at once: one to the laptop, one to the archive.
    let to_laptop = team.start(&TO_LAPTOP);
    let to_archive =
        team.start(&["--staging", "stage", "--no-role-passwords", "--to", "archive:tuesday"]);
    for export in [to_laptop, to_archive] {
        team.wants(0, &["export"], &export.wait_with_output().unwrap());
    }
    let directory = team.host("laptop").path("/home/ann/monday");
    let meta = std::fs::metadata(&directory).unwrap();
    assert_eq!(meta.uid(), team.host("laptop").user("ann").uid);
    assert_eq!(meta.permissions().mode() & 0o777, 0o700);
    team.assert_delivered("laptop", "/home/ann/monday");
    team.assert_delivered("files", "/home/ops/exports/tuesday");
    std::fs::remove_dir(team.host("files").path("/home/ops/exports")).unwrap();
    assert_nothing_left(&leftovers, "two exports");
    let said = std::fs::read_to_string(team.host("backup1").path("/home/dba/serve.log")).unwrap();
    assert_eq!(said, "pgthaw serve: listening on /run/pgthaw/server.sock\n");

    let sessions = team.sessions();
    assert!(
        sessions.iter().all(|s| s["state"] == "succeeded" && s["user"] == "ann"),
        "{sessions:?}"
    );
    let log = team.expect(0, "ann", &["log", sessions[0]["id"].as_str().unwrap()]).0;
    assert!(log.contains("SSH keys of dba@backup1"), "{log}");
    let audit = team.audit();
    let ends: Vec<_> = audit.iter().filter(|line| line["action"] == "end").collect();
    assert_eq!(ends.len(), 2, "{audit:?}");
    assert!(ends.iter().all(|line| line["user"] == "ann" && line["result"] == "succeeded"));
    let asked: Vec<_> = audit.iter().filter(|line| line["action"] == "export").collect();
    assert_eq!(asked.len(), 2);
    assert!(asked.iter().all(|line| line["result"] == "accepted" && line["repository"] == "prod"));
}

#[test]
fn an_account_of_the_servers_machine_asks() {
    if !possible() {
        return;
    }
    let team = Team::new();
    let leftovers = team.leftovers();
    let mut asked = team.host("backup1").command("root", "env");
    asked.args(["PGTHAW_SERVER=/run/pgthaw/server.sock", "timeout", "60", "pgthaw", "export"]);
    asked.args(["prod", "-d", "crm", "-d", "sales", "--to", "/srv/monday"]);
    team.wants(0, &["export"], &asked.output().unwrap());
    let meta = std::fs::metadata(team.host("backup1").path("/srv/monday")).unwrap();
    assert_eq!(meta.uid(), 0, "it belongs to who asked, not to the service");
    team.assert_delivered("backup1", "/srv/monday");
    assert_nothing_left(&leftovers, "asked on the server's machine");
}

#[test]
fn a_server_that_was_carried_over_takes_its_program_along() {
    if !possible() {
        return;
    }
    let team = Team::new();
    let leftovers = team.leftovers();
    let mut asked = team.host("laptop").command("ann", "env");
    asked.args(["PGTHAW_SERVER=ssh://dba@db-stage", "pgthaw", "sessions"]);
    team.wants(0, &["sessions"], &asked.output().unwrap());
    assert_nothing_left(&leftovers, "a server elsewhere");
}

#[test]
fn a_closed_laptop_goes_on_later() {
    if !possible() {
        return;
    }
    let team = Team::new();
    let leftovers = team.leftovers();
    // Slow enough to be in the middle of the delivery for a while.
    team.lab.throttle("db-stage", "laptop", Some(400_000));
    let mut export = team.start(&TO_LAPTOP);
    let arriving = || {
        let files = walk(&team.host("laptop").path("/home/ann/monday"));
        files.iter().any(|size| *size > 100_000)
    };
    team.wait_until("the delivery", arriving);
    for process in team.host("laptop").processes() {
        if ["env ", "pgthaw", "ssh "].iter().any(|name| process.arguments.starts_with(name)) {
            process.signal(Signal::KILL);
        }
    }
    export.wait().unwrap();
    team.lab.throttle("db-stage", "laptop", None);
    team.wait_until("the session to say what it waits for", || {
        let sessions = team.sessions();
        let detail = sessions.last().and_then(|session| session["detail"].as_str());
        detail.is_some_and(|detail| detail.contains("pgthaw attach"))
    });
    let session = team.sessions().pop().unwrap();
    assert_eq!(session["state"], "waiting");
    let id = session["id"].as_str().unwrap();
    let (_, err) = team.expect(0, "ann", &["attach", id]);
    assert!(!err.contains("attempt 2"), "the same attempt: {err}");
    team.assert_delivered("laptop", "/home/ann/monday");
    assert_nothing_left(&leftovers, "a closed laptop");
}

#[test]
fn a_killed_server_takes_its_sessions_up_again() {
    if !possible() {
        return;
    }
    let mut team = Team::new();
    team.lab.throttle("db-stage", "laptop", Some(400_000));
    let export = team.start(&TO_LAPTOP);
    team.wait_until("the delivery", || {
        !walk(&team.host("laptop").path("/home/ann/monday")).is_empty()
    });
    team.kill_server();
    team.serve();
    team.lab.throttle("db-stage", "laptop", None);
    let output = export.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}\n{}", text(&output.stderr), team.logs());
    team.assert_delivered("laptop", "/home/ann/monday");
}

#[test]
fn a_forwarded_agents_keys_reach_what_the_servers_do_not() {
    if !possible() {
        return;
    }
    let team = Team::new();
    team.host("db-stage").refuse_key("dba", "dba@backup1");
    let leftovers = team.leftovers();
    let refused = team.start(&TO_LAPTOP).wait_with_output().unwrap();
    let said = team.wants(1, &["export"], &refused).1;
    assert!(said.contains("Permission denied"), "{said}");

    let export = format!(
        "ssh-add -q && PGTHAW_SERVER=ssh://backup1 pgthaw export prod -d crm -d sales --forward-ssh-agent {}",
        TO_LAPTOP.join(" ")
    );
    let mut command = team.host("laptop").command("ann", "ssh-agent");
    let output = command.args(["sh", "-c", &export]).output().unwrap();
    team.wants(0, &["export"], &output);
    team.assert_delivered("laptop", "/home/ann/monday");
    let session = team.sessions().pop().unwrap();
    assert_eq!(session["ssh_keys_of"], "ann@laptop");
    let log = team.expect(0, "ann", &["log", session["id"].as_str().unwrap()]).0;
    assert!(log.contains("SSH keys of ann@laptop"), "{log}");
    assert_nothing_left(&leftovers, "a forwarded agent");
}

/// Sizes of all files below a directory.
fn walk(directory: &std::path::Path) -> Vec<u64> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .flat_map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => walk(&entry.path()),
            Ok(meta) => vec![meta.len()],
            Err(_) => vec![],
        })
        .collect()
}
