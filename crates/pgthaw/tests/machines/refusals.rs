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
    refused("wrong user", "nobody-here@staging", &["nobody-here@staging", "Permission denied"]);
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
    assert_nothing_left(&leftovers, "refused");
}

#[test]
fn what_is_wrong_on_several_machines_is_told_at_once() {
    if !possible() {
        return;
    }
    let machines = Machines::new();
    // A staging server without PostgreSQL and FUSE, a target without room.
    machines.host("staging").script("chmod 0 /usr/lib/postgresql; rm -f /dev/fuse");
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
    for words in ["dba@staging: ", "PostgreSQL 15", "/dev/fuse", "ops@target: ", "no room left"] {
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
}
