//! What a thread waits for until its answer comes.

use std::io;
use std::sync::{Condvar, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// Something asked for. It is settled once, with the lock held that its waiters wait with.
#[derive(Debug)]
pub(super) struct Promise<T> {
    outcome: OnceLock<Outcome<T>>,
    settled: Condvar,
}

/// How a request ended.
#[derive(Debug)]
pub(super) enum Outcome<T> {
    /// With what was asked for.
    Done(T),
    /// With an error of the store at the other end.
    Failed(Failure),
    /// It will not be answered: who still wants it asks again.
    Withdrawn,
}

/// An error that came over the link.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    pub(super) kind: io::ErrorKind,
    pub(super) text: String,
}

impl<T> Promise<T> {
    pub(super) fn new() -> Self {
        Self { outcome: OnceLock::new(), settled: Condvar::new() }
    }

    pub(super) fn outcome(&self) -> Option<&Outcome<T>> {
        self.outcome.get()
    }

    /// Settles it, if it is not yet, and wakes who waits. The caller holds the waiters' lock.
    pub(super) fn settle(&self, outcome: Outcome<T>) {
        let _ = self.outcome.set(outcome); // settled before: an answer that nobody waited for any more
        self.wake();
    }

    /// Lets who waits look around. The caller holds the waiters' lock.
    pub(super) fn wake(&self) {
        self.settled.notify_all();
    }

    /// Waits until it may be settled, or `limit` has passed.
    pub(super) fn wait<'a, S>(
        &self,
        guard: MutexGuard<'a, S>,
        limit: Duration,
    ) -> MutexGuard<'a, S> {
        self.settled.wait_timeout(guard, limit).unwrap_or_else(PoisonError::into_inner).0
    }
}

impl From<&Failure> for io::Error {
    fn from(failure: &Failure) -> Self {
        Self::new(failure.kind, failure.text.clone())
    }
}
