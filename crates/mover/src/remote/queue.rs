//! A bounded queue between two threads that either side can close.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Items on their way from one thread to another; who is too fast waits.
pub(super) struct Queue<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    capacity: usize,
}

struct State<T> {
    items: VecDeque<T>,
    closed: bool,
    /// Threads that wait: waking nobody would still cost a system call.
    waiting: usize,
}

/// What [`Queue::pop`] found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Popped<T> {
    Item(T),
    /// Nothing came in time.
    Nothing,
    /// Closed, and nothing is left in it.
    Closed,
}

impl<T> Queue<T> {
    pub(super) fn new(capacity: usize) -> Self {
        let state = State { items: VecDeque::new(), closed: false, waiting: 0 };
        Self { state: Mutex::new(state), changed: Condvar::new(), capacity }
    }

    /// Appends an item, waiting for room up to `limit`; gives it back if there was none, or if the queue is closed.
    pub(super) fn push(&self, item: T, limit: Duration) -> Result<(), T> {
        let mut state = self.wait(limit, |state| state.closed || state.items.len() < self.capacity);
        if state.closed || state.items.len() >= self.capacity {
            return Err(item);
        }
        state.items.push_back(item);
        self.wake(&state);
        Ok(())
    }

    /// Takes the oldest item, waiting for one up to `limit`. What lies in a closed queue is still given out.
    pub(super) fn pop(&self, limit: Duration) -> Popped<T> {
        let mut state = self.wait(limit, |state| state.closed || !state.items.is_empty());
        match state.items.pop_front() {
            Some(item) => {
                self.wake(&state);
                Popped::Item(item)
            }
            None if state.closed => Popped::Closed,
            None => Popped::Nothing,
        }
    }

    /// Waits until nothing is in it, or it is closed.
    pub(super) fn wait_empty(&self) {
        drop(self.wait(Duration::MAX, |state| state.closed || state.items.is_empty()));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lock().items.is_empty()
    }

    /// Whether it is at least half full: whoever takes items is the slower side.
    pub(super) fn piles_up(&self) -> bool {
        self.lock().items.len() >= self.capacity.div_ceil(2)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Refuses further items and wakes all who wait.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn wait(&self, limit: Duration, ready: impl Fn(&State<T>) -> bool) -> MutexGuard<'_, State<T>> {
        let deadline = Instant::now().checked_add(limit);
        let mut state = self.lock();
        while !ready(&state) {
            let left = deadline.map_or(Duration::MAX, |at| at.duration_since(Instant::now()));
            if left.is_zero() {
                break;
            }
            state.waiting += 1;
            let left = left.min(Duration::from_secs(3600)); // the system's clock takes no longer waits everywhere
            state = self
                .changed
                .wait_timeout(state, left)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state);
            state.waiting -= 1;
        }
        state
    }

    fn wake(&self, state: &State<T>) {
        if state.waiting > 0 {
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_bounded_and_gives_out_what_is_left_after_it_is_closed() {
        let queue = Queue::new(2);
        assert_eq!(queue.pop(Duration::ZERO), Popped::Nothing);
        assert!(!queue.piles_up());
        assert_eq!(
            [1, 2, 3].map(|item| queue.push(item, Duration::ZERO)),
            [Ok(()), Ok(()), Err(3)]
        );
        assert!(queue.piles_up());
        queue.close();
        assert_eq!(queue.push(4, Duration::MAX), Err(4));
        let popped = [(); 3].map(|()| queue.pop(Duration::MAX));
        assert_eq!(popped, [Popped::Item(1), Popped::Item(2), Popped::Closed]);
    }

    #[test]
    fn who_waits_is_woken() {
        let queue = Queue::new(1);
        std::thread::scope(|threads| {
            let popping = threads.spawn(|| [(); 3].map(|()| queue.pop(Duration::MAX)));
            for item in [1, 2] {
                queue.push(item, Duration::MAX).unwrap();
            }
            queue.wait_empty();
            queue.close();
            assert_eq!(popping.join().unwrap(), [Popped::Item(1), Popped::Item(2), Popped::Closed]);
        });
    }
}
