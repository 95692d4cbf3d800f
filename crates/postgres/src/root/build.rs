//! Builds a root in the mount namespace of the calling process, and makes it the process' root.
//!
//! What is to be shown is opened first, as detached copies of mounts; then an empty file system becomes the root and the
//! old one is let go of; then everything is put in its place. So no path is ever looked up in the old root once
//! anything was made, and nothing of the old root can be reached at the end.

use std::ffi::{CStr, CString, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};

use super::layout::{Access, Step};

/// Directories that an empty file system may be put on for a moment; one of them is on every Linux.
const STAGING: [&str; 4] = ["/tmp", "/mnt", "/run", "/var"];
/// The most that the root itself holds: directories, links and a few small files.
const ROOT_BYTES: &str = "4m";

/// What could not be done, on which object.
#[derive(Debug)]
pub struct BuildError {
    /// For people: `mount an empty file system on `/tmp``.
    pub what: String,
    /// What failed.
    pub source: io::Error,
}

impl std::fmt::Display for BuildError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.what, self.source)
    }
}

fn failed<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> BuildError {
    let what = what.into();
    move |source| BuildError { what, source: source.into() }
}

/// Builds the root that `steps` describe and makes it the root of this process, which must be alone in its mount
/// namespace and have the right to mount there.
///
/// # Errors
/// What could not be done; the process can only end then.
pub fn build(steps: &[Step]) -> Result<(), BuildError> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).map_err(failed("make all mounts private"))?;
    let opened = steps.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    // The old root's /proc: the new root may have none. Each look at it opens the list of mounts anew, because a list that is
    // open belongs to the root of then.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let proc = rustix::fs::open("/proc", flags, Mode::empty()).map_err(failed("open `/proc`"))?;
    become_empty()?;
    // Whatever umask we have: the account inside must get through to its own.
    let umask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    for (step, source) in steps.iter().zip(&opened) {
        make(step, source.as_ref().map(|source| &source.tree))?;
        if let (Step::Bind { path, access, .. }, Some(Opened { restricted: false, .. })) =
            (step, source)
        {
            remount(&proc, path, forbidden(*access))
                .map_err(failed(format!("restrict what may be done in `{}`", path.display())))?;
        }
    }
    for step in steps {
        if let Step::Temporary { path, writable: false, .. } = step {
            let flags = MountFlags::BIND | flags_of(forbidden(Access::Run));
            rustix::mount::mount_remount(path, flags, "")
                .map_err(failed(format!("make `{}` read-only", path.display())))?;
        }
    }
    rustix::process::umask(umask);
    let read_only = forbidden(Access::Read);
    let done = match set_attributes(CWD.as_raw_fd(), c"/", 0, read_only) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
            let flags = MountFlags::BIND | flags_of(read_only);
            rustix::mount::mount_remount("/", flags, "").map_err(Into::into)
        }
        done => done,
    };
    done.map_err(failed("make the root read-only"))
}

/// What a step shows, detached from everything.
struct Opened {
    tree: OwnedFd,
    /// What may be done there is limited already; before Linux 5.12 that has to wait until it is in its place.
    restricted: bool,
}

/// Opens what a step shows, while it can still be found.
fn open(step: &Step) -> Result<Option<Opened>, BuildError> {
    match step {
        Step::Bind { source, access, .. } => {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_RECURSIVE;
            let tree = rustix::mount::open_tree(CWD, source, flags)
                .map_err(failed(format!("open `{}`", source.display())))?;
            let recursive = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
            match set_attributes(tree.as_raw_fd(), c"", recursive, forbidden(*access)) {
                Ok(()) => Ok(Some(Opened { tree, restricted: true })),
                Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
                    Ok(Some(Opened { tree, restricted: false }))
                }
                Err(error) => {
                    let what = format!("restrict what may be done in `{}`", source.display());
                    Err(BuildError { what, source: error })
                }
            }
        }
        Step::Processes(_) => Ok(processes().map(|tree| Opened { tree, restricted: true })),
        _ => Ok(None),
    }
}

/// Mounts the processes of our namespace, detached; nothing where the kernel refuses: in containers that hide parts of
/// `/proc` it does, and PostgreSQL needs none.
fn processes() -> Option<OwnedFd> {
    let mounted = |processes_only: bool| {
        let context = rustix::mount::fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
        if processes_only {
            rustix::mount::fsconfig_set_string(&context, "subset", "pid")?;
        }
        rustix::mount::fsconfig_create(&context)?;
        // Read-only: an ordinary user's process could lower its own `oom_score_adj` again.
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    // before Linux 5.8 there is only the whole of it
    mounted(true).or_else(|_: Errno| mounted(false)).ok()
}

/// Makes an empty file system the root and lets go of the old one.
fn become_empty() -> Result<(), BuildError> {
    let staging = STAGING.iter().find(|path| Path::new(path).is_dir()).unwrap_or(&"/tmp");
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let options = CString::new(format!("size={ROOT_BYTES},nr_inodes=16384,mode=0755"))
        .map_err(failed("name the options of a file system"))?;
    let what = format!("mount an empty file system on `{staging}` in a namespace of its own");
    rustix::mount::mount("pgthaw-root", *staging, "tmpfs", flags, options.as_c_str())
        .map_err(failed(what))?;
    rustix::process::chdir(*staging).map_err(failed(format!("enter `{staging}`")))?;
    // The old root comes to lie over the new one, and is taken away from there (pivot_root(2), "pivot_root(".", ".")").
    rustix::process::pivot_root(".", ".").map_err(failed("change the root (pivot_root)"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(failed("let go of the old root"))?;
    rustix::process::chdir("/").map_err(failed("enter the new root"))
}

fn make(step: &Step, source: Option<&OwnedFd>) -> Result<(), BuildError> {
    let path = step.path();
    let making = |what: &str| failed(format!("make {what} `{}` in the new root", path.display()));
    match step {
        Step::Directory(path) => directory(path).map_err(making("the directory")),
        Step::Bind { directory: is_directory, exists, .. } => {
            if !exists {
                if *is_directory { directory(path) } else { file(path, b"") }
                    .map_err(making("a place for"))?;
            }
            attach(source, path).map_err(making("visible"))
        }
        Step::Temporary { bytes, files, mode, exists, .. } => {
            if !exists {
                directory(path).map_err(making("the directory"))?;
            }
            temporary(path, *bytes, *files, *mode).map_err(making("a file system in memory on"))
        }
        Step::Link { to, .. } => {
            above(path).and_then(|()| symlink(to, path)).map_err(making("the link"))
        }
        Step::File { content, .. } => file(path, content).map_err(making("the file")),
        Step::Processes(path) => match source {
            Some(_) => {
                directory(path).and_then(|()| attach(source, path)).map_err(making("visible"))
            }
            None => Ok(()),
        },
    }
}

fn directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o755).create(path)
}

fn above(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), directory)
}

fn file(path: &Path, content: &[u8]) -> io::Result<()> {
    above(path)?;
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o644).open(path)?;
    io::Write::write_all(&mut file, content)
}

fn temporary(path: &Path, bytes: u64, files: u64, mode: u32) -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let options = CString::new(format!("size={bytes},nr_inodes={files},mode={mode:o}"))?;
    Ok(rustix::mount::mount("pgthaw-tmp", path, "tmpfs", flags, options.as_c_str())?)
}

/// Puts a detached mount in its place.
fn attach(source: Option<&OwnedFd>, path: &Path) -> io::Result<()> {
    let source = source.ok_or(io::ErrorKind::NotFound)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(rustix::mount::move_mount(source, "", CWD, path, flags)?)
}

/// What a mount with `access` forbids.
fn forbidden(access: Access) -> MountAttrFlags {
    let (read_only, no_devices, no_programs) = (
        MountAttrFlags::MOUNT_ATTR_RDONLY,
        MountAttrFlags::MOUNT_ATTR_NODEV,
        MountAttrFlags::MOUNT_ATTR_NOEXEC,
    );
    let always = MountAttrFlags::MOUNT_ATTR_NOSUID;
    match access {
        Access::Run => always | read_only | no_devices,
        Access::Read => always | read_only | no_devices | no_programs,
        Access::Write => always | no_devices | no_programs,
        Access::Device => always | no_programs,
    }
}

/// Sets what a mount forbids (`mount_setattr(2)`, since Linux 5.12), and that it is nobody else's.
fn set_attributes(
    directory: i32,
    path: &CStr,
    flags: libc::c_int,
    forbidden: MountAttrFlags,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: forbidden.bits().into(),
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: a system call on a string and a structure that live until it returns; the size is the structure's.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            directory,
            path.as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The same for older kernels: each mount at or below `path` by itself, because a `bind,remount,ro` of the uppermost one
/// leaves those below it writable.
fn remount(proc: &OwnedFd, path: &Path, forbidden: MountAttrFlags) -> io::Result<()> {
    let (mut text, flags) = (Vec::new(), OFlags::RDONLY | OFlags::CLOEXEC);
    let mounts = rustix::fs::openat(proc, "self/mountinfo", flags, Mode::empty())?;
    File::from(mounts).read_to_end(&mut text)?;
    let mut found = false;
    for (at, flags) in text.split(|byte| *byte == b'\n').filter_map(mounted) {
        if at.starts_with(path) {
            let flags = MountFlags::BIND | flags | flags_of(forbidden);
            rustix::mount::mount_remount(&at, flags, "")?;
            found |= at == path;
        }
    }
    match found {
        true => Ok(()),
        // nothing was restricted: the program must not run there
        false => Err(io::Error::other("the kernel does not list it among the mounts")),
    }
}

/// Reads a line of `/proc/PID/mountinfo` (proc(5)): the mountpoint, and the flags that a remount must not drop.
fn mounted(line: &[u8]) -> Option<(PathBuf, MountFlags)> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let (at, options) = (fields.get(4)?, fields.get(5)?);
    let flag = |option: &[u8]| match option {
        b"ro" => MountFlags::RDONLY,
        b"nosuid" => MountFlags::NOSUID,
        b"nodev" => MountFlags::NODEV,
        b"noexec" => MountFlags::NOEXEC,
        b"noatime" => MountFlags::NOATIME,
        b"nodiratime" => MountFlags::NODIRATIME,
        b"relatime" => MountFlags::RELATIME,
        _ => MountFlags::empty(),
    };
    let flags = options.split(|byte| *byte == b',').map(flag).collect();
    Some((PathBuf::from(OsString::from_vec(unescaped(at))), flags))
}

/// Undoes mountinfo's escapes: a space is `\040`.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let (mut bytes, mut at) = (Vec::new(), 0);
    while let Some(&byte) = text.get(at) {
        let digits = text.get(at + 1..at + 4).filter(|_| byte == b'\\');
        let number = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        match number.and_then(|number| u8::from_str_radix(number, 8).ok()) {
            Some(escaped) => {
                bytes.push(escaped);
                at += 4;
            }
            None => {
                bytes.push(byte);
                at += 1;
            }
        }
    }
    bytes
}

fn flags_of(forbidden: MountAttrFlags) -> MountFlags {
    let pairs = [
        (MountAttrFlags::MOUNT_ATTR_RDONLY, MountFlags::RDONLY),
        (MountAttrFlags::MOUNT_ATTR_NOSUID, MountFlags::NOSUID),
        (MountAttrFlags::MOUNT_ATTR_NODEV, MountFlags::NODEV),
        (MountAttrFlags::MOUNT_ATTR_NOEXEC, MountFlags::NOEXEC),
    ];
    pairs.into_iter().filter(|(set, _)| forbidden.contains(*set)).map(|(_, flag)| flag).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_mountpoints_and_what_a_remount_keeps() {
        let line = b"36 35 98:0 /mnt1 /mnt/a\\040b rw,nosuid,noatime master:1 - ext3 /dev/root rw";
        let want = (PathBuf::from("/mnt/a b"), MountFlags::NOSUID | MountFlags::NOATIME);
        assert_eq!(mounted(line), Some(want));
        assert_eq!(mounted(b""), None);
        assert_eq!(unescaped(br"a\134b\9"), br"a\b\9");
    }

    #[test]
    fn nothing_keeps_set_user_id_bits_and_only_devices_are_devices() {
        for access in [Access::Run, Access::Read, Access::Write, Access::Device] {
            let flags = flags_of(forbidden(access));
            assert!(flags.contains(MountFlags::NOSUID));
            assert_eq!(flags.contains(MountFlags::NODEV), access != Access::Device, "{access:?}");
            assert_eq!(flags.contains(MountFlags::NOEXEC), access != Access::Run, "{access:?}");
        }
    }
}
