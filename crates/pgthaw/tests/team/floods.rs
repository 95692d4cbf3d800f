//! Accounts that take all they can get from a team's server, while others work.

use std::time::{Duration, Instant};

use crate::lab::{Team, possible};

/// Opens connections that say half a request, and offers that say nothing, and holds on to them.
const SILENT: &str = r#"
use IO::Socket::UNIX;
my @held;
for my $n (1 .. 1200) {
    my $socket = IO::Socket::UNIX->new(Peer => "/run/pgthaw/server.sock") or next;
    $socket->autoflush(1); print $socket "GET /v1/sessions HTTP/1.1\r\nhost: x"; push @held, $socket;
    my $offer = IO::Socket::UNIX->new(Peer => "/run/pgthaw/offers.sock") or next;
    push @held, $offer;
}
sleep 60;
"#;

/// Asks for the databases of a backup, over and over at the same time.
const GREEDY: &str = r#"
use IO::Socket::UNIX;
$SIG{PIPE} = "IGNORE";
my $body = '{"repository":{"name":"prod","path":""}}';
my @held;
for my $n (1 .. 40) {
    my $socket = IO::Socket::UNIX->new(Peer => "/run/pgthaw/server.sock") or next;
    $socket->autoflush(1); push @held, $socket;
    print $socket "POST /v1/databases HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
        . length($body) . "\r\n\r\n$body";
}
sleep 60;
"#;

/// The server's memory that is its own, in bytes.
fn memory(team: &Team) -> u64 {
    let mut serving = team.host("backup1").processes().into_iter();
    let server = serving.find(|p| p.arguments.starts_with("pgthaw serve")).unwrap();
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid)).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn who_takes_all_he_can_get_keeps_nobody_from_working() {
    if !possible() {
        return;
    }
    let team = Team::new();
    let flood = |user: &str, script: &str| {
        team.host("backup1").command(user, "perl").args(["-e", script]).spawn().unwrap()
    };
    let mut floods = vec![flood("ops", SILENT), flood("ops", SILENT)];
    std::thread::sleep(Duration::from_secs(1));
    let options = ["--staging", "stage", "--no-role-passwords", "--to", "archive:x"];
    let mut export = team.start(&options);
    floods.push(flood("ann", GREEDY));
    let mut slowest = Duration::ZERO;
    let mut most = (0, 0);
    while export.try_wait().unwrap().is_none() {
        let begun = Instant::now();
        // The owner of the server is somebody else than who floods it.
        let mut asked = team.host("backup1").command("dba", "env");
        asked.args([
            "RUNTIME_DIRECTORY=/run/pgthaw",
            "PGTHAW_SERVER=/run/pgthaw/server.sock",
            "pgthaw",
            "sessions",
        ]);
        let asked = asked.output().unwrap();
        assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));
        slowest = slowest.max(begun.elapsed());
        let readers = team.host("backup1").processes().into_iter();
        let readers = readers.filter(|p| p.arguments.starts_with("pgthaw internal source")).count();
        most = (most.0.max(memory(&team)), most.1.max(readers));
        std::thread::sleep(Duration::from_millis(50));
    }
    let output = export.wait_with_output().unwrap();
    team.wants(0, &options, &output);
    team.assert_delivered("files", "/home/ops/exports/x");
    assert!(slowest < Duration::from_secs(2), "the slowest answer took {slowest:?}");
    assert!(most.0 < 200_000_000, "the server's memory: {} bytes", most.0);
    assert!(most.1 <= 6, "{} processes read the repository at a time", most.1);
    for mut flood in floods {
        flood.kill().unwrap();
        flood.wait().unwrap();
    }
}
