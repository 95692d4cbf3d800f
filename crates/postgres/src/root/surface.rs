//! What of the kernel can be reached from inside a root: a list of refused system calls, and limits.
//!
//! The namespaces are the wall; this keeps code in a backup away from the parts of the kernel that PostgreSQL never
//! asks for and that walls were got through by before: new namespaces and mounts, keys, other processes' memory,
//! programs in the kernel, sockets of hypervisors. Calls that are refused fail as they do for an account without
//! rights, so libraries that try them go on.

use std::io;

/// Processes and threads that may run inside: a fork bomb meets this. An instance has one per connection and a dozen beside.
pub const PROCESSES: u64 = 512;

// Newer calls, which have the same numbers on all architectures (include/uapi/asm-generic/unistd.h).
const STATMOUNT: libc::c_long = 457;
const LISTMOUNT: libc::c_long = 458;
const OPEN_TREE_ATTR: libc::c_long = 467;

/// Calls that only processors of the PC have: its ports, and other kinds of segments.
#[cfg(target_arch = "x86_64")]
const REFUSED_HERE: &[libc::c_long] = &[libc::SYS_iopl, libc::SYS_ioperm, libc::SYS_modify_ldt];
#[cfg(not(target_arch = "x86_64"))]
const REFUSED_HERE: &[libc::c_long] = &[];

/// Calls that answer EPERM. `clone` and `socket` are looked at by their arguments.
#[rustfmt::skip]
const REFUSED: &[libc::c_long] = &[
    // namespaces, mounts, roots
    libc::SYS_unshare, libc::SYS_setns, libc::SYS_mount, libc::SYS_umount2, libc::SYS_pivot_root, libc::SYS_chroot,
    libc::SYS_open_tree, libc::SYS_move_mount, libc::SYS_fsopen, libc::SYS_fsconfig, libc::SYS_fsmount,
    libc::SYS_fspick, libc::SYS_mount_setattr, libc::SYS_open_by_handle_at, libc::SYS_name_to_handle_at,
    libc::SYS_fanotify_init, libc::SYS_quotactl, libc::SYS_quotactl_fd,
    // keys
    libc::SYS_add_key, libc::SYS_request_key, libc::SYS_keyctl,
    // other processes
    libc::SYS_ptrace, libc::SYS_process_vm_readv, libc::SYS_process_vm_writev, libc::SYS_kcmp,
    libc::SYS_pidfd_getfd, libc::SYS_process_madvise,
    // programs and observers in the kernel, user-space paging
    libc::SYS_bpf, libc::SYS_perf_event_open, libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register,
    // the machine
    libc::SYS_acct, libc::SYS_swapon, libc::SYS_swapoff, libc::SYS_reboot, libc::SYS_kexec_load,
    libc::SYS_init_module, libc::SYS_finit_module, libc::SYS_delete_module, libc::SYS_syslog,
    libc::SYS_kexec_file_load, libc::SYS_lookup_dcookie, libc::SYS_migrate_pages,
    STATMOUNT, LISTMOUNT, OPEN_TREE_ATTR,
    libc::SYS_settimeofday, libc::SYS_clock_settime, libc::SYS_clock_adjtime, libc::SYS_adjtimex,
    libc::SYS_sethostname, libc::SYS_setdomainname, libc::SYS_vhangup, libc::SYS_personality,
];

/// Families of sockets that exist inside; others reach hypervisors, radios and ciphers of the kernel.
const FAMILIES: [libc::c_int; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// Flags of `clone(2)` that make a namespace.
const NEW_NAMESPACE: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u32;

// `struct seccomp_data` (linux/seccomp.h): number, architecture, instruction pointer, six arguments of 64 bits.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// The low half of the first argument; both machines that pgthaw is built for are little-endian.
const FIRST_ARGUMENT: u32 = 16;
/// The lower half of the second one.
const SECOND_ARGUMENT: u32 = 24;

/// `AUDIT_ARCH_…` of linux/audit.h.
#[cfg(target_arch = "x86_64")]
const OURS: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
const OURS: u32 = 0xC000_00B7;
/// Calls of the x32 ABI carry this bit (asm/unistd.h); no other architecture has numbers as large.
const OTHER_ABI: u32 = 0x4000_0000;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const ANY_BIT: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

fn statement(code: u16, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: 0, jf: 0, k }
}

/// A comparison: the next `skip` statements are left out unless it holds.
fn unless(code: u16, k: u32, skip: u8) -> libc::sock_filter {
    libc::sock_filter { code, jt: 0, jf: skip, k }
}

fn refuse(errno: libc::c_int) -> libc::sock_filter {
    statement(RETURN, libc::SECCOMP_RET_ERRNO | errno.cast_unsigned())
}

/// Returns the program that judges each system call (`bpf(4)` in its classic form, see `seccomp(2)`).
fn filter() -> Vec<libc::sock_filter> {
    let allow = statement(RETURN, libc::SECCOMP_RET_ALLOW);
    let number = |call: libc::c_long| u32::try_from(call).unwrap_or(u32::MAX);
    let mut program = vec![
        statement(LOAD, ARCHITECTURE),
        libc::sock_filter { code: EQUAL, jt: 1, jf: 0, k: OURS },
        refuse(libc::EPERM), // calls of another architecture (32 bits) have other numbers
        statement(LOAD, NUMBER),
        unless(AT_LEAST, OTHER_ABI, 1),
        refuse(libc::EPERM),
    ];
    for call in REFUSED.iter().chain(REFUSED_HERE) {
        program.extend([unless(EQUAL, number(*call), 1), refuse(libc::EPERM)]);
    }
    // its flags lie in memory, where they cannot be judged: the C library goes on with `clone`
    program.extend([unless(EQUAL, number(libc::SYS_clone3), 1), refuse(libc::ENOSYS)]);
    program.extend([
        unless(EQUAL, number(libc::SYS_clone), 4),
        statement(LOAD, FIRST_ARGUMENT),
        unless(ANY_BIT, NEW_NAMESPACE, 1),
        refuse(libc::EPERM),
        allow,
    ]);
    // Room beyond the end of a file (FALLOC_FL_KEEP_SIZE) is seen by nobody who looks at its length: the server's log lies on the
    // host's disk. PostgreSQL and the C library's posix_fallocate use mode 0.
    program.extend([
        unless(EQUAL, number(libc::SYS_fallocate), 4),
        statement(LOAD, SECOND_ARGUMENT),
        unless(EQUAL, 0, 1),
        allow,
        refuse(libc::EOPNOTSUPP),
    ]);
    let families = u8::try_from(FAMILIES.len()).unwrap_or(u8::MAX);
    for call in [libc::SYS_socket, libc::SYS_socketpair] {
        program
            .extend([unless(EQUAL, number(call), 3 + families), statement(LOAD, FIRST_ARGUMENT)]);
        for (family, left) in FAMILIES.iter().zip((0..families).rev()) {
            let family = family.cast_unsigned();
            program.push(libc::sock_filter { code: EQUAL, jt: left + 1, jf: 0, k: family });
        }
        program.extend([refuse(libc::EAFNOSUPPORT), allow]);
    }
    program.push(allow);
    program
}

/// Refuses the calls of this list to the calling thread and everything it starts, for ever. `no_new_privs` must be set.
///
/// # Errors
/// If the kernel has no seccomp filters.
pub fn refuse_calls() -> io::Result<()> {
    let mut program = filter();
    let length = libc::c_ushort::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    // SAFETY: a system call on a structure and an array that live until it returns; the kernel copies them.
    let done = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Limits the calling process and everything it starts: [`PROCESSES`] beyond the `running` ones that the kernel counts
/// together with them, and no core dumps, which would hold rows of the backup.
///
/// # Errors
/// If the kernel refuses a lower limit, which it never does.
pub fn limit(running: u64) -> io::Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let to = |value: u64| Rlimit { current: Some(value), maximum: Some(value) };
    let most = getrlimit(Resource::Nproc).maximum.unwrap_or(u64::MAX);
    setrlimit(Resource::Nproc, to(most.min(running.saturating_add(PROCESSES))))?;
    setrlimit(Resource::Core, to(0))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program on a call, as the kernel would.
    fn judge(architecture: u32, number: u32, first: u32) -> u32 {
        let (program, mut at, mut value) = (filter(), 0, 0);
        loop {
            let step = &program[at];
            at += 1;
            match step.code {
                LOAD => {
                    value = match step.k {
                        NUMBER => number,
                        ARCHITECTURE => architecture,
                        _ => first,
                    }
                }
                RETURN => return step.k,
                code => {
                    let holds = match code {
                        EQUAL => value == step.k,
                        AT_LEAST => value >= step.k,
                        _ => value & step.k != 0,
                    };
                    at += usize::from(if holds { step.jt } else { step.jf });
                }
            }
        }
    }

    #[test]
    fn each_call_is_judged() {
        let number = |call: libc::c_long| u32::try_from(call).unwrap();
        let allowed = libc::SECCOMP_RET_ALLOW;
        let refused = |errno: libc::c_int| libc::SECCOMP_RET_ERRNO | errno.cast_unsigned();
        let cases = [
            (libc::SYS_read, 0, allowed),
            (libc::SYS_openat, 0, allowed),
            (libc::SYS_execve, 0, allowed),
            (libc::SYS_mount, 0, refused(libc::EPERM)),
            (libc::SYS_personality, 0, refused(libc::EPERM)),
            (libc::SYS_clone3, 0, refused(libc::ENOSYS)),
            (libc::SYS_fallocate, 0, allowed),
            (libc::SYS_fallocate, libc::FALLOC_FL_KEEP_SIZE, refused(libc::EOPNOTSUPP)),
            (libc::SYS_clone, libc::SIGCHLD, allowed),
            (libc::SYS_clone, libc::CLONE_NEWUSER | libc::SIGCHLD, refused(libc::EPERM)),
            (libc::SYS_clone, libc::CLONE_NEWNS, refused(libc::EPERM)),
            (libc::SYS_socket, libc::AF_UNIX, allowed),
            (libc::SYS_socket, libc::AF_INET, allowed),
            (libc::SYS_socket, libc::AF_INET6, allowed),
            (libc::SYS_socket, libc::AF_NETLINK, allowed),
            (libc::SYS_socket, libc::AF_VSOCK, refused(libc::EAFNOSUPPORT)),
            (libc::SYS_socket, libc::AF_ALG, refused(libc::EAFNOSUPPORT)),
            (libc::SYS_socketpair, libc::AF_UNIX, allowed),
            (libc::SYS_socketpair, libc::AF_ALG, refused(libc::EAFNOSUPPORT)),
        ];
        for (call, first, want) in cases {
            assert_eq!(judge(OURS, number(call), first.cast_unsigned()), want, "{call} {first}");
        }
        for call in REFUSED {
            assert_eq!(judge(OURS, number(*call), 0), refused(libc::EPERM), "{call}");
        }
        assert_eq!(judge(0x4000_0003, 0, 0), refused(libc::EPERM), "32 bits");
        assert_eq!(judge(OURS, OTHER_ABI | 1, 0), refused(libc::EPERM), "x32");
    }
}
