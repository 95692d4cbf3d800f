//! Who may ask a team's server for what: decided here, without I/O.
//!
//! A request is allowed when one rule of the caller's allows all of it. Root and the service's group need no rule. What a rule cannot
//! express (directories, programs and accounts of the other machines, a repository by its path) is theirs alone.

use pgthaw_session::ExportRequest;
use pgthaw_session::request::matches_pattern;
use serde::Deserialize;

/// What members of a group, or one account, may ask for. `*` and `?` stand for any text and any character.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Rule {
    /// The Unix group.
    pub group: Option<String>,
    /// The account.
    pub user: Option<String>,
    /// Names of repositories.
    pub repositories: Vec<String>,
    /// Names of databases; `--all` needs `*`.
    #[serde(default)]
    pub databases: Vec<String>,
    /// Names of staging servers; `mount-server` is the server's own machine.
    #[serde(default)]
    pub staging: Vec<String>,
    /// Targets: `caller` is the machine of whoever asks, `HOST:DIR` a directory of another host, `/DIR` one of the server's machine;
    /// `*` alone is anything.
    #[serde(default)]
    pub targets: Vec<String>,
    /// Whether `globals.sql` may hold the roles' password hashes.
    #[serde(default)]
    pub role_passwords: bool,
}

/// What rules call the server's own machine.
pub const MOUNT_SERVER: &str = "mount-server";
/// What rules call the machine of whoever asks.
pub const CALLER: &str = "caller";

impl Rule {
    /// Refuses a rule that allows nobody anything.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn refuse_nonsense(&self) -> Result<(), String> {
        match (&self.group, &self.user) {
            (None, None) => Err("a rule ([[allow]]) names neither group nor user".into()),
            _ if self.repositories.is_empty() => {
                Err("a rule ([[allow]]) names no repositories".into())
            }
            _ => Ok(()),
        }
    }

    /// Whether the rule is for this account.
    pub fn is_for(&self, user: &str, groups: &[String]) -> bool {
        let group = self.group.as_ref().is_none_or(|group| groups.contains(group));
        group && self.user.as_ref().is_none_or(|name| name == user)
    }

    /// Whether the rule allows looking at the backups of `repository`.
    pub fn allows_repository(&self, repository: &str) -> bool {
        any(&self.repositories, repository)
    }

    /// Whether the rule allows asking for `database`.
    pub fn allows_database(&self, database: &str) -> bool {
        any(&self.databases, database)
    }

    /// Whether one of the rule's targets, which name a kind of place with their form, allows this one: `caller`, `HOST:DIR` or `/DIR`.
    fn allows_target(&self, destination: Option<Destination>) -> bool {
        let Some(destination) = destination else { return false };
        let allows = |pattern: &String| match (destination, pattern.as_str()) {
            (_, "*") => true,
            (Destination::Caller, pattern) => pattern == CALLER,
            (Destination::Host(host, path), pattern) => {
                pattern.split_once(':').is_some_and(|(hosts, paths)| {
                    !hosts.contains('/')
                        && matches_pattern(hosts, host)
                        && matches_pattern(paths, path)
                })
            }
            (Destination::Here(path), pattern) => {
                pattern.starts_with('/') && matches_pattern(pattern, path)
            }
        };
        self.targets.iter().any(allows)
    }

    /// What of `asked` the rule does not allow.
    fn refusal(&self, asked: &Asked) -> Option<String> {
        let request = asked.request;
        if !self.allows_repository(asked.repository) {
            return Some(format!("repository `{}`", asked.repository));
        }
        if request.all && !self.databases.iter().any(|pattern| pattern == "*") {
            return Some("all databases (--all)".into());
        }
        if let Some(name) = request.databases.iter().find(|name| !self.allows_database(name)) {
            return Some(format!("database `{name}`"));
        }
        let staging = request.staging.as_deref().unwrap_or(MOUNT_SERVER);
        // A host that is really called so is not the server's own machine.
        if request.staging.as_deref() == Some(MOUNT_SERVER) || !any(&self.staging, staging) {
            return Some(format!("staging server `{staging}`"));
        }
        if !self.allows_target(asked.destination()) {
            return Some(format!("target `{}`", asked.target()));
        }
        (request.globals && request.role_passwords && !self.role_passwords)
            .then(|| "password hashes of roles (--no-role-passwords leaves them out)".into())
    }
}

fn any(patterns: &[String], name: &str) -> bool {
    patterns.iter().any(|pattern| matches_pattern(pattern, name))
}

/// A request as it was asked, before names became paths and hosts.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Name of the repository.
    pub repository: &'a str,
    /// The request.
    pub request: &'a ExportRequest,
}

/// Where a dump is to go, as rules see it.
#[derive(Debug, Clone, Copy)]
enum Destination<'a> {
    /// The machine of whoever asks.
    Caller,
    /// A directory of another machine; where it is relative, below the one that the configuration names.
    Host(&'a str, &'a str),
    /// A directory of the server's machine.
    Here(&'a str),
}

impl<'a> Asked<'a> {
    /// The destination; none for a path that no pattern can be about: one with `..`, by which a pattern could be left, one that is not
    /// UTF-8, or a relative one on this machine.
    fn destination(&self) -> Option<Destination<'a>> {
        let request: &'a ExportRequest = self.request;
        if request.target_caller.is_some() {
            return request.target_host.is_none().then_some(Destination::Caller);
        }
        let path = request.target.to_str()?;
        let inside = path.split('/').all(|part| part != "..");
        match &request.target_host {
            _ if !inside => None,
            Some(host) => Some(Destination::Host(host, path)),
            None => path.starts_with('/').then_some(Destination::Here(path)),
        }
    }
}

impl Asked<'_> {
    /// The target as rules name it.
    pub fn target(&self) -> String {
        match (&self.request.target_caller, &self.request.target_host) {
            (Some(_), _) => CALLER.into(),
            (None, Some(host)) => format!("{host}:{}", self.request.target.display()),
            (None, None) => self.request.target.display().to_string(),
        }
    }
}

/// Says what refuses `asked` to somebody whose rules are `rules`; nothing when it is allowed.
pub fn refusal(rules: &[Rule], asked: &Asked) -> Option<String> {
    let request = asked.request;
    let reserved = [
        ("--pg-bin", request.pg_bin.is_some()),
        ("--os-user", request.os_user.is_some()),
        ("--superuser", request.superuser.is_some()),
        ("--preload", !request.preload.is_empty()),
        ("--dump-dir", request.dump_dir.is_some()),
        ("--work-dir", request.work_dir.is_some()),
        ("--keep-dump", request.keep_dump),
        ("--allow-unisolated", request.allow_unisolated),
        (
            "--read-from",
            request.read_from_staging.as_ref().is_some_and(|path| !path.as_os_str().is_empty()),
        ),
    ];
    if let Some((option, _)) = reserved.iter().find(|(_, given)| *given) {
        return Some(format!("option {option} of a server that others share"));
    }
    let mut refusals = rules.iter().map(|rule| rule.refusal(asked));
    // The rule that comes closest says the most; the first one will do where none fits the repository.
    let first = refusals.next().unwrap_or_else(|| Some("anything".into()))?;
    let mut best = first;
    for refusal in refusals {
        let refusal = refusal?;
        if best.starts_with("repository") {
            best = refusal;
        }
    }
    Some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str) -> Rule {
        toml::from_str(text).unwrap()
    }

    fn crm_team() -> Rule {
        rule(
            "group = 'crm-team'\nrepositories = ['prod']\ndatabases = ['crm', 'sales*']\n\
             staging = ['db-stage']\ntargets = ['caller', 'files:/srv/exports/*']\n",
        )
    }

    fn request() -> ExportRequest {
        serde_json::from_value(serde_json::json!({
            "repository": { "name": "prod", "path": "" },
            "databases": ["crm"],
            "staging": "db-stage",
            "target_caller": { "name": "ann@laptop", "id": "1" },
            "target": "/home/ann/monday",
            "jobs": 1, "globals": true, "role_passwords": false,
        }))
        .unwrap()
    }

    fn refused(rules: &[Rule], change: impl FnOnce(&mut ExportRequest)) -> Option<String> {
        let mut request = request();
        change(&mut request);
        refusal(rules, &Asked { repository: "prod", request: &request })
    }

    #[test]
    fn a_rule_allows_what_it_names_and_nothing_else() {
        let rules = [crm_team()];
        type Change = fn(&mut ExportRequest);
        let cases: [(&str, Change); 18] = [
            ("", |_| {}),
            ("", |r| r.databases.push("sales_2026".into())),
            ("database `hr`", |r| r.databases.push("hr".into())),
            ("all databases", |r| (r.all, r.databases) = (true, vec![])),
            ("staging server `mount-server`", |r| r.staging = None),
            ("staging server `other`", |r| r.staging = Some("other".into())),
            ("password hashes", |r| r.role_passwords = true),
            ("--preload", |r| r.preload.push("lib".into())),
            ("--allow-unisolated", |r| r.allow_unisolated = true),
            ("--pg-bin", |r| r.pg_bin = Some("/tmp/evil".into())),
            ("", |r| {
                (r.target_caller, r.target_host) = (None, Some("files".into()));
                r.target = "/srv/exports/monday".into();
            }),
            ("target `files:/srv/exports/../x`", |r| {
                (r.target_caller, r.target_host) = (None, Some("files".into()));
                r.target = "/srv/exports/../x".into();
            }),
            ("target `/etc`", |r| (r.target_caller, r.target) = (None, "/etc".into())),
            // words of a rule in another place than its own
            ("target `caller`", |r| (r.target_caller, r.target) = (None, "caller".into())),
            ("target `files:/srv/exports/x`", |r| {
                (r.target_caller, r.target) = (None, "files:/srv/exports/x".into());
            }),
            ("target `a:files:/srv/exports/x`", |r| {
                (r.target_caller, r.target_host) = (None, Some("a:files".into()));
                r.target = "/srv/exports/x".into();
            }),
            ("target `caller`", |r| r.target_host = Some("files".into())),
            ("staging server `mount-server`", |r| r.staging = Some("mount-server".into())),
        ];
        for (want, change) in cases {
            match refused(&rules, change) {
                None => assert_eq!(want, ""),
                Some(got) => assert!(!want.is_empty() && got.contains(want), "{want}: {got}"),
            }
        }
        let other = refusal(&rules, &Asked { repository: "hr", request: &request() });
        assert_eq!(other.as_deref(), Some("repository `hr`"));
    }

    #[test]
    fn one_rule_must_allow_all_of_it() {
        let hr = rule(
            "user = 'ann'\nrepositories = ['prod']\ndatabases = ['hr']\nstaging = ['*']\ntargets = ['*']\n",
        );
        let both = [crm_team(), hr];
        assert_eq!(refused(&both, |r| r.databases = vec!["hr".into()]), None);
        let here = rule(
            "user = 'ann'\nrepositories = ['prod']\ndatabases = ['crm']\nstaging = ['mount-server']\ntargets = ['/srv/*']\n",
        );
        let named = |staging: Option<&str>| {
            let staging = staging.map(str::to_owned);
            refused(std::slice::from_ref(&here), |r| {
                (r.target_caller, r.target, r.staging) = (None, "/srv/x".into(), staging);
            })
        };
        assert_eq!(named(None), None);
        assert!(named(Some("mount-server")).is_some(), "an ssh host of that name");
        assert!(refused(&both, |r| r.databases.push("hr".into())).is_some());
        assert!(refused(&[], |_| {}).is_some());
    }

    #[test]
    fn rules_are_for_groups_and_accounts() {
        let groups = ["crm-team".to_owned(), "staff".to_owned()];
        assert!(crm_team().is_for("ann", &groups));
        assert!(!crm_team().is_for("ann", &groups[1..]));
        let both = Rule { user: Some("bob".into()), ..crm_team() };
        assert!(!both.is_for("ann", &groups));
        assert!(both.is_for("bob", &groups));
    }
}
