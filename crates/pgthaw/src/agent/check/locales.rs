//! Whether this machine has the locales that the chosen databases were made with: PostgreSQL refuses to open a database
//! whose locale is missing ("database locale is incompatible with operating system").

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, Stdio};

use crate::wire::{BackupDatabase, CheckReport};

/// The installed locales, as `locale -a` lists them, each [`plain`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Locales(BTreeSet<String>);

impl Locales {
    /// Asks for the installed locales; none where nobody can tell (no `locale` program).
    pub fn installed() -> Option<Self> {
        let mut command = Command::new("locale");
        command.arg("-a").env("LC_ALL", "C").env_remove("LOCPATH").stdin(Stdio::null());
        let output = command.stderr(Stdio::null()).output().ok()?;
        output.status.success().then(|| Self::parse(&String::from_utf8_lossy(&output.stdout)))
    }

    fn parse(list: &str) -> Self {
        Self(list.lines().map(plain).collect())
    }

    fn has(&self, name: &str) -> bool {
        matches!(name, "" | "C" | "POSIX") || self.0.contains(&plain(name))
    }
}

/// Writes the character set of a locale's name as glibc compares it: `de_DE.UTF-8` and `de_DE.utf8` are one.
fn plain(name: &str) -> String {
    let (name, modifier) = match name.split_once('@') {
        Some((name, modifier)) => (name, format!("@{modifier}")),
        None => (name, String::new()),
    };
    let Some((language, charset)) = name.split_once('.') else {
        return format!("{name}{modifier}");
    };
    let mut charset: String = charset.chars().filter(char::is_ascii_alphanumeric).collect();
    charset.make_ascii_lowercase();
    if charset.bytes().all(|byte| byte.is_ascii_digit()) {
        charset.insert_str(0, "iso");
    }
    format!("{language}.{charset}{modifier}")
}

/// Judges the locales of the chosen databases.
pub fn judge(report: &mut CheckReport, installed: Option<&Locales>, chosen: &[&BackupDatabase]) {
    let Some(installed) = installed else { return };
    let mut missing: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for database in chosen {
        for locale in [&database.collate, &database.ctype].into_iter().flatten() {
            if !installed.has(locale) {
                missing.entry(locale).or_default().insert(&database.name);
            }
        }
    }
    for (locale, databases) in missing {
        let names: Vec<String> = databases.iter().map(|name| format!("\"{name}\"")).collect();
        let text =
            format!("the locale {locale} of database {} is not installed here", names.join(", "));
        let language = locale.split(['_', '.', '@']).next().unwrap_or(locale);
        let remedy = format!(
            "Debian and Ubuntu: `dpkg-reconfigure locales`; RHEL: `dnf install glibc-langpack-{language}`; \
             elsewhere: `localedef` as root"
        );
        report.error(text, Some(remedy));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compares_names_as_glibc_does() {
        let installed = Locales::parse(
            "C\nC.utf8\nPOSIX\nde_DE.utf8\nde_DE@euro\nen_US.iso88591\nfr_FR.ISO-8859-15@x\n",
        );
        let cases = [
            ("C", true),
            ("", true),
            ("C.UTF-8", true),
            ("de_DE.UTF-8", true),
            ("de_DE.UTF8", true),
            ("de_DE@euro", true),
            ("de_DE", false),
            ("en_US.ISO-8859-1", true),
            ("en_US.8859-1", true),
            ("en_US.UTF-8", false),
            ("fr_FR.iso885915@x", true),
            ("fr_FR.iso885915", false),
        ];
        for (name, want) in cases {
            assert_eq!(installed.has(name), want, "{name}");
        }
        assert!(Locales::default().has("POSIX"));
    }

    #[test]
    fn asks_this_machine() {
        if let Some(installed) = Locales::installed() {
            assert!(!installed.0.is_empty());
        }
    }
}
