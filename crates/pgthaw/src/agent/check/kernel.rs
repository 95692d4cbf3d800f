//! Whether this machine's kernel has the system calls that processes and directories of a session are handled with.

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, getpid, pidfd_open};

use crate::wire::CheckReport;

/// What is known of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// Its release, as `uname -r` prints it.
    pub release: String,
    /// The system calls that it does not have, or that a container's seccomp filter keeps from us.
    pub lacks: Vec<&'static str>,
}

impl Kernel {
    /// Tries the newest system calls that are needed: `pidfd_open` came with Linux 5.3, `openat2` with 5.6.
    pub fn look() -> Self {
        let (flags, resolve) = (OFlags::PATH | OFlags::CLOEXEC, ResolveFlags::NO_SYMLINKS);
        let tried = [
            ("openat2", openat2(CWD, "/", flags, Mode::empty(), resolve)),
            ("pidfd_open", pidfd_open(getpid(), PidfdFlags::empty())),
        ];
        let lacking = |tried: &rustix::io::Result<_>| {
            matches!(tried, Err(Errno::NOSYS | Errno::PERM)) // older filters of containers say EPERM
        };
        let lacks = tried.iter().filter(|(_, tried)| lacking(tried)).map(|(name, _)| *name);
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        Self { lacks: lacks.collect(), release }
    }
}

/// Says what the kernel lacks.
pub fn judge(report: &mut CheckReport, kernel: &Kernel) {
    if kernel.lacks.is_empty() {
        return;
    }
    let text =
        format!("the kernel, Linux {}, lacks {}", kernel.release, kernel.lacks.join(" and "));
    let remedy = "Linux 5.6 or newer is needed; in a container, let its seccomp filter pass them";
    report.error(text, Some(remedy.into()));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets these system calls of the calling thread fail as on a kernel that does not have them (seccomp(2)).
    fn without(calls: &[libc::c_long]) {
        use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
        let line = |code: u32, matches: u8, value: u32| libc::sock_filter {
            code: u16::try_from(code).unwrap(),
            jt: 0,
            jf: matches,
            k: value,
        };
        let mut program = vec![line(BPF_LD | BPF_W | BPF_ABS, 0, 0)]; // the number of the call
        for call in calls {
            program.push(line(BPF_JMP | BPF_JEQ | BPF_K, 1, u32::try_from(*call).unwrap()));
            let errno = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs();
            program.push(line(BPF_RET | BPF_K, 0, errno));
        }
        program.push(line(BPF_RET | BPF_K, 0, libc::SECCOMP_RET_ALLOW));
        let filter = libc::sock_fprog {
            len: u16::try_from(program.len()).unwrap(),
            filter: program.as_mut_ptr(),
        };
        // SAFETY: the filter and what it points to live through the call, which copies them.
        let done = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter)
        };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }

    #[test]
    fn what_a_kernel_lacks_is_found() {
        let looked = |calls: &'static [libc::c_long]| {
            let looking = move || {
                without(calls);
                Kernel::look()
            };
            std::thread::spawn(looking).join().unwrap().lacks
        };
        assert!(looked(&[]).is_empty());
        assert_eq!(looked(&[libc::SYS_openat2]), ["openat2"]);
        let both = &[libc::SYS_openat2, libc::SYS_pidfd_open];
        assert_eq!(looked(both), ["openat2", "pidfd_open"]);
    }
}
