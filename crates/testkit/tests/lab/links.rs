//! Links: cut, slowed, counted, with closed ports, and the proxy that delays.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pgthaw_testkit::{Host, Lab, Proxy, ProxyOptions, run};

use crate::{failure, possible, ssh, stdout};

/// An SSH session that gives back each line.
struct Echo {
    child: Child,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Echo {
    fn start(from: &Host, to: &str) -> Self {
        let mut ssh = ssh(from, "dba", to, "cat");
        let mut child = ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (send, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            stdout.lines().map_while(Result::ok).for_each(|line| drop(send.send(line)));
        });
        let echo = Self { child, lines };
        echo.say("hello");
        assert_eq!(echo.hear(Duration::from_secs(10)).as_deref(), Some("hello"));
        echo
    }

    fn say(&self, line: &str) {
        // In one piece: the session may end as soon as it has the first.
        let line = format!("{line}\n");
        self.child.stdin.as_ref().unwrap().write_all(line.as_bytes()).unwrap();
    }

    fn hear(&self, limit: Duration) -> Option<String> {
        self.lines.recv_timeout(limit).ok()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        drop(self.child.stdin.take()); // ends `cat`, and with it the session
        let _ = self.child.wait();
    }
}

/// Returns whether nobody answers a new connection: neither yes nor no.
fn vanishes(from: &Host, to: &str) -> bool {
    let mut ssh = from.command("dba", "ssh");
    let begin = Instant::now();
    let said = failure(ssh.args(["-o", "BatchMode=yes", "-o", "ConnectTimeout=1", to, "true"]));
    said.contains("timed out") && begin.elapsed() >= Duration::from_secs(1)
}

#[test]
fn a_cut_link_stalls_a_session_and_mended_it_goes_on() {
    if !possible() {
        return;
    }
    let lab = Lab::new(&["mount", "staging", "target"]);
    let echo = Echo::start(lab.host("mount"), "dba@staging");
    lab.cut("mount", "staging");
    echo.say("during the cut");
    assert_eq!(echo.hear(Duration::from_secs(1)), None);
    let arrived = lab.bytes("mount", "staging");
    assert!(vanishes(lab.host("mount"), "staging"));
    assert_eq!(lab.bytes("mount", "staging"), arrived, "nothing arrives");
    run(&mut ssh(lab.host("mount"), "dba", "dba@target", "ssh -o BatchMode=yes staging true"));
    lab.mend("mount", "staging");
    assert_eq!(echo.hear(Duration::from_secs(20)).as_deref(), Some("during the cut"));
}

#[test]
fn a_crash_is_heard_of_by_nobody() {
    if !possible() {
        return;
    }
    let lab = Lab::new(&["mount", "staging"]);
    let (mount, staging) = (lab.host("mount"), lab.host("staging"));
    let mut echo = Echo::start(mount, "dba@staging");
    staging.crash();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(echo.child.try_wait().unwrap(), None, "it does not know");
    assert!(vanishes(mount, "staging"));
    // A cut of a host that is down holds when it is up.
    lab.cut("mount", "staging");
    staging.boot();
    assert!(vanishes(mount, "staging"));
    lab.mend("mount", "staging");
    echo.say("who?");
    assert_eq!(echo.hear(Duration::from_secs(10)), None);
    assert!(!echo.child.wait().unwrap().success(), "the new host knows nothing of the connection");
}

#[test]
fn a_firewall_leaves_port_22_alone() {
    if !possible() {
        return;
    }
    let lab = Lab::new(&["staging", "target"]);
    let reach = |from: &str, to: &str| {
        let listener =
            "import socket; s = socket.create_server(('', 5000)); print(flush=True); s.accept()";
        let mut server = lab.host(to).command("dba", "python3");
        let mut server = server.args(["-c", listener]).stdout(Stdio::piped()).spawn().unwrap();
        BufReader::new(server.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
        let mut client = lab.host(from).command("dba", "timeout");
        let text = format!("exec 3<> /dev/tcp/{to}/5000");
        let reached = client.args(["1", "bash", "-c", &text]).status().unwrap().success();
        lab.host(to)
            .processes()
            .iter()
            .filter(|process| process.arguments.contains("create_server"))
            .for_each(|process| process.signal(rustix::process::Signal::KILL));
        server.wait().unwrap();
        reached
    };
    assert!(reach("staging", "target"));
    lab.block_ports("staging", "target");
    assert!(!reach("staging", "target"));
    assert!(reach("target", "staging"), "the other direction is open");
    run(&mut ssh(lab.host("staging"), "dba", "dba@target", "true"));
    lab.host("target").reboot();
    assert!(!reach("staging", "target"), "a firewall outlives a reboot");
    lab.open_ports("staging", "target");
    assert!(reach("staging", "target"));
    lab.silence_ports("target", "staging");
    assert!(!reach("staging", "target"), "nothing comes back");
    run(&mut ssh(lab.host("staging"), "dba", "dba@target", "true"));
}

/// Sends bytes over SSH; returns the seconds it took.
fn send(lab: &Lab, bytes: usize) -> f64 {
    let command = format!("head -c {bytes} /dev/zero");
    let begin = Instant::now();
    let output = run(&mut ssh(lab.host("target"), "dba", "dba@staging", &command));
    assert_eq!(output.stdout.len(), bytes);
    begin.elapsed().as_secs_f64()
}

#[test]
fn links_are_counted_and_slowed_alone() {
    if !possible() {
        return;
    }
    let lab = Lab::new(&["mount", "staging", "target"]);
    let before = (lab.bytes("staging", "target"), lab.bytes("staging", "mount"));
    send(&lab, 10_000_000);
    let counted = lab.bytes("staging", "target") - before.0;
    assert!((10_000_000..10_500_000).contains(&counted), "{counted}");
    assert_eq!(lab.bytes("staging", "mount"), before.1);
    assert!(lab.bytes("target", "staging") < 1_000_000);

    let bytes = 4_000_000;
    lab.throttle("staging", "target", Some(2_000_000));
    let slow = send(&lab, bytes);
    assert!((1.5..4.0).contains(&slow), "{slow} s");
    lab.host("target").reboot();
    let slow = send(&lab, bytes);
    assert!((1.5..4.0).contains(&slow), "{slow} s after a reboot");
    lab.throttle("staging", "target", None);
    let fast = send(&lab, bytes);
    assert!(fast < 1.4, "{fast} s");
}

#[test]
fn a_proxy_delays_limits_and_is_cut() {
    if !possible() {
        return;
    }
    let lab = Lab::new(&["mount", "staging"]);
    let (mount, staging) = (lab.host("mount"), lab.host("staging"));
    let near = "127.0.0.1:22".parse().unwrap();
    let delay = Duration::from_millis(50);
    let proxy = Proxy::start(staging, 2222, near, ProxyOptions { delay, bytes_per_second: None });
    assert_eq!(proxy.address().to_string(), "10.77.0.2:2222");
    let echo = Echo::start(mount, "ssh://dba@staging:2222");
    let begin = Instant::now();
    echo.say("there and back");
    assert_eq!(echo.hear(Duration::from_secs(10)).as_deref(), Some("there and back"));
    let round_trip = begin.elapsed();
    assert!((2 * delay..4 * delay).contains(&round_trip), "{round_trip:?}");
    proxy.cut();
    echo.say("during the cut");
    assert_eq!(echo.hear(Duration::from_millis(500)), None);
    proxy.mend();
    assert_eq!(echo.hear(Duration::from_secs(10)).as_deref(), Some("during the cut"));
    drop((echo, proxy));
    let proxied = |command: &str| ssh(mount, "dba", "ssh://dba@staging:2222", command);
    assert!(failure(&mut proxied("true")).contains("Connection refused"), "it is gone");

    let timed = |mut command: Command| {
        let begin = Instant::now();
        (run(&mut command).stdout.len(), begin.elapsed().as_secs_f64())
    };
    let options = ProxyOptions { bytes_per_second: Some(4_000_000), ..Default::default() };
    let slow = Proxy::start(staging, 2222, near, options);
    let (length, seconds) = timed(proxied("head -c 8000000 /dev/zero"));
    assert!(length == 8_000_000 && (1.9..3.5).contains(&seconds), "{length} bytes in {seconds} s");
    drop(slow);
    let fast =
        Proxy::start(staging, 0, near, ProxyOptions { delay: delay / 20, bytes_per_second: None });
    let to = format!("ssh://dba@staging:{}", fast.address().port());
    let (length, seconds) = timed(ssh(mount, "dba", &to, "head -c 200000000 /dev/zero"));
    eprintln!("200 MB by way of the proxy with 2.5 ms of delay: {seconds:.2} s");
    assert!(length == 200_000_000 && seconds < 20.0, "{length} bytes in {seconds} s");
    assert_eq!(stdout(&run(&mut ssh(mount, "dba", "staging", "hostname"))), "staging");
}
