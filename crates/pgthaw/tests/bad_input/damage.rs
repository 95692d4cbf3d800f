//! Damage in what is stored: never exit code 0 with other rows than the source's.

use std::fs;

use pgthaw_testkit::Fixture;

use crate::lab::{Lab, cut, flip, index_beside_messages, messages};
use crate::support::assert_equal;

#[test]
fn damaged_table_files_fail_the_export() {
    let (full, file) = (Lab::full(), messages());
    let stored = format!("backup/demo/{full}/pg_data/{file}.lz4");
    let backup = ["--backup", full.as_str()];

    let lab = Lab::lz4();
    flip(&lab.path(&stored), None);
    lab.refuses("flipped in an lz4 file", 1, &backup, &[&file, "hint: "]);
    lab.refuses("verified whole", 1, &["--backup", &full, "--verify-source"], &[&file]);
    cut(&lab.path(&stored));
    lab.refuses("short lz4 file", 1, &backup, &[&file, "bytes"]);
    fs::remove_file(lab.path(&stored)).unwrap();
    lab.refuses("missing lz4 file", 1, &backup, &[&file, "missing"]);

    // In the rows, in a page's head, in the last page.
    let size = fs::metadata(Fixture::get().stream.dir.join(&file)).unwrap().len();
    let last = usize::try_from(size).unwrap() - 3;
    for position in [8192 + 5000, 8192 * 2 + 14, last] {
        let lab = Lab::stream();
        flip(&lab.path(&file), Some(position));
        lab.refuses(&format!("flipped at {position}"), 1, &[], &[&file]);
        if position == last {
            lab.refuses("verified whole", 1, &["--verify-source"], &[&file]);
        }
    }
    let lab = Lab::stream();
    let bytes = fs::read(lab.path(&file)).unwrap();
    fs::write(lab.path(&file), &bytes[..bytes.len() - 8192]).unwrap();
    lab.refuses("a page less", 1, &[], &[&file, "bytes"]);
    // Without a manifest nothing but the page's own checksum tells.
    let lab = Lab::stream();
    fs::remove_file(lab.path("backup_manifest")).unwrap();
    flip(&lab.path(&file), Some(8192 + 5000));
    lab.refuses("without manifest", 1, &[], &["crm", "invalid page", &file, "damaged page"]);
}

/// What no dump reads is found by `--verify-source`: before the database gets its name, and without holding back the others.
#[test]
fn damage_that_no_dump_meets_is_found_when_all_is_verified() {
    let (lab, full, index) = (Lab::lz4(), Lab::full(), index_beside_messages());
    let stored = lab.path(&format!("backup/demo/{full}/pg_data/{index}.lz4"));
    let end = usize::try_from(fs::metadata(&stored).unwrap().len()).unwrap() - 100;
    flip(&stored, Some(end));
    let backup = ["--backup", full.as_str()];
    lab.pgthaw.export(&lab.repository, &["crm"], &lab.pgthaw.target("unread"), &backup);
    let target = lab.pgthaw.target("verified");
    let both = ["-d", "crm", "-d", "sales", "--backup", &full, "--verify-source"];
    lab.refuses_into(
        &target,
        "verified whole",
        1,
        &both,
        &[&index, "1 of 2 databases failed: `crm`"],
    );
    assert!(target.join("sales/toc.dat").exists(), "{}", lab.pgthaw.logs());
}

/// No segment of a neighbour is decoded, not even for recovery: first touches after a checkpoint carry full pages. Its
/// maps may be, and the empty forks that unlogged tables are reset to.
#[test]
fn neighbours_are_not_read() {
    let (lab, full) = (Lab::lz4(), Lab::full());
    let repository = lab.repository.display().to_string();
    let databases = lab.pgthaw.json(&["databases", &repository, "--backup", &full]);
    let databases = databases.as_array().unwrap();
    let oid = |name: &str| {
        let found = databases.iter().find(|database| database["name"] == name);
        found.unwrap_or_else(|| panic!("no {name}"))["oid"].to_string()
    };
    let neighbours = ["sales", "warehouse", "empty", pgthaw_testkit::ODD_NAME].map(oid);
    let (mut damaged, mut directories) =
        (0, vec![lab.path(&format!("backup/demo/{full}/pg_data"))]);
    directories.push(lab.path(&format!("backup/demo/{full}/pg_tblspc")));
    while let Some(directory) = directories.pop() {
        for path in fs::read_dir(directory).unwrap().flatten().map(|entry| entry.path()) {
            let is_neighbours =
                |part: &std::ffi::OsStr| neighbours.iter().any(|oid| part == oid.as_str());
            let name = path.file_name().unwrap().to_str().unwrap();
            let is_other_fork = ["_vm", "_fsm", "_init"].iter().any(|fork| name.contains(fork));
            if path.is_dir() {
                directories.push(path);
            } else if !is_other_fork
                && path.parent().and_then(|parent| parent.file_name()).is_some_and(is_neighbours)
            {
                let length = usize::try_from(fs::metadata(&path).unwrap().len()).unwrap();
                fs::write(&path, vec![0; length]).unwrap();
                damaged += 1;
            }
        }
    }
    assert!(damaged > 500, "{damaged} files");
    let target = lab.pgthaw.target("crm");
    lab.pgthaw.export(&lab.repository, &["crm"], &target, &["--backup", &full]);
    assert_equal(&target, &Fixture::get().expected, &["crm"]);
    lab.refuses(
        "one of them",
        1,
        &["-d", "sales", "--backup", &full],
        &["could not be read", "hint: "],
    );
}

#[test]
fn damaged_wal_fails_the_export() {
    let full = Lab::full();
    let archive = "archive/demo/15-1/0000000100000000";
    let at_end = ["--backup", full.as_str()];
    let latest = ["--backup", full.as_str(), "--target-latest"];
    let segment = "000000010000000000000008";

    let lab = Lab::lz4();
    flip(&lab.find(archive, &format!("{segment}-")), None);
    lab.refuses("flipped in the middle", 1, &latest, &[segment]);
    fs::remove_file(lab.find(archive, &format!("{segment}-"))).unwrap();
    lab.refuses("missing in the middle", 1, &latest, &[segment, "missing", "later ones"]);
    // Before the end of the backup nothing of it is needed.
    lab.pgthaw.export(&lab.repository, &["empty"], &lab.pgthaw.target("before"), &at_end);
    let needed = "000000010000000000000006";
    flip(&lab.find(archive, &format!("{needed}-")), None);
    lab.refuses("flipped, needed", 1, &at_end, &[needed]);
    fs::remove_file(lab.find(archive, &format!("{needed}-"))).unwrap();
    lab.refuses("missing, needed", 1, &at_end, &[needed, "missing"]);
}

/// Plain WAL carries no checksum of its own: PostgreSQL takes a damaged record for the end of WAL.
#[test]
fn damaged_plain_wal_fails_the_export() {
    let fixture = Fixture::get();
    let lab = Lab::stream();
    let mut segments: Vec<_> =
        fs::read_dir(lab.path("pg_wal")).unwrap().flatten().map(|entry| entry.path()).collect();
    segments.retain(|path| path.file_name().is_some_and(|name| name.len() == 24));
    segments.sort();
    let label = fs::read_to_string(lab.path("backup_label")).unwrap();
    let start: usize = {
        let (_, rest) = label.split_once("START WAL LOCATION: 0/").unwrap();
        usize::from_str_radix(rest.split(' ').next().unwrap(), 16).unwrap() % (16 << 20)
    };
    flip(&segments[0], Some(start + 3000));
    lab.refuses("before the end of the backup", 1, &[], &[]);

    let archive = lab.pgthaw.scratch.join("archive");
    pgthaw_testkit::copy_tree(&fixture.wal_archive, &archive);
    let mut archived: Vec<_> =
        fs::read_dir(&archive).unwrap().flatten().map(|entry| entry.path()).collect();
    archived.retain(|path| path.file_name().is_some_and(|name| name.len() == 24));
    archived.sort();
    let lab = Lab::stream();
    let options = ["--wal-archive", archive.to_str().unwrap(), "--target-latest"];
    // The last but one, in its second half, so that the backup's end lies before.
    let damaged = &archived[archived.len() - 2];
    let filled = fs::read(damaged).unwrap().iter().rposition(|byte| *byte != 0).unwrap();
    println!("{} is filled up to {filled}", damaged.display());
    flip(damaged, Some(filled / 2 + 4000));
    let words = [damaged.file_name().unwrap().to_str().unwrap(), "damaged"];
    lab.refuses("in the last but one", 1, &options, &words);
}
