//! The C library's locales: which are installed, which a database needs, and how a missing one is made.
//!
//! A server refuses a database whose `LC_COLLATE` or `LC_CTYPE` is not installed, whatever the database's
//! provider is. [`plan_locales`] decides from facts; [`Installed`], [`Sources`] and [`LocaleBuild::build`]
//! look and act. What is built goes into a private directory that the server gets as `LOCPATH`. With that
//! set glibc no longer looks into its archive of locales, so a plan that builds one locale builds all.
//!
//! Sources: glibc's manual ("Locale Names"), `setlocale.c`, `localedef(1)`.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::os_user::OsUser;

/// Where packages put the sources of locales.
const SOURCES: &str = "/usr/share/i18n";

/// Returns a locale's name in the form glibc compares: the character set in lower case, letters and digits only.
fn normalised(name: &str) -> String {
    let (rest, modifier) = match name.split_once('@') {
        Some((rest, modifier)) => (rest, Some(modifier)),
        None => (name, None),
    };
    let mut text = match rest.split_once('.') {
        Some((language, charset)) => format!("{language}.{}", normalised_charset(charset)),
        None => rest.to_string(),
    };
    if let Some(modifier) = modifier {
        text = format!("{text}@{modifier}");
    }
    text
}

/// As glibc's `_nl_normalize_codeset`.
fn normalised_charset(charset: &str) -> String {
    let plain: String = charset
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .map(|c| c.to_ascii_lowercase())
        .collect();
    if !plain.is_empty() && plain.bytes().all(|b| b.is_ascii_digit()) {
        format!("iso{plain}")
    } else {
        plain
    }
}

/// Returns whether a name is safe as a file's name and an argument.
fn is_plain(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_.@-+".contains(&b);
    !name.is_empty()
        && name.len() <= 128
        && name.bytes().all(plain)
        && !name.starts_with(['.', '-'])
}

/// The locales that the C library can use here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Installed(BTreeSet<String>);

impl Installed {
    /// Asks `locale -a`.
    ///
    /// # Errors
    /// If it cannot be run.
    pub fn here() -> io::Result<Self> {
        let output =
            Command::new("locale").arg("-a").env_remove("LOCPATH").stdin(Stdio::null()).output()?;
        let names = String::from_utf8_lossy(&output.stdout);
        match output.status.success() {
            true => Ok(Self::from_names(names.lines())),
            false => Err(io::Error::other(format!("`locale -a`: {}", output.status))),
        }
    }

    /// Takes the names as `locale -a` prints them.
    pub fn from_names<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        Self(names.into_iter().map(|name| normalised(name.trim())).collect())
    }

    /// Returns whether a database with this locale can be opened. `C` and `POSIX` always can.
    pub fn contains(&self, name: &str) -> bool {
        is_builtin(name) || self.0.contains(&normalised(name))
    }
}

fn is_builtin(name: &str) -> bool {
    matches!(name, "C" | "POSIX")
}

/// What locales can be built from here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sources {
    /// Whether `localedef` is there.
    pub localedef: bool,
    /// The names of definitions, such as `de_DE`.
    pub definitions: BTreeSet<String>,
    /// The names of character sets by their normalised form: `utf8` to `UTF-8`.
    pub charsets: BTreeMap<String, String>,
    /// The character sets of locales whose names have none, such as `de_DE` to `ISO-8859-1`.
    pub defaults: BTreeMap<String, String>,
}

impl Sources {
    /// Looks where packages put them. What is not there is empty.
    pub fn here() -> Self {
        let names = |directory: &str| {
            let entries = std::fs::read_dir(Path::new(SOURCES).join(directory))
                .into_iter()
                .flatten()
                .flatten();
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect::<Vec<_>>()
        };
        let charset = |file: String| file.strip_suffix(".gz").map(String::from).unwrap_or(file);
        let supported =
            std::fs::read_to_string(Path::new(SOURCES).join("SUPPORTED")).unwrap_or_default();
        Self {
            localedef: Command::new("localedef")
                .arg("--version")
                .stdin(Stdio::null())
                .output()
                .is_ok_and(|output| output.status.success()),
            definitions: names("locales").into_iter().collect(),
            charsets: names("charmaps")
                .into_iter()
                .map(charset)
                .map(|name| (normalised_charset(&name), name))
                .collect(),
            defaults: parse_supported(&supported),
        }
    }
}

/// Reads the lines `de_DE ISO-8859-1` of glibc's list; those with a character set in the name say nothing new.
fn parse_supported(text: &str) -> BTreeMap<String, String> {
    let lines = text.lines().filter_map(|line| line.trim().split_once(' '));
    lines
        .filter(|(name, _)| !name.contains('.'))
        .map(|(name, charset)| (name.into(), charset.trim().into()))
        .collect()
}

/// A locale to build.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LocaleBuild {
    /// Its name as the databases have it.
    pub name: String,
    /// The definition it is built from.
    pub definition: String,
    /// The character set it is built for.
    pub charset: String,
}

/// A locale that a database needs, that is not installed and cannot be built.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingLocale {
    /// The database that needs it.
    pub database: String,
    /// The locale.
    pub locale: String,
    /// What the operator can do about it.
    pub remedy: String,
}

/// What to do about the locales of some databases.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalePlan {
    /// To be built into the directory that becomes `LOCPATH`; empty if nothing is missing.
    pub build: Vec<LocaleBuild>,
    /// Certain errors.
    pub missing: Vec<MissingLocale>,
}

/// Decides what to do about the locales of these databases: each with its name, `LC_COLLATE` and `LC_CTYPE`. Locales that
/// could not be read are left out.
pub fn plan_locales<'a>(
    databases: impl IntoIterator<Item = (&'a str, [Option<&'a str>; 2])>,
    installed: &Installed,
    sources: &Sources,
) -> LocalePlan {
    let mut needed: Vec<(&str, &str)> = Vec::new();
    for (database, locales) in databases {
        for locale in locales.into_iter().flatten() {
            let entry = (database, locale);
            if !is_builtin(locale) && !needed.contains(&entry) {
                needed.push(entry);
            }
        }
    }
    let mut plan = LocalePlan::default();
    if needed.iter().all(|(_, locale)| installed.contains(locale)) {
        return plan;
    }
    let mut build = BTreeSet::new();
    for (database, locale) in needed {
        match recipe(locale, sources) {
            Some(recipe) => drop(build.insert(recipe)),
            // glibc 2.35 and later have this one as a directory or built in: LOCPATH does not hide it
            None if installed.contains(locale) && normalised(locale) == "C.utf8" => {}
            None => plan.missing.push(MissingLocale {
                database: database.into(),
                locale: locale.into(),
                remedy: remedy(locale),
            }),
        }
    }
    if plan.missing.is_empty() {
        plan.build = build.into_iter().collect();
    }
    plan
}

/// Returns how to build a locale, if its sources are there.
fn recipe(name: &str, sources: &Sources) -> Option<LocaleBuild> {
    if !sources.localedef || !is_plain(name) {
        return None;
    }
    let (rest, modifier) =
        name.split_once('@').map_or((name, None), |(rest, modifier)| (rest, Some(modifier)));
    let (language, charset) =
        rest.split_once('.').map_or((rest, None), |(language, charset)| (language, Some(charset)));
    let definition =
        modifier.map_or_else(|| language.to_string(), |modifier| format!("{language}@{modifier}"));
    let charset = match charset {
        Some(charset) => sources.charsets.get(&normalised_charset(charset))?,
        None => sources.defaults.get(&definition)?,
    };
    sources.definitions.contains(&definition).then(|| LocaleBuild {
        name: name.into(),
        definition,
        charset: charset.clone(),
    })
}

fn remedy(locale: &str) -> String {
    let language = locale.split(['_', '.', '@']).next().unwrap_or(locale);
    format!(
        "Debian and Ubuntu: apt install locales (then it is built for this export alone), or add {locale} to /etc/locale.gen and run locale-gen; \
         RHEL, Rocky, Alma: dnf install glibc-langpack-{language}"
    )
}

/// Why a locale could not be built.
#[derive(Debug, thiserror::Error)]
pub enum LocaleError {
    /// `localedef` could not be run.
    #[error("run `localedef` to build the locale {name}")]
    Run {
        /// The locale.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// `localedef` did not make it.
    #[error("`localedef` did not build the locale {name}: {message}")]
    Failed {
        /// The locale.
        name: String,
        /// Its last words.
        message: String,
    },
}

impl LocaleError {
    /// Returns what the operator can do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Run { .. } => {
                "localedef is part of glibc's own packages (libc-bin, glibc-common)".into()
            }
            Self::Failed { name, .. } => remedy(name),
        }
    }
}

impl LocaleBuild {
    /// Builds the locale as `user` into `directory`, which `user` can write and which is to become `LOCPATH`.
    ///
    /// Building it again does no harm. Returns the locale's own directory.
    ///
    /// # Errors
    /// [`LocaleError`] with `localedef`'s words.
    pub fn build(&self, directory: &Path, user: &OsUser) -> Result<PathBuf, LocaleError> {
        let target = directory.join(normalised(&self.name));
        let mut command = Command::new("localedef");
        command
            .args(["--no-archive", "--quiet", "-i", &self.definition, "-f", &self.charset])
            .arg(&target);
        command.stdin(Stdio::null()).current_dir("/").env("LC_ALL", "C").env_remove("I18NPATH");
        user.run_as(&mut command);
        let output = command
            .output()
            .map_err(|source| LocaleError::Run { name: self.name.clone(), source })?;
        // 1 means warnings only (`localedef(1)`): many definitions cause some
        let made = matches!(output.status.code(), Some(0 | 1))
            && target.join("LC_COLLATE").exists()
            && target.join("LC_CTYPE").exists();
        let message = || {
            let text = String::from_utf8_lossy(&output.stderr);
            text.lines().last().map_or_else(|| output.status.to_string(), String::from)
        };
        if made {
            Ok(target)
        } else {
            Err(LocaleError::Failed { name: self.name.clone(), message: message() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sources() -> Sources {
        Sources {
            localedef: true,
            definitions: ["de_DE", "de_DE@euro", "en_US", "ru_RU"].map(String::from).into(),
            charsets: [
                ("utf8", "UTF-8"),
                ("iso88591", "ISO-8859-1"),
                ("iso885915", "ISO-8859-15"),
                ("koi8r", "KOI8-R"),
            ]
            .map(|(key, name)| (key.into(), name.into()))
            .into(),
            defaults: parse_supported(
                "de_DE ISO-8859-1\nde_DE.UTF-8 UTF-8\nde_DE@euro ISO-8859-15\n",
            ),
        }
    }

    #[test]
    fn compares_names_as_glibc_does() {
        let installed =
            Installed::from_names(["C.utf8", "de_DE.utf8", "de_DE@euro", "en_US.iso88591"]);
        let cases = [
            ("C", true),
            ("POSIX", true),
            ("C.UTF-8", true),
            ("de_DE.UTF-8", true),
            ("de_DE.utf8", true),
            ("de_DE.UTF8", true),
            ("en_US.ISO-8859-1", true),
            ("en_US.88591", true),
            ("de_DE@euro", true),
            ("de_DE", false),
            ("de_DE.UTF-8@euro", false),
            ("de_AT.UTF-8", false),
            ("de_de.UTF-8", false),
            ("", false),
        ];
        for (name, want) in cases {
            assert_eq!(installed.contains(name), want, "{name}");
        }
    }

    #[test]
    fn finds_the_recipe_of_a_locale() {
        let cases = [
            ("de_DE.UTF-8", Some(("de_DE", "UTF-8"))),
            ("de_DE.utf8", Some(("de_DE", "UTF-8"))),
            ("de_DE", Some(("de_DE", "ISO-8859-1"))),
            ("de_DE@euro", Some(("de_DE@euro", "ISO-8859-15"))),
            ("de_DE.UTF-8@euro", Some(("de_DE@euro", "UTF-8"))),
            ("ru_RU.KOI8-R", Some(("ru_RU", "KOI8-R"))),
            ("ru_RU", None),
            ("ru_RU.CP1251", None),
            ("fr_FR.UTF-8", None),
            ("../../x.UTF-8", None),
            ("-i.UTF-8", None),
        ];
        for (name, want) in cases {
            let found = recipe(name, &sources());
            assert_eq!(
                found.as_ref().map(|recipe| (recipe.definition.as_str(), recipe.charset.as_str())),
                want,
                "{name}"
            );
        }
        assert_eq!(recipe("de_DE.UTF-8", &Sources { localedef: false, ..sources() }), None);
    }

    #[test]
    fn plans_for_databases() {
        let installed = Installed::from_names(["C.utf8", "en_US.utf8"]);
        type Database = (&'static str, [Option<&'static str>; 2]);
        let plan = |databases: &[Database], sources: &Sources| {
            plan_locales(databases.iter().copied(), &installed, sources)
        };
        let built = |plan: &LocalePlan| {
            plan.build.iter().map(|build| build.name.clone()).collect::<Vec<_>>()
        };
        let c = ("c", [Some("C"), Some("POSIX")]);
        let english = ("english", [Some("en_US.UTF-8"), Some("en_US.UTF-8")]);
        let german = ("german", [Some("de_DE.UTF-8"), Some("de_DE.UTF-8")]);
        let plain = ("plain", [Some("C.UTF-8"), Some("C.UTF-8")]);
        let french = ("french", [Some("fr_FR.UTF-8"), Some("C")]);
        let unknown = ("unknown", [None, None]);

        let nothing = plan(&[c, english, plain, unknown], &Sources::default());
        assert_eq!(nothing, LocalePlan::default(), "all are installed");
        let both = plan(&[english, german, plain], &sources());
        assert_eq!(
            built(&both),
            ["de_DE.UTF-8", "en_US.UTF-8"],
            "LOCPATH hides the installed one too"
        );
        let impossible = plan(&[german, french, english], &sources());
        assert!(impossible.build.is_empty(), "nothing is built in vain");
        let missing = &impossible.missing[..];
        assert_eq!(missing.len(), 1);
        assert_eq!(
            (missing[0].database.as_str(), missing[0].locale.as_str()),
            ("french", "fr_FR.UTF-8")
        );
        assert!(
            missing[0].remedy.contains("glibc-langpack-fr")
                && missing[0].remedy.contains("apt install locales")
        );
    }

    proptest! {
        #[test]
        fn no_name_panics(name in ".{0,30}") {
            let _ = (normalised(&name), recipe(&name, &sources()), remedy(&name));
            let _ = parse_supported(&name);
        }
    }
}
