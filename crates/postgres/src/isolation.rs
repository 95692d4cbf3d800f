//! How far an instance is cut off from this machine, and whether the kernel allows it.
//!
//! Code in a backup (C functions, triggers, conditions that pg_dump evaluates) runs in the instance, and replay of WAL uses
//! absolute paths of the original server: settings do not bind either. So an instance gets a root of its own
//! ([`crate::root`]), made by root, or by an ordinary user inside a new user namespace. Where the kernel refuses, an
//! export is refused, unless the user accepts the risk (`--allow-unisolated`): then there are the settings, and an empty
//! network namespace if that at least can be had.

use std::ffi::CString;
use std::io;

use serde::{Deserialize, Serialize};

use crate::binaries::Binaries;
use crate::os_user::OsUser;
use crate::process::KILL_LIMIT;
use crate::root::host::Host;
use crate::root::layout::{Account, View, layout};
use crate::root::{self, Confinement, Helper, RootPlan, Streams, ids_of};

/// How far an instance is cut off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Isolation {
    /// A root of its own, made as root.
    Root,
    /// A root of its own inside a user namespace that maps only the user.
    UserRoot,
    /// No root of its own, because the user accepted that.
    Unisolated {
        /// An empty network namespace and an IPC namespace of its own, at least.
        network: bool,
    },
}

impl Isolation {
    /// Returns how far an instance with this confinement is cut off here; without a root of its own that is tried in a child.
    pub fn of(confinement: &Confinement) -> Self {
        match confinement {
            Confinement::Root(_) if rustix::process::geteuid().is_root() => Self::Root,
            Confinement::Root(_) => Self::UserRoot,
            Confinement::Unisolated => Self::Unisolated { network: attempt(&Entry::new()).is_ok() },
        }
    }

    /// Returns whether the instance's shared memory lies in a namespace that ends with it.
    pub fn has_own_ipc(&self) -> bool {
        !matches!(self, Self::Unisolated { network: false })
    }

    /// Returns one line for `check` and the log.
    pub fn describe(&self) -> String {
        match self {
            Self::Root => "isolated in a root of its own".into(),
            Self::UserRoot => "isolated in a root of its own, in a user namespace".into(),
            Self::Unisolated { network: true } => {
                "not isolated from this machine's files and processes (--allow-unisolated), only from its network".into()
            }
            Self::Unisolated { network: false } => {
                "not isolated from this machine (--allow-unisolated)".into()
            }
        }
    }
}

/// Tries whether a root of its own can be had here, by building one and leaving it. `binaries` are PostgreSQL's programs,
/// if they were found.
///
/// # Errors
/// What the kernel refused, on which object: a kernel may allow a user namespace and refuse the first mount in it.
pub fn try_root(
    helper: &Helper,
    binaries: Option<&Binaries>,
    user: Option<&OsUser>,
) -> Result<(), String> {
    let ids = ids_of(user);
    let laid_out = layout(&Host::look(binaries, &[], user), &View::default(), &Account::of(user));
    let (steps, _) = laid_out.map_err(|error| error.to_string())?;
    let plan = RootPlan { steps, program: None, ids };
    let started = root::start(helper, &plan, "", Streams::null());
    let mut child = started.map_err(|error| match std::error::Error::source(&error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    })?;
    match child.wait_blocking(KILL_LIMIT) {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(format!("the process that tried it ended with {status}")),
        None => Err("the process that tried it does not end".into()),
    }
}

/// What a child has to do to enter its namespaces, prepared so that it needs no memory.
pub(crate) struct Entry {
    flags: libc::c_int,
    maps: Option<Maps>,
}

/// The files of a new user namespace and what goes into them.
struct Maps {
    files: [(&'static std::ffi::CStr, CString); 3],
}

impl Entry {
    /// Prepares the entry: a network and an IPC namespace, for an ordinary user in a user namespace.
    fn new() -> Self {
        let alone = libc::CLONE_NEWNET | libc::CLONE_NEWIPC;
        if rustix::process::geteuid().is_root() {
            return Self { flags: alone, maps: None };
        }
        let uid = rustix::process::geteuid().as_raw();
        let gid = rustix::process::getegid().as_raw();
        let line = |id: u32| CString::new(format!("{id} {id} 1")).unwrap_or_default();
        let files = [
            (c"/proc/self/setgroups", CString::from(c"deny")),
            (c"/proc/self/uid_map", line(uid)),
            (c"/proc/self/gid_map", line(gid)),
        ];
        Self { flags: alone | libc::CLONE_NEWUSER, maps: Some(Maps { files }) }
    }

    /// Prepares the entry into what an instance without a root of its own gets; `None` if that is nothing.
    pub(crate) fn prepare(isolation: &Isolation) -> Option<Self> {
        matches!(isolation, Isolation::Unisolated { network: true }).then(Self::new)
    }

    /// Enters the namespaces. Between fork and exec only: it makes async-signal-safe calls alone.
    pub(crate) fn enter(&self) -> io::Result<()> {
        // SAFETY: a system call without memory.
        if unsafe { libc::unshare(self.flags) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let Some(maps) = &self.maps else { return Ok(()) };
        for (path, content) in &maps.files {
            let bytes = content.as_bytes();
            // SAFETY: system calls on strings that live in `self`; the descriptor is closed at once.
            unsafe {
                let file = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                if file < 0 {
                    return Err(io::Error::last_os_error());
                }
                let written = libc::write(file, bytes.as_ptr().cast(), bytes.len());
                let error = io::Error::last_os_error();
                libc::close(file);
                if written != bytes.len() as isize {
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

/// Enters the namespaces in a forked child that ends at once.
fn attempt(entry: &Entry) -> io::Result<()> {
    // SAFETY: the child makes only async-signal-safe calls and ends by `_exit`.
    let child = unsafe { libc::fork() };
    match child {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let code = match entry.enter() {
                Ok(()) => 0,
                Err(error) => error.raw_os_error().unwrap_or(libc::EPERM),
            };
            // SAFETY: ends the child without running anybody's exit handlers.
            unsafe { libc::_exit(code) }
        }
        child => {
            let mut status = 0;
            // SAFETY: waits for our own child; `status` is ours.
            while unsafe { libc::waitpid(child, &raw mut status, 0) } == -1 {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            match libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status)) {
                Some(0) => Ok(()),
                Some(errno) => Err(io::Error::from_raw_os_error(errno)),
                None => Err(io::Error::other("the child that tried was killed")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_isolates() {
        let unisolated = Isolation::of(&Confinement::Unisolated);
        assert!(unisolated.describe().contains("--allow-unisolated"));
        assert_eq!(Entry::prepare(&unisolated).is_some(), unisolated.has_own_ipc());
        let nothing = Isolation::Unisolated { network: false };
        assert!(Entry::prepare(&nothing).is_none() && !nothing.has_own_ipc());
        assert!(Isolation::Root.has_own_ipc() && Entry::prepare(&Isolation::Root).is_none());
    }

    #[test]
    fn the_answer_is_what_a_child_meets() {
        let impossible = Entry { flags: -1, maps: None };
        assert_eq!(attempt(&impossible).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}
