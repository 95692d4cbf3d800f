//! A backup of 100,000 files and an archive of as many segments are no quadratic work.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use pgthaw_source::repository::WalWanted;
use pgthaw_source::{Location, Repository};
use sha1::{Digest, Sha1};

/// Files of the backup, in [`DIRECTORIES`] directories; one in ten is an object of its own, the others lie in a bundle.
const FILES: usize = 100_000;
const DIRECTORIES: usize = 50;
const LABEL: &str = "20261122-101112F";
/// Generous: a busy machine, an unoptimized build. Quadratic work would take minutes.
const LIMIT: Duration = Duration::from_secs(20);

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes an info file with pgBackRest's checksum, and its copy.
fn write_sealed(path: &Path, sections: &[(&str, Vec<(String, String)>)]) {
    let head = [("backrest", vec![("backrest-format".into(), "5".into())])];
    let (mut text, mut json) = (String::new(), String::from("{"));
    for (number, (section, lines)) in head.iter().chain(sections).enumerate() {
        writeln!(text, "[{section}]").unwrap();
        json += if number > 0 { "}," } else { "" };
        write!(json, "\"{section}\":{{").unwrap();
        for (number, (key, value)) in lines.iter().enumerate() {
            writeln!(text, "{key}={value}").unwrap();
            json += if number > 0 { "," } else { "" };
            write!(json, "\"{key}\":{value}").unwrap();
        }
        text.push('\n');
    }
    json += "}}";
    writeln!(text, "[backrest]\nbackrest-checksum=\"{}\"", hex(&Sha1::digest(json))).unwrap();
    fs::write(path, text).unwrap();
}

/// A `pg_control` with the fields that opening a backup reads.
fn control() -> Vec<u8> {
    let mut bytes = vec![0; 8192];
    bytes[0] = 7;
    bytes[12] = 9;
    bytes[48] = 1;
    bytes[208..216].copy_from_slice(&1_234_567.0_f64.to_le_bytes());
    for (index, value) in [8192_u32, 131_072, 8192, 16 << 20].into_iter().enumerate() {
        bytes[216 + 4 * index..220 + 4 * index].copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

#[test]
fn a_hundred_thousand_files() {
    let dir = tempfile::tempdir().unwrap();
    let stanza = dir.path().join("backup/demo");
    let data = stanza.join(LABEL).join("pg_data");
    fs::create_dir_all(data.join("global")).unwrap();
    let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let line = |name: String, bytes: &[u8], more: &str| {
        let sum = hex(&Sha1::digest(bytes));
        (name, format!("{{{more}\"checksum\":\"{sum}\",\"size\":{},\"timestamp\":1}}", bytes.len()))
    };
    let mut files = Vec::new();
    for directory in 0..DIRECTORIES {
        let name = format!("base/{}", 16384 + directory);
        fs::create_dir_all(data.join(&name)).unwrap();
        for file in 0..FILES / DIRECTORIES {
            let path = format!("{name}/{}", 1000 + file);
            let own = file % 10 == 0;
            if own {
                fs::write(data.join(&path), b"x").unwrap();
            }
            let bundle = format!("\"bni\":1,\"bno\":{},", files.len());
            files.push(line(format!("pg_data/{path}"), b"x", if own { "" } else { &bundle }));
        }
    }
    fs::create_dir(stanza.join(LABEL).join("bundle")).unwrap();
    fs::write(stanza.join(LABEL).join("bundle/1"), vec![b'x'; FILES]).unwrap();
    fs::write(data.join("global/pg_control"), control()).unwrap();
    files.push(line("pg_data/global/pg_control".into(), &control(), ""));
    let history = "{\"db-catalog-version\":9,\"db-control-version\":1300,\"db-system-id\":7,\"db-version\":\"15\"}";
    let current = "{\"backup-info-size\":1,\"backup-timestamp-start\":1,\"backup-timestamp-stop\":2,\"backup-type\":\"full\",\"db-id\":1}";
    write_sealed(
        &stanza.join("backup.info"),
        &[("backup:current", vec![pair(LABEL, current)]), ("db:history", vec![pair("1", history)])],
    );
    write_sealed(
        &stanza.join(LABEL).join("backup.manifest"),
        &[
            ("backup", vec![pair("backup-label", &format!("\"{LABEL}\""))]),
            (
                "backup:db",
                vec![
                    pair("db-catalog-version", "9"),
                    pair("db-system-id", "7"),
                    pair("db-version", "\"15\""),
                ],
            ),
            (
                "backup:option",
                vec![pair("option-compress-type", "\"none\""), pair("option-online", "false")],
            ),
            ("target:file", files),
        ],
    );

    let started = Instant::now();
    let location = Location { path: dir.path().into(), ..Location::default() };
    let repository = Repository::open(&location).unwrap();
    let backup = repository.open_backup(None, WalWanted::EndOfBackup).unwrap();
    let took = started.elapsed();
    assert_eq!(backup.map.files.len(), FILES + 1);
    println!("{FILES} files opened in {took:?}");
    assert!(took < LIMIT, "{took:?}");
}

#[test]
fn a_hundred_thousand_segments() {
    const BACKUPS: usize = 200;
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("backup/demo")).unwrap();
    let name = |number: usize| format!("00000001{:08X}{:08X}", number / 256, number % 256);
    let history = |id| {
        format!(
            "{{\"db-catalog-version\":9,\"db-control-version\":1300,{id}:7,\"db-version\":\"15\"}}"
        )
    };
    let backups = (0..BACKUPS).map(|number| {
        let segment = name(number * (FILES / BACKUPS));
        let kept = format!("\"backup-archive-start\":\"{segment}\",\"backup-archive-stop\":\"{segment}\"");
        let line = format!(
            "{{{kept},\"backup-info-size\":1,\"backup-timestamp-start\":1,\"backup-timestamp-stop\":{number},\"backup-type\":\"full\",\"db-id\":1}}"
        );
        (format!("20261122-{number:06}F"), line)
    });
    write_sealed(
        &dir.path().join("backup/demo/backup.info"),
        &[
            ("backup:current", backups.collect()),
            ("db:history", vec![("1".into(), history("\"db-system-id\""))]),
        ],
    );
    let archive = dir.path().join("archive/demo/15-1");
    for directory in 0..FILES.div_ceil(256) {
        fs::create_dir_all(archive.join(&name(directory * 256)[..16])).unwrap();
    }
    write_sealed(
        &dir.path().join("archive/demo/archive.info"),
        &[("db:history", vec![("1".into(), history("\"db-id\""))])],
    );
    let sum = hex(&[7; 20]);
    for number in 0..FILES {
        let name = name(number);
        fs::write(archive.join(&name[..16]).join(format!("{name}-{sum}")), b"").unwrap();
    }

    let started = Instant::now();
    let location = Location { path: dir.path().into(), ..Location::default() };
    let backups = Repository::open(&location).unwrap().backups().unwrap();
    let took = started.elapsed();
    let last = name(FILES - 1);
    assert_eq!(backups.len(), BACKUPS);
    assert!(backups.iter().all(|info| info.archived_until.as_ref().unwrap().segment == last));
    println!("{FILES} segments listed in {took:?}");
    assert!(took < LIMIT, "{took:?}");
}
