//! Each kind of leftover, planted, is found; removed, it is not.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pgthaw_testkit::{Leftovers, Scratch, User, run};
use rustix::mount::{MountFlags, UnmountFlags};

/// What the planted things have in their names besides.
fn tag() -> String {
    format!("planted-{}", std::process::id())
}

/// Plants one thing at a time and checks that exactly it is found.
fn expect(what: &str, found: &Leftovers, planted: &str) {
    let lines = found.check_within(Duration::ZERO);
    assert!(lines.len() == 1 && lines[0].contains(planted), "{what}: {lines:?}");
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn finds_each_planted_leftover() {
    let dir = Scratch::new();
    let home = dir.join("home");
    fs::create_dir(&home).unwrap();
    let leftovers = Leftovers::before(&[&home]);
    let clean = |what: &str| {
        let lines = leftovers.check();
        assert!(lines.is_empty(), "{what} is gone: {lines:?}");
    };
    clean("nothing");

    let in_arguments = Killed(
        Command::new("tail")
            .args(["-f", "/dev/null"])
            .arg(home.join("x"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    std::thread::sleep(Duration::from_millis(200));
    expect("process by its arguments", &leftovers, &format!("process {}", in_arguments.0.id()));
    drop(in_arguments);
    let in_environment =
        Killed(Command::new("sleep").arg("600").env("HOME", &home).spawn().unwrap());
    std::thread::sleep(Duration::from_millis(200));
    expect("process by its environment", &leftovers, &format!("process {}", in_environment.0.id()));
    drop(in_environment);
    let _neighbour =
        Killed(Command::new("sleep").arg("600").env("HOME", dir.join("home2")).spawn().unwrap());
    clean("a process");

    let id = String::from_utf8(run(Command::new("ipcmk").args(["-M", "4096"])).stdout).unwrap();
    let id = id.trim().rsplit(' ').next().unwrap().to_owned();
    expect("System V shared memory", &leftovers, &format!("segment {id}"));
    run(Command::new("ipcrm").args(["-m", &id]));
    clean("the segment");

    for (what, path) in [
        ("posix shared memory", format!("/dev/shm/{}", tag())),
        ("file in /var/tmp", format!("/var/tmp/pgthaw-{}", tag())),
        ("file in /tmp", format!("/tmp/pgthaw-{}", tag())),
        ("file in a directory of the test", format!("{}/pgthaw-{}", home.display(), tag())),
    ] {
        fs::write(&path, "").unwrap();
        expect(what, &leftovers, &path);
        fs::remove_file(&path).unwrap();
        clean(what);
    }

    let path = home.join("agent.sock");
    let socket = UnixListener::bind(&path).unwrap();
    expect("socket", &leftovers, path.to_str().unwrap());
    drop(socket);
    clean("the socket");
}

#[test]
fn finds_mounts() {
    if User::current().uid != 0 {
        eprintln!("skipped: mounting needs root");
        return;
    }
    let dir = Scratch::new();
    let inside = dir.join("home/mount point");
    let outside = dir.join("elsewhere");
    for made in [&inside, &outside] {
        fs::create_dir_all(made).unwrap();
    }
    let leftovers = Leftovers::before(&[&dir.join("home")]);
    for (what, point) in
        [("below the test's directory", &inside), ("of our type, anywhere", &outside)]
    {
        mount(point, "pgthaw");
        let lines = leftovers.check_within(Duration::ZERO);
        rustix::mount::unmount(point, UnmountFlags::DETACH).unwrap();
        assert!(
            lines.len() == 1 && lines[0].contains(point.to_str().unwrap()),
            "{what}: {lines:?}"
        );
        assert_eq!(leftovers.check(), Vec::<String>::new(), "{what}, unmounted");
    }
}

/// Mounts a FUSE file system that nobody serves.
fn mount(point: &Path, source: &str) {
    let fuse = fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&fuse);
    let options =
        std::ffi::CString::new(format!("fd={fd},rootmode=40000,user_id=0,group_id=0")).unwrap();
    let (kind, flags) = ("fuse.pgthaw", MountFlags::empty());
    rustix::mount::mount(source, point, kind, flags, Some(options.as_c_str())).unwrap();
}

/// A survivor of a session that shows in no other way: nothing in its arguments or environment.
#[test]
fn finds_mounts_that_only_another_process_s_namespace_has() {
    if User::current().uid != 0 {
        eprintln!("skipped: mounting needs root");
        return;
    }
    let dir = Scratch::new();
    let (home, inside, outside) = (dir.join("home"), dir.join("home/mount"), dir.join("elsewhere"));
    for made in [&inside, &outside] {
        fs::create_dir_all(made).unwrap();
    }
    let leftovers = Leftovers::before(&[&home]);
    let source = |place: &Path| format!("pgthaw:{}", place.display());
    for (what, point, source) in [
        ("below the test's directory", &inside, "pgthaw".to_owned()),
        ("mounted below it at first", &outside, source(&inside)),
        ("of our type, anywhere", &outside, source(&outside)),
    ] {
        mount(point, &source);
        let mut survivor = Command::new("unshare");
        survivor.args(["--mount", "--propagation", "private", "sleep", "600"]);
        let survivor = Killed(survivor.env_clear().env("PATH", "/usr/bin:/bin").spawn().unwrap());
        let pid = survivor.0.id();
        let started = Instant::now();
        while fs::read_to_string(format!("/proc/{pid}/comm")).unwrap() != "sleep\n" {
            assert!(started.elapsed() < Duration::from_secs(10), "{what}: no survivor");
        }
        rustix::mount::unmount(point, UnmountFlags::DETACH).unwrap();
        expect(what, &leftovers, &format!("in the namespace of process {pid}"));
        drop(survivor);
        assert_eq!(leftovers.check(), [""; 0], "{what}, its process ended");
    }
}
