//! What the words of a command line mean: repositories, targets, sizes, compression.
//!
//! Each function is a value parser for `clap`: its error becomes part of a usage error (exit code 2). Nothing here looks
//! at the file system.

use std::num::NonZeroU64;
use std::path::PathBuf;

use pgthaw_session::limits::{CACHE_MAX, CACHE_MIN, LEASE_MIN, TIME_MAX};

/// The formats of repositories that are read, as `KIND:PATH` names them.
pub const KINDS: [&str; 2] = ["pgbackrest", "basebackup"];

/// `REPO` as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepositoryName {
    /// The format, where it was named.
    pub kind: Option<String>,
    /// Where the repository lies; may be relative.
    pub path: PathBuf,
}

/// Reads `PATH` or `KIND:PATH`.
pub fn repository(text: &str) -> Result<RepositoryName, String> {
    let (kind, path) = match split_at_early_colon(text) {
        None => (None, text),
        Some((kind, path)) if KINDS.contains(&kind) => (Some(kind.to_owned()), path),
        Some((word, _)) => {
            return Err(format!(
                "`{word}:` is no kind of repository that pgthaw reads: name a directory of this machine, `pgbackrest:DIR` \
                 or `basebackup:DIR` (a directory with a colon in its name is written `./{text}`)"
            ));
        }
    };
    if path.is_empty() {
        return Err("it names no directory".into());
    }
    Ok(RepositoryName { kind, path: path.into() })
}

/// Reads the directory that gets an export: `DIR`, `host:DIR`, `user@host:DIR` or `ssh://user@host:port/DIR`.
pub fn target(text: &str) -> Result<pgthaw_link::Place, String> {
    if text.is_empty() {
        return Err("it is empty".into());
    }
    text.parse::<pgthaw_link::Place>().map_err(|err| {
        format!("{err} (a directory with a colon in its name is written `./{text}`)")
    })
}

/// Reads a machine as `ssh` takes it.
pub fn host(text: &str) -> Result<pgthaw_link::Host, String> {
    text.parse().map_err(|err: pgthaw_link::BadHost| err.to_string())
}

/// Which machine reads the repository for a mount elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadFrom {
    /// The mount server, which sends what is asked for.
    MountServer,
    /// The staging server, which sees the repository itself: at this path, or at the same as the mount server.
    Staging(Option<PathBuf>),
}

/// Reads `mount-server`, `staging` or `staging:DIR`.
pub fn read_from(text: &str) -> Result<ReadFrom, String> {
    match (text, text.strip_prefix("staging:")) {
        ("mount-server", _) => Ok(ReadFrom::MountServer),
        ("staging", _) => Ok(ReadFrom::Staging(None)),
        (_, Some(path)) if path.starts_with('/') => {
            Ok(ReadFrom::Staging(Some(PathBuf::from(path).components().collect())))
        }
        (_, Some(path)) => Err(format!("`{path}` is no whole path: write it from `/` on")),
        _ => Err("write mount-server, staging or staging:DIR".into()),
    }
}

/// Reads `OID=DIR` or `OID=none`.
pub fn tablespace(text: &str) -> Result<(u32, Option<PathBuf>), String> {
    let named =
        text.split_once('=').and_then(|(oid, directory)| Some((oid.parse().ok()?, directory)));
    match named {
        Some((oid @ 1.., "none")) => Ok((oid, None)),
        Some((oid @ 1.., directory)) if !directory.is_empty() => Ok((oid, Some(directory.into()))),
        _ => Err("write OID=DIR, as in 16385=/backups/monday/ts_16385".into()),
    }
}

/// Reads a path: any text but none, UTF-8 because it is kept as JSON.
pub fn path(text: &str) -> Result<PathBuf, String> {
    match text {
        "" => Err("it is empty".into()),
        text => Ok(text.into()),
    }
}

/// Reads a name or a pattern: any text but none.
pub fn name(text: &str) -> Result<String, String> {
    match text {
        "" => Err("it is empty".into()),
        text => Ok(text.into()),
    }
}

/// Reads a size in bytes, or with a unit as PostgreSQL and pgBackRest write them: `512MB`, `2 GB`, `64MiB`; all are powers of 1024.
pub fn size(text: &str) -> Result<u64, String> {
    let bad = || format!("`{text}` is no size: write it like 512MB or 2GB");
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(bad()),
    };
    let number: u64 = number.parse().map_err(|_| bad())?;
    match number.checked_mul(1 << shift) {
        Some(0) => Err("a size of 0 is too small".into()),
        Some(bytes) => Ok(bytes),
        None => Err(format!("`{text}` is larger than 64 bits can hold")),
    }
}

/// Reads how long an agent goes on without its server: a server that is started again needs some seconds.
pub fn lease(text: &str) -> Result<u64, String> {
    match seconds(text)? {
        lease @ LEASE_MIN.. => Ok(lease),
        _ => Err(format!("`{text}` is too short: at least 30s are needed")),
    }
}

/// Ports, first and last, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports(pub Option<(u16, u16)>);

/// Reads a range of ports, one port, or `none`.
pub fn ports(text: &str) -> Result<Ports, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.parse(), last.parse()) {
        _ if text == "none" => Ok(Ports(None)),
        (Ok(first @ 1..), Ok(last)) if first <= last => Ok(Ports(Some((first, last)))),
        _ => Err(format!("`{text}` is no range of ports: write it like 47000-47099")),
    }
}

/// Reads bytes per second, with a unit: a bare number means KiB to rsync, and bytes elsewhere.
pub fn rate(text: &str) -> Result<NonZeroU64, String> {
    let per_second = text.strip_suffix("/s").unwrap_or(text);
    let unit = per_second.ends_with(|last: char| last.is_ascii_alphabetic());
    let bytes = size(per_second).ok().filter(|_| unit).and_then(NonZeroU64::new);
    bytes
        .ok_or_else(|| format!("`{text}` is no rate: write it like 10MB, which is 10MB per second"))
}

/// Reads the size of a cache: one that cannot hold a few pages of several files at a time cannot work.
pub fn cache_size(text: &str) -> Result<u64, String> {
    match size(text)? {
        ..CACHE_MIN => Err(format!("`{text}` is too small: at least 1MB is needed")),
        bytes @ ..=CACHE_MAX => Ok(bytes),
        _ => Err(format!("`{text}` is more than the 16TB that a cache may have")),
    }
}

/// Reads a time of at least one second, in seconds, with the units of PostgreSQL's configuration: s (or none), min, h and d.
pub fn seconds(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let unit = match unit.trim_start() {
        "" | "s" => 1,
        "min" => 60,
        "h" => 60 * 60,
        "d" => 24 * 60 * 60,
        _ => 0, // no unit
    };
    let seconds = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    seconds.filter(|seconds| (1..=TIME_MAX).contains(seconds)).ok_or_else(|| {
        format!(
            "`{text}` is no time from 1s to 365d: write a number with s, min, h or d, as in 30min"
        )
    })
}

/// Reads a compression as pg_dump's `-Z` takes it: a level, or `METHOD[:DETAIL]`. Whether the backup's pg_dump knows the
/// method is found out by the check.
pub fn compression(text: &str) -> Result<String, String> {
    let (method, detail) =
        text.split_once(':').map_or((text, None), |(method, detail)| (method, Some(detail)));
    let level = matches!(text.as_bytes(), [b'0'..=b'9']);
    let known = ["gzip", "lz4", "zstd", "none"].contains(&method);
    if level || (known && detail != Some("") && !(method == "none" && detail.is_some())) {
        Ok(text.into())
    } else {
        Err(format!(
            "`{text}` is no compression: write 0 to 9, or gzip, lz4, zstd or none, as in zstd:3"
        ))
    }
}

/// Splits `word:rest` when the colon comes before the first `/`.
fn split_at_early_colon(text: &str) -> Option<(&str, &str)> {
    text.split_once(':').filter(|(word, _)| !word.contains('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_the_units_of_postgresql() {
        let cases = [
            ("90", Some(90)),
            ("90s", Some(90)),
            ("30min", Some(1800)),
            ("2 h", Some(7200)),
            ("1d", Some(86400)),
            ("0", None),
            ("366d", None),
            ("30m", None),
            ("min", None),
            ("-1s", None),
            ("99999999999999999999s", None),
        ];
        for (text, want) in cases {
            assert_eq!(seconds(text).ok(), want, "{text}");
        }
    }

    #[test]
    fn rates_have_a_unit() {
        let cases = [
            ("10MB", 10 << 20),
            ("1.5MB", 0),
            ("500 kB/s", 500 << 10),
            ("1g", 1 << 30),
            ("5000", 0),
            ("0MB", 0),
            ("MB", 0),
            ("", 0),
        ];
        for (text, want) in cases {
            assert_eq!(rate(text).ok(), NonZeroU64::new(want), "{text}");
        }
    }

    #[test]
    fn tablespaces_have_a_directory_or_none() {
        assert_eq!(tablespace("16385=/b/ts=1"), Ok((16385, Some("/b/ts=1".into()))));
        assert_eq!(tablespace("16385=none"), Ok((16385, None)));
        for bad in ["16385", "16385=", "=x", "0=x", "x=/b", "-1=/b"] {
            assert!(tablespace(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ports_are_ranges_that_can_be_listened_on() {
        let cases = [
            ("47000-47099", Some(Some((47000, 47099)))),
            ("8443", Some(Some((8443, 8443)))),
            ("none", Some(None)),
            ("0-10", None),
            ("47099-47000", None),
            ("1-65536", None),
            ("-", None),
            ("", None),
        ];
        for (text, want) in cases {
            assert_eq!(ports(text).ok(), want.map(Ports), "{text}");
        }
    }

    #[test]
    fn repositories_are_paths_or_kinds_with_paths() {
        let cases = [
            ("/backups/prod", Some((None, "/backups/prod"))),
            ("relative/dir", Some((None, "relative/dir"))),
            ("pgbackrest:/var/lib/pgbackrest", Some((Some("pgbackrest"), "/var/lib/pgbackrest"))),
            ("basebackup:monday", Some((Some("basebackup"), "monday"))),
            ("pgbackrest", Some((None, "pgbackrest"))),
            ("/srv/a:b", Some((None, "/srv/a:b"))),
            ("./a:b", Some((None, "./a:b"))),
            ("", None),
            ("pgbackrest:", None),
            ("s3://bucket/prod", None),
            ("barman:/var/lib/barman", None),
            ("db1:/backups", None),
        ];
        for (text, want) in cases {
            let got = repository(text).ok();
            let want = want.map(|(kind, path): (Option<&str>, &str)| RepositoryName {
                kind: kind.map(str::to_owned),
                path: path.into(),
            });
            assert_eq!(got, want, "{text}");
        }
        assert!(repository("s3://bucket").unwrap_err().contains("`s3:` is no kind of repository"));
    }

    #[test]
    fn targets_may_lie_on_other_machines() {
        let host = |text: &str| target(text).map(|place| place.host.map(|host| host.to_string()));
        assert_eq!(host("/srv/10:30"), Ok(None));
        assert_eq!(host("./10:30"), Ok(None));
        assert_eq!(host("ops@files:dir"), Ok(Some("ops@files".into())));
        assert_eq!(host("ssh://ops@files:22/srv"), Ok(Some("ssh://ops@files:22".into())));
        for bad in ["", "-oProxyCommand=x:/srv", "ssh://files", "a b:/srv"] {
            assert!(target(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_have_units() {
        let cases = [
            ("1", Some(1)),
            ("512MB", Some(512 << 20)),
            ("512mb", Some(512 << 20)),
            ("64 MiB", Some(64 << 20)),
            ("2GB", Some(2 << 30)),
            ("8kB", Some(8192)),
            ("3g", Some(3 << 30)),
            ("1TB", Some(1 << 40)),
            ("0", None),
            ("0MB", None),
            ("", None),
            ("MB", None),
            ("-1", None),
            ("1.5GB", None),
            ("10 parrots", None),
            ("99999999999TB", None),
            ("99999999999999999999", None),
        ];
        for (text, want) in cases {
            assert_eq!(size(text).ok(), want, "{text}");
        }
    }

    #[test]
    fn a_cache_holds_something() {
        assert_eq!(cache_size("1MB"), Ok(1 << 20));
        assert!(cache_size("1023kB").unwrap_err().contains("at least 1MB"));
        assert!(cache_size("1").is_err() && cache_size("parrots").is_err());
    }

    #[test]
    fn compression_is_written_as_for_pg_dump() {
        for good in [
            "0",
            "9",
            "gzip",
            "gzip:6",
            "gzip:level=6",
            "lz4",
            "zstd:3",
            "zstd:level=3,long",
            "none",
        ] {
            assert_eq!(compression(good).as_deref(), Ok(good));
        }
        for bad in ["", "10", "-1", "bzip2", "zstd:", "none:1", ":3", "GZIP"] {
            assert!(compression(bad).is_err(), "{bad}");
        }
    }
}
