//! A session's mount, looked up in `/proc/self/mountinfo` only: nothing here stats, opens or lists below a mountpoint.

use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::UnmountFlags;

/// The type of pgthaw's mounts.
pub const OWN_TYPE: &str = "fuse.pgthaw";

/// Mounts stacked on one another higher than this are not taken down.
const HIGHEST_STACK: usize = 100;

/// A mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Minor number of its device, which names a FUSE connection.
    pub device_minor: u32,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// Its type, such as [`OWN_TYPE`].
    pub kind: String,
}

/// Returns the file systems that are mounted at `path` or below it, lowest first.
///
/// Links in the directories above `path` are followed; `path` itself is not looked at.
///
/// # Errors
/// `/proc/self/mountinfo` cannot be read.
pub fn at_or_below(path: &Path) -> io::Result<Vec<Mount>> {
    let path = with_resolved_parent(path);
    let mut mounts = parse_mountinfo(&fs::read("/proc/self/mountinfo")?);
    mounts.retain(|mount| mount.mountpoint.starts_with(&path));
    Ok(mounts)
}

/// Takes down pgthaw's own mounts at `path` or below, without waiting for anybody who uses them; requests that wait for
/// a daemon's answer end with an error first. Returns whether something was mounted.
///
/// # Errors
/// Something stays mounted, or is not pgthaw's.
pub fn unmount_all(path: &Path) -> io::Result<bool> {
    let mut was_mounted = false;
    for _ in 0..HIGHEST_STACK {
        let mounts = at_or_below(path)?;
        let Some(top) = mounts.last() else { return Ok(was_mounted) };
        if top.kind != OWN_TYPE {
            let (mountpoint, kind) = (top.mountpoint.display(), &top.kind);
            let text =
                format!("leave `{mountpoint}` alone: its file system, {kind}, is not pgthaw's");
            return Err(io::Error::other(text));
        }
        was_mounted = true;
        abort(top);
        if let Err(error) = unmount(&top.mountpoint)
            && at_or_below(path)?.len() >= mounts.len()
        {
            let text = format!("unmount `{}`: {error}", top.mountpoint.display());
            return Err(io::Error::new(error.kind(), text));
        }
    }
    Err(io::Error::other(format!("`{}` is mounted again and again", path.display())))
}

/// Ends all requests that wait for the daemon of `mount`, where fusectl is mounted and we may; unmounting by force does
/// the same, but only root can.
fn abort(mount: &Mount) {
    let control = format!("/sys/fs/fuse/connections/{}/abort", mount.device_minor);
    if let Err(error) = fs::write(&control, "1") {
        tracing::debug!("cannot write `{control}`: {error}");
    }
}

/// Unmounts by force, and lazily: at once out of sight, in truth when nobody uses it any more.
fn unmount(mountpoint: &Path) -> io::Result<()> {
    let flags = UnmountFlags::DETACH | UnmountFlags::FORCE | UnmountFlags::NOFOLLOW;
    match rustix::mount::unmount(mountpoint, flags) {
        Err(Errno::PERM) => pgthaw_mountfs::unmount(mountpoint, true), // an ordinary user's, without force
        other => Ok(other?),
    }
}

/// Resolves links above `path`, but leaves alone its last part, which may be a mount that does not answer.
fn with_resolved_parent(path: &Path) -> PathBuf {
    match (path.parent().map(Path::canonicalize), path.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => path.into(),
    }
}

/// Reads `/proc/self/mountinfo`; lines that are none are left out. See proc(5).
fn parse_mountinfo(text: &[u8]) -> Vec<Mount> {
    let lines = text.split(|&byte| byte == b'\n');
    lines.filter_map(parse_mountinfo_line).collect()
}

/// `36 35 98:0 /root /mountpoint options [optional fields] - type source super-options`
fn parse_mountinfo_line(line: &[u8]) -> Option<Mount> {
    let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
    let end_of_optional = fields.iter().skip(6).position(|&field| field == b"-")? + 6;
    let device = std::str::from_utf8(fields.get(2)?).ok()?;
    Some(Mount {
        device_minor: device.split_once(':')?.1.parse().ok()?,
        mountpoint: PathBuf::from(OsString::from_vec(unescape(fields.get(4)?))),
        kind: String::from_utf8_lossy(fields.get(end_of_optional + 1)?).into(),
    })
}

/// Undoes the kernel's escapes: a blank, tab, newline or backslash is written as `\` and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let escaped = after.first_chunk::<3>().filter(|_| first == b'\\');
        let value = escaped.and_then(|digits| std::str::from_utf8(digits).ok());
        match value.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(byte);
                rest = &after[3..];
            }
            None => {
                plain.push(first);
                rest = after;
            }
        }
    }
    plain
}

/// Removes the directory `path`, which was made for a mount. Returns whether it was there.
///
/// # Errors
/// Something is mounted there, or it is not an empty directory ([`ErrorKind::DirectoryNotEmpty`]).
pub fn remove_empty_directory(path: &Path) -> io::Result<bool> {
    let named = |error: io::Error| {
        io::Error::new(error.kind(), format!("remove the directory `{}`: {error}", path.display()))
    };
    if is_mountpoint(path)? {
        return Err(named(io::Error::other("a file system is mounted there")));
    }
    match fs::remove_dir(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(named(error)),
    }
}

/// Returns whether [`remove_empty_directory`] would remove `path`; what is mounted there is not looked at.
///
/// # Errors
/// It cannot be read.
pub fn is_empty_directory(path: &Path) -> io::Result<bool> {
    if is_mountpoint(path)? {
        return Ok(false);
    }
    match fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(false)
        }
        Err(error) => {
            Err(io::Error::new(error.kind(), format!("look at `{}`: {error}", path.display())))
        }
    }
}

fn is_mountpoint(path: &Path) -> io::Result<bool> {
    let resolved = with_resolved_parent(path);
    Ok(at_or_below(path)?.iter().any(|mount| mount.mountpoint == resolved))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_mountinfo() {
        let text = b"22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n\
            90 22 0:57 / /run/media/pgthaw/a rw,nosuid - fuse.pgthaw pgthaw rw,user_id=0\n\
            91 22 0:58 / /with\\040blank\\134 rw shared:7 master:1 - fuse x rw\n\
            garbage\n92 22 0:x / /bad rw - tmpfs x rw\n93 22 0:1 / /short rw\n";
        let mounts = parse_mountinfo(text);
        let points: Vec<_> = mounts.iter().map(|m| m.mountpoint.to_str().unwrap()).collect();
        assert_eq!(points, ["/", "/run/media/pgthaw/a", "/with blank\\"]);
        assert_eq!((mounts[1].device_minor, mounts[1].kind.as_str()), (57, "fuse.pgthaw"));
    }

    #[test]
    fn undoes_escapes() {
        let cases: [(&[u8], &[u8]); 5] = [
            (b"plain", b"plain"),
            (b"a\\040b\\011c\\012d\\134e", b"a b\tc\nd\\e"),
            (b"\\04", b"\\04"),
            (b"\\999", b"\\999"),
            (b"\\", b"\\"),
        ];
        for (escaped, want) in cases {
            assert_eq!(unescape(escaped), want, "{}", escaped.escape_ascii());
        }
    }

    #[test]
    fn removes_only_empty_directories() {
        let scratch = tempfile::tempdir().unwrap();
        let (outer, inner) = (scratch.path().join("outer"), scratch.path().join("outer/inner"));
        fs::create_dir_all(&inner).unwrap();
        assert!(!is_empty_directory(&outer).unwrap());
        assert_eq!(
            remove_empty_directory(&outer).unwrap_err().kind(),
            ErrorKind::DirectoryNotEmpty
        );
        assert!(is_empty_directory(&inner).unwrap() && remove_empty_directory(&inner).unwrap());
        assert!(is_empty_directory(&outer).unwrap() && remove_empty_directory(&outer).unwrap());
        assert!(!is_empty_directory(&outer).unwrap() && !remove_empty_directory(&outer).unwrap());
        fs::write(&outer, "").unwrap();
        assert!(remove_empty_directory(&outer).is_err(), "a file");
    }
}
