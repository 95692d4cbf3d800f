//! The lab's own proof: hosts that are apart from each other and from the machine, and go without a trace.

mod canaries;
mod ends;
mod hosts;
mod links;
mod programs;
mod ssh;

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use pgthaw_testkit::{Host, User};

/// Returns whether the test can make a lab; says so if not.
fn possible() -> bool {
    let root = User::current().uid == 0;
    if !root {
        eprintln!("skipped: a lab needs root");
    }
    root
}

/// Returns `ssh` from a user of a host to another host, never asking.
fn ssh(from: &Host, user: &str, to: &str, command: &str) -> Command {
    let mut ssh = from.command(user, "ssh");
    ssh.args(["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", to, command]);
    ssh
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

/// Returns what a command that must fail says on standard error.
#[track_caller]
fn failure(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(!output.status.success(), "{command:?} succeeds: {output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until something is so.
#[track_caller]
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
