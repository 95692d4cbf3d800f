//! A session's mount, looked up in `/proc/PID/mountinfo` only: nothing here stats, opens or lists below a mountpoint.
//!
//! A mount lives as long as any mount namespace holds it, so those of all other processes are looked at too. Elsewhere it is
//! known by its source, by its device, or by its mountpoint.

use std::collections::BTreeSet;
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
    /// Its number, which no other mount of the machine has.
    id: u64,
    /// Minor number of its device, which names a FUSE connection.
    pub device_minor: u32,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// Its type, such as [`OWN_TYPE`].
    pub kind: String,
    /// What was mounted, as whoever mounted it calls it.
    source: String,
    /// Peer groups that hear of what is unmounted here, and those that this one hears of.
    shared: Option<u64>,
    master: Option<u64>,
}

/// A session's mount that the calling process does not see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountElsewhere {
    /// The mount, with its mountpoint as the holders see it.
    pub mount: Mount,
    /// Ids of the processes in whose mount namespace it is, ascending.
    pub holders: Vec<u32>,
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

/// Returns the session's mounts, of which `mountpoint` is the place, in mount namespaces other than the caller's. Processes that
/// cannot be looked at are passed over, and so are mounts that go when the caller's own is unmounted.
///
/// # Errors
/// `/proc` cannot be read.
pub fn elsewhere(mountpoint: &Path) -> io::Result<Vec<MountElsewhere>> {
    let own = parse_mountinfo(&fs::read("/proc/self/mountinfo")?);
    let mut others = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        let list = fs::read(format!("/proc/{pid}/mountinfo")).unwrap_or_default(); // ended, or not ours to read
        if list.windows(OWN_TYPE.len()).any(|part| part == OWN_TYPE.as_bytes()) {
            others.push((pid, parse_mountinfo(&list)));
        }
    }
    let known = Known {
        mountpoints: [mountpoint.to_owned(), with_resolved_parent(mountpoint)],
        source: pgthaw_mountfs::mount_source(mountpoint),
    };
    Ok(held_elsewhere(&known, &own, others))
}

/// By what a session's mount is known.
struct Known {
    mountpoints: [PathBuf; 2],
    source: String,
}

impl Known {
    /// Whether `mount` is the session's. Only pgthaw's own type is. A source that tells has the say: in a namespace of its own another
    /// account can bind the mount of another session to this one's path, but not change its source.
    fn knows(&self, mount: &Mount) -> bool {
        let at_our_path = || self.mountpoints.iter().any(|path| mount.mountpoint.starts_with(path));
        let tells = mount.source.starts_with("pgthaw:");
        mount.kind == OWN_TYPE && if tells { mount.source == self.source } else { at_our_path() }
    }
}

fn held_elsewhere(
    known: &Known,
    own: &[Mount],
    mut others: Vec<(u32, Vec<Mount>)>,
) -> Vec<MountElsewhere> {
    let ours: Vec<&Mount> = own.iter().filter(|mount| known.knows(mount)).collect();
    let is_ours = |mount: &Mount| {
        known.knows(mount)
            || (mount.kind == OWN_TYPE
                && ours.iter().any(|ours| ours.device_minor == mount.device_minor))
    };
    let ids: BTreeSet<u64> = own.iter().map(|mount| mount.id).collect();
    others.sort_by_key(|(pid, _)| *pid);
    let mut found: Vec<MountElsewhere> = Vec::new();
    for (pid, mounts) in others {
        for mount in mounts.into_iter().filter(|mount| is_ours(mount) && !ids.contains(&mount.id)) {
            match found.iter_mut().find(|found| found.mount.id == mount.id) {
                Some(found) => found.holders.push(pid),
                None => found.push(MountElsewhere { mount, holders: vec![pid] }),
            }
        }
    }
    let mut following: BTreeSet<u64> = ours.iter().filter_map(|mount| mount.shared).collect();
    loop {
        let before = found.len();
        found.retain(|MountElsewhere { mount, .. }| {
            let hears =
                [mount.shared, mount.master].into_iter().flatten().any(|g| following.contains(&g));
            if hears {
                following.extend(mount.shared);
            }
            !hears
        });
        if found.len() == before {
            return found;
        }
    }
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
pub fn abort(mount: &Mount) {
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
    let text = |field: &[u8]| std::str::from_utf8(field).ok().map(str::to_owned);
    let device = text(fields.get(2)?)?;
    let group = |prefix: &str| {
        let mut optional = fields[6..end_of_optional].iter().filter_map(|field| text(field));
        optional.find_map(|field| field.strip_prefix(prefix)?.parse().ok())
    };
    Some(Mount {
        id: text(fields.first()?)?.parse().ok()?,
        source: text(fields.get(end_of_optional + 2)?).unwrap_or_default(),
        shared: group("shared:"),
        master: group("master:"),
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
    fn knows_a_session_s_mount_in_other_namespaces() {
        let known = || Known {
            mountpoints: ["/run/media/pgthaw/s", "/run/media/pgthaw/s"].map(PathBuf::from),
            source: "pgthaw:/run/media/pgthaw/s".into(),
        };
        let list = |lines: &[&str]| parse_mountinfo(lines.join("\n").as_bytes());
        const ROOT: &str = "22 1 254:1 / / rw shared:1 - ext4 /dev/vda1 rw";
        const OWN: &str = "90 22 0:57 / /run/media/pgthaw/s rw shared:7 - fuse.pgthaw pgthaw:/run/media/pgthaw/s rw";
        /// What it is about, the caller's own list, those of processes 1, 2, …, and what is found.
        type Case = (&'static str, &'static [&'static str], Lists, &'static [&'static str]);
        type Lists = &'static [&'static [&'static str]];
        let cases: [Case; 13] = [
            (
                "another session's, moved to our place by somebody",
                &[ROOT],
                &[&[
                    "95 80 0:58 / /run/media/pgthaw/s rw - fuse.pgthaw pgthaw:/run/media/pgthaw/b rw",
                ]],
                &[],
            ),
            ("nothing anywhere", &[ROOT], &[&[ROOT]], &[]),
            ("the same namespace", &[ROOT, OWN], &[&[ROOT, OWN]], &[]),
            (
                "bound to another place",
                &[ROOT],
                &[&["95 80 0:57 / /mnt/x rw - fuse.pgthaw pgthaw:/run/media/pgthaw/s rw"]],
                &["/mnt/x: 1"],
            ),
            (
                "without a telling source, at its place or below",
                &[ROOT],
                &[&[
                    "95 80 0:57 / /run/media/pgthaw/s rw - fuse.pgthaw pgthaw rw",
                    "96 80 0:57 /data /run/media/pgthaw/s/data rw - fuse.pgthaw pgthaw rw",
                ]],
                &["/run/media/pgthaw/s: 1", "/run/media/pgthaw/s/data: 1"],
            ),
            (
                "by the device of what is mounted here",
                &[ROOT, OWN],
                &[&["95 80 0:57 /tablespaces/16385 /srv/fast rw - fuse.pgthaw other rw"]],
                &["/srv/fast: 1"],
            ),
            (
                "one namespace, several processes",
                &[ROOT],
                &[
                    &["95 80 0:57 / /x rw - fuse.pgthaw pgthaw:/run/media/pgthaw/s rw"],
                    &["95 80 0:57 / /x rw - fuse.pgthaw pgthaw:/run/media/pgthaw/s rw"],
                ],
                &["/x: 1 2"],
            ),
            (
                "a private copy",
                &[ROOT, OWN],
                &[&["95 80 0:57 / /run/media/pgthaw/s rw - fuse.pgthaw pgthaw rw"]],
                &["/run/media/pgthaw/s: 1"],
            ),
            (
                "a copy that follows",
                &[ROOT, OWN],
                &[&["95 80 0:57 / /run/media/pgthaw/s rw master:7 - fuse.pgthaw pgthaw rw"]],
                &[],
            ),
            (
                "a copy that follows one that follows",
                &[ROOT, OWN],
                &[
                    &["95 80 0:57 / /run/media/pgthaw/s rw master:9 - fuse.pgthaw pgthaw rw"],
                    &[
                        "96 80 0:57 / /run/media/pgthaw/s rw shared:9 master:7 - fuse.pgthaw pgthaw rw",
                    ],
                ],
                &[],
            ),
            (
                "a copy whose original is gone",
                &[ROOT],
                &[&["95 80 0:57 / /run/media/pgthaw/s rw master:7 - fuse.pgthaw pgthaw rw"]],
                &["/run/media/pgthaw/s: 1"],
            ),
            (
                "another session",
                &[ROOT, OWN],
                &[&[
                    "95 80 0:58 / /run/media/pgthaw/s2 rw - fuse.pgthaw pgthaw:/run/media/pgthaw/s2 rw",
                ]],
                &[],
            ),
            (
                "another's file system on that place",
                &[ROOT],
                &[&["95 80 0:58 / /run/media/pgthaw/s rw - tmpfs tmpfs rw"]],
                &[],
            ),
        ];
        for (name, own, others, want) in cases {
            let others = others.iter().zip(1..).map(|(lines, pid)| (pid, list(lines))).collect();
            let found = held_elsewhere(&known(), &list(own), others);
            let found: Vec<String> = found
                .iter()
                .map(|MountElsewhere { mount, holders }| {
                    let holders: Vec<_> = holders.iter().map(u32::to_string).collect();
                    format!("{}: {}", mount.mountpoint.display(), holders.join(" "))
                })
                .collect();
            assert_eq!(found, want, "{name}");
        }
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
