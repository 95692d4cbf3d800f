//! The accounts of a host: those of the machine's system, and ordinary users that exist in the host alone.

use std::path::PathBuf;

use crate::user::User;

/// First user id of a lab's users; each host has its own range, as real hosts do that know nothing of each other.
const FIRST_UID: usize = 3000;
/// Users that one host can have.
const PER_HOST: usize = 100;

/// The three files of a host's accounts database.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Accounts {
    pub passwd: String,
    pub group: String,
    pub shadow: String,
}

impl Accounts {
    /// Takes the system's accounts out of the machine's files and adds `users`, each with a group of its own and
    /// without a password.
    pub fn new(passwd: &str, group: &str, host: usize, users: &[String]) -> Self {
        assert!(users.len() <= PER_HOST, "too many users: {users:?}");
        let (mut passwd, mut group) = (of_system(passwd), of_system(group));
        for (number, name) in users.iter().enumerate() {
            let id = FIRST_UID + host * PER_HOST + number;
            passwd += &format!("{name}:x:{id}:{id}::/home/{name}:/bin/bash\n");
            group += &format!("{name}:x:{id}:\n");
        }
        // No password matches `*`; `!` would lock the account for ssh too.
        let names = passwd.lines().filter_map(|line| line.split(':').next());
        let shadow = names.map(|name| format!("{name}:*:20000:0:99999:7:::\n")).collect();
        Self { passwd, group, shadow }
    }
}

/// Returns the lines whose id, the third field, is none of an ordinary user's (`/etc/login.defs`: from 1000 on).
fn of_system(text: &str) -> String {
    let id = |line: &&str| line.split(':').nth(2)?.parse::<u32>().ok();
    let lines =
        text.lines().filter(|line| id(line).is_some_and(|id| !(1000..60_000).contains(&id)));
    lines.map(|line| format!("{line}\n")).collect()
}

/// Finds a user and his home directory in the text of a passwd file.
pub(super) fn find(passwd: &str, name: &str) -> Option<(User, PathBuf)> {
    let fields = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let found = fields.into_iter().find(|fields| fields.len() == 7 && fields[0] == name)?;
    let (uid, gid) = (found[2].parse().ok()?, found[3].parse().ok()?);
    Some((User { name: name.into(), uid, gid }, found[5].into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_system_and_adds_users() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\njoe:x:1000:1000::/home/joe:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n";
        let group = "root:x:0:\nusers:x:100:joe\njoe:x:1000:\n";
        let made = Accounts::new(passwd, group, 2, &["dba".into(), "ops".into()]);
        assert_eq!(made.group, "root:x:0:\nusers:x:100:joe\ndba:x:3200:\nops:x:3201:\n");
        let (user, home) = find(&made.passwd, "ops").unwrap();
        assert_eq!((user.uid, user.gid, home), (3201, 3201, "/home/ops".into()));
        assert_eq!((find(&made.passwd, "joe"), find(&made.passwd, "op")), (None, None));
        assert!(find(&made.passwd, "nobody").is_some());
        assert_eq!(made.shadow.lines().count(), 4);
    }
}
