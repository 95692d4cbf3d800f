//! What a team's server refuses, and to whom.

use crate::lab::{Team, possible};

#[test]
fn nobody_gets_what_no_rule_allows() {
    if !possible() {
        return;
    }
    let team = Team::new();
    let export = |more: &[&str]| {
        let all =
            [&["export", "prod", "--staging", "stage", "--to", "/home/ann/out"], more].concat();
        team.expect(2, "ann", &all).1
    };
    let cases: [(&[&str], &str); 5] = [
        (&["-d", "crm"], "password hashes of roles (--no-role-passwords"),
        (&["-d", "postgres", "--no-role-passwords"], "database `postgres`"),
        (&["--all", "--no-role-passwords"], "all databases"),
        (&["-d", "crm", "--no-role-passwords", "--preload", "evil"], "option --preload"),
        (&["-d", "crm", "--no-role-passwords", "--dump-dir", "/tmp"], "option --dump-dir"),
    ];
    for (options, want) in cases {
        let said = export(options);
        assert!(
            said.contains("no rule of this server allows ann") && said.contains(want),
            "{said}"
        );
    }
    let path = team.expect(2, "ann", &["backups", "/home/dba/repo"]).1;
    assert!(path.contains("a repository by its path"), "{path}");
    let unknown = team.expect(2, "ann", &["backups", "hr"]).1;
    assert!(unknown.contains("repository `hr`"), "{unknown}");
    let ops = team.expect(2, "ops", &["backups", "prod"]).1;
    assert!(ops.contains("no rule of this server allows ops repository `prod`"), "{ops}");
    let refused = team.audit();
    let actions: Vec<_> = refused.iter().map(|line| line["action"].as_str().unwrap()).collect();
    assert_eq!(actions, [["export"; 5].as_slice(), &["backups"; 3]].concat());
    assert!(refused.iter().all(|line| line["result"] == "refused" && line["reason"].is_string()));
    assert!(!team.host("laptop").path("/home/ann/out").exists());
    assert!(team.sessions().is_empty());

    // Somebody else's session is not there for him.
    let export = [
        "export",
        "prod",
        "-d",
        "crm",
        "--staging",
        "stage",
        "--no-role-passwords",
        "--to",
        "/home/ann/out",
    ];
    team.expect(0, "ann", &export);
    let id = team.sessions()[0]["id"].as_str().unwrap().to_owned();
    for command in ["session", "log", "retry", "cancel"] {
        let said = team.expect(2, "ops", &[command, &id]).1;
        assert!(said.contains("there is no session"), "{said}");
    }
    let listed = team.expect(0, "ops", &["sessions", "--output", "json"]).0;
    assert_eq!(listed.trim(), "[]");
}

#[test]
fn what_is_looked_at_is_written_down() {
    if !possible() {
        return;
    }
    let team = Team::new();
    team.expect(0, "ann", &["backups", "prod"]);
    team.expect(0, "ann", &["databases", "prod"]);
    team.expect(2, "ann", &["databases", "prod", "--backup", "nosuch"]);
    let check = ["-d", "crm", "--staging", "stage", "--no-role-passwords", "--to", "/home/ann/out"];
    team.expect(0, "ann", &[&["check", "prod"], &check[..]].concat());
    let lines = team.audit();
    let told = |key: &str| -> Vec<_> { lines.iter().map(|line| line[key].clone()).collect() };
    assert_eq!(told("action"), ["backups", "databases", "databases", "check"]);
    assert_eq!(told("result"), ["accepted", "accepted", "refused", "accepted"]);
    assert_eq!(told("backup")[2], "nosuch");
    assert_eq!(told("staging")[3], "stage");
    assert!(lines.iter().all(|line| line["user"] == "ann" && line["repository"] == "prod"));
}

#[test]
fn a_retry_needs_a_rule_again() {
    if !possible() {
        return;
    }
    let mut team = Team::new();
    team.lab.throttle("db-stage", "files", Some(400_000)); // so that the agent does not end before it is killed
    let options =
        ["--staging", "stage", "--no-role-passwords", "--retries", "0", "--to", "archive:x"];
    let mut export = team.start(&options);
    team.wait_until("an agent", || {
        team.sessions().first().is_some_and(|session| session["step"] == "dump")
    });
    let id = team.sessions()[0]["id"].as_str().unwrap().to_owned();
    team.kill_all("db-stage", "pgthaw internal agent");
    team.lab.throttle("db-stage", "files", None);
    assert_eq!(export.wait().unwrap().code(), Some(1));
    team.change_configuration("databases = ['crm', 'sales']", "databases = ['crm']");
    let said = team.expect(2, "ann", &["retry", &id]).1;
    assert!(said.contains("no rule of this server allows ann database `sales`"), "{said}");
    let last = team.audit().pop().unwrap();
    assert_eq!((&last["action"], &last["result"]), (&"retry".into(), &"refused".into()));
    team.change_configuration("databases = ['crm']", "databases = ['crm', 'sales']");
    team.expect(0, "ann", &["retry", &id]);
    team.assert_delivered("files", "/home/ops/exports/x");
}

#[test]
fn a_key_may_be_kept_to_the_server() {
    if !possible() {
        return;
    }
    let team = Team::new();
    let only = "pgthaw attach --stdio --only server";
    team.host("backup1").force_command("ann", "ann@laptop", only);
    team.expect(0, "ann", &["backups", "prod"]);
    // The account's files are out of reach with it: it serves neither as staging server nor as target.
    let mut command = team.host("laptop").command("ann", "pgthaw");
    command.args(["check", "/home/ann", "-d", "crm", "--to", "ann@backup1:/home/ann/x"]);
    assert_ne!(command.output().unwrap().status.code(), Some(0));
}

#[test]
fn without_a_server_it_is_said() {
    if !possible() {
        return;
    }
    let mut team = Team::new();
    let said = {
        let mut command = team.host("laptop").command("ann", "env");
        command.args(["PGTHAW_SERVER=backup1", "pgthaw", "sessions"]);
        let output = command.output().unwrap();
        team.wants(2, &["sessions"], &output).1
    };
    assert!(said.contains("$PGTHAW_SERVER") && said.contains("ssh://"), "{said}");
    team.kill_server();
    let said = team.expect(1, "ann", &["backups", "prod"]).1;
    assert!(said.contains("there is no pgthaw server") && said.contains("pgthaw serve"), "{said}");
}
