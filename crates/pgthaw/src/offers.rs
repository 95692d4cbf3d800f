//! Connections that callers offer to their own machines, kept until they are needed.
//!
//! A server cannot reach a laptop; whoever asks from there makes the connections, and his end of each serves as `pgthaw attach` does.
//! They come over a socket beside the server's own, with the descriptors in the message (see [`crate::attach::handing`]).

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use tokio::net::UnixListener;
use tokio::sync::Notify;

use crate::admission::{Admission, Held};
use crate::attach::handing::{Handed, take_over};

/// Name of the socket, beside the server's.
pub const SOCKET: &str = "offers.sock";
/// How long a connection is waited for.
const LIMIT: Duration = Duration::from_secs(20);
/// How long an offer may take to arrive on its connection.
const ARRIVAL_LIMIT: Duration = Duration::from_secs(5);
/// How often those that have ended are let go of.
const LOOK: Duration = Duration::from_secs(2);
/// Offers of one caller's machine that are kept; a newer one takes the place of the oldest.
const MOST: usize = 16;
/// Offers of one account that are kept or just arriving, whatever names it gives its machines. Each takes three descriptors.
const MOST_OF_ACCOUNT: usize = 48;
/// Offers of all accounts.
const MOST_OF_ALL: usize = 512;

/// Whose offers: an account of this machine, and what it calls its own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct OfferKey {
    /// The account here.
    pub uid: u32,
    /// The caller's machine.
    pub caller: String,
}

/// The offers that nobody has taken yet.
#[derive(Debug)]
pub struct Offers {
    kept: Mutex<BTreeMap<OfferKey, VecDeque<(Handed, Held)>>>,
    arrived: Notify,
    admission: Arc<Admission>,
}

impl Default for Offers {
    fn default() -> Self {
        let admission = Admission::new(MOST_OF_ACCOUNT, MOST_OF_ALL);
        Self { kept: Mutex::default(), arrived: Notify::new(), admission }
    }
}

impl Offers {
    /// Takes offers in from `listener`, for as long as the runtime lives.
    pub fn listen(self: &Arc<Self>, listener: UnixListener) {
        let offers = self.clone();
        tokio::spawn(async move {
            let mut look = tokio::time::interval(LOOK);
            loop {
                tokio::select! {
                    accepted = listener.accept() => match accepted {
                        Ok((stream, _)) => {
                            let account = stream.peer_cred().map_or(u32::MAX, |peer| peer.uid());
                            let Some(held) = offers.admission.enter(account) else { continue };
                            let offers = offers.clone();
                            // A caller that says nothing must not hold the others up.
                            std::thread::spawn(move || {
                                let _ = stream.into_std().and_then(|stream| offers.arrive(stream, held));
                            });
                        }
                        Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                    },
                    // A process on this machine holds each of them.
                    _ = look.tick() => offers.let_go_of_ended(),
                }
            }
        });
    }

    fn arrive(&self, stream: StdStream, held: Held) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(ARRIVAL_LIMIT))?;
        let uid = rustix::net::sockopt::socket_peercred(&stream)?.uid.as_raw();
        let handed = take_over(stream)?;
        let key = OfferKey { uid, caller: handed.said.clone() };
        let mut kept = self.lock();
        let queue = kept.entry(key).or_default();
        if queue.len() == MOST {
            queue.pop_front();
        }
        queue.push_back((handed, held));
        drop(kept);
        self.arrived.notify_waiters();
        Ok(())
    }

    /// Takes a connection to the machine of `key`; waits for one for a while.
    pub async fn take(&self, key: &OfferKey) -> Option<Handed> {
        let taking = async {
            loop {
                let arrived = self.arrived.notified();
                if let Some(handed) = self.take_now(key) {
                    return handed;
                }
                arrived.await;
            }
        };
        tokio::time::timeout(LIMIT, taking).await.ok()
    }

    fn take_now(&self, key: &OfferKey) -> Option<Handed> {
        let mut kept = self.lock();
        let queue = kept.get_mut(key)?;
        // The newest is the likeliest to be alive.
        let alive = std::iter::from_fn(|| queue.pop_back()).find(|(handed, _)| !has_ended(handed));
        if queue.is_empty() {
            kept.remove(key);
        }
        alive.map(|(handed, _)| handed)
    }

    fn let_go_of_ended(&self) {
        self.lock().retain(|_, queue| {
            queue.retain(|(handed, _)| !has_ended(handed));
            !queue.is_empty()
        });
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<OfferKey, VecDeque<(Handed, Held)>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether whoever offered the connection is gone, or his end of it.
///
/// sshd does not end what it started when its client goes away; it only closes the pipes.
fn has_ended(handed: &Handed) -> bool {
    let mut ends = [
        PollFd::new(&handed.holder, PollFlags::RDHUP),
        PollFd::new(&handed.input, PollFlags::RDHUP),
    ];
    let gone = PollFlags::HUP | PollFlags::ERR | PollFlags::RDHUP;
    match rustix::event::poll(&mut ends, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
        Ok(_) => ends.iter().any(|end| end.revents().intersects(gone)),
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;
    use crate::attach::handing::hand_over;

    fn offer(
        socket: &std::path::Path,
        said: &'static str,
    ) -> (std::thread::JoinHandle<()>, StdStream) {
        let socket = socket.to_owned();
        let (near, far) = StdStream::pair().unwrap();
        let output: OwnedFd = near.try_clone().unwrap().into();
        let holding =
            std::thread::spawn(move || hand_over(&socket, said, near.into(), output).unwrap());
        (holding, far)
    }

    fn key(caller: &str) -> OfferKey {
        OfferKey { uid: rustix::process::geteuid().as_raw(), caller: caller.into() }
    }

    #[tokio::test]
    async fn offers_are_taken_by_their_key() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join(SOCKET);
        let offers = Arc::new(Offers::default());
        offers.listen(UnixListener::bind(&socket).unwrap());
        let (holding, _far) = offer(&socket, "ann@laptop 1");
        let taken = offers.take(&key("ann@laptop 1")).await.unwrap();
        assert!(offers.take_now(&key("ann@laptop 1")).is_none(), "each is taken once");
        assert!(offers.take_now(&key("bob@laptop 1")).is_none());
        assert!(!has_ended(&taken) && !holding.is_finished());
        drop(taken);
        holding.join().unwrap();
    }

    #[tokio::test]
    async fn one_whose_caller_is_gone_is_let_go_of() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join(SOCKET);
        let offers = Arc::new(Offers::default());
        offers.listen(UnixListener::bind(&socket).unwrap());
        let (holding, far) = offer(&socket, "ann@laptop 1");
        drop(far); // as sshd does
        tokio::task::spawn_blocking(|| holding.join().unwrap()).await.unwrap();
        let (_holding, _far) = offer(&socket, "ann@laptop 1");
        assert!(!has_ended(&offers.take(&key("ann@laptop 1")).await.unwrap()));
    }
}
