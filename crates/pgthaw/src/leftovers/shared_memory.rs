//! The System V shared memory that stays when PostgreSQL is killed.
//!
//! An instance normally runs in an IPC namespace of its own, where nothing can stay. Where it cannot, a segment is
//! known by its creator: a process that carries the session's marker, or whose id was recorded while it ran. It must
//! have been made in that process's lifetime, and nobody may use it.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::processes::Process;

/// Where [`record_creator`] writes, in the session's work directory.
const RECORD: &str = "postmasters";

/// The clock may have been set by this many seconds between a process's start and our look at it.
const CLOCK_SLACK: u64 = 5;

/// A process that made, or may have made, shared memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Creator {
    /// Its process id.
    pub pid: u32,
    /// When it started, in seconds since 1970.
    pub started_at: u64,
}

impl Creator {
    /// Takes a running process; none where its start time cannot be told.
    pub fn from_running(process: &Process) -> Option<Self> {
        let uptime = fs::read_to_string("/proc/uptime").ok()?;
        let uptime: u64 = uptime.split('.').next()?.parse().ok()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs();
        let age =
            uptime.saturating_sub(process.start_time / rustix::param::clock_ticks_per_second());
        Some(Self { pid: process.pid, started_at: now.saturating_sub(age) })
    }
}

/// A System V shared memory segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Its id, as `ipcs -m` shows it.
    pub id: i32,
    /// The process that made it.
    pub creator: u32,
    /// How many processes use it.
    pub users: u64,
    /// When it was made, in seconds since 1970.
    pub created_at: u64,
}

/// Records in `work_directory` that `postmaster` is an instance of the session: call it right after the start.
///
/// The record is of use until the machine is started anew.
///
/// # Errors
/// It cannot be written.
pub fn record_creator(work_directory: &Path, postmaster: &Process) -> io::Result<()> {
    let Some(creator) = Creator::from_running(postmaster) else {
        return Err(io::Error::other(format!("cannot tell when {postmaster} started")));
    };
    let line = format!("{} {} {}\n", creator.pid, creator.started_at, boot_id()?);
    let mut options = fs::OpenOptions::new();
    let mut file =
        options.append(true).create(true).mode(0o600).open(work_directory.join(RECORD))?;
    file.write_all(line.as_bytes())
}

/// Returns the recorded instances of this machine's present run.
pub fn recorded_creators(work_directory: &Path) -> Vec<Creator> {
    let record = fs::read_to_string(work_directory.join(RECORD)).unwrap_or_default();
    parse_record(&record, &boot_id().unwrap_or_default())
}

fn parse_record(record: &str, boot_id: &str) -> Vec<Creator> {
    let parse = |line: &str| {
        let mut fields = line.split(' ');
        let creator =
            Creator { pid: fields.next()?.parse().ok()?, started_at: fields.next()?.parse().ok()? };
        (fields.next()? == boot_id).then_some(creator)
    };
    record.lines().filter_map(parse).collect()
}

fn boot_id() -> io::Result<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|text| text.trim().into())
}

/// Returns the segments that one of `creators` made.
///
/// # Errors
/// `/proc/sysvipc/shm` cannot be read; a kernel without System V shared memory has none, which is no error.
pub fn segments_of(creators: &[Creator]) -> io::Result<Vec<Segment>> {
    let table = match fs::read_to_string("/proc/sysvipc/shm") {
        Ok(table) => table,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut segments = parse_table(&table);
    segments.retain(|segment| made_by(segment, creators));
    Ok(segments)
}

fn made_by(segment: &Segment, creators: &[Creator]) -> bool {
    creators.iter().any(|creator| {
        creator.pid == segment.creator
            && segment.created_at.saturating_add(CLOCK_SLACK) >= creator.started_at
    })
}

/// Reads `/proc/sysvipc/shm`: a heading, then one line per segment.
fn parse_table(table: &str) -> Vec<Segment> {
    let mut lines = table.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let heading = lines.next().unwrap_or_default();
    let column = |name: &str| heading.iter().position(|&heading| heading == name);
    let (Some(id), Some(creator), Some(users), Some(created_at)) =
        (column("shmid"), column("cpid"), column("nattch"), column("ctime"))
    else {
        return Vec::new();
    };
    let segment = |fields: Vec<&str>| {
        Some(Segment {
            id: fields.get(id)?.parse().ok()?,
            creator: fields.get(creator)?.parse().ok()?,
            users: fields.get(users)?.parse().ok()?,
            created_at: fields.get(created_at)?.parse().ok()?,
        })
    };
    lines.filter_map(segment).collect()
}

/// Removes `segment`. Returns whether it was there.
///
/// # Errors
/// Somebody uses it or its id by now, its creator's id is a running process's again, or we may not.
pub fn remove(segment: &Segment) -> io::Result<bool> {
    let creator = [Creator { pid: segment.creator, started_at: segment.created_at }];
    let now = segments_of(&creator)?.into_iter().find(|now| now.id == segment.id);
    let Some(now) = now else { return Ok(false) };
    if now.users > 0 || Process::with_pid(segment.creator).is_some() {
        return Err(io::Error::other(format!("shared memory segment {} is in use", segment.id)));
    }
    // SAFETY: IPC_RMID takes no buffer; the segment's memory is not mapped here.
    let result = unsafe { libc::shmctl(segment.id, libc::IPC_RMID, std::ptr::null_mut()) };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EINVAL | libc::EIDRM) => Ok(false),
        _ => Err(io::Error::new(
            error.kind(),
            format!("shared memory segment {}: {error}", segment.id),
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const TABLE: &str = "\
       key      shmid perms                  size  cpid  lpid nattch   uid   gid  cuid  cgid      atime      dtime      ctime                   rss                  swap
   5432001          3   600                    56   812   812      6   101   104   101   104 1700000000          0 1700000000                  4096                     0
         0         -1
   5432002          7   600                    56   900   900      0   101   104   101   104 1700000300          0 1700000300                  4096                     0
";

    #[test]
    fn knows_segments_by_their_creator() {
        let segments = parse_table(TABLE);
        let segment = |id, creator, users, created_at| Segment { id, creator, users, created_at };
        assert_eq!(
            segments,
            [segment(3, 812, 6, 1_700_000_000), segment(7, 900, 0, 1_700_000_300)]
        );
        assert_eq!(parse_table(""), []);
        assert_eq!(parse_table("some other kernel\n1 2 3 4\n"), []);

        let cases = [
            ("made after the start", 900, 1_700_000_299, true),
            ("clock set a little", 900, 1_700_000_305, true),
            ("made before the start: an earlier process with this id", 900, 1_700_000_306, false),
            ("another process", 901, 1_700_000_299, false),
        ];
        for (name, pid, started_at, want) in cases {
            assert_eq!(made_by(&segments[1], &[Creator { pid, started_at }]), want, "{name}");
        }
    }

    #[test]
    fn records_of_an_earlier_run_of_the_machine_do_not_count() {
        let record = "12 100 now\n13 200 before\n14 300\nx 1 now\n15 400 now\n";
        let creator = |pid, started_at| Creator { pid, started_at };
        assert_eq!(parse_record(record, "now"), [creator(12, 100), creator(15, 400)]);
    }

    #[test]
    fn records_and_removes_a_dead_process_s_segment() {
        let work = tempfile::tempdir().unwrap();
        let own = Process::with_pid(std::process::id()).unwrap();
        record_creator(work.path(), &own).unwrap();
        assert_eq!(recorded_creators(work.path()), [Creator::from_running(&own).unwrap()]);

        // `ipcmk` makes a segment and ends, as a killed postmaster does.
        let Ok(output) = Command::new("ipcmk").args(["-M", "4096"]).output() else { return };
        let text = String::from_utf8_lossy(&output.stdout);
        let id: i32 = text.trim().rsplit(' ').next().unwrap().parse().unwrap();
        let table = fs::read_to_string("/proc/sysvipc/shm").unwrap();
        let segment = parse_table(&table).into_iter().find(|s| s.id == id).unwrap();
        let later = Creator { pid: segment.creator, started_at: segment.created_at + 60 };
        assert!(segments_of(&[later]).unwrap().is_empty());
        let creator = Creator { pid: segment.creator, started_at: segment.created_at };
        assert_eq!(segments_of(&[creator]).unwrap(), std::slice::from_ref(&segment));
        assert!(remove(&segment).unwrap());
        assert!(!remove(&segment).unwrap(), "it can be repeated");
    }
}
