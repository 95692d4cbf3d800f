//! Mounting and unmounting, without ever looking into the mount: what is mounted is read from the
//! kernel's list.
//!
//! Root mounts with `mount(2)` for whoever serves; an ordinary user mounts through `fusermount3`.

use std::ffi::{CString, OsStr, OsString};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

const DEVICE: &str = "/dev/fuse";
/// As `/proc/self/mountinfo` shows our mounts.
const TYPE: &str = "fuse.pgthaw";
const HELPERS: [&str; 3] = ["fusermount3", "/usr/bin/fusermount3", "/bin/fusermount3"];

/// Why a file system was not mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// This kernel or container has no FUSE.
    #[error("there is no {DEVICE}")]
    NoDevice,
    /// The device is there, but not for this user.
    #[error("no permission to open {DEVICE}")]
    DeviceDenied,
    /// The device cannot be opened.
    #[error("open {DEVICE}")]
    Device(#[source] io::Error),
    /// An ordinary user needs the helper.
    #[error("there is no `fusermount3`")]
    NoHelper,
    /// The helper cannot be started.
    #[error("start `fusermount3`")]
    Helper(#[source] io::Error),
    /// The helper says no.
    #[error("`fusermount3` did not mount `{}`: {message}", mountpoint.display())]
    HelperRefused {
        /// Where it should have mounted.
        mountpoint: PathBuf,
        /// What it said.
        message: String,
    },
    /// The kernel says no.
    #[error("mount `{}`", mountpoint.display())]
    Mount {
        /// Where it should have mounted.
        mountpoint: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl MountError {
    /// Returns what the operator can do about it; printed under the error as `hint: …`.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NoDevice | Self::Device(_) => {
                "load the kernel module with `modprobe fuse`; a container needs `--device /dev/fuse`"
            }
            Self::DeviceDenied => {
                "install the package fuse3, whose udev rule opens the device to all, or `chmod 0666 /dev/fuse`"
            }
            Self::NoHelper => "install the package fuse3",
            Self::Helper(_) => "look whether `fusermount3` can be run",
            Self::HelperRefused { .. } => {
                "`fusermount3` must be setuid root, and the directory must be yours"
            }
            Self::Mount { .. } => {
                "mounting needs root with CAP_SYS_ADMIN, and an existing directory"
            }
        }
    }
}

impl From<MountError> for io::Error {
    fn from(error: MountError) -> Self {
        let kind = match &error {
            MountError::NoDevice | MountError::NoHelper => io::ErrorKind::NotFound,
            MountError::DeviceDenied => io::ErrorKind::PermissionDenied,
            MountError::Device(source)
            | MountError::Helper(source)
            | MountError::Mount { source, .. } => source.kind(),
            MountError::HelperRefused { .. } => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

/// Mounts on `mountpoint` with root's rights, for all users (the kernel checks owner and mode of
/// each file), and returns the device, to be passed to [`crate::serve`] in whatever process. Until
/// it is served every access waits.
///
/// # Errors
/// [`MountError`] if the device cannot be opened or the kernel refuses.
pub fn mount_as_root(mountpoint: &Path) -> Result<OwnedFd, MountError> {
    let device = open_device()?;
    let source = mount_source(mountpoint);
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        device.as_raw_fd()
    );
    let options = CString::new(options).map_err(|err| MountError::Device(err.into()))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOATIME;
    let refused =
        |err: Errno| MountError::Mount { mountpoint: mountpoint.into(), source: err.into() };
    rustix::mount::mount(&source, mountpoint, TYPE, flags, options.as_c_str()).map_err(refused)?;
    Ok(device)
}

/// Mounts on `mountpoint`, a directory of this user, through `fusermount3`; only this user can
/// enter the mount. Returns the device as [`mount_as_root`] does.
///
/// # Errors
/// [`MountError`] if there is no FUSE device for this user or no helper, or if the helper refuses.
pub fn mount_as_user(mountpoint: &Path) -> Result<OwnedFd, MountError> {
    drop(open_device()?); // the helper says less clearly what is wrong
    let (ours, theirs) = UnixStream::pair().map_err(MountError::Helper)?;
    let source = mount_source(mountpoint);
    let options =
        format!("fsname={source},subtype=pgthaw,default_permissions,nosuid,nodev,noexec,noatime");
    let theirs = OwnedFd::from(theirs);
    let output = run_helper(|command| {
        // The helper passes the device through its standard input.
        let stdin = theirs.try_clone()?;
        command
            .args(["-o", &options, "--"])
            .arg(mountpoint)
            .env("_FUSE_COMMFD", "0")
            .stdin(Stdio::from(stdin));
        Ok(())
    })?;
    drop(theirs);
    let refused =
        |message: String| MountError::HelperRefused { mountpoint: mountpoint.into(), message };
    if !output.status.success() {
        return Err(refused(said(&output)));
    }
    received_descriptor(&ours).map_err(|err| refused(format!("it passed no device: {err}")))
}

/// Returns what the kernel lists as the source of our mount on `mountpoint`: by it the mount is known wherever else it is
/// mounted, also after it was unmounted there. Only the directory above `mountpoint` is looked at.
pub fn mount_source(mountpoint: &Path) -> String {
    let mountpoint = plain(mountpoint).unwrap_or_else(|_| mountpoint.to_owned());
    let mut source = String::from("pgthaw:");
    for &byte in mountpoint.as_os_str().as_bytes() {
        match byte {
            // Neither the list of mounts nor the helper's options escape these.
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'_' | b'-' => {
                source.push(byte.into());
            }
            _ => source.push_str(&format!("%{byte:02x}")),
        }
    }
    source
}

fn open_device() -> Result<OwnedFd, MountError> {
    rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|err| match err
    {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => MountError::NoDevice,
        Errno::ACCESS | Errno::PERM => MountError::DeviceDenied,
        other => MountError::Device(other.into()),
    })
}

/// Runs `fusermount3` to its end.
fn run_helper(prepare: impl Fn(&mut Command) -> io::Result<()>) -> Result<Output, MountError> {
    for helper in HELPERS {
        let mut command = Command::new(helper);
        command.stdin(Stdio::null());
        prepare(&mut command).map_err(MountError::Helper)?;
        match command.output() {
            Err(err) if err.kind() == io::ErrorKind::NotFound => {}
            other => return other.map_err(MountError::Helper),
        }
    }
    Err(MountError::NoHelper)
}

fn said(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let text = text.trim().trim_start_matches("fusermount3: ");
    if text.is_empty() { output.status.to_string() } else { text.replace('\n', "; ") }
}

fn received_descriptor(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    descriptor.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Unmounts our file system from `mountpoint`; nothing of ours there is fine. `lazily` takes it out
/// of sight also while it is in use. Never looks into the mount, so a dead server does no harm.
///
/// # Errors
/// If it is in use (and not `lazily`), not permitted, or covered by somebody else's mount.
pub fn unmount(mountpoint: &Path, lazily: bool) -> io::Result<()> {
    let mountpoint = plain(mountpoint)?;
    match top_mount(&mountpoint)? {
        Top::Ours => {}
        Top::Nothing => return Ok(()),
        Top::Others(kind) => {
            let text = format!("`{}` holds a mount of type {kind}, not ours", mountpoint.display());
            return Err(io::Error::other(text));
        }
    }
    let lazy = if lazily { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    let result = match rustix::mount::unmount(&mountpoint, UnmountFlags::NOFOLLOW | lazy) {
        Err(Errno::PERM) => unmount_by_helper(&mountpoint, lazily),
        other => other.map_err(io::Error::from),
    };
    match result {
        Err(_) if matches!(top_mount(&mountpoint), Ok(Top::Nothing)) => Ok(()), // somebody else was faster
        other => other.map_err(|err| {
            io::Error::new(err.kind(), format!("unmount `{}`: {err}", mountpoint.display()))
        }),
    }
}

fn unmount_by_helper(mountpoint: &Path, lazily: bool) -> io::Result<()> {
    let output = run_helper(|command| {
        command.arg("-u").args(lazily.then_some("-z")).arg("--").arg(mountpoint);
        Ok(())
    })?;
    if output.status.success() { Ok(()) } else { Err(io::Error::other(said(&output))) }
}

/// Returns whether a file system of ours is mounted on `mountpoint`. Never looks into it.
///
/// # Errors
/// If the kernel's list cannot be read, or the directory that holds `mountpoint` cannot be
/// resolved.
pub fn mounted_at(mountpoint: &Path) -> io::Result<bool> {
    match plain(mountpoint) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(false),
        path => Ok(matches!(top_mount(&path?)?, Top::Ours)),
    }
}

/// Returns `mountpoint` as the kernel lists it; only the directory above is looked at.
fn plain(mountpoint: &Path) -> io::Result<PathBuf> {
    let bad = || {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("`{}` names no directory", mountpoint.display()),
        )
    };
    let name = mountpoint.file_name().ok_or_else(bad)?;
    let above =
        mountpoint.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(above.canonicalize()?.join(name))
}

#[derive(Debug, PartialEq, Eq)]
enum Top {
    Nothing,
    Ours,
    Others(String),
}

fn top_mount(mountpoint: &Path) -> io::Result<Top> {
    Ok(top_in(&std::fs::read("/proc/self/mountinfo")?, mountpoint))
}

/// Finds what lies topmost on `mountpoint` in the kernel's list (proc(5), "/proc/pid/mountinfo").
fn top_in(mountinfo: &[u8], mountpoint: &Path) -> Top {
    let mut top = Top::Nothing;
    for line in mountinfo.split(|byte| *byte == b'\n') {
        let mut fields = line.split(|byte| *byte == b' ');
        let Some(place) = fields.nth(4) else { continue };
        if unescaped(place) != mountpoint.as_os_str() {
            continue;
        }
        let kind = fields.skip_while(|field| *field != b"-").nth(1).unwrap_or_default();
        let kind = OsStr::from_bytes(kind).to_string_lossy();
        top = if kind == TYPE { Top::Ours } else { Top::Others(kind.into_owned()) };
    }
    top
}

/// Undoes the list's octal escapes of space, tab, newline and backslash.
fn unescaped(field: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] => {
                plain.push((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'));
                rest = after;
            }
            _ => {
                plain.push(byte);
                rest = after;
            }
        }
    }
    OsString::from_vec(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_s_source_names_its_place_in_plain_characters() {
        let cases = [
            (
                "/run/media/pgthaw/20260101-000000-abcd",
                "pgthaw:/run/media/pgthaw/20260101-000000-abcd",
            ),
            ("/a b,c\\d/%\u{e9}", "pgthaw:/a%20b%2cc%5cd/%25%c3%a9"),
            ("/usr/../usr/x", "pgthaw:/usr/x"),
        ];
        for (mountpoint, want) in cases {
            assert_eq!(mount_source(Path::new(mountpoint)), want);
        }
    }

    #[test]
    fn reads_the_kernels_list_of_mounts() {
        let list = b"25 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
            30 25 0:50 / /session/a\\040b rw,nosuid shared:3 master:1 - fuse.pgthaw pgthaw rw,user_id=0\n\
            31 25 0:51 / /session/covered rw - fuse.pgthaw pgthaw rw\n\
            32 31 0:52 / /session/covered rw - tmpfs tmpfs rw\n\
            33 25 0:53 / /session/back\\134slash rw - fuse.pgthaw pgthaw rw\n\
            broken line\n";
        let cases = [
            ("/session/a b", Top::Ours),
            ("/session/back\\slash", Top::Ours),
            ("/work", Top::Nothing),
            ("/session/covered", Top::Others("tmpfs".into())),
            ("/", Top::Others("ext4".into())),
        ];
        for (path, want) in cases {
            assert_eq!(top_in(list, Path::new(path)), want, "{path}");
        }
    }
}
