//! A disk that takes only so many bytes per second.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Where the kernel's control groups are.
const GROUPS: &str = "/sys/fs/cgroup";
/// The limit of all writes to a disk (cgroup v1, blkio-controller.rst); the root group has it, too.
const FIRST_VERSION: &str = "/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device";

/// Holds a disk back while it lives, by the kernel's control groups: in version 1 for everybody, in version 2 for this process and
/// the children it starts meanwhile. Needs root. Whoever measures should see whether a plain write is held.
#[derive(Debug)]
pub struct HeldDisk {
    /// Lifts the limit when its standard input ends, so also when this process is killed.
    release: Child,
}

impl HeldDisk {
    /// Holds the disk on which `path` lies to so many bytes written per second.
    ///
    /// # Errors
    /// As the kernel says: `PermissionDenied` without root, `NotFound` without control groups for disks or for a path that lies
    /// on no disk, as on a tmpfs.
    pub fn hold(path: &Path, bytes_per_second: u64) -> io::Result<Self> {
        let disk = disk_of(path)?;
        if Path::new(FIRST_VERSION).exists() {
            let held = release(&format!("echo {disk} 0 > {FIRST_VERSION}"))?;
            fs::write(FIRST_VERSION, format!("{disk} {bytes_per_second}"))?;
            return Ok(held);
        }
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
        let own = own.ok_or(io::ErrorKind::NotFound)?;
        let process = std::process::id();
        let group = format!("{GROUPS}/held-disk-{process}");
        fs::write(format!("{GROUPS}/cgroup.subtree_control"), "+io")?;
        fs::create_dir(&group)?;
        // A process that has ended is in no group.
        let back = format!("echo {process} 2>&- > {GROUPS}/{own}/cgroup.procs");
        let held = release(&format!("{back}; sleep 0.1; rmdir {group}"))?;
        fs::write(format!("{group}/io.max"), format!("{disk} wbps={bytes_per_second}"))?;
        fs::write(format!("{group}/cgroup.procs"), process.to_string())?;
        Ok(held)
    }
}

/// Starts what runs `commands` when it is dropped, or when this process ends in whatever way.
fn release(commands: &str) -> io::Result<HeldDisk> {
    let script = format!("trap '' INT HUP TERM; read -r end; {commands}");
    let release = Command::new("sh").args(["-c", &script]).stdin(Stdio::piped()).spawn()?;
    Ok(HeldDisk { release })
}

impl Drop for HeldDisk {
    fn drop(&mut self) {
        self.release.stdin.take();
        let _ = self.release.wait(); // what it could not do it has said
    }
}

/// Returns the number of the disk of a path, as the kernel writes it; limits are those of whole disks.
fn disk_of(path: &Path) -> io::Result<String> {
    let device = fs::metadata(path)?.dev();
    let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let place = fs::canonicalize(format!("/sys/dev/block/{number}"))?;
    match place.parent().filter(|_| place.join("partition").exists()) {
        Some(disk) => Ok(fs::read_to_string(disk.join("dev"))?.trim().to_owned()),
        None => Ok(number),
    }
}
