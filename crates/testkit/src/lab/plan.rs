//! What a host is to be like, said before its lab is made.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Directories that are empty after a reboot; the other disks keep what they hold.
const VOLATILE: [&str; 3] = ["/tmp", "/run", "/dev/shm"];
/// Disks of every host.
const USUAL: [&str; 5] = ["/tmp", "/run", "/dev/shm", "/var/tmp", "/home"];

/// A host to be made: its name, users, disks, and what it has of the machine.
///
/// The root file system is the machine's to read; what the host writes there is its own and outlives a reboot.
/// Mounts of the machine are not there, and its `/home`, `/tmp` and `/var/tmp` neither: programs and repositories
/// from there have to be shared.
#[derive(Debug, Clone)]
pub struct HostPlan {
    pub(super) name: String,
    pub(super) users: Vec<String>,
    disks: BTreeMap<String, DiskPlan>,
    shares: Vec<(PathBuf, String)>,
}

/// A file system in memory with a size of its own.
#[derive(Debug, Clone, Default)]
struct DiskPlan {
    size: Option<u64>,
    options: String,
}

impl HostPlan {
    /// Plans a host with the users `dba`, `ops` and `ann`, and disks for `/tmp`, `/run`, `/dev/shm`, `/var/tmp` and
    /// `/home`, each as large as half of the machine's memory. An interface is called like the host behind it,
    /// so a name has at most 15 letters, digits and hyphens.
    pub fn new(name: &str) -> Self {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        assert!((1..=15).contains(&name.len()) && name.bytes().all(plain), "host name {name:?}");
        let disks = USUAL.map(|at| (at.to_owned(), DiskPlan::default())).into();
        Self {
            name: name.into(),
            users: ["dba", "ops", "ann"].map(str::to_owned).into(),
            disks,
            shares: Vec::new(),
        }
    }

    /// Gives the host these ordinary users and no others.
    pub fn users(mut self, names: &[&str]) -> Self {
        self.users = names.iter().map(|name| (*name).to_owned()).collect();
        self
    }

    /// Gives the disk at `at` a size in bytes; there is one more disk if none was there.
    pub fn disk(mut self, at: &str, bytes: u64) -> Self {
        self.disk_at(at).size = Some(bytes);
        self
    }

    /// Mounts the disk at `at` with more options, as tmpfs(5) and mount(8) know them: `noexec`, `nr_inodes=100`.
    pub fn disk_options(mut self, at: &str, options: &str) -> Self {
        self.disk_at(at).options = options.into();
        self
    }

    /// Lets the host read a file or directory of the machine at `at`. Owners stay what they are by number: what
    /// one of the lab's users is to own has to be copied, to [`crate::Host::path`].
    pub fn share(mut self, from: &Path, at: &str) -> Self {
        let from = from.canonicalize().unwrap_or_else(|err| panic!("{}: {err}", from.display()));
        self.shares.push((from, absolute(at)));
        self
    }

    /// Installs a program of the machine in the host's `/usr/local/bin`.
    pub fn program(self, from: &Path) -> Self {
        let name = from.file_name().and_then(|name| name.to_str()).expect("a program's path");
        let at = format!("/usr/local/bin/{name}");
        self.share(from, &at)
    }

    fn disk_at(&mut self, at: &str) -> &mut DiskPlan {
        self.disks.entry(absolute(at)).or_default()
    }

    /// Returns what is shared of the machine, and where the host has it.
    pub(super) fn shares(&self) -> &[(PathBuf, String)] {
        &self.shares
    }

    /// Returns the mount points of all disks, root's aside.
    pub(super) fn disks(&self) -> impl Iterator<Item = &str> {
        self.disks.keys().map(String::as_str)
    }

    /// Returns where the lab's floor keeps what is the host's own.
    pub(super) fn place(&self) -> String {
        format!("/run/hosts/{}", self.name)
    }

    /// Returns the script that makes, once, the disks that outlive a reboot.
    pub(super) fn lasting_disks(&self) -> String {
        let place = self.place();
        let mut script = format!(
            "mkdir -p {place}/overlay\nmount -t tmpfs -o mode=755 lab {place}/overlay\n\
             mkdir {place}/overlay/upper {place}/overlay/scratch\n"
        );
        for (number, (at, disk)) in self.disks.iter().enumerate() {
            if !VOLATILE.contains(&at.as_str()) {
                let (to, options) = (format!("{place}/disk{number}"), disk.mount_options(at));
                let _ = writeln!(script, "mkdir {to}\nmount -t tmpfs -o {options} lab {to}");
            }
        }
        script
    }

    /// Returns the fstab(5) by which `boot.sh` builds the host's root directory at `/mnt`.
    pub(super) fn fstab(&self) -> String {
        let mut lines = String::from(
            "proc /mnt/proc proc nosuid,nodev,noexec\n\
             sysfs /mnt/sys sysfs nosuid,nodev,noexec\n\
             tmpfs /mnt/dev tmpfs mode=755,nosuid\n\
             devpts /mnt/dev/pts devpts newinstance,ptmxmode=666,mode=620,gid=5,nosuid,noexec,X-mount.mkdir\n",
        );
        for (number, (at, disk)) in self.disks.iter().enumerate() {
            let options = disk.mount_options(at);
            let _ = if VOLATILE.contains(&at.as_str()) {
                writeln!(lines, "tmpfs /mnt{at} tmpfs {options},X-mount.mkdir")
            } else {
                let bind = format!("bind,{},X-mount.mkdir", disk.flags());
                writeln!(lines, "{}/disk{number} /mnt{at} none {bind}", self.place())
            };
        }
        lines
    }
}

impl DiskPlan {
    fn mount_options(&self, at: &str) -> String {
        let mode = if at.ends_with("tmp") || at == "/dev/shm" { "1777" } else { "755" };
        let mut options = format!("mode={mode},nosuid,nodev");
        if let Some(size) = self.size {
            let _ = write!(options, ",size={size}");
        }
        if !self.options.is_empty() {
            let _ = write!(options, ",{}", self.options);
        }
        options
    }

    /// Returns those options that belong to a mount, not to its file system: each mount needs them anew.
    fn flags(&self) -> String {
        let flags = self.options.split(',').filter(|option| ["noexec", "ro"].contains(option));
        ["nosuid", "nodev"].into_iter().chain(flags).collect::<Vec<_>>().join(",")
    }
}

/// Checks that a path can stand in an fstab and means the same everywhere.
fn absolute(at: &str) -> String {
    let plain = at.starts_with('/') && !at.ends_with('/') && !at.contains(char::is_whitespace);
    assert!(plain && !at.contains("/."), "path {at:?}");
    at.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lasting_disks_are_made_once_and_bound_at_each_boot() {
        let plan = HostPlan::new("staging").disk("/srv", 4096).disk_options("/srv", "noexec");
        let (script, fstab) = (plan.lasting_disks(), plan.fstab());
        assert!(script.contains("mode=755,nosuid,nodev,size=4096,noexec lab"), "{script}");
        assert!(fstab.contains(" /mnt/srv none bind,nosuid,nodev,noexec,X-mount.mkdir"), "{fstab}");
        assert!(
            !script.contains("dev/shm") && fstab.contains("tmpfs /mnt/dev/shm tmpfs mode=1777")
        );
    }
}
