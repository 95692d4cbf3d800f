//! Who asks, and what he may do: known by his Unix account and groups, as the kernel says (SO_PEERCRED, SO_PEERGROUPS).
//!
//! On the account's own socket everybody who can open it may do everything: it lies in a 0700 directory. On a team's socket that is so
//! for root, the service's account and the members of its group; all others need a rule ([`crate::rules`]), and see their own
//! sessions only.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pgthaw_postgres::os_user::OsUser;
use pgthaw_session::request::Requester;
use tokio::net::UnixStream;

use crate::configuration::Configuration;
use crate::rules::Rule;

/// How long an account's groups are believed to keep their names.
const NAMES_LIMIT: Duration = Duration::from_secs(60);
/// Groups that an account may be in (Linux: NGROUPS_MAX).
const GROUPS_MOST: usize = 65_536;

/// What the kernel says of the other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Peer {
    /// Its account.
    pub uid: u32,
    /// Its groups, the main one first.
    pub groups: Vec<u32>,
}

impl Peer {
    /// Who is at the other end of `stream`. Somebody of whom nothing is known may do what nobody may: nothing.
    pub fn of(stream: &UnixStream) -> Self {
        peer(stream).unwrap_or(Self { uid: u32::MAX, groups: Vec::new() })
    }
}

fn peer(stream: &UnixStream) -> io::Result<Peer> {
    let credentials = rustix::net::sockopt::socket_peercred(stream)?;
    let mut groups = vec![credentials.gid.as_raw()];
    groups.extend(peer_groups(stream)?);
    Ok(Peer { uid: credentials.uid.as_raw(), groups })
}

/// The other end's supplementary groups when it connected (unix(7), SO_PEERGROUPS, since Linux 4.13).
fn peer_groups(stream: &UnixStream) -> io::Result<Vec<u32>> {
    let mut groups = vec![0u32; 256];
    loop {
        let mut bytes = u32::try_from(groups.len() * 4).unwrap_or(u32::MAX);
        // SAFETY: the buffer is as long as `bytes` says, and both live through the call.
        let done = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        let count = bytes as usize / 4;
        if done == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let err = io::Error::last_os_error();
        if err.raw_os_error() != Some(libc::ERANGE) || count > GROUPS_MOST {
            return Err(err);
        }
        groups.resize(count, 0);
    }
}

/// What somebody may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rights {
    /// Everything, with everybody's sessions.
    Everything,
    /// What one of these rules allows, with his own sessions.
    Rules(Vec<Rule>),
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// His account.
    pub account: Requester,
    /// What he may do.
    pub rights: Rights,
    /// Whether he came through a team's socket.
    pub team: bool,
}

impl Caller {
    /// Whether the session of `requester` is his to see and to steer.
    pub fn owns(&self, requester: Option<&Requester>) -> bool {
        match self.rights {
            Rights::Everything => true,
            Rights::Rules(_) => requester.is_some_and(|asked| asked.uid == self.account.uid),
        }
    }

    /// His rules; nothing when he needs none.
    pub fn rules(&self) -> Option<&[Rule]> {
        match &self.rights {
            Rights::Everything => None,
            Rights::Rules(rules) => Some(rules),
        }
    }
}

/// What names are known of an account, and since when.
type Names = (Instant, String, Vec<String>);

/// Tells who callers are.
#[derive(Debug)]
pub struct Callers {
    configuration: Arc<Configuration>,
    names: Mutex<BTreeMap<Peer, Names>>,
}

impl Callers {
    /// By the rules of this configuration.
    pub fn new(configuration: Arc<Configuration>) -> Self {
        Self { configuration, names: Mutex::default() }
    }

    /// Who `peer` is, and what he may do on a socket of this kind. Asks the account database.
    pub fn identify(&self, peer: &Peer, team: bool) -> Caller {
        let (user, groups) = self.names(peer);
        let own = rustix::process::geteuid().as_raw();
        let trusted = !team
            || peer.uid == 0
            || peer.uid == own
            || self
                .configuration
                .service
                .group
                .as_ref()
                .is_some_and(|group| groups.contains(group));
        let rights = match trusted {
            true => Rights::Everything,
            false => {
                let rules = self.configuration.allow.iter();
                Rights::Rules(rules.filter(|rule| rule.is_for(&user, &groups)).cloned().collect())
            }
        };
        Caller { account: Requester { user, uid: peer.uid }, rights, team }
    }

    fn names(&self, peer: &Peer) -> (String, Vec<String>) {
        let known = |names: &BTreeMap<Peer, Names>| match names.get(peer) {
            Some((since, user, groups)) if since.elapsed() < NAMES_LIMIT => {
                Some((user.clone(), groups.clone()))
            }
            _ => None,
        };
        if let Some(names) = known(&self.names.lock().unwrap_or_else(PoisonError::into_inner)) {
            return names;
        }
        let uid = peer.uid.to_string();
        let user = OsUser::look_up(&uid).map_or(uid, |user| user.name);
        let groups = group_names(&peer.groups);
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.insert(peer.clone(), (Instant::now(), user.clone(), groups.clone()));
        (user, groups)
    }
}

/// Names of groups, as the account database says (getent(1)); one without a name is left out.
fn group_names(ids: &[u32]) -> Vec<String> {
    if ids.is_empty() {
        return Vec::new(); // getent without a key lists them all
    }
    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
    let Ok(output) = Command::new("getent").arg("group").args(ids).output() else {
        return Vec::new();
    };
    let lines = String::from_utf8_lossy(&output.stdout);
    lines.lines().filter_map(|line| Some(line.split_once(':')?.0.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn callers(text: &str) -> Callers {
        Callers::new(Arc::new(toml::from_str(text).unwrap()))
    }

    #[test]
    fn the_account_and_root_may_do_everything_and_others_what_rules_say() {
        let callers = callers(
            "[service]\ngroup = 'daemon'\n[[allow]]\nuser = 'nobody'\nrepositories = ['prod']\n",
        );
        let own = rustix::process::geteuid().as_raw();
        let peer = |uid, groups: &[u32]| Peer { uid, groups: groups.to_vec() };
        assert_eq!(callers.identify(&peer(own, &[]), true).rights, Rights::Everything);
        assert_eq!(callers.identify(&peer(0, &[]), true).rights, Rights::Everything);
        let nobody = callers.identify(&peer(65534, &[65534]), true);
        assert_eq!(nobody.account.user, "nobody");
        assert_eq!(nobody.rules().unwrap().len(), 1);
        let member = callers.identify(&peer(65534, &[65534, 1]), true);
        assert_eq!(member.rights, Rights::Everything, "group 1 is daemon's");
        assert_eq!(callers.identify(&peer(4_000_000, &[]), true).rules(), Some(&[][..]));
        assert_eq!(callers.identify(&peer(65534, &[]), false).rights, Rights::Everything);
    }

    #[test]
    fn sessions_are_their_requesters() {
        let of = |uid| Requester { user: "u".into(), uid };
        let mut caller = Caller { account: of(7), rights: Rights::Rules(vec![]), team: true };
        assert!(caller.owns(Some(&of(7))));
        assert!(!caller.owns(Some(&of(8))) && !caller.owns(None));
        caller.rights = Rights::Everything;
        assert!(caller.owns(Some(&of(8))) && caller.owns(None));
    }

    #[tokio::test]
    async fn the_kernel_says_who_is_there() {
        let (near, _far) = UnixStream::pair().unwrap();
        let got = peer(&near).unwrap();
        assert_eq!(got.uid, rustix::process::geteuid().as_raw());
        assert_eq!(got.groups[0], rustix::process::getegid().as_raw());
    }
}
