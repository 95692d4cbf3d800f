//! SSH between the hosts of a lab: a real sshd on port 22 of each, key pairs of its own for each user of each host,
//! and what a test may spoil of it.
//!
//! At first every user of every host may log in as every user of every other one, and knows the keys of all hosts.

use std::fs;
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;

use super::host::Host;
use super::wait_for;
use crate::user::run;

const SSHD: &str = "/usr/sbin/sshd";
const HOST_KEY: &str = "/etc/ssh/ssh_host_ed25519_key";
const CONFIG: &str = "HostKey /etc/ssh/ssh_host_ed25519_key\n\
    PidFile /run/sshd.pid\n\
    UsePAM no\n\
    PasswordAuthentication no\n\
    KbdInteractiveAuthentication no\n\
    MaxStartups 100\n\
    PrintMotd no\n\
    Subsystem sftp internal-sftp\n";
/// What an ed25519 key begins with, in every file that holds one.
const KEY: &str = "ssh-ed25519 ";

impl Host {
    /// Makes the host's key and those of its users. Nothing of the machine's own SSH is left.
    pub(super) fn make_keys(&self) {
        self.script("rm -rf /etc/ssh\nmkdir /etc/ssh");
        self.write("/etc/ssh/sshd_config", CONFIG, 0o600);
        self.make_host_key();
        for name in &self.plan.users {
            let (user, home) = self.account(name);
            let dir = home.join(".ssh");
            self.make_dir(&dir, 0o700, &user);
            let key = dir.join("id_ed25519");
            make_key(&self.path(&key), &format!("{name}@{}", self.name()));
            for file in [key.clone(), key.with_extension("pub")] {
                user.take(&self.path(file));
            }
        }
    }

    fn make_host_key(&self) {
        make_key(&self.path(HOST_KEY), self.name());
    }

    /// Returns a line of known_hosts for this host's present key, by name and by address, on any port.
    pub fn known_hosts_line(&self) -> String {
        let public = fs::read_to_string(self.path(format!("{HOST_KEY}.pub"))).expect("made by us");
        let key = public.split(' ').take(2).collect::<Vec<_>>().join(" ");
        let (name, address) = (self.name(), self.address());
        format!("{name},{address},[{name}]:*,[{address}]:* {key}\n")
    }

    /// Returns the public keys of all its users, one a line.
    fn public_keys(&self) -> String {
        let key = |name: &String| fs::read_to_string(self.path(ssh_file(name, "id_ed25519.pub")));
        self.plan.users.iter().map(|name| key(name).expect("made by us")).collect()
    }

    /// Replaces the host's key, so that those who knew it must refuse the new one. Sessions go on.
    pub fn change_host_key(&self) {
        for name in [HOST_KEY.to_owned(), format!("{HOST_KEY}.pub")] {
            fs::remove_file(self.path(name)).expect("made by us");
        }
        self.make_host_key();
        self.stop_sshd();
        self.start_sshd();
    }

    /// Lets a user of this host forget what he knew of another one's key.
    pub fn forget_host(&self, user: &str, other: &Host) {
        self.edit(user, "known_hosts", |known| without_host(known, other.name()));
    }

    /// Lets a user of this host know another one's present key.
    pub fn learn_host(&self, user: &str, other: &Host) {
        let line = other.known_hosts_line();
        self.edit(user, "known_hosts", |known| without_host(known, other.name()) + &line);
    }

    /// Refuses a key to whoever wants to be `account` here. `key` is its owner: `ops@staging`.
    pub fn refuse_key(&self, account: &str, key: &str) {
        self.set_key_options(account, key, "#");
    }

    /// Accepts a key as at first.
    pub fn accept_key(&self, account: &str, key: &str) {
        self.set_key_options(account, key, "");
    }

    /// Lets a key run this command line only, whatever its owner asks for.
    pub fn force_command(&self, account: &str, key: &str, command: &str) {
        let quoted = command.replace('"', "\\\"");
        self.set_key_options(account, key, &format!("command=\"{quoted}\" "));
    }

    fn set_key_options(&self, account: &str, key: &str, options: &str) {
        self.edit(account, "authorized_keys", |text| with_options(text, key, options));
    }

    fn edit(&self, user: &str, name: &str, change: impl FnOnce(&str) -> String) {
        let path = self.path(ssh_file(user, name));
        let text = fs::read_to_string(&path).unwrap_or_default();
        fs::write(&path, change(&text)).unwrap_or_else(|err| panic!("{}: {err}", path.display()));
        self.user(user).take(&path);
    }

    /// Starts its sshd; returns when that listens.
    pub fn start_sshd(&self) {
        run(&mut self.command("root", SSHD));
        wait_for("sshd to listen", || self.listens_on_port_22());
    }

    /// Stops its sshd: new connections are refused, sessions go on.
    pub fn stop_sshd(&self) {
        let listener = self.processes().into_iter().find(|process| is_listener(&process.arguments));
        listener.unwrap_or_else(|| panic!("{} has no sshd", self.name())).signal(Signal::TERM);
        wait_for("sshd to end", || !self.listens_on_port_22());
    }

    fn listens_on_port_22(&self) -> bool {
        self.listening().iter().any(|address| address.ends_with(":22"))
    }
}

/// Makes all hosts and users of a lab known to each other.
pub(super) fn introduce(hosts: &[Host]) {
    let known: String = hosts.iter().map(Host::known_hosts_line).collect();
    let authorized: String = hosts.iter().map(Host::public_keys).collect();
    let addresses: String =
        hosts.iter().map(|host| format!("{} {}\n", host.address(), host.name())).collect();
    for host in hosts {
        host.write("/etc/hosts", &format!("127.0.0.1 localhost\n{addresses}"), 0o644);
        for user in &host.plan.users {
            host.edit(user, "known_hosts", |_| known.clone());
            host.edit(user, "authorized_keys", |_| authorized.clone());
        }
    }
}

/// Returns whether these are the arguments of an sshd that waits for connections.
pub(super) fn is_listener(arguments: &str) -> bool {
    arguments.starts_with("sshd:") && arguments.contains("[listener]")
}

fn ssh_file(user: &str, name: &str) -> String {
    format!("/home/{user}/.ssh/{name}")
}

fn make_key(path: &Path, comment: &str) {
    let mut command = Command::new("ssh-keygen");
    command.args(["-q", "-t", "ed25519", "-N", "", "-C", comment, "-f"]);
    run(command.arg(path));
}

/// Returns known_hosts without the lines of a host.
fn without_host(known: &str, name: &str) -> String {
    let begin = format!("{name},");
    let kept = known.lines().filter(|line| !line.starts_with(&begin));
    kept.map(|line| format!("{line}\n")).collect()
}

/// Returns authorized_keys with other options before the key whose comment is `owner`.
///
/// # Panics
/// If there is no such key.
fn with_options(authorized: &str, owner: &str, options: &str) -> String {
    let mut found = false;
    let end = format!(" {owner}");
    let mut changed = String::new();
    for line in authorized.lines() {
        match line.rfind(KEY).filter(|_| line.ends_with(&end)) {
            Some(at) => {
                found = true;
                changed.extend([options, &line[at..], "\n"]);
            }
            None => changed.extend([line, "\n"]),
        }
    }
    assert!(found, "no key of {owner} in:\n{authorized}");
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_one_key_come_and_go() {
        let keys = "ssh-ed25519 AAAA ops@a\nssh-ed25519 BBBB dba@a\n";
        let forced = with_options(keys, "dba@a", "command=\"true\" ");
        assert_eq!(forced, "ssh-ed25519 AAAA ops@a\ncommand=\"true\" ssh-ed25519 BBBB dba@a\n");
        let refused = with_options(&forced, "dba@a", "#");
        assert_eq!(refused, "ssh-ed25519 AAAA ops@a\n#ssh-ed25519 BBBB dba@a\n");
        assert_eq!(with_options(&refused, "dba@a", ""), keys);
    }

    #[test]
    fn forgets_one_host_only() {
        let known = "a,10.0.0.1 ssh-ed25519 A\nab,10.0.0.2 ssh-ed25519 B\n";
        assert_eq!(without_host(known, "a"), "ab,10.0.0.2 ssh-ed25519 B\n");
    }
}
