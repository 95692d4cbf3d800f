//! Every EIO the mount gives out, counted with its file and offset: PostgreSQL can swallow an I/O
//! error.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::file::locked;

/// How many faults are kept; more are only counted.
const KEPT: usize = 200;

/// One error the mount gave out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The file as it is (or was last) called, relative to the mount's root.
    pub path: String,
    /// The first byte that was asked for.
    pub offset: u64,
    /// What went wrong.
    pub kind: FaultKind,
    /// The cause in words; for the write layer it names the directory.
    pub error: String,
}

/// What went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// Bytes could not be read, from the lower or back from the write layer.
    Read,
    /// A write could not be kept. The mount is poisoned from here on.
    Write,
    /// Space could not be reserved (`fallocate`); the caller got the true error, the mount is not
    /// poisoned.
    NoSpace,
    /// Refused because an earlier write was lost ([`FaultKind::Write`]).
    Poisoned,
    /// A symbolic link that was not provided ([`crate::FileSystem::provide_link`]) was refused; the caller got EPERM.
    Link,
    /// Refused because of [`crate::FileSystem::abort`]: counted, but not reported to `on_fault`.
    Aborted,
}

/// What an operation could not do, before it is known which path it concerns.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) kind: FaultKind,
    pub(crate) offset: u64,
    pub(crate) error: String,
}

/// Called with each fault that is kept, before the caller of the mount gets its EIO.
pub type OnFault = Box<dyn Fn(&Fault) + Send + Sync>;

/// The list of faults.
pub(crate) struct Faults {
    kept: Mutex<Vec<Fault>>,
    count: AtomicU64,
    on_fault: OnFault,
}

impl Faults {
    pub(crate) fn new(on_fault: OnFault) -> Self {
        Self { kept: Mutex::default(), count: AtomicU64::new(0), on_fault }
    }

    /// Counts `fault`, keeps it if there is room (a lost write always), and reports it. Returns whether it was kept.
    pub(crate) fn record(&self, fault: Fault) -> bool {
        self.count.fetch_add(1, Ordering::Relaxed);
        let mut kept = locked(self.kept.lock());
        let keep = kept.len() < KEPT || (fault.kind == FaultKind::Write && kept.len() < 2 * KEPT);
        if keep {
            kept.push(fault.clone());
        }
        drop(kept);
        if keep && fault.kind != FaultKind::Aborted {
            (self.on_fault)(&fault);
        }
        keep
    }

    pub(crate) fn kept(&self) -> Vec<Fault> {
        locked(self.kept.lock()).clone()
    }

    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}
