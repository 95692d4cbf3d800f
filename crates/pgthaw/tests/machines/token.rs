//! The token that lets one half of a mover in to the other travels over ssh, and is seen nowhere else.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pgthaw_testkit::Lab;

use crate::lab::{Machines, possible};

/// Where the staging server's ssh connections are written down as they come.
const HEARD: &str = "/home/dba/heard";
/// Where sessions leave files, on each host.
const PLACES: [(&str, &[&str]); 3] = [
    ("mount", &["/home/ann", "/tmp", "/var/tmp"]),
    ("staging", &["/home/dba", "/tmp", "/var/tmp"]),
    ("target", &["/home/ops", "/tmp", "/var/tmp"]),
];

#[test]
fn a_movers_token_is_seen_nowhere() {
    if !possible() {
        return;
    }
    let machines = Machines::new();
    let (lab, staging) = (&machines.lab, machines.host("staging"));
    let program = Path::new(env!("CARGO_BIN_EXE_pgthaw"));
    std::fs::copy(program, staging.path("/usr/local/bin/pgthaw")).unwrap();
    let heard = "umask 077; tee -a heard | pgthaw attach --stdio --only staging";
    staging.force_command("dba", "ann@mount", heard);

    // Somebody looks on whose account is none of these.
    let ended = AtomicBool::new(false);
    let (lines, open) = std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let (mut lines, mut open) = (BTreeSet::new(), BTreeSet::new());
            while !ended.load(Ordering::Relaxed) {
                for host in lab.hosts() {
                    lines.extend(host.processes().into_iter().map(|process| process.arguments));
                }
                open.extend(contents(lab, |mode| mode & 0o004 != 0));
                std::thread::sleep(Duration::from_millis(100));
            }
            (lines, open)
        });
        let export = machines.start(&[]);
        machines.ended(export, 0);
        ended.store(true, Ordering::Relaxed);
        watch.join().unwrap()
    });
    assert_eq!(machines.session()["dump_way"]["direct"], true);
    let id = machines.session()["id"].as_str().unwrap().to_owned();
    machines.expect(0, &["session", &id, "--bundle", "/home/ann/bundle.json"]);

    let heard = std::fs::read(staging.path(HEARD)).unwrap();
    let tokens = tokens(&heard);
    assert_eq!(tokens.len(), 1, "one connection, one token");
    let needles = spellings(&tokens[0]);
    let holds = |bytes: &[u8]| needles.iter().any(|needle| contains(bytes, needle));
    assert!(holds(&heard), "the detector sees it where it is");
    for line in lines {
        assert!(!holds(line.as_bytes()), "{line}");
    }
    for (path, bytes) in open {
        assert!(!holds(&bytes), "{path}, which others may read");
    }
    let kept = contents(lab, |_| true);
    assert!(kept.iter().any(|(path, _)| path.ends_with("/journal")), "journals are looked at");
    assert!(kept.iter().any(|(path, _)| path.ends_with("bundle.json")), "the bundle is looked at");
    for (path, bytes) in kept {
        assert!(!holds(&bytes), "{path}");
    }
}

/// The tokens of offers in what was heard: `"token":[1,2,…]`.
fn tokens(heard: &[u8]) -> Vec<Vec<u8>> {
    let text = String::from_utf8_lossy(heard);
    let lists =
        text.split("\"token\":").skip(1).filter_map(|rest| rest.split_inclusive(']').next());
    let tokens = lists.filter_map(|list| serde_json::from_str::<Vec<u8>>(list).ok());
    tokens.filter(|token| token.len() == 32).collect()
}

/// How a token may be written: as it is, as JSON, as Debug, in hex.
fn spellings(token: &[u8]) -> Vec<Vec<u8>> {
    let hex: String = token.iter().map(|byte| format!("{byte:02x}")).collect();
    let numbers: Vec<String> = token.iter().map(u8::to_string).collect();
    let written = [hex.to_uppercase(), hex, numbers.join(","), numbers.join(", ")];
    written.into_iter().map(String::into_bytes).chain([token.to_vec()]).collect()
}

fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    bytes.windows(needle.len()).any(|part| part == needle)
}

/// The small files of the places where sessions leave some, whose mode `wanted` accepts; without what was heard, the repository and
/// the program.
fn contents(lab: &Lab, wanted: fn(u32) -> bool) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for (host, places) in PLACES {
        let root = lab.host(host).path("/");
        for place in places {
            let files = std::process::Command::new("find")
                .arg(lab.host(host).path(place))
                .args(["-xdev", "-type", "f", "-size", "-1024k", "-not", "-path", "*/repo/*"])
                .args(["-not", "-name", "heard", "-printf", "%m %p\\n"])
                .output()
                .unwrap();
            for line in String::from_utf8_lossy(&files.stdout).lines() {
                let Some((mode, path)) = line.split_once(' ') else { continue };
                let mode = u32::from_str_radix(mode, 8).unwrap_or(0);
                if wanted(mode)
                    && let Ok(bytes) = std::fs::read(path)
                {
                    let inside = path.trim_start_matches(&*root.to_string_lossy());
                    found.push((format!("{host}:/{inside}"), bytes));
                }
            }
        }
    }
    found
}
