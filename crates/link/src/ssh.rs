//! The `ssh` command, and what its failures mean.

use std::path::Path;
use std::process::Command;

use crate::host::Host;

/// Seconds that ssh may take to connect.
const CONNECT_SECONDS: u32 = 15;

/// Options of every connection. The user's own configuration, keys, agent and known hosts count; but nobody is asked
/// anything (there is no terminal), no unknown host is accepted whatever the configuration says, and nothing is forwarded.
const OPTIONS: [&str; 9] = [
    "BatchMode=yes",
    "StrictHostKeyChecking=yes",
    "ClearAllForwardings=yes",
    "ForwardX11=no",
    "PermitLocalCommand=no",
    "ServerAliveInterval=10",
    "ServerAliveCountMax=3",
    "RemoteCommand=none",
    "SessionType=default",
];

/// Ciphers that a processor with instructions for AES does three times as fast as the one that `ssh` prefers.
const FAST_CIPHERS: [&str; 2] = ["aes128-gcm@openssh.com", "aes256-gcm@openssh.com"];

/// Returns `ssh` ready to tell its configuration for `host` (`-G`), for [`faster_ciphers`]; it does not connect.
pub(crate) fn configuration(host: &Host) -> Command {
    let mut command = Command::new("ssh");
    command.arg("-G");
    if let Some(port) = host.port() {
        command.args(["-p", &port.to_string()]);
    }
    command.args(["--", host.destination()]);
    command
}

/// Returns the ciphers that the configuration allows (`listing`, as `ssh -G` prints it) in another order: those first that
/// this machine's processor does fastest. None where that changes nothing.
pub(crate) fn faster_ciphers(listing: &str) -> Option<String> {
    let allowed = listing.lines().find_map(|line| line.strip_prefix("ciphers "))?.trim();
    let ciphers = || allowed.split(',');
    let (fast, other): (Vec<_>, Vec<_>) =
        ciphers().partition(|cipher| FAST_CIPHERS.contains(cipher));
    let changes = !fast.is_empty() && !ciphers().eq(fast.iter().chain(&other).copied());
    changes.then(|| [fast, other].concat().join(","))
}

/// Whether this machine's processor has instructions for AES-GCM.
pub(crate) fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("aes") && is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    false
}

/// Returns `ssh` ready to run `script` in the login shell of `host`; with `ciphers` in that order, and with `agent`, the socket of
/// an ssh-agent, by that one's keys alone.
pub(crate) fn command(
    host: &Host,
    script: &str,
    ciphers: Option<&str>,
    agent: Option<&Path>,
) -> Command {
    let mut command = Command::new("ssh");
    command.args(["-T", "-e", "none", "-a"]);
    if let Some(ciphers) = ciphers {
        command.args(["-o", &format!("Ciphers={ciphers}")]);
    }
    if let Some(agent) = agent {
        command.env("SSH_AUTH_SOCK", agent);
        command.args(["-o", "IdentityAgent=SSH_AUTH_SOCK", "-o", "IdentityFile=none"]);
    }
    for option in OPTIONS {
        command.args(["-o", option]);
    }
    command.args(["-o", &format!("ConnectTimeout={CONNECT_SECONDS}")]);
    if let Some(port) = host.port() {
        command.args(["-p", &port.to_string()]);
    }
    // A login shell may be anything; `sh` is not.
    command.args(["--", host.destination(), &format!("exec sh -c {}", quoted(script))]);
    command
}

/// Quotes for a POSIX shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// What ssh says, and what to do about it (messages of OpenSSH's `ssh.c`, `sshconnect.c`, `sshconnect2.c`).
const MEANINGS: [(&str, &str); 12] = [
    ("Could not resolve hostname", "check the host's name; aliases of ~/.ssh/config work, too"),
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "find out why the host's key changed; if that is right, remove the old one with `ssh-keygen -R` and connect once with ssh",
    ),
    (
        "Host key verification failed",
        "connect once by hand with ssh to check and accept the host's key",
    ),
    ("No matching host key", "connect once by hand with ssh to check and accept the host's key"),
    (
        "Permission denied",
        "let `ssh -o BatchMode=yes` to this host work without a question: a key in authorized_keys, and unlocked in ssh-agent if it has a passphrase",
    ),
    (
        "Too many authentication failures",
        "name the right key with IdentityFile and IdentitiesOnly in ~/.ssh/config",
    ),
    ("Connection refused", "start sshd there, or name its port as ssh://host:port"),
    ("Connection timed out", "check that the host is up and that a firewall lets ssh through"),
    ("No route to host", "check that the host is up and reachable from here"),
    ("Network is unreachable", "check this machine's network"),
    ("Connection closed by", "sshd ended the connection; its log on that host says why"),
    ("kex_exchange_identification", "sshd ended the connection; its log on that host says why"),
];

/// Finds the line of `stderr` that tells why ssh failed, and what to do.
pub(crate) fn explain(stderr: &str) -> (String, Option<&'static str>) {
    for (words, hint) in MEANINGS {
        if let Some(line) = stderr.lines().find(|line| line.contains(words)) {
            return (line.trim().trim_matches('@').trim().to_owned(), Some(hint));
        }
    }
    let last = stderr.lines().map(str::trim).rfind(|line| !line.is_empty());
    (last.unwrap_or("ssh said nothing").to_owned(), None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_that_matters_is_found() {
        let cases = [
            (
                "Warning: x\nssh: Could not resolve hostname nohost: Name or service not known\n",
                "ssh: Could not resolve hostname nohost: Name or service not known",
                "aliases",
            ),
            (
                "dba@db: Permission denied (publickey).",
                "dba@db: Permission denied (publickey).",
                "authorized_keys",
            ),
            (
                "@@@@\n@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\n@@@@\nHost key verification failed.\n",
                "WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!",
                "ssh-keygen -R",
            ),
            ("Host key verification failed.", "Host key verification failed.", "by hand"),
        ];
        for (stderr, line, hint) in cases {
            let (found, help) = explain(stderr);
            assert_eq!(found, line);
            assert!(help.unwrap().contains(hint), "{stderr}: {help:?}");
        }
        assert_eq!(explain("odd\n\n"), ("odd".into(), None));
    }

    #[test]
    fn a_host_cannot_become_an_option() {
        let host: Host = "ssh://dba@db1:2222".parse().unwrap();
        let command = command(&host, "it's", Some("one,two"), None);
        let arguments: Vec<_> = command.get_args().map(|a| a.to_str().unwrap()).collect();
        let end = arguments.iter().position(|argument| *argument == "--").unwrap();
        assert_eq!(arguments[end + 1..], ["dba@db1", r"exec sh -c 'it'\''s'"]);
        assert_eq!(arguments[end - 2..end], ["-p", "2222"]);
        assert!(arguments[..end].windows(2).any(|option| option == ["-o", "Ciphers=one,two"]));
        let listing = configuration(&host);
        let arguments: Vec<_> = listing.get_args().map(|a| a.to_str().unwrap()).collect();
        assert_eq!(arguments, ["-G", "-p", "2222", "--", "dba@db1"]);
    }

    #[test]
    fn ciphers_are_only_put_in_another_order() {
        let [small, large] = FAST_CIPHERS;
        let usual = format!("chacha20-poly1305@openssh.com,aes128-ctr,{small},{large}");
        let cases = [
            (&*usual, Some(format!("{small},{large},chacha20-poly1305@openssh.com,aes128-ctr"))),
            ("aes256-ctr,aes256-gcm@openssh.com", Some(format!("{large},aes256-ctr"))),
            ("aes256-gcm@openssh.com,aes128-gcm@openssh.com,aes128-ctr", None),
            ("chacha20-poly1305@openssh.com", None),
        ];
        for (allowed, want) in cases {
            let listing = format!("user dba\nhostname db1\nciphers {allowed}\nmacs x\n");
            assert_eq!(faster_ciphers(&listing), want, "{allowed}");
        }
        assert_eq!(faster_ciphers(""), None);
    }
}
