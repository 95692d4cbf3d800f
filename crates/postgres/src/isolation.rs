//! Namespaces that cut an instance off from the network and from other people's shared memory.
//!
//! Code in a backup (C functions, triggers) runs in the instance; settings alone do not bind it. Where the
//! kernel allows it the instance gets an empty network namespace and an IPC namespace of its own, made by
//! root, or by an ordinary user inside a new user namespace. Unix sockets with a path work across them.

use std::ffi::CString;
use std::io;

use serde::{Deserialize, Serialize};

/// How far an instance can be cut off on this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Isolation {
    /// An empty network namespace and an own IPC namespace, made as root.
    Namespaces,
    /// The same inside a user namespace that maps only the user himself.
    UserNamespace,
    /// The kernel or the container refuses; only the settings isolate.
    ConfigurationOnly {
        /// What was refused.
        reason: String,
    },
}

impl Isolation {
    /// Returns whether the instance's shared memory lies in a namespace that ends with it.
    pub fn has_own_ipc(&self) -> bool {
        !matches!(self, Self::ConfigurationOnly { .. })
    }

    /// Returns one line for `check` and the log.
    pub fn describe(&self) -> String {
        match self {
            Self::Namespaces => "isolated by an empty network namespace".into(),
            Self::UserNamespace => {
                "isolated by an empty network namespace in a user namespace".into()
            }
            Self::ConfigurationOnly { reason } => {
                format!("isolated by configuration only ({reason})")
            }
        }
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
    /// Prepares the entry; `None` if there are no namespaces to enter.
    pub(crate) fn prepare(isolation: &Isolation) -> Option<Self> {
        let alone = libc::CLONE_NEWNET | libc::CLONE_NEWIPC;
        match isolation {
            Isolation::Namespaces => Some(Self { flags: alone, maps: None }),
            Isolation::UserNamespace => {
                let uid = rustix::process::geteuid().as_raw();
                let gid = rustix::process::getegid().as_raw();
                let line = |id: u32| CString::new(format!("{id} {id} 1")).unwrap_or_default();
                let deny = CString::from(c"deny");
                let files = [
                    (c"/proc/self/setgroups", deny),
                    (c"/proc/self/uid_map", line(uid)),
                    (c"/proc/self/gid_map", line(gid)),
                ];
                Some(Self { flags: alone | libc::CLONE_NEWUSER, maps: Some(Maps { files }) })
            }
            Isolation::ConfigurationOnly { .. } => None,
        }
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

/// Tries in a child process how far an instance can be cut off here.
pub fn isolation_possible() -> Isolation {
    let wanted = match rustix::process::geteuid().is_root() {
        true => Isolation::Namespaces,
        false => Isolation::UserNamespace,
    };
    match Entry::prepare(&wanted).map_or(Ok(()), |entry| attempt(&entry)) {
        Ok(()) => wanted,
        Err(error) => {
            let what = match wanted {
                Isolation::UserNamespace => "user and network namespaces",
                _ => "network namespaces",
            };
            Isolation::ConfigurationOnly { reason: format!("{what} are refused here: {error}") }
        }
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
        let refused = Isolation::ConfigurationOnly { reason: "no".into() };
        assert_eq!(refused.describe(), "isolated by configuration only (no)");
        assert!(Entry::prepare(&refused).is_none());
        assert!(!refused.has_own_ipc());
    }

    #[test]
    fn the_answer_is_what_a_child_meets() {
        let possible = isolation_possible();
        if let Some(entry) = Entry::prepare(&possible) {
            attempt(&entry).unwrap();
        }
        let impossible = Entry { flags: -1, maps: None };
        assert_eq!(attempt(&impossible).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}
