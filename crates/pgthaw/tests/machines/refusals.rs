//! Machines that cannot be used: each its own message, exit code 1, and nothing left anywhere.

use crate::lab::{Machines, assert_nothing_left, possible};

#[test]
fn machines_that_cannot_be_reached_are_told() {
    if !possible() {
        return;
    }
    let machines = Machines::new();
    let (mount, staging) = (machines.host("mount"), machines.host("staging"));
    let leftovers = machines.leftovers();
    let refused = |case: &str, staging: &str, words: &[&str]| {
        let arguments = [
            "export",
            machines.repository(),
            "-d",
            "crm",
            "--staging",
            staging,
            "--to",
            "ops@target:out",
        ];
        let (_, err) = machines.expect(1, &arguments);
        for word in words.iter().chain(&["hint: "]) {
            assert!(err.contains(word), "{case}: no `{word}` in {err}");
        }
        let (out, err) = machines.expect(1, &[&["check"], &arguments[1..]].concat());
        let said = out + &err;
        assert!(said.contains(words[0]), "{case}: check: {said}");
    };
    refused("unknown host", "dba@nowhere", &["nowhere", "Could not resolve hostname"]);
    // The machine is named once.
    let denied = "error: nobody-here@staging: Permission denied";
    refused("wrong user", "nobody-here@staging", &["nobody-here@staging: Permission", denied]);
    mount.forget_host("ann", staging);
    refused("unknown key", "dba@staging", &["Host key verification failed", "by hand"]);
    mount.learn_host("ann", staging);
    staging.change_host_key();
    refused(
        "changed key",
        "dba@staging",
        &["REMOTE HOST IDENTIFICATION HAS CHANGED", "ssh-keygen -R"],
    );
    mount.learn_host("ann", staging);
    staging.refuse_key("dba", "ann@mount");
    refused("refused key", "dba@staging", &["Permission denied (publickey)"]);
    staging.accept_key("dba", "ann@mount");
    staging.stop_sshd();
    refused("no sshd", "dba@staging", &["Connection refused"]);
    staging.start_sshd();
    let hard = ["/home", "/var/tmp", "/tmp", "/run"];
    let remount = |disks: &[&str], option: &str| {
        let each = |disk: &&str| format!("mount -o remount,{option} {disk}\n");
        let all: String = disks.iter().map(each).collect();
        staging.script(&(all + "rm -rf /run/mount")); // where mount(8) keeps notes
    };
    remount(&hard, "noexec");
    refused(
        "noexec",
        "dba@staging",
        &["run from no directory there: /var/tmp: may execute nothing (noexec)", "install pgthaw"],
    );
    remount(&hard, "exec");
    // As another architecture answers.
    staging.script("printf '#!/bin/sh\\n[ $1 = -s ] && echo Linux || echo riscv64\\n' > /usr/local/bin/uname; chmod 755 /usr/local/bin/uname");
    refused("architecture", "dba@staging", &["and that is Linux riscv64", "name a machine"]);
    staging.script("rm /usr/local/bin/uname");
    assert_nothing_left(&leftovers, "refused");
    // Homes that alone may execute are enough.
    remount(&hard[1..], "noexec");
    let arguments = ["check", machines.repository(), "-d", "crm"];
    machines.expect(0, &[&arguments[..], &["--staging", "dba@staging", "--to", "out"]].concat());
    remount(&hard[1..], "exec");
    assert_nothing_left(&leftovers, "checked");
    assert_eq!(std::fs::read_dir(staging.path("/home/dba")).unwrap().count(), 1, ".ssh alone");
}

#[test]
fn what_is_wrong_on_several_machines_is_told_at_once() {
    if !possible() {
        return;
    }
    let machines = Machines::new();
    // A staging server without PostgreSQL, FUSE and room, a target without room.
    machines.host("staging").script(
        "chmod 0 /usr/lib/postgresql; rm -f /dev/fuse; head -c 19M /dev/zero > /var/tmp/filler",
    );
    machines.host("staging").resize("/var/tmp", 20 << 20);
    machines.host("staging").resize("/tmp", 1 << 20);
    machines.host("target").script("mkdir /home/ops/full; mount -t tmpfs -o size=64k,uid=$(id -u ops) none /home/ops/full; head -c 100000 /dev/zero > /home/ops/full/filler || true");
    let arguments = [
        "check",
        machines.repository(),
        "-d",
        "crm",
        "--staging",
        "dba@staging",
        "--to",
        "ops@target:full/out",
    ];
    let (out, err) = machines.expect(1, &arguments);
    let said = format!("{out}{err}");
    for words in [
        "dba@staging: ",
        "PostgreSQL 15",
        "/dev/fuse",
        "ops@target: ",
        "no room left",
        "`/var/tmp`",
    ] {
        assert!(said.contains(words), "no `{words}` in {said}");
    }
}

/// A line in authorized_keys that allows nothing but pgthaw's own part.
#[test]
fn a_forced_command_is_enough() {
    if !possible() {
        return;
    }
    let machines = Machines::new();
    for host in ["staging", "target"] {
        // It cannot be carried over such a connection.
        let program = std::path::Path::new(env!("CARGO_BIN_EXE_pgthaw"));
        std::fs::copy(program, machines.host(host).path("/usr/local/bin/pgthaw")).unwrap();
    }
    machines.host("staging").force_command(
        "dba",
        "ann@mount",
        "pgthaw attach --stdio --only staging",
    );
    machines.host("target").force_command(
        "ops",
        "ann@mount",
        "pgthaw attach --stdio --only target",
    );
    let leftovers = machines.leftovers();
    let export = machines.start(&[]);
    machines.ended(export, 0);
    machines.assert_delivered();
    assert_nothing_left(&leftovers, "forced commands");
    // The roles do not serve each other's purpose.
    let swapped = [
        "export",
        machines.repository(),
        "-d",
        "crm",
        "--staging",
        "ops@target",
        "--to",
        "dba@staging:out",
    ];
    let (_, err) = machines.expect(1, &swapped);
    assert!(err.contains("may not be used for that"), "{err}");
    // Another build does not even begin.
    // The process that has just refused may be about to end.
    machines.host("staging").script("until echo >> /usr/local/bin/pgthaw; do sleep 0.1; done");
    let other = ["export", machines.repository(), "-d", "crm", "--staging", "dba@staging"];
    let (_, err) = machines.expect(1, &[&other[..], &["--to", "elsewhere"]].concat());
    assert!(err.contains("dba@staging: ") && err.contains(" is another build than"), "{err}");
}
