//! Requests that cannot be meant: exit code 2, or 1 where the repository is what is wrong.

use std::fs;

use pgthaw_testkit::{Fixture, User, copy_tree};

use crate::lab::Lab;
use crate::support::{HeldDump, Pgthaw, wait_for};

#[test]
fn what_is_no_repository_is_named() {
    let pgthaw = Pgthaw::new();
    let make = |name: &str| {
        let path = pgthaw.scratch.join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    let (empty, other, bare) = (make("empty"), make("other"), make("bare"));
    fs::write(other.join("letter.txt"), "Dear Sir").unwrap();
    fs::create_dir_all(bare.join("backup/demo")).unwrap();
    fs::create_dir_all(bare.join("archive/demo")).unwrap();
    let file = pgthaw.scratch.join("file");
    fs::write(&file, "no directory").unwrap();
    let missing = pgthaw.scratch.join("missing");
    let cases = [
        (&missing, &["No such file", "hint: name the directory"][..]),
        (&empty, &["is empty", "hint: "]),
        (&other, &["is no repository that pgthaw knows", "hint: name a pgBackRest repository"]),
        (&bare, &["backup.info", "missing", "hint: "]),
        (&file, &["irectory"]),
    ];
    for (path, words) in cases {
        let name = path.display().to_string();
        let words: Vec<&str> = words.iter().copied().chain([name.as_str()]).collect();
        let target = pgthaw.target("export").display().to_string();
        for arguments in [
            &["backups", &name][..],
            &["databases", &name],
            &["check", &name, "-d", "crm", "--to", &target],
            &["export", &name, "-d", "crm", "--to", &target],
        ] {
            pgthaw.refused(&name, pgthaw.command(arguments), 2, &words);
        }
        assert!(!pgthaw.target("export").exists());
    }
}

#[test]
fn unknown_backups_and_databases_are_refused_with_those_there() {
    let lab = Lab::lz4();
    let labels = &Fixture::get().lz4.labels;
    let all = [labels[0].as_str(), &labels[1], &labels[2], "20200101-000000F", "hint: "];
    for id in ["20200101-000000F", "..", "latest"] {
        let words = if id == "20200101-000000F" { &all[..] } else { &all[..3] };
        lab.refuses(id, 2, &["--backup", id], words);
    }
    let there = ["no database", "nosuch", "crm", "sales", "warehouse", "we ird/\"name\""];
    lab.refuses("one unknown", 2, &["-d", "nosuch"], &there);
    lab.refuses("one of two unknown", 2, &["-d", "crm", "-d", "nosuch"], &there);
    lab.refuses("case counts", 2, &["-d", "CRM"], &["`CRM`"]);
    lab.refuses("no connections", 2, &["-d", "template0"], &["template0", "connections"]);
    lab.refuses("all left out", 2, &["--all", "--exclude-database", "*"], &["no database"]);
}

#[test]
fn stanzas_are_named_where_there_are_several() {
    let lab = Lab::lz4();
    lab.refuses("unknown", 2, &["--stanza", "other"], &["no stanza `other`", "demo"]);
    for top in ["backup", "archive"] {
        copy_tree(&lab.path(&format!("{top}/demo")), &lab.path(&format!("{top}/second")));
    }
    lab.refuses("none named", 2, &[], &["several stanzas", "demo, second", "--stanza"]);
    lab.refuses("path as stanza", 2, &["--stanza", "../demo"], &["no stanza `../demo`"]);
}

#[test]
fn options_that_do_not_fit_are_refused_before_anything_is_made() {
    let lab = Lab::lz4();
    let full = Lab::full();
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("format", &["--", "-Fc"], &["-F"]),
        ("file", &["--", "--file=/tmp/x"], &["--file"]),
        ("host", &["--", "--host", "db1"], &["--host"]),
        ("port", &["--", "-p5432"], &["-p"]),
        ("database", &["--", "other"], &["other"]),
        ("abbreviated", &["--", "--form=c"], &["--form"]),
        (
            "foreign",
            &["--", "--include-foreign-data=*"],
            &["--include-foreign-data", "live foreign"],
        ),
        ("foreign, abbreviated", &["--", "--include-f", "*"], &["--include-foreign-data"]),
        ("filter", &["--", "--filter=/tmp/x"], &["--filter", "live foreign"]),
        ("unknown", &["--", "--no-such-option"], &["--no-such-option"]),
        ("compression of a newer pg_dump", &["-Z", "zstd"], &["pg_dump", "zstd"]),
        ("compression of none", &["-Z", "bzip2"], &["bzip2"]),
        ("jobs", &["-j", "0"], &["-j"]),
        ("size", &["--cache-size", "many"], &["many"]),
        ("no size", &["--cache-size", "1"], &["--cache-size", "at least 1MB"]),
        ("wal archive", &["--wal-archive", "/tmp"], &["--wal-archive", "pgbackrest"]),
        ("snapshot", &["--atomic-snapshot"], &["--atomic-snapshot", "pgbackrest"]),
        ("label", &["--backup-label", "/etc/passwd"], &["--backup-label", "pgbackrest"]),
        ("backup of two", &["--backup", &full, "--backup", &full], &["--backup"]),
    ];
    for (case, more, words) in cases {
        lab.refuses(case, 2, more, words);
    }
    let repository = lab.repository.display().to_string();
    for target in ["", "ssh://db1", "ssh://db1:x/srv", "alice@:exports"] {
        let command = lab.pgthaw.command(&["export", &repository, "-d", "crm", "--to", target]);
        lab.pgthaw.refused(target, command, 2, &["--to"]);
    }
    let target = lab.pgthaw.target("export").display().to_string();
    for arguments in [
        &["export", &repository, "-d", "crm"][..],
        &["export", &repository, "--to", &target],
        &["export", "-d", "crm", "--to", &target],
        &["export", &repository, "-d", "crm", "--all", "--to", &target],
        &["export", "s3://bucket/repo", "-d", "crm", "--to", &target],
        &["session", "20200101-000000-abcd"],
        &["retry", "../../etc"],
        &["nonsense"],
    ] {
        lab.pgthaw.refused(&format!("{arguments:?}"), lab.pgthaw.command(arguments), 2, &[]);
    }
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let lab = Lab::lz4();
    let repository = lab.repository.display().to_string();
    let target = lab.pgthaw.target("export").display().to_string();
    for arguments in [
        &["backups", &repository][..],
        &["backups", &repository, "--output", "json"],
        &["databases", &repository],
        &["check", &repository, "-d", "empty", "--to", &target],
        &["export", &repository, "-d", "empty", "--to", &target],
        &["sessions"],
        &["completions", "bash"],
        &["man"],
        &["--help"],
        &["--version"],
    ] {
        let mut command = lab.pgthaw.command(arguments);
        command.stdout(fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
        let words = ["standard output", "No space left"];
        lab.pgthaw.refused(&format!("{arguments:?}"), command, 1, &words);
    }
    let target = std::path::Path::new(&target);
    assert!(target.join("export.json").exists(), "the export itself is whole");

    // A reader that went away is none.
    let mut command = lab.pgthaw.command(&["sessions"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    command.stdout(writer);
    lab.pgthaw.refused("a closed pipe", command, 0, &[]);
}

#[test]
fn targets_that_are_taken_are_refused() {
    let lab = Lab::lz4();
    let target = lab.pgthaw.target("export");
    let name = target.display().to_string();
    fs::create_dir(&target).unwrap();
    fs::write(target.join("letter.txt"), "Dear Sir").unwrap();
    lab.refuses_into(&target, "not empty", 2, &[], &["not empty", "letter.txt", &name]);
    lab.refuses_into(
        &target,
        "nothing to replace",
        2,
        &["--replace"],
        &["not empty", "letter.txt"],
    );
    fs::remove_dir_all(&target).unwrap();
    fs::write(&target, "a file").unwrap();
    lab.refuses_into(&target, "a file", 2, &[], &["no directory", &name]);
    fs::remove_file(&target).unwrap();
    std::os::unix::fs::symlink("/nowhere/at/all", &target).unwrap();
    lab.refuses_into(&target, "a dead link", 2, &[], &[&name]);
    fs::remove_file(&target).unwrap();
    let inside = lab.path("export").display().to_string();
    let repository = lab.repository.display().to_string();
    let command = lab.pgthaw.command(&["export", &repository, "-d", "crm", "--to", &inside]);
    lab.pgthaw.refused("inside", command, 2, &["inside", &inside]);
}

#[test]
fn a_second_session_with_the_same_target_is_refused() {
    let lab = Lab::lz4();
    let target = lab.pgthaw.target("export");
    let held = HeldDump::of(&lab.pgthaw); // so that the session is at work until we have asked
    let programs = held.programs.display().to_string();
    let mut first =
        lab.pgthaw.start_export(&lab.repository, &["crm"], &target, &["--pg-bin", &programs]);
    let id =
        wait_for("the first session", || lab.pgthaw.session()["id"].as_str().map(str::to_owned));
    let arguments = lab.pgthaw.export_arguments(&lab.repository, &["crm"], &target);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let words = ["belongs to session", id.as_str(), "pgthaw retry", "pgthaw cancel"];
    lab.pgthaw.refused("running", lab.pgthaw.command(&arguments), 2, &words);

    // Another name of it, and another account's server, which does not know of the session.
    let link = lab.pgthaw.scratch.join("link");
    std::os::unix::fs::symlink(target.parent().unwrap(), &link).unwrap();
    let through = link.join("export").display().to_string();
    let others = lab.pgthaw.export_arguments(&lab.repository, &["crm"], through.as_ref());
    let others: Vec<&str> = others.iter().map(String::as_str).collect();
    lab.pgthaw.refused("by a link", lab.pgthaw.command(&others), 2, &words);
    wait_for("the first session's directory", || target.is_dir().then_some(()));
    let mut command = lab.pgthaw.command(&arguments);
    command.env("XDG_STATE_HOME", lab.pgthaw.scratch.join("state2"));
    lab.pgthaw.refused("of another server", command, 2, &[&id]);
    // Directories of one export are no targets of another.
    for nested in [target.join("crm"), target.parent().unwrap().to_owned()] {
        let nested = lab.pgthaw.export_arguments(&lab.repository, &["crm"], &nested);
        let nested: Vec<&str> = nested.iter().map(String::as_str).collect();
        lab.pgthaw.refused("nested", lab.pgthaw.command(&nested), 2, &words);
    }
    let below = lab.pgthaw.export_arguments(&lab.repository, &["crm"], &target.join("crm"));
    let mut command = lab.pgthaw.command(&below.iter().map(String::as_str).collect::<Vec<_>>());
    command.env("XDG_STATE_HOME", lab.pgthaw.scratch.join("state2"));
    lab.pgthaw.refused("nested, of another server", command, 2, &[&id]);
    held.let_go();
    assert!(first.wait().unwrap().success(), "{}", lab.pgthaw.logs());
    let words = ["holds an earlier export", "--replace"];
    lab.pgthaw.refused("done", lab.pgthaw.command(&arguments), 2, &words);
    assert!(target.join("export.json").exists());
}

#[test]
fn what_may_not_be_read_or_written_is_named() {
    let user = User::ordinary();
    let fixture = Fixture::get();
    let pgthaw = Pgthaw::of(user.clone());
    let repository = pgthaw.scratch.join("repository");
    let copy = fixture.lz4.copy_for(&user, &repository);
    let export = |target: &std::path::Path| {
        let arguments = pgthaw.export_arguments(&copy.path, &["crm"], target);
        pgthaw.command(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    };
    pgthaw.refused(
        "not writable",
        export("/etc/pgthaw-test".as_ref()),
        1,
        &["/etc", "written", "hint: "],
    );
    assert!(!std::path::Path::new("/etc/pgthaw-test").exists());
    let close = |path: &std::path::Path| {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(0o000)).unwrap();
    };
    let target = pgthaw.target("export");
    let manifest = repository.join("backup/demo").join(copy.labels.last().unwrap());
    for closed in [manifest, repository.join("backup/demo/backup.info"), repository] {
        close(&closed);
        let said = pgthaw.refused(
            "unreadable",
            export(&target),
            1,
            &["Permission denied", "owner of the repository"],
        );
        assert!(said.contains("repository"), "{said}");
    }
    assert!(!target.exists());
    // Its directories are opened again for those who remove them.
    use std::os::unix::fs::PermissionsExt;
    for path in [
        pgthaw.scratch.join("repository"),
        pgthaw.scratch.join("repository/backup/demo").join(copy.labels.last().unwrap()),
    ] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).unwrap();
    }
}
