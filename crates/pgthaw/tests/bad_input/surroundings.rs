//! Machines that lack what an export needs.

use std::fs;
use std::process::Command;

use pgthaw_testkit::{Fixture, User};

use crate::lab::Lab;
use crate::support::Pgthaw;

/// `command` run in a mount namespace of its own, after `script`.
fn in_namespace(script: &str, command: &Command) -> Command {
    let mut wrapped = Command::new("unshare");
    wrapped.args(["--mount", "--propagation", "private", "sh", "-ec"]);
    wrapped.arg(format!("{script}\nexec \"$@\"")).arg("sh");
    wrapped.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => wrapped.env(name, value),
            None => wrapped.env_remove(name),
        };
    }
    wrapped.current_dir("/");
    wrapped
}

/// A `/dev` without FUSE.
const DEVICES: &str = "mkdir -p $SCRATCH/dev; mount -t tmpfs none $SCRATCH/dev; mkdir $SCRATCH/dev/shm
for name in null zero urandom random; do : > $SCRATCH/dev/$name; mount --bind /dev/$name $SCRATCH/dev/$name; done";

#[test]
fn without_fuse_it_says_what_is_missing() {
    if User::current().uid != 0 {
        return; // only root can hide a device
    }
    let fixture = Fixture::get();
    let cases = [
        ("root without the device", User::current(), "", "load the kernel module"),
        (
            "an ordinary user without the right",
            User::ordinary(),
            "mknod -m 0600 $SCRATCH/dev/fuse c 10 229",
            "install the package fuse3",
        ),
    ];
    for (case, user, more, hint) in cases {
        let pgthaw = Pgthaw::of(user.clone());
        let copy = fixture.lz4.copy_for(&user, &pgthaw.scratch.join("repository"));
        let target = pgthaw.target("export");
        let arguments = pgthaw.export_arguments(&copy.path, &["crm"], &target);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let script = format!("{DEVICES}\n{more}\nmount --rbind $SCRATCH/dev /dev");
        let mut command = in_namespace(&script, &pgthaw.command(&arguments));
        command.env("SCRATCH", pgthaw.scratch.path());
        pgthaw.refused(case, command, 1, &["FUSE cannot be used", "/dev/fuse", hint]);
        assert!(!target.exists());
    }
}

#[test]
fn without_postgresql_of_that_major_it_names_the_package() {
    let lab = Lab::lz4();
    let programs = lab.pgthaw.scratch.join("programs");
    fs::create_dir(&programs).unwrap();
    let bin = programs.display().to_string();
    lab.refuses("an empty --pg-bin", 1, &["--pg-bin", &bin], &["--pg-bin", &bin, "hint: "]);
    lab.refuses("no such --pg-bin", 1, &["--pg-bin", "/no/such/bin"], &["/no/such/bin"]);

    // A backup of a major that is not installed.
    for name in ["backup/demo/backup.info", "archive/demo/archive.info"] {
        lab.edit_signed(name, |text| text.replace("\"15\"", "\"11\""));
    }
    for label in &Fixture::get().lz4.labels {
        lab.edit_signed(&format!("backup/demo/{label}/backup.manifest"), |text| {
            text.replace("db-version=\"15\"", "db-version=\"11\"")
        });
    }
    fs::rename(lab.path("archive/demo/15-1"), lab.path("archive/demo/11-1")).unwrap();
    lab.refuses("another major", 1, &[], &["11", "hint: "]);
}

#[test]
fn without_room_it_does_not_begin() {
    if User::current().uid != 0 {
        return; // only root can mount a small disk
    }
    let lab = Lab::lz4();
    let script = "mount -t tmpfs -o size=64k none $SCRATCH/out; head -c 100000 /dev/zero > $SCRATCH/out/filler || true";
    let target = lab.pgthaw.target("export");
    let arguments = lab.pgthaw.export_arguments(&lab.repository, &["crm"], &target);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut command = in_namespace(script, &lab.pgthaw.command(&arguments));
    command.env("SCRATCH", lab.pgthaw.scratch.path());
    lab.pgthaw.refused("a full target", command, 1, &["no room left", target.to_str().unwrap()]);
    let lab = Lab::lz4();
    let mut command =
        in_namespace("mount -t tmpfs -o ro none $SCRATCH/out", &lab.pgthaw.command(&arguments));
    command.env("SCRATCH", lab.pgthaw.scratch.path());
    let arguments: Vec<String> =
        lab.pgthaw.export_arguments(&lab.repository, &["crm"], &lab.pgthaw.target("export"));
    let mut command = in_namespace(
        "mount -t tmpfs -o ro none $SCRATCH/out",
        &lab.pgthaw.command(&arguments.iter().map(String::as_str).collect::<Vec<_>>()),
    );
    command.env("SCRATCH", lab.pgthaw.scratch.path());
    lab.pgthaw.refused("a read-only target", command, 1, &["read-only", "hint: "]);
}

#[test]
fn other_accounts_are_refused_to_ordinary_users() {
    let user = User::ordinary();
    let pgthaw = Pgthaw::of(user.clone());
    let copy = Fixture::get().lz4.copy_for(&user, &pgthaw.scratch.join("repository"));
    let mut arguments = pgthaw.export_arguments(&copy.path, &["crm"], &pgthaw.target("export"));
    arguments.extend(["--os-user".to_owned(), "postgres".to_owned()]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    pgthaw.refused(
        "--os-user of another",
        pgthaw.command(&arguments),
        1,
        &["postgres", "root", "hint: "],
    );
}

#[test]
fn damaged_journals_are_told_and_harm_no_other_session() {
    let lab = Lab::lz4();
    let target = lab.pgthaw.target("first");
    lab.pgthaw.export(&lab.repository, &["empty"], &target, &[]);
    let id = lab.pgthaw.session_id();
    let journal = lab.pgthaw.scratch.join("state/pgthaw/sessions").join(&id).join("journal");
    let whole = fs::read(&journal).unwrap();
    let line = whole.iter().position(|byte| *byte == b'\n').unwrap();
    for at in [line / 2, line + 100] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        fs::write(&journal, bytes).unwrap();
        let listed = lab.pgthaw.json(&["sessions"]);
        let row = &listed.as_array().unwrap()[0];
        assert_eq!((row["id"].as_str(), row["state"].as_str()), (Some(&*id), Some("failed")));
        assert!(row["error"].as_str().is_some_and(|error| error.contains("line")), "{row}");
        for arguments in [&["session", &id][..], &["log", &id], &["retry", &id], &["cancel", &id]] {
            let words = ["journal", &id, "line", "hint: "];
            lab.pgthaw.refused(&format!("{arguments:?}"), lab.pgthaw.command(arguments), 1, &words);
        }
    }
    // Sessions beside it are listed and made as ever.
    lab.pgthaw.export(&lab.repository, &["empty"], &lab.pgthaw.target("second"), &[]);
    let listed = lab.pgthaw.json(&["sessions"]);
    assert!(listed.as_array().is_some_and(|all| !all.is_empty()), "{listed}");
    // A record that was cut off while it was written is dropped and told.
    fs::write(&journal, &whole[..whole.len() - 5]).unwrap();
    lab.pgthaw.expect(0, &["session", &id]);
}
