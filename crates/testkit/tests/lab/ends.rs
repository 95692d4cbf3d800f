//! What is left on a host is found; of a lab nothing is left, however its test ends.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pgthaw_testkit::{Host, HostLeftovers, Lab, run};
use rustix::process::Signal;

use crate::{possible, ssh, stdout, until};

/// Starts a command and waits until the host shows it.
fn start(host: &Host, command: &mut Command, part: &str) -> Child {
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    until(part, || host.processes().iter().any(|process| process.arguments.starts_with(part)));
    child
}

/// Ends what [`start`] started.
fn end(host: &Host, mut child: Child, part: &str) {
    for process in host.processes() {
        if process.arguments.starts_with(part) {
            process.signal(Signal::KILL);
        }
    }
    child.wait().unwrap();
}

#[test]
fn finds_each_planted_leftover() {
    if !possible() {
        return;
    }
    let lab = Lab::new(&["staging", "target"]);
    let host = lab.host("staging");
    // A bystander, and what may stay.
    host.script("echo theirs > /var/tmp/pgthaw-notes; touch /home/dba/pgthaw-notes");
    let bystander = start(host, host.command("dba", "sleep").arg("3601"), "sleep 3601");
    let leftovers = HostLeftovers::before(host);
    host.script("mkdir -p /home/dba/.local/state/pgthaw/pgthaw-1 /home/dba/exports/crm");
    let expect = |what: &str, planted: &str| {
        let lines = leftovers.check_within(Duration::ZERO);
        assert!(lines.len() == 1 && lines[0].starts_with(planted), "{what}: {lines:?}");
    };
    let clean = |what: &str| assert_eq!(leftovers.check(), Vec::<String>::new(), "{what} is gone");
    clean("nothing");

    let process = start(host, host.command("ops", "sleep").arg("3602"), "sleep 3602");
    expect("process", "process ");
    end(host, process, "sleep 3602");
    clean("the process");

    let files = [
        ("file in /tmp", "/tmp/any"),
        ("file in /var/tmp", "/var/tmp/any"),
        ("file in /run", "/run/media/pgthaw/1"),
        ("posix shared memory", "/dev/shm/any"),
        ("file of ours at home", "/home/dba/.cache/pgthaw-agent"),
        ("hidden file of ours at home", "/home/dba/.pgthaw-agent"),
        ("file of ssh", "/home/dba/.ssh/control"),
    ];
    for (what, path) in files {
        let top = if path.starts_with("/run") { "/run/media" } else { path };
        host.script(&format!("mkdir -p $(dirname {path}); touch {path}"));
        expect(what, &format!("file {top}"));
        host.script(&format!("rm -r {top}"));
        clean(what);
    }

    // Sockets belong to the network of whoever makes them.
    let text = "import socket, time; s = socket.socket(socket.AF_UNIX); s.bind('/home/ops/agent'); time.sleep(3600)";
    let mut python = host.command("ops", "python3");
    let process = start(host, python.args(["-c", text]), "python3");
    until("the socket", || host.path("/home/ops/agent").exists());
    let lines = leftovers.check_within(Duration::ZERO);
    assert!(lines.contains(&"socket /home/ops/agent".to_owned()), "{lines:?}");
    end(host, process, "python3");
    clean("the socket");
    drop(UnixListener::bind(host.path("/home/ops/other")).unwrap());

    let made = run(host.command("dba", "ipcmk").args(["-M", "4096", "-S", "1", "-Q"]));
    assert_eq!(stdout(&made).lines().count(), 3);
    let lines = leftovers.check_within(Duration::ZERO);
    let kinds = ["message queue ", "semaphore set ", "shared memory segment "];
    assert!(lines.len() == 3 && lines.iter().zip(kinds).all(|(line, kind)| line.starts_with(kind)));
    run(host.command("dba", "ipcrm").arg("--all"));
    clean("IPC");

    host.script("mkdir /opt/mount; mount -n -t tmpfs planted /opt/mount");
    expect("mount", "mount /opt/mount");
    host.script("umount -n /opt/mount");
    clean("the mount");

    // A connection that its other side has left open.
    let mut master = ssh(lab.host("target"), "dba", "ops@staging", "sleep 3603");
    let process = start(host, &mut master, "sleep 3603");
    let lines = leftovers.check_within(Duration::ZERO);
    assert!(lines.iter().any(|line| line.contains("sshd: ops")), "{lines:?}");
    end(lab.host("target"), process, "ssh ");
    end_all(host, "sleep 3603");
    clean("the connection");
    assert!(host.processes().iter().any(|it| it.arguments == "sleep 3601"), "the bystander");
    end(host, bystander, "sleep 3601");
}

fn end_all(host: &Host, part: &str) {
    let processes = host.processes().into_iter();
    processes.filter(|it| it.arguments.starts_with(part)).for_each(|it| it.signal(Signal::KILL));
}

/// How the child below ends.
const END: &str = "PGTHAW_TEST_END";

#[test]
#[ignore = "run by another test, in a child process"]
fn hold_a_lab() {
    let Ok(how) = std::env::var(END) else { return };
    let lab = Lab::new(&["mount", "staging"]);
    let host = lab.host("staging");
    let mut ssh = ssh(lab.host("mount"), "dba", "ops@staging", "sleep 3600");
    let mut session = start(lab.host("mount"), &mut ssh, "ssh ");
    until("the session", || host.processes().iter().any(|it| it.arguments == "sleep 3600"));
    let mut used = namespaces(&lab.pid().to_string());
    used.extend(lab.hosts().iter().flat_map(|host| namespaces(&host.init().to_string())));
    println!("\nnamespaces {}", used.into_iter().collect::<Vec<_>>().join(" "));
    assert!(how != "panic", "as told");
    session.wait().unwrap();
}

/// Returns the namespaces of a process; none if it has ended by now.
fn namespaces(pid: &str) -> BTreeSet<String> {
    let link = |kind| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
    let found = ["net", "mnt", "pid", "ipc", "uts"].into_iter().filter_map(|kind| link(kind).ok());
    found.map(|link| link.display().to_string()).collect()
}

/// Returns the namespaces of all processes.
fn all_namespaces() -> BTreeSet<String> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.flat_map(|entry| namespaces(&entry.file_name().to_string_lossy())).collect()
}

/// Returns what the machine shows of a lab with these namespaces: network devices, mounts, and names of network
/// namespaces. What others do to the machine meanwhile is not looked at.
fn visible(own: &BTreeSet<String>) -> Vec<String> {
    let names = |dir: &str| {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
    };
    let mut found = names("/sys/class/net");
    found.retain(|device| ["p0-1", "p1-0", "w0-1", "mount", "staging"].contains(&device.as_str()));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let of_a_lab = |line: &&str| line.contains(" lab ") || line.contains("/run/hosts/");
    found.extend(mounts.lines().filter(of_a_lab).map(str::to_owned));
    found.extend(names("/run/netns").into_iter().filter(|name| {
        let inode = fs::metadata(format!("/run/netns/{name}")).map(|named| named.ino());
        inode.is_ok_and(|inode| own.contains(&format!("net:[{inode}]")))
    }));
    found
}

#[test]
fn a_lab_goes_with_its_test() {
    if !possible() {
        return;
    }
    for how in ["panic", "kill"] {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--ignored", "--exact", "ends::hold_a_lab", "--nocapture"]).env(END, how);
        let mut child = child.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let line = lines.find(|line| line.starts_with("namespaces ")).expect("a lab");
        let shared = namespaces("self");
        let own = line.split(' ').skip(1).filter(|name| !shared.contains(*name));
        let own: BTreeSet<String> = own.map(str::to_owned).collect();
        // Of the floor three; of each of the two hosts five.
        assert_eq!(own.len(), 13, "{line}");
        assert_eq!(visible(&own), Vec::<String>::new(), "{how}, while it runs");
        if how == "kill" {
            assert!(own.is_subset(&all_namespaces()));
            child.kill().unwrap();
        }
        assert!(!child.wait().unwrap().success());
        until("every process in them to end", || all_namespaces().is_disjoint(&own));
        assert_eq!(visible(&own), Vec::<String>::new(), "{how}, afterwards");
    }
}
