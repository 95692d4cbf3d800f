//! The cables between hosts: each pair has one of its own, so that it can be cut, slowed and counted alone.
//!
//! A cable is a bridge with two ports on the lab's floor, and each port's other side is an interface of a host,
//! named after the host at the far end. Cutting takes a port out of the bridge: both hosts see a carrier, and
//! their packets vanish. Neighbours are fixed, so that nobody is told "unreachable" either. What filters and
//! counts lies on the floor; hosts have nothing of it and keep it over a reboot.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::floor::{Floor, feed};

/// Least bytes that a slowed link passes at once; the kernel hands over packets of up to 64 KiB.
const LEAST_BURST: u64 = 128 << 10;

/// All cables of a lab. Hosts are numbers here.
#[derive(Debug)]
pub(super) struct Links {
    floor: Arc<Floor>,
    names: Vec<String>,
    state: Mutex<State>,
}

/// What was done to the cables, and what they carried. Pairs are (from, to) unless they name a cable, which is
/// (lower, higher).
#[derive(Debug, Default)]
struct State {
    attached: BTreeSet<usize>,
    cut: BTreeSet<(usize, usize)>,
    rates: BTreeMap<(usize, usize), u64>,
    blocked: BTreeMap<(usize, usize), Blocked>,
    /// Bytes that went through ports which are gone.
    carried: BTreeMap<(usize, usize), u64>,
}

/// Which packets a firewall between two hosts lets vanish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blocked {
    /// Those that open a TCP connection to another port than 22.
    New,
    /// All of TCP but what comes from port 22 or goes there.
    All,
}

impl Links {
    /// Lays the cables between hosts of these names; none is plugged in yet.
    pub fn lay(floor: &Arc<Floor>, names: Vec<String>) -> Self {
        let mut script = "ip -batch - <<END\n".to_owned();
        for (a, b) in (0..names.len()).flat_map(|b| (0..b).map(move |a| (a, b))) {
            let cable = cable(a, b);
            let _ = writeln!(
                script,
                "link add name {cable} type bridge mcast_snooping 0\nlink set {cable} up"
            );
        }
        floor.script(&(script + "END\n"));
        Self { floor: floor.clone(), names, state: Mutex::default() }
    }

    /// Plugs all cables of a host into the network namespace of its process `init`.
    pub fn attach(&self, host: usize, init: i32) {
        let mut state = self.state();
        let (mut floor, mut inside) = (String::new(), "link set lo up\n".to_owned());
        let own = address(host);
        let _ = writeln!(inside, "address add {own}/32 dev lo");
        for (peer, name) in self.others(host) {
            let (port, far) = (port(host, peer), address(peer));
            let (own_mac, far_mac) = (mac(host, peer), mac(peer, host));
            let _ = writeln!(
                floor,
                "link add name {port} type veth peer name {name} address {own_mac} netns {init}\nlink set {port} up"
            );
            if !state.cut.contains(&ordered(host, peer)) {
                let _ = writeln!(floor, "link set {port} master {}", cable(host, peer));
            }
            let _ = writeln!(
                inside,
                "address add {own} peer {far} dev {name}\nlink set {name} up\n\
                 neighbour replace {far} lladdr {far_mac} nud permanent dev {name}"
            );
        }
        self.floor.script(&format!("ip -batch - <<END\n{floor}END\n"));
        let mut command = Command::new("nsenter");
        command.args(["--target", &init.to_string(), "--net", "ip", "-batch", "-"]);
        feed(&mut command, &inside);
        state.attached.insert(host);
        for ((from, to), rate) in &state.rates {
            if *to == host {
                self.set_rate(*from, *to, Some(*rate));
            }
        }
    }

    /// Pulls all cables of a host out of it: whatever it still says is heard by nobody.
    pub fn detach(&self, host: usize) {
        let mut state = self.state();
        let mut batch = String::new();
        for (peer, _) in self.others(host) {
            *state.carried.entry((peer, host)).or_default() += self.count(peer, host);
            let _ = writeln!(batch, "link delete {}", port(host, peer));
        }
        state.attached.remove(&host);
        self.floor.script(&format!("ip -batch - <<END\n{batch}END\n"));
    }

    /// Lets everything between two hosts vanish from now on, or not any more.
    pub fn cut(&self, a: usize, b: usize, cut: bool) {
        let mut state = self.state();
        let link = ordered(a, b);
        let changed = if cut { state.cut.insert(link) } else { state.cut.remove(&link) };
        if changed {
            let mut batch = String::new();
            for (host, peer) in [(a, b), (b, a)] {
                if state.attached.contains(&host) {
                    let master =
                        if cut { "nomaster".into() } else { format!("master {}", cable(a, b)) };
                    let _ = writeln!(batch, "link set {} {master}", port(host, peer));
                }
            }
            self.floor.script(&format!("ip -batch - <<END\n{batch}END\n"));
        }
    }

    /// Limits what a link carries to `rate` bytes per second in this direction, or not any more.
    pub fn limit(&self, from: usize, to: usize, rate: Option<u64>) {
        let mut state = self.state();
        let before = match rate {
            Some(rate) => state.rates.insert((from, to), rate),
            None => state.rates.remove(&(from, to)),
        };
        if before != rate && state.attached.contains(&to) {
            self.set_rate(from, to, rate);
        }
    }

    fn set_rate(&self, from: usize, to: usize, rate: Option<u64>) {
        let port = port(to, from);
        self.floor.script(&match rate {
            Some(rate) => format!(
                "tc qdisc replace dev {port} root tbf rate {}bit burst {} latency 50ms\n",
                rate * 8,
                (rate / 50).max(LEAST_BURST)
            ),
            None => format!("tc qdisc delete dev {port} root\n"),
        });
    }

    /// Lets TCP packets vanish on their way `from` one host `to` another, or none any more.
    pub fn block(&self, from: usize, to: usize, what: Option<Blocked>) {
        let mut state = self.state();
        let pair = (from, to);
        match what {
            Some(what) => state.blocked.insert(pair, what),
            None => state.blocked.remove(&pair),
        };
        self.floor.script(&format!("nft -f - <<END\n{}END\n", firewall(&state.blocked)));
    }

    /// Returns the bytes that have arrived over a link in this direction, by the kernel's figures.
    pub fn bytes(&self, from: usize, to: usize) -> u64 {
        let state = self.state();
        let now = if state.attached.contains(&to) { self.count(from, to) } else { 0 };
        state.carried.get(&(from, to)).copied().unwrap_or(0) + now
    }

    /// Returns what the port before a host has handed to it.
    fn count(&self, from: usize, to: usize) -> u64 {
        let path = format!("/sys/class/net/{}/statistics/tx_bytes", port(to, from));
        let text = fs::read_to_string(self.floor.path(&path));
        text.unwrap_or_else(|err| panic!("{path}: {err}")).trim().parse().expect("a number")
    }

    fn others(&self, host: usize) -> impl Iterator<Item = (usize, &str)> {
        let names = self.names.iter().map(String::as_str).enumerate();
        names.filter(move |(number, _)| *number != host)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the address of a host, the same in every lab: no lab reaches another one.
pub(super) fn address(host: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, u8::try_from(host + 1).expect("a small lab"))
}

/// Returns the name of a host's end of a cable, on the floor.
fn port(host: usize, peer: usize) -> String {
    format!("p{host}-{peer}")
}

fn cable(a: usize, b: usize) -> String {
    let (low, high) = ordered(a, b);
    format!("w{low}-{high}")
}

fn ordered(a: usize, b: usize) -> (usize, usize) {
    (a.min(b), a.max(b))
}

/// Returns the hardware address of a host's interface towards `peer`.
fn mac(host: usize, peer: usize) -> String {
    format!("02:00:00:00:{host:02x}:{peer:02x}")
}

/// Returns the whole rule set for `nft`; it takes the place of the one before in one step.
fn firewall(blocked: &BTreeMap<(usize, usize), Blocked>) -> String {
    let mut rules = String::new();
    for ((from, to), what) in blocked {
        let what: &[_] = match what {
            Blocked::New => &["tcp dport != 22 tcp flags & (syn | ack) == syn drop"],
            // Not one rule: nft makes a single comparison of two `!=` for ports that lie side by side.
            Blocked::All => {
                &["tcp dport 22 accept", "tcp sport 22 accept", "meta l4proto tcp drop"]
            }
        };
        for rule in what {
            let _ = writeln!(rules, "oifname {} {rule}", port(*to, *from));
        }
    }
    format!(
        "table bridge lab\ndelete table bridge lab\n\
         table bridge lab {{ chain forward {{\ntype filter hook forward priority 0\n{rules}}}\n}}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_firewall_names_the_port_before_the_blocked_host() {
        let rules = firewall(&[((0, 1), Blocked::New), ((2, 1), Blocked::All)].into());
        assert!(
            rules.contains("oifname p1-0 tcp") && rules.contains("oifname p1-2 tcp"),
            "{rules}"
        );
        assert!(!firewall(&BTreeMap::new()).contains("drop"));
    }
}
