//! The way of a dump to a target on another machine than the staging server: two connections for it alone, joined here.
//!
//! ```text
//! agent ── (handed over by pgthaw attach) ── [sshd ── ssh] ── server ── [ssh ── sshd] ── pgthaw attach, receiving ── target
//! ```
//! The kernel moves the bytes from the one pipe into the other (splice(2)); they are never copied into this process.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use pgthaw_link::{OpenLine, Purpose};
use rustix::pipe::{SpliceFlags, splice};

use super::kept::{Connected, Kept};
use super::site::Site;

/// Bytes that are asked to be moved at a time; a pipe holds less.
const MOST: usize = 1 << 20;

/// Keeps the agent on `staging`, which listens on `socket` there, connected with the receiving half of a data mover on `target`.
pub fn keep(staging: Site, socket: PathBuf, target: Site, receive: Purpose) -> Kept {
    Kept::keep(move |connected| {
        let (staging, target) = (staging.clone(), target.clone());
        let (send, receive) = (Purpose::Socket(socket.clone()), receive.clone());
        async move { connect(&staging, &send, &target, &receive, &connected).await }
    })
}

/// Makes the two connections, joins them, and returns why they ended.
async fn connect(
    staging: &Site,
    send: &Purpose,
    target: &Site,
    receive: &Purpose,
    connected: &Connected,
) -> String {
    let (from, to) = match tokio::join!(staging.open(send), target.open(receive)) {
        (Ok(from), Ok(to)) => (from, to),
        (Err(err), _) | (_, Err(err)) => return err.message,
    };
    let (
        OpenLine { carrier: mut sender, input: back, output: forth, .. },
        OpenLine { carrier: mut receiver, input, output, .. },
    ) = (from, to);
    let pipes = (
        forth.into_owned_fd(),
        input.into_owned_fd(),
        output.into_owned_fd(),
        back.into_owned_fd(),
    );
    let (Ok(forth), Ok(input), Ok(output), Ok(back)) = pipes else {
        return "the connections' pipes cannot be used".into();
    };
    std::thread::spawn(move || join(&forth, &input));
    std::thread::spawn(move || join(&output, &back));
    connected.yes();
    tokio::select! {
        () = sender.wait() => format!("the connection to {} is lost", staging.name()),
        () = receiver.wait() => format!("the connection to {} is lost", target.name()),
    }
}

/// Moves bytes from one pipe into the other until one of them ends.
fn join(from: &OwnedFd, to: &OwnedFd) {
    while let Ok(1..) = splice(from, None, to, None, MOST, SpliceFlags::MOVE) {}
}
