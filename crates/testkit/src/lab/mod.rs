//! Several hosts on one machine, for what works over a network: each has its own processes, mounts, users, disks,
//! network and sshd, and can crash; each link between two of them can be cut, slowed and counted.
//!
//! Owns namespaces and what is in them; leaves to the test what its hosts run. Everything is inside of namespaces
//! that no name keeps alive and that end with the test's process, also when it is killed: the machine's own
//! network, mounts and accounts are never touched. Needs root, Linux 5.2 and the programs `unshare`, `nsenter`,
//! `setpriv`, `mount`, `ip`, `tc`, `nft`, `sshd` and `ssh-keygen`. Hosts reach each other and nothing else;
//! their TCP is Linux's default (cubic), whatever the machine's own is, unless the kernel lets no network namespace
//! choose it.
//!
//! Start at [`Lab`]; a host is [`Host`], what it is made from [`HostPlan`].

mod accounts;
mod canaries;
mod floor;
mod host;
mod init;
mod leftovers;
mod links;
mod plan;
mod proxy;
mod sockets;
mod ssh;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

pub use host::{Host, HostProcess};
pub use leftovers::HostLeftovers;
pub use plan::HostPlan;
pub use proxy::{Proxy, ProxyOptions};

use canaries::HostCanaries;
use floor::Floor;
use links::{Blocked, Links};

/// Longest time that a daemon gets to start or to end.
const LIMIT: Duration = Duration::from_secs(20);

/// Hosts that are joined by a link for each two of them; all gone when dropped.
///
/// ```no_run
/// use pgthaw_testkit::{HostPlan, Lab, run};
///
/// let staging = HostPlan::new("staging").disk("/var/tmp", 64 << 20);
/// let lab = Lab::with([HostPlan::new("mount"), staging]);
/// let output = run(lab.host("mount").command("dba", "ssh").args(["ops@staging", "hostname"]));
/// assert_eq!(output.stdout, b"staging\n");
/// lab.cut("mount", "staging");
/// lab.host("staging").reboot();
/// lab.mend("mount", "staging");
/// ```
#[derive(Debug)]
pub struct Lab {
    canaries: Mutex<Vec<HostCanaries>>,
    hosts: Vec<Host>,
    links: Arc<Links>,
    floor: Arc<Floor>,
}

impl Lab {
    /// Makes a lab of usual hosts with these names.
    pub fn new(names: &[&str]) -> Self {
        Self::with(names.iter().map(|name| HostPlan::new(name)))
    }

    /// Makes a lab. Returns when every sshd listens.
    pub fn with(plans: impl IntoIterator<Item = HostPlan>) -> Self {
        let plans: Vec<_> = plans.into_iter().collect();
        let shares = plans.iter().flat_map(HostPlan::shares).map(|(from, _)| from.as_path());
        let floor = Arc::new(Floor::lay(&shares.collect::<Vec<_>>()));
        let names = plans.iter().map(|plan| plan.name.clone()).collect();
        let links = Arc::new(Links::lay(&floor, names));
        floor.script(&plans.iter().map(HostPlan::lasting_disks).collect::<String>());
        let hosts = thread::scope(|scope| {
            let mut first_share = 0;
            let mut hosts = Vec::new();
            for (number, plan) in plans.into_iter().enumerate() {
                let (first, floor, links) = (first_share, &floor, &links);
                first_share += plan.shares().len();
                hosts.push(scope.spawn(move || {
                    let host = Host::new(plan, number, first, floor, links);
                    host.make_keys();
                    host
                }));
            }
            hosts
                .into_iter()
                .map(|host| host.join().expect("the host's own words are above"))
                .collect()
        });
        let lab = Self { canaries: Mutex::default(), hosts, links, floor };
        ssh::introduce(&lab.hosts);
        thread::scope(|scope| {
            for host in &lab.hosts {
                scope.spawn(|| host.start_sshd());
            }
        });
        lab
    }

    /// Returns a host.
    ///
    /// # Panics
    /// If the lab has none of that name.
    #[track_caller]
    pub fn host(&self, name: &str) -> &Host {
        let found = self.hosts.iter().find(|host| host.name() == name);
        found.unwrap_or_else(|| panic!("no host {name} in the lab"))
    }

    /// Returns all hosts.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Cuts the link between two hosts: packets vanish both ways, and nobody is told.
    #[track_caller]
    pub fn cut(&self, a: &str, b: &str) {
        self.links.cut(self.host(a).number, self.host(b).number, true);
    }

    /// Mends the link between two hosts.
    #[track_caller]
    pub fn mend(&self, a: &str, b: &str) {
        self.links.cut(self.host(a).number, self.host(b).number, false);
    }

    /// Lets a link carry at most so many bytes per second in each direction, headers included; `None` takes the
    /// limit away.
    #[track_caller]
    pub fn throttle(&self, a: &str, b: &str, bytes_per_second: Option<u64>) {
        let (a, b) = (self.host(a).number, self.host(b).number);
        self.links.limit(a, b, bytes_per_second);
        self.links.limit(b, a, bytes_per_second);
    }

    /// Lets new TCP connections of one host to another one's ports other than 22 vanish, as a firewall does.
    #[track_caller]
    pub fn block_ports(&self, from: &str, to: &str) {
        self.links.block(self.host(from).number, self.host(to).number, Some(Blocked::New));
    }

    /// Lets all TCP packets of one host to another one vanish but those of ssh, as a firewall does that has forgotten its connections.
    #[track_caller]
    pub fn silence_ports(&self, from: &str, to: &str) {
        self.links.block(self.host(from).number, self.host(to).number, Some(Blocked::All));
    }

    /// Undoes [`Lab::block_ports`] and [`Lab::silence_ports`].
    #[track_caller]
    pub fn open_ports(&self, from: &str, to: &str) {
        self.links.block(self.host(from).number, self.host(to).number, None);
    }

    /// Returns the bytes that have arrived over a link in this direction since the lab was made, by the kernel's
    /// figures: Ethernet frames, where many segments may share one header.
    #[track_caller]
    pub fn bytes(&self, from: &str, to: &str) -> u64 {
        self.links.bytes(self.host(from).number, self.host(to).number)
    }

    fn canaries(&self) -> MutexGuard<'_, Vec<HostCanaries>> {
        self.canaries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the pid of the process on which the whole lab depends.
    pub fn pid(&self) -> i32 {
        self.floor.pid()
    }
}

/// Waits until something is so.
///
/// # Panics
/// If it takes longer than [`LIMIT`].
#[track_caller]
fn wait_for(what: &str, is_so: impl Fn() -> bool) {
    let end = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
