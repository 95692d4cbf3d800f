//! Mounts across users and processes: an ordinary user's own, root's that another user serves, and
//! dead servers.
//!
//! The other user is a child process of this test binary.

mod support;

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgthaw_mountfs::{
    FileSystem, MountError, Owner, ServeOptions, Tree, mount_as_root, mount_as_user, mounted_at,
    serve, unmount,
};
use rustix::process::{Pid, Signal, kill_process};
use support::fsx::{run_mix, seed};
use support::{Mounted, Pattern, until};

/// Who the child is: `nobody`.
const USER: u32 = 65534;
const ROLE: &str = "PGTHAW_TEST_ROLE";
const DIRECTORY: &str = "PGTHAW_TEST_DIRECTORY";

/// A directory of the other user, with a copy of this program that he can run.
struct OtherUser {
    directory: tempfile::TempDir,
}

impl OtherUser {
    fn new() -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "this test becomes another user, so it runs as root"
        );
        // What Debian's fuse3 does by its udev rule.
        fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("program");
        fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        chown(directory.path(), Some(USER), Some(USER)).unwrap();
        Self { directory }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn command(&self, role: &str) -> Command {
        let mut command = Command::new(self.path().join("program"));
        command.args(["--ignored", "--exact", "child", "--nocapture"]).env(ROLE, role);
        command.env("TMPDIR", self.path()).env(DIRECTORY, self.path()).uid(USER).gid(USER);
        command
    }
}

/// A mount of root's that a child of the other user serves; both gone when dropped.
struct ServedByOther {
    other: OtherUser,
    mountpoint: PathBuf,
    child: Child,
}

impl ServedByOther {
    fn new() -> Self {
        let other = OtherUser::new();
        let mountpoint = other.path().join("mount");
        fs::create_dir(&mountpoint).unwrap();
        let device = mount_as_root(&mountpoint).unwrap();
        let child = other.command("serve").stdin(Stdio::from(device)).stdout(Stdio::null()).spawn();
        let child = child.unwrap();
        Self { other, mountpoint, child }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for ServedByOther {
    fn drop(&mut self) {
        let unmounted = unmount(&self.mountpoint, true);
        let _ = self.child.kill(); // it may have ended
        let _ = self.child.wait();
        if !std::thread::panicking() {
            unmounted.unwrap();
            assert!(!mounted_at(&self.mountpoint).unwrap());
        }
    }
}

fn plant(tree: &mut Tree) {
    for (number, size) in [0, 100_000, 81_920].into_iter().enumerate() {
        tree.file(format!("lower-{number}"), number, size, 0).unwrap();
    }
    tree.directory("d/e", 0).unwrap();
}

/// A program that uses the mount.
#[test]
#[ignore = "run by the other tests, in a child process"]
fn mix_program() {
    support::fsx::mix_program();
}

/// What the child does, by its role.
#[test]
#[ignore = "run by the other tests, in a child process"]
fn child() {
    match &std::env::var(ROLE).expect("run by the other tests")[..] {
        "mix" => {
            let mounted = Mounted::new(Pattern { answer_every: 3, ..Pattern::default() }, plant);
            let plain = tempfile::tempdir().unwrap();
            for (number, size) in [0, 100_000, 81_920].into_iter().enumerate() {
                let bytes = Pattern::default().bytes(number, 0, size);
                fs::write(plain.path().join(format!("lower-{number}")), bytes).unwrap();
            }
            fs::create_dir_all(plain.path().join("d/e")).unwrap();
            assert_eq!(fs::metadata(mounted.path()).unwrap().uid(), USER);
            run_mix(mounted.path(), plain.path(), seed(), 4000);
            assert_eq!(mounted.fs.faults(), []);
            let busy = fs::File::open(mounted.path().join("d")).unwrap();
            assert!(unmount(mounted.path(), false).is_err());
            drop(busy);
            until("unmounted", || unmount(mounted.path(), false).is_ok());
        }
        "serve" => {
            let directory = PathBuf::from(std::env::var_os(DIRECTORY).unwrap());
            let mut tree = Tree::new();
            plant(&mut tree);
            let owner = Owner { uid: USER, gid: USER };
            let layer = directory.join("layer");
            let fs = FileSystem::new(
                tree,
                Arc::new(Pattern::default()),
                &layer,
                owner,
                Box::new(|_| {}),
            );
            let device = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
            let null = fs::File::open("/dev/null").unwrap();
            rustix::stdio::dup2_stdin(&null).unwrap();
            serve(Arc::new(fs.unwrap()), device, ServeOptions::default()).unwrap();
        }
        "no device" => {
            let refused = mount_as_user(Path::new("/")).unwrap_err();
            assert!(matches!(refused, MountError::NoDevice), "{refused:?}");
        }
        "denied" => {
            let refused = mount_as_user(Path::new("/")).unwrap_err();
            assert!(matches!(refused, MountError::DeviceDenied), "{refused:?}");
            assert!(refused.hint().contains("fuse3"));
        }
        "not his" => {
            let refused = mount_as_user(Path::new("/usr")).unwrap_err();
            assert!(matches!(&refused, MountError::HelperRefused { .. }), "{refused:?}");
            assert!(refused.to_string().contains("/usr"), "{refused}");
        }
        role => panic!("no role {role}"),
    }
}

#[test]
fn an_ordinary_user_mounts_writes_and_unmounts() {
    let other = OtherUser::new();
    let mut child = other.command("mix").spawn().unwrap();
    let ended = child.wait().unwrap();
    let ours = format!(" {}/", other.path().display());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let left: Vec<_> = mounts.lines().filter(|line| line.contains(&ours)).collect();
    for line in &left {
        let _ = unmount(Path::new(line.split(' ').nth(4).unwrap()), true);
    }
    assert!(ended.success() && left.is_empty(), "{ended}, left: {left:?}");
}

#[test]
fn the_reasons_why_a_user_cannot_mount_are_told_apart() {
    let other = OtherUser::new();
    assert!(other.command("not his").status().unwrap().success());
    // In mount namespaces of their own: a machine without FUSE, and one whose device is root's.
    let program = other.path().join("program");
    for (role, device) in [("no device", ""), ("denied", "mknod -m 0600 /dev/fuse c 10 229;")] {
        let script = format!(
            "set -e; mount -t tmpfs none /dev; {device} mknod -m 0666 /dev/null c 1 3; \
             exec setpriv --reuid={USER} --regid={USER} --clear-groups \
             \"$0\" --ignored --exact child --nocapture"
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", &script]).arg(&program);
        assert!(command.env(ROLE, role).status().unwrap().success(), "{role}");
    }
}

#[test]
fn a_mount_of_roots_is_served_by_another_user() {
    let served = ServedByOther::new();
    let file = served.mountpoint.join("lower-1");
    assert!(fs::read(&file).unwrap() == Pattern::default().bytes(1, 0, 100_000));
    let stat = fs::metadata(&file).unwrap();
    assert_eq!((stat.uid(), stat.gid(), stat.mode() & 0o7777), (USER, USER, 0o600));
    fs::write(served.mountpoint.join("d/new"), vec![1; 50_000]).unwrap();
    fs::File::open(served.mountpoint.join("d/new")).unwrap().sync_all().unwrap();
    let layer = fs::metadata(served.other.path().join("layer")).unwrap();
    assert_eq!((layer.uid(), layer.mode() & 0o7777), (USER, 0o700));
    // The kernel checks permissions: a third user may not even look.
    let third = Command::new("cat").arg(&file).uid(65533).gid(65533).stderr(Stdio::null()).status();
    assert!(!third.unwrap().success());
    // Unmounting ends the server.
    let mut served = served;
    until("unmounted", || unmount(&served.mountpoint, false).is_ok());
    assert!(served.child.wait().unwrap().success());
}

#[test]
fn a_dead_or_stopped_server_does_not_block_unmounting() {
    for signal in [Signal::STOP, Signal::KILL] {
        let mut served = ServedByOther::new();
        assert_eq!(fs::read(served.mountpoint.join("lower-2")).unwrap().len(), 81_920);
        served.signal(signal);
        if signal == Signal::KILL {
            served.child.wait().unwrap();
        }
        let started = Instant::now();
        assert!(mounted_at(&served.mountpoint).unwrap());
        unmount(&served.mountpoint, true).unwrap();
        assert!(!mounted_at(&served.mountpoint).unwrap());
        assert!(started.elapsed() < Duration::from_secs(2), "{signal:?}: {:?}", started.elapsed());
    }
}
