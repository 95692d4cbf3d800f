//! Hosts: apart from the machine, rebooted, with disks that get full.

use std::fs;
use std::io::ErrorKind;
use std::process::Command;
use std::time::Instant;

use pgthaw_testkit::{HostPlan, Lab, Scratch, run};
use rustix::process::Signal;

use crate::{failure, possible, stdout, until};

#[test]
fn a_host_has_names_users_and_directories_of_its_own() {
    if !possible() {
        return;
    }
    let begin = Instant::now();
    let lab = Lab::new(&["mount", "staging", "target", "explorer"]);
    eprintln!("four hosts after {:?}", begin.elapsed());
    let staging = lab.host("staging");
    let shell =
        |user: &str, text: &str| stdout(&run(staging.command(user, "sh").args(["-c", text])));
    assert_eq!(
        shell("ops", "hostname; id -un; id -gn; pwd; umask"),
        "staging\nops\nops\n/home/ops\n0022"
    );
    assert_eq!(shell("dba", "getent hosts target"), "10.77.0.3       target");
    assert_eq!(shell("dba", "echo $$; cat /proc/1/comm").lines().last(), Some("sleep"));
    assert_eq!(
        staging.command("dba", "sh").args(["-c", "exit 7"]).status().unwrap().code(),
        Some(7)
    );

    // What it writes is on no other host, nor on the machine.
    let name = format!("tk-of-a-host-{}", std::process::id());
    for dir in ["/tmp", "/var/tmp", "/run", "/dev/shm", "/home", "/etc", "/usr/local/bin"] {
        staging.script(&format!("echo here > {dir}/{name}"));
        let elsewhere = |dir: String| fs::metadata(dir).unwrap_err().kind();
        assert_eq!(elsewhere(format!("{dir}/{name}")), ErrorKind::NotFound, "{dir}");
        let other = lab.host("target").path(format!("{dir}/{name}"));
        assert_eq!(elsewhere(other.display().to_string()), ErrorKind::NotFound, "{dir}");
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    assert!(!passwd.contains("/home/ops"), "the machine has no such user");

    // System V shared memory and the network's devices too.
    shell("dba", "ipcmk -M 4096");
    assert_eq!(stdout(&run(staging.command("dba", "ipcs").arg("-m"))).lines().count(), 4);
    assert_eq!(
        stdout(&run(lab.host("target").command("dba", "ipcs").arg("-m"))).lines().count(),
        3
    );
    assert_eq!(shell("dba", "ls /sys/class/net"), "explorer\nlo\nmount\ntarget");
    let tcp = "/proc/sys/net/ipv4/tcp";
    let chosen = format!("{tcp}_congestion_control");
    // Not all kernels let a network namespace choose cubic; there a host has what any namespace has.
    let allowed = shell("dba", &format!("cat {tcp}_allowed_congestion_control"));
    let expected = if allowed.split(' ').any(|name| name == "cubic") {
        "cubic".to_owned()
    } else {
        stdout(&run(Command::new("unshare").args(["--net", "cat", &chosen])))
    };
    assert_eq!(shell("dba", &format!("cat {chosen}")), expected, "of {allowed}");
    failure(staging.command("dba", "sh").args(["-c", "echo x > /etc/passwd"]));
}

#[test]
fn an_orphan_is_reaped() {
    if !possible() {
        return;
    }
    let lab = Lab::new(&["only"]);
    let host = lab.host("only");
    run(host.command("dba", "sh").args(["-c", "setsid sh -c 'echo $$ > pid; exec sleep 0.2' &"]));
    let pid =
        || fs::read_to_string(host.path("/home/dba/pid")).unwrap_or_default().trim().to_owned();
    until("the orphan to begin", || !pid().is_empty());
    let proc = host.path("/proc").join(pid());
    until("the orphan to be gone, zombie and all", || !proc.exists());
}

#[test]
fn a_reboot_ends_processes_and_keeps_disks() {
    if !possible() {
        return;
    }
    let lab = Lab::new(&["mount", "staging"]);
    let (mount, staging) = (lab.host("mount"), lab.host("staging"));
    for dir in ["/tmp", "/var/tmp", "/run", "/dev/shm", "/home/dba", "/opt"] {
        staging.script(&format!("echo kept > {dir}/file"));
    }
    run(staging.command("dba", "sh").args(["-c", "setsid sleep 3600 > /dev/null 2>&1 &"]));
    let sleeps = || {
        let mut found = staging.processes();
        found.retain(|process| process.arguments == "sleep 3600");
        found
    };
    until("the process", || sleeps().len() == 1);
    let before = sleeps();
    assert_eq!(before[0].uid, staging.user("dba").uid);
    assert_ne!(before[0].pid, before[0].inner_pid);
    let (first, carried) = (staging.init(), lab.bytes("mount", "staging"));

    let begin = Instant::now();
    staging.reboot();
    eprintln!("rebooted in {:?}", begin.elapsed());
    assert_ne!(staging.init(), first);
    assert_eq!(sleeps(), []);
    let begin = |pid: i32| fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    assert_ne!(begin(before[0].pid), b"sleep\x003600\0", "it is gone from the machine as well");
    for (dir, kept) in [
        ("/tmp", false),
        ("/run", false),
        ("/dev/shm", false),
        ("/var/tmp", true),
        ("/home/dba", true),
        ("/opt", true),
    ] {
        assert_eq!(staging.path(format!("{dir}/file")).exists(), kept, "{dir}");
    }
    let answer = run(&mut crate::ssh(mount, "dba", "ops@staging", "hostname"));
    assert_eq!(stdout(&answer), "staging");
    assert!(lab.bytes("mount", "staging") > carried, "figures go on over a reboot");

    // A process that is killed from outside.
    run(staging.command("dba", "sh").args(["-c", "setsid sleep 3600 > /dev/null 2>&1 &"]));
    until("the process", || sleeps().len() == 1);
    sleeps()[0].signal(Signal::KILL);
    until("its end", || sleeps().is_empty());
}

#[test]
fn a_small_disk_gets_full_and_grows() {
    if !possible() {
        return;
    }
    let plan = HostPlan::new("staging").disk("/var/tmp", 8 << 20).disk("/srv", 1 << 20);
    let lab = Lab::with([plan.disk_options("/home", "noexec,nr_inodes=200")]);
    let staging = lab.host("staging");
    let write = |megabytes: &str| {
        let mut head = staging.command("dba", "sh");
        head.args(["-c", &format!("head -c {megabytes}M /dev/zero > /var/tmp/file")]);
        head
    };
    assert_eq!(staging.free("/var/tmp"), 8 << 20);
    assert_eq!(staging.free("/srv"), 1 << 20);
    assert!(failure(&mut write("9")).contains("No space left on device"));
    assert_eq!(staging.free("/var/tmp"), 0);
    staging.resize("/var/tmp", 32 << 20);
    run(&mut write("9"));
    assert_eq!(staging.free("/var/tmp"), 23 << 20);
    staging.reboot();
    assert_eq!(staging.free("/var/tmp"), 23 << 20);
    staging.resize("/var/tmp", 9 << 20);
    assert_eq!(staging.free("/var/tmp"), 0, "shrunk to what it holds, it is full");

    // The other kinds of a bad disk.
    staging.script("cp /bin/true /home/dba/true");
    assert!(failure(&mut staging.command("dba", "/home/dba/true")).contains("Permission denied"));
    let files = "for i in $(seq 300); do : > file$i || exit 1; done";
    let full = failure(staging.command("dba", "sh").args(["-c", files]));
    assert!(full.contains("No space left on device"), "{full}");
}

#[test]
fn a_host_reads_what_is_shared_with_it() {
    if !possible() {
        return;
    }
    let dir = Scratch::new();
    fs::create_dir(dir.join("repo")).unwrap();
    fs::write(dir.join("repo/file"), "shared").unwrap();
    let with = HostPlan::new("with").share(&dir.join("repo"), "/var/tmp/deep/repo");
    let with = with.program(&std::env::current_exe().unwrap());
    let lab = Lab::with([HostPlan::new("without"), with]);
    let host = lab.host("with");
    assert_eq!(fs::read_to_string(host.path("/var/tmp/deep/repo/file")).unwrap(), "shared");
    let refused = failure(host.command("root", "touch").arg("/var/tmp/deep/repo/file"));
    assert!(refused.contains("Read-only file system"), "{refused}");
    let name = std::env::current_exe().unwrap();
    let listed = run(host.command("dba", name.file_name().unwrap()).args(["--list"]));
    assert!(stdout(&listed).contains("a_host_reads_what_is_shared_with_it"));
    assert!(!lab.host("without").path("/var/tmp/deep").exists());
    host.reboot();
    assert_eq!(fs::read_to_string(host.path("/var/tmp/deep/repo/file")).unwrap(), "shared");
}

#[test]
fn two_labs_at_once_do_not_meet() {
    if !possible() {
        return;
    }
    let make = || {
        let lab = Lab::new(&["mount", "staging"]);
        lab.host("mount").script("echo this > /home/dba/which");
        lab
    };
    let (one, two) = std::thread::scope(|scope| {
        let (one, two) = (scope.spawn(make), scope.spawn(make));
        (one.join().unwrap(), two.join().unwrap())
    });
    assert_eq!(one.host("mount").address(), two.host("mount").address());
    one.host("mount").script("echo one > /home/dba/which");
    let which = |lab: &Lab| {
        let mut ssh = crate::ssh(lab.host("staging"), "ops", "dba@mount", "cat which");
        stdout(&run(&mut ssh))
    };
    assert_eq!((which(&one).as_str(), which(&two).as_str()), ("one", "this"));
    one.cut("mount", "staging");
    drop(one);
    assert_eq!(which(&two), "this");
}
