//! System V shared memory that a killed server leaves behind.
//!
//! PostgreSQL keeps one small segment as a lock on its data directory. Segments are recognized by the
//! process that made them, as `/proc/sysvipc/shm` tells it.

use std::fs;
use std::io;

/// A line of `/proc/sysvipc/shm`.
#[derive(Debug, PartialEq, Eq)]
struct Segment {
    id: i32,
    creator: u32,
    attached: u64,
    owner: u32,
}

/// What became of a process' segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removal {
    /// Segments that were removed.
    pub removed: usize,
    /// Segments that some process still uses: its children, which have not noticed yet that it has ended.
    pub in_use: usize,
}

/// Removes the segments that process `creator` of user `owner` made and nobody uses.
///
/// Ask only about a process of ours that has ended just now: numbers of processes are used again.
///
/// # Errors
/// If the kernel's list cannot be read or a segment not be removed.
pub fn remove_of(creator: u32, owner: u32) -> io::Result<Removal> {
    let list = match fs::read_to_string("/proc/sysvipc/shm") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Removal::default()), // no System V IPC
        list => list?,
    };
    let mut removal = Removal::default();
    let all = parse(&list).into_iter();
    for segment in all.filter(|segment| (segment.creator, segment.owner) == (creator, owner)) {
        if segment.attached > 0 {
            removal.in_use += 1;
            continue;
        }
        // SAFETY: IPC_RMID takes no buffer.
        if unsafe { libc::shmctl(segment.id, libc::IPC_RMID, std::ptr::null_mut()) } != 0 {
            let error = io::Error::last_os_error();
            if !matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EIDRM)) {
                return Err(error);
            }
        }
        removal.removed += 1;
    }
    Ok(removal)
}

/// Reads the list; its first line names the columns, whose order is taken from there.
fn parse(list: &str) -> Vec<Segment> {
    let mut lines = list.lines();
    let heads: Vec<&str> = lines.next().unwrap_or_default().split_ascii_whitespace().collect();
    let column = |name: &str| heads.iter().position(|head| *head == name);
    let (Some(id), Some(creator), Some(attached), Some(owner)) =
        (column("shmid"), column("cpid"), column("nattch"), column("uid"))
    else {
        return Vec::new();
    };
    let segment = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        Some(Segment {
            id: fields.get(id)?.parse().ok()?,
            creator: fields.get(creator)?.parse().ok()?,
            attached: fields.get(attached)?.parse().ok()?,
            owner: fields.get(owner)?.parse().ok()?,
        })
    };
    lines.filter_map(segment).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_list() {
        let list = "       key      shmid perms                  size  cpid  lpid nattch   uid   gid  cuid  cgid      atime      dtime      ctime                   rss                  swap\n   5450091          3   600                    56  4711  4711      0   101   104   101   104 1795387000          0 1795387000                  4096                     0\n";
        assert_eq!(parse(list), [Segment { id: 3, creator: 4711, attached: 0, owner: 101 }]);
        assert_eq!(parse(""), []);
        assert_eq!(parse("shmid cpid\n1 2\n"), []);
    }

    #[test]
    fn removes_only_an_unused_segment_of_that_process() {
        // SAFETY: makes a private segment of one page; no memory of ours is involved.
        let id = unsafe { libc::shmget(libc::IPC_PRIVATE, 4096, libc::IPC_CREAT | 0o600) };
        assert!(id >= 0, "{}", io::Error::last_os_error());
        let (own, uid) = (std::process::id(), rustix::process::geteuid().as_raw());
        let there = || {
            let list = fs::read_to_string("/proc/sysvipc/shm").unwrap();
            parse(&list).iter().any(|segment| segment.id == id)
        };
        assert!(there());
        assert_eq!(remove_of(own, uid + 1).unwrap(), Removal::default());
        assert_eq!(remove_of(u32::MAX, uid).unwrap(), Removal::default());
        assert!(there());
        assert_eq!(remove_of(own, uid).unwrap(), Removal { removed: 1, in_use: 0 });
        assert!(!there());
    }
}
