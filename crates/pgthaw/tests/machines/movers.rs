//! The ways of a dump from the staging server to the target: directly where a firewall lets one of them connect, else through the mount
//! server.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::lab::{Machines, THREE, assert_nothing_left, possible};

/// More than a session says besides the dump.
const TALK: u64 = 200_000;

/// The bytes that a link carries while something runs.
fn carried<T>(machines: &Machines, from: &str, to: &str, run: impl FnOnce() -> T) -> (u64, T) {
    let before = machines.lab.bytes(from, to);
    let done = run();
    (machines.lab.bytes(from, to) - before, done)
}

/// What the newest session says of the dump's way.
fn way(session: &Value) -> (Option<bool>, String) {
    let way = &session["dump_way"];
    (way["direct"].as_bool(), way["text"].as_str().unwrap_or_default().to_owned())
}

/// What lies between staging server and target, and what follows.
struct Case<'a> {
    /// Connections that a firewall lets vanish: from, to.
    blocked: &'a [(&'a str, &'a str)],
    options: &'a [&'a str],
    direct: bool,
    /// What is said of the way.
    words: &'a [&'a str],
}

#[test]
fn a_dump_goes_directly_where_it_may() {
    if !possible() {
        return;
    }
    let machines = Machines::new();
    let lab = &machines.lab;
    let hosts = ["mount", "staging", "target"].map(|name| machines.host(name));
    let listening = || hosts.map(|host| host.listening());
    let before = listening();
    let addresses = ["staging", "target"].map(|name| machines.host(name).address());
    let refused = [
        format!("dba@staging: connect to {}:47000", addresses[1]),
        format!("ops@target: connect to {}:47000", addresses[0]),
    ];
    let meets = |blocked, direct, words| Case { blocked, options: &[], direct, words };
    let blocked_there = [("staging", "target")];
    let blocked_both = [("staging", "target"), ("target", "staging")];
    let both_refused = ["through this machine", &refused[0], &refused[1]];
    let cases = [
        meets(&[], true, &["directly from dba@staging to port 47000 of ops@target"]),
        meets(&blocked_there, true, &["directly from port 47000 of dba@staging to ops@target"]),
        meets(&blocked_both, false, &both_refused),
        Case {
            options: &["--mover-ports", "5001"],
            ..meets(&[], true, &["to port 5001 of ops@target"])
        },
        Case {
            options: &["--mover-ports", "none"],
            ..meets(&[], false, &["through this machine", "switched off"])
        },
    ];
    for Case { blocked, options, direct, words } in cases {
        let case = format!("blocked: {blocked:?}, {options:?}");
        blocked.iter().for_each(|(from, to)| lab.block_ports(from, to));
        let leftovers = machines.leftovers();
        let arguments =
            [&["check", machines.repository(), "-d", "crm", "-d", "sales"], &THREE[..], options];
        let (out, err) = machines.expect(0, &arguments.concat());
        let checked = out + &err;
        let (bytes, ()) = carried(&machines, "staging", "target", || {
            let export = machines.start(options);
            machines.ended(export, 0);
        });
        let session = machines.session();
        let (taken, text) = way(&session);
        let said = std::fs::read_to_string(machines.host("mount").path("/home/ann/said")).unwrap();
        assert_eq!(taken, Some(direct), "{case}: {session}\n{said}");
        for word in words {
            for told in [&text, &said, &checked] {
                assert!(told.contains(word), "{case}: no `{word}` in {told}");
            }
        }
        let delivered = session["bytes_done"].as_u64().unwrap();
        assert!(delivered > 2 * TALK, "{delivered}");
        match direct {
            true => assert!(bytes > delivered, "{case}: {bytes} of {delivered}"),
            false => assert!(bytes < TALK, "{case}: {bytes}"),
        }
        assert_eq!(session["attempts"], 1, "{case}");
        assert_eq!(listening(), before, "{case}");
        machines.assert_delivered();
        assert_nothing_left(&leftovers, &case);
        blocked.iter().for_each(|(from, to)| lab.open_ports(from, to));
    }
}

/// The repository is read over a port of the staging server where the mount server can connect to it, else over ssh; a cut is waited for
/// either way.
#[test]
fn a_repository_is_read_directly_where_it_may() {
    if !possible() {
        return;
    }
    let machines = Machines::new();
    let lab = &machines.lab;
    let connect = format!("connect to {}:47000", machines.host("staging").address());
    let refused = ["over ssh", &connect];
    let cases: [(bool, &[&str], bool, &[&str]); 3] = [
        (false, &[], true, &["directly over port 47000 of dba@staging"]),
        (true, &[], false, &refused),
        (false, &["--mover-ports", "none"], false, &["over ssh", "switched off"]),
    ];
    for (blocked, options, direct, words) in cases {
        let case = format!("blocked: {blocked}, {options:?}");
        if blocked {
            lab.block_ports("mount", "staging");
        }
        let leftovers = machines.leftovers();
        let arguments =
            [&["check", machines.repository(), "-d", "crm", "-d", "sales"], &THREE[..], options];
        let (out, err) = machines.expect(0, &arguments.concat());
        let checked = out + &err;
        let export = machines.start(options);
        machines.wait_for_step("recover");
        machines.wait_until("the first reads", || !machines.session()["reads_way"].is_null());
        let listens = format!("{}:47000", machines.host("staging").address());
        let asks = format!("{}:", machines.host("mount").address());
        let connections = machines.host("staging").connected();
        let found =
            connections.iter().any(|(near, far)| *near == listens && far.starts_with(&asks));
        assert_eq!(found, direct, "{case}: {connections:?}");
        lab.cut("mount", "staging");
        std::thread::sleep(Duration::from_secs(3));
        lab.mend("mount", "staging");
        machines.ended(export, 0);
        let session = machines.session();
        let way = &session["reads_way"];
        assert_eq!(way["direct"], direct, "{case}: {session}");
        for word in words {
            for told in [way["text"].as_str().unwrap(), &machines.said(), &checked] {
                assert!(told.contains(word), "{case}: no `{word}` in {told}");
            }
        }
        assert_eq!(session["attempts"], 1, "{case}");
        machines.assert_delivered();
        assert_nothing_left(&leftovers, &case);
        if blocked {
            lab.open_ports("mount", "staging");
        }
    }
}

/// A firewall that forgets the connection, but not ssh's: after a while without a sign of life the repository is read over ssh.
#[test]
fn a_direct_connection_of_reads_that_falls_silent_is_given_up() {
    if !possible() {
        return;
    }
    let machines = Machines::new();
    let lab = &machines.lab;
    let leftovers = machines.leftovers();
    let export = machines.start(&[]);
    machines.wait_until("direct reads", || machines.session()["reads_way"]["direct"] == true);
    lab.silence_ports("mount", "staging");
    lab.silence_ports("staging", "mount");
    let before = lab.bytes("mount", "staging");
    machines.wait_until("reads over ssh", || machines.session()["reads_way"]["direct"] == false);
    machines.ended(export, 0);
    let session = machines.session();
    assert_eq!(session["attempts"], 1, "{session}");
    let bytes = lab.bytes("mount", "staging") - before;
    assert!(bytes > TALK, "it was still to be read: {bytes}");
    machines.assert_delivered();
    assert_nothing_left(&leftovers, "silent");
}

/// Short cuts are ridden through; after a long one the dump goes on through the mount server, the same processes and no second attempt.
#[test]
fn a_direct_way_that_is_cut_is_gone_on_from() {
    if !possible() {
        return;
    }
    /// More than is on its way at a time, and much less than what has arrived when the link is cut.
    const IN_FLIGHT: u64 = 1 << 20;
    let machines = Machines::new();
    for (seconds, direct) in [(10, true), (50, false)] {
        let case = format!("staging-target cut for {seconds} s");
        let leftovers = machines.leftovers();
        machines.lab.throttle("staging", "target", Some(600_000));
        let begun = machines.lab.bytes("staging", "target");
        let export = machines.start(&[]);
        machines.wait_until("a part of the dump", || {
            machines.lab.bytes("staging", "target") > begun + 2 * IN_FLIGHT
        });
        let session = machines.session();
        assert_eq!(way(&session).0, Some(true), "{case}: {session}");
        machines.lab.cut("staging", "target");
        machines.lab.throttle("staging", "target", None);
        std::thread::sleep(Duration::from_secs(seconds));
        machines.lab.mend("staging", "target");
        machines.ended(export, 0);
        let session = machines.session();
        assert_eq!(way(&session).0, Some(direct), "{case}: {session}\n{}", machines.logs());
        assert_eq!(session["attempts"], 1, "{case}");
        if direct {
            let bytes = machines.lab.bytes("staging", "target") - begun;
            let delivered = session["bytes_done"].as_u64().unwrap();
            eprintln!("{case}: {bytes} bytes for {delivered}");
            assert!(bytes < delivered + IN_FLIGHT, "{case}: {bytes} of {delivered}");
        }
        machines.assert_delivered();
        assert_nothing_left(&leftovers, &case);
    }
}

#[test]
fn a_limit_holds_whichever_way_the_dump_goes() {
    if !possible() {
        return;
    }
    const LIMIT: u64 = 1 << 20;
    let machines = Machines::new();
    // Options, and whether the dump is compressed on its way.
    let cases = [
        (&["--bwlimit", "1MB"][..], false),
        (&["--bwlimit", "1MB/s", "--mover-ports", "none", "-Z", "none"], true),
    ];
    for (options, compressed) in cases {
        let case = format!("{options:?}");
        // Bytes that leave the staging server: to the mount server go the relayed dump and what is asked of the repository.
        let left = || -> u64 {
            ["mount", "target"].iter().map(|to| machines.lab.bytes("staging", to)).sum()
        };
        let export = machines.start(options);
        machines.wait_for_step("dump");
        let (begun, before) = (Instant::now(), left());
        machines.ended(export, 0);
        let (seconds, bytes) = (begun.elapsed().as_secs_f64(), left() - before);
        let delivered = machines.session()["bytes_done"].as_u64().unwrap();
        eprintln!("{case}: {bytes} bytes for {delivered} in {seconds:.1} s");
        match compressed {
            false => assert!(bytes > delivered, "{case}: {bytes} of {delivered}"),
            true => assert!(bytes < delivered * 2 / 3, "{case}: {bytes} of {delivered}"),
        }
        assert!(bytes > 2 * LIMIT, "{case}: {bytes}");
        // Packets have headers, and a moment passes before the first look.
        let most = LIMIT as f64 * 1.1 * (seconds + 0.5);
        assert!((bytes as f64) < most, "{case}: {bytes} in {seconds} s");
        machines.assert_delivered();
    }
}
