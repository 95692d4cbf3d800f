//! Where the kernel refuses PostgreSQL a root of its own: what is said, and what `--allow-unisolated` does and never does.

mod support;

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use pgthaw_testkit::{
    BaseBackupOptions, Cluster, ClusterOptions, Fixture, Scale, Scratch, User, fingerprint,
    is_moved_by_traffic, restore_dump_into_fresh_server, tree_hash,
};
use support::{Pgthaw, text};

/// Lets `command` and everything it starts live without `unshare(2)`, as a container's seccomp filter does. Only root can without
/// making set-user-id programs such as fusermount3 useless.
fn without_unshare(command: &mut Command) {
    let refuse = || {
        let line =
            |code: u32, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf, k };
        let (load, equal, ret) = (
            libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            libc::BPF_RET | libc::BPF_K,
        );
        let mut program = [
            line(load, 0, 0), // the number of the call
            line(equal, 1, libc::SYS_unshare as u32),
            line(ret, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs()),
            line(ret, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let filter = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
        // SAFETY: the filter and what it points to live through the call, which copies them.
        match unsafe {
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter)
        } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: system calls on memory of the closure alone, between fork and exec.
    unsafe { command.pre_exec(refuse) };
}

const REFUSED: &str = "the kernel refuses PostgreSQL a root of its own";

/// Runs `arguments` without `unshare`, wants this exit code, and returns what was said.
fn run(pgthaw: &Pgthaw, code: i32, arguments: &[&str]) -> String {
    let mut command = pgthaw.command(arguments);
    without_unshare(&mut command);
    let output = command.output().unwrap();
    let said = text(&output.stdout) + &text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}\n{}", pgthaw.logs());
    said
}

fn refused_and_accepted(user: User) {
    let (fixture, backups) = (Fixture::get(), Scratch::new());
    let backup = fixture.stream.copy_for(&user, &backups.join("plain"));
    let pgthaw = Pgthaw::of(user);
    let leftovers = pgthaw.leftovers();
    let target = pgthaw.target("out");
    let arguments = pgthaw.export_arguments(&backup.dir, &["crm"], &target);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let check = [&["check"], &arguments[1..]].concat();
    for command in [&check, &arguments] {
        let said = run(&pgthaw, 1, command);
        for words in [REFUSED, "namespace", "--allow-unisolated"] {
            assert!(said.contains(words), "{words}: {said}");
        }
    }
    assert!(!target.exists(), "nothing is made for a refused export");
    assert_eq!(leftovers.check(), [""; 0]);

    let accepted = [&arguments[..], &["--allow-unisolated"]].concat();
    let said = run(&pgthaw, 0, &accepted);
    assert!(said.contains("will not be isolated from this machine"), "{said}");
    let fresh = restore_dump_into_fresh_server(&target);
    let found = fingerprint(&fresh, "crm").without(is_moved_by_traffic);
    assert_eq!(fixture.expected["crm"].differences(&found), [""; 0]);
    assert_eq!(leftovers.check(), [""; 0]);
}

#[test]
fn a_refused_root_is_told_and_can_be_done_without() {
    if User::current().uid != 0 {
        eprintln!("SKIPPED: only root can take system calls away from set-user-id programs");
        return;
    }
    refused_and_accepted(User::current());
    refused_and_accepted(User::ordinary());
}

#[test]
fn a_root_that_can_be_had_is_had_whatever_was_accepted() {
    let (fixture, pgthaw) = (Fixture::get(), Pgthaw::new());
    let target = pgthaw.target("out");
    pgthaw.export(&fixture.stream.dir, &["crm"], &target, &["--allow-unisolated"]);
    let id = pgthaw.session_id();
    let log = text(&pgthaw.run(&["log", &id]).stdout);
    assert!(log.contains("isolated in a root of its own"), "{log}");
}

/// Replay would change the mode of the original location, make directories in it, and write there.
#[test]
fn wal_that_makes_tablespaces_is_refused_without_a_root_whatever_was_accepted() {
    if User::current().uid != 0 {
        eprintln!("SKIPPED: only root can take system calls away from set-user-id programs");
        return;
    }
    let (scratch, pgthaw) = (Scratch::new(), Pgthaw::new());
    let cluster = Cluster::build(&scratch.join("source"), Scale::Tiny, &ClusterOptions::default());
    cluster.sql("postgres", "ALTER SYSTEM SET wal_keep_size = '1GB'");
    cluster.sql("postgres", "SELECT pg_reload_conf()");
    let options = BaseBackupOptions::default();
    let backup = cluster.base_backup(&scratch.join("backup"), &options);
    let location = scratch.join("later");
    std::fs::create_dir(&location).unwrap();
    cluster.owner().take(&location);
    cluster.sql("crm", &format!("CREATE TABLESPACE later LOCATION '{}'", location.display()));
    cluster.sql("crm", "CREATE TABLE public.later TABLESPACE later AS SELECT 1 AS i");
    cluster.sql("crm", "SELECT pg_switch_wal()");
    cluster.stop("fast");
    let before = tree_hash(&location);
    let archive = cluster.data().join("pg_wal").display().to_string();
    let target = pgthaw.target("out");
    let arguments = pgthaw.export_arguments(&backup.dir, &["crm"], &target);
    let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    arguments.extend(["--wal-archive", &archive, "--target-latest", "--allow-unisolated"]);
    let said = run(&pgthaw, 1, &arguments);
    for words in ["makes the tablespace", &location.display().to_string(), "no root of its own"] {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert_eq!(tree_hash(&location), before, "the original tablespace was touched");
    // with a root it is exported, by another server than the one that may not make any
    let pgthaw = Pgthaw::new();
    let more = ["--wal-archive", &archive, "--target-latest"];
    pgthaw.export(&backup.dir, &["crm"], &pgthaw.target("out"), &more);
    assert_eq!(tree_hash(&location), before, "the original tablespace was touched");
}

/// As in a container, or where the administrator has switched user namespaces off.
#[test]
fn user_namespaces_that_are_used_up_are_told() {
    let (fixture, user, backups) = (Fixture::get(), User::ordinary(), Scratch::new());
    let backup = fixture.stream.copy_for(&user, &backups.join("plain"));
    let pgthaw = Pgthaw::of(user);
    let target = pgthaw.target("out");
    let arguments = pgthaw.export_arguments(&backup.dir, &["crm"], &target);
    let command = pgthaw.command(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let script = "echo 0 > /proc/sys/user/max_user_namespaces && exec \"$0\" \"$@\"";
    let inside = ["-U", "--map-current-user", "--keep-caps", "--", "sh", "-c", script];
    // The account inside may not be able to enter the directory where the program was built.
    let program = pgthaw.scratch.join("pgthaw-inside");
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_pgthaw")).arg(&program).status();
    assert!(copied.unwrap().success());
    let mut unshared = pgthaw.user.command("unshare");
    unshared.args(inside).arg(&program);
    let own = arguments.iter().map(String::as_str);
    unshared.arg("check").args(own.skip(1));
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            unshared.env(name, value);
        }
    }
    let output = unshared.output().unwrap();
    let said = text(&output.stdout) + &text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for words in [REFUSED, "No space left", "user.max_user_namespaces"] {
        assert!(said.contains(words), "{words}: {said}");
    }
}
