//! Limits of a server for each account of the host: connections, offers, running requests.
//!
//! Every account may open a team's socket. An account that opens a thousand silent connections must not block other accounts, and
//! must not use the descriptors that running sessions need.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Connections of one account at a time: more than any person's commands make.
const CONNECTIONS: usize = 64;
/// Running requests per account; each may start a process that reads a repository. Further requests wait.
const REQUESTS: usize = 4;
/// Running requests of all accounts.
const ALL_REQUESTS: usize = 16;

/// Counts what the accounts hold, each up to a limit, and all together up to another.
#[derive(Debug)]
pub struct Admission {
    each: usize,
    all: usize,
    held: Mutex<BTreeMap<u32, usize>>,
}

/// One thing that an account holds, until it is dropped.
#[derive(Debug)]
pub struct Held {
    admission: Arc<Admission>,
    account: u32,
}

impl Admission {
    /// At most `each` of an account, and `all` together. Root and our own account only count for themselves.
    pub fn new(each: usize, all: usize) -> Arc<Self> {
        Arc::new(Self { each, all, held: Mutex::default() })
    }

    /// Limits for connections: they use at most a quarter of this process's descriptors; running sessions use the rest.
    pub fn of_connections() -> Arc<Self> {
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20);
        let quarter = usize::try_from(descriptors / 4).unwrap_or(usize::MAX);
        Self::new(CONNECTIONS, quarter.clamp(CONNECTIONS, 4096))
    }

    /// Counts one more for `account`; returns `None` where that exceeds its own limit or the limit of all accounts.
    pub fn enter(self: &Arc<Self>, account: u32) -> Option<Held> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let trusted = [0, rustix::process::geteuid().as_raw()];
        let others = |held: &BTreeMap<u32, usize>| -> usize {
            held.iter().filter(|(account, _)| !trusted.contains(account)).map(|(_, n)| n).sum()
        };
        let own = held.get(&account).copied().unwrap_or(0);
        if !trusted.contains(&account) && (own >= self.each || others(&held) >= self.all) {
            return None;
        }
        held.insert(account, own + 1);
        drop(held);
        Some(Held { admission: self.clone(), account })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut held = self.admission.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = held.get_mut(&self.account) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.account);
            }
        }
    }
}

/// The queue of requests: limits how many run for each account and in total.
#[derive(Debug)]
pub struct Turns {
    all: Arc<Semaphore>,
    accounts: Mutex<BTreeMap<u32, Arc<Semaphore>>>,
}

/// A request's turn, until it is dropped.
#[derive(Debug)]
pub struct Turn {
    _own: OwnedSemaphorePermit,
    _all: OwnedSemaphorePermit,
}

impl Default for Turns {
    fn default() -> Self {
        Self { all: Arc::new(Semaphore::new(ALL_REQUESTS)), accounts: Mutex::default() }
    }
}

impl Turns {
    /// Waits until `account` may do one more thing; nothing if the server ends.
    pub async fn wait(&self, account: u32) -> Option<Turn> {
        let own = {
            let mut accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
            accounts.retain(|_, turns| {
                Arc::strong_count(turns) > 1 || turns.available_permits() < REQUESTS
            });
            accounts.entry(account).or_insert_with(|| Arc::new(Semaphore::new(REQUESTS))).clone()
        };
        // One's own first: an account that waits for its own does not keep the others from theirs.
        let own = own.acquire_owned().await.ok()?;
        let all = self.all.clone().acquire_owned().await.ok()?;
        Some(Turn { _own: own, _all: all })
    }
}

/// Lets this process have as many descriptors as the system allows: the usual 1024 are for programs that use `select(2)`.
pub fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let _ = setrlimit(Resource::Nofile, raised); // the old one is enough for a few sessions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_takes_its_share_and_no_more() {
        let (admission, own) = (Admission::new(2, 3), rustix::process::geteuid().as_raw());
        let (ann, bob, eve) = (own + 1001, own + 1002, own + 1003);
        let enter = |account| admission.enter(account);
        let held = [enter(ann), enter(ann), enter(bob)];
        assert!(held.iter().all(Option::is_some));
        assert!(enter(ann).is_none() && enter(bob).is_none() && enter(eve).is_none());
        assert!((0..9).all(|_| enter(own).is_some()) && enter(0).is_some());
        drop(held);
        assert!(enter(eve).is_some());
        assert!(admission.held.lock().unwrap().is_empty(), "nothing is kept of who is gone");
    }

    #[tokio::test]
    async fn requests_of_one_account_wait_for_each_other_only() {
        let turns = Turns::default();
        let mut mine = Vec::new();
        for _ in 0..REQUESTS {
            mine.push(turns.wait(7).await.unwrap());
        }
        let soon = std::time::Duration::from_millis(20);
        assert!(tokio::time::timeout(soon, turns.wait(7)).await.is_err());
        assert!(tokio::time::timeout(soon, turns.wait(8)).await.is_ok());
        mine.pop();
        assert!(tokio::time::timeout(soon, turns.wait(7)).await.is_ok());
    }
}
