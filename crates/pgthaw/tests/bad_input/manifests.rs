//! Repositories whose own descriptions are damaged, unfinished or lie.

use std::fs;

use crate::lab::{Lab, cut, flip};

fn manifest(label: &str) -> String {
    format!("backup/demo/{label}/backup.manifest")
}

#[test]
fn damaged_descriptions_are_refused_by_name() {
    let full = Lab::full();
    let backup = ["--backup", full.as_str()];
    for name in [manifest(&full).as_str(), "backup/demo/backup.info", "archive/demo/archive.info"] {
        for (how, damage) in
            [("cut", cut as fn(&std::path::Path)), ("flipped", |path| flip(path, None))]
        {
            let lab = Lab::lz4();
            for name in [name.to_owned(), format!("{name}.copy")] {
                damage(&lab.path(&name));
            }
            lab.refuses(
                &format!("{name} {how}"),
                1,
                &backup,
                &["is damaged", name, "so is its copy", "hint: "],
            );
        }
    }
    let lab = Lab::stream();
    flip(&lab.path("backup_manifest"), None);
    lab.refuses("flipped backup_manifest", 1, &[], &["backup_manifest", "damaged"]);
    let lab = Lab::stream();
    cut(&lab.path("backup_manifest"));
    lab.refuses("cut backup_manifest", 1, &[], &["backup_manifest", "truncated"]);
    let lab = Lab::stream();
    fs::write(lab.path("global/pg_control"), vec![0; 8192]).unwrap();
    lab.refuses("pg_control", 1, &[], &["pg_control", "damaged"]);
}

#[test]
fn unfinished_backups_are_refused() {
    let (lab, full) = (Lab::lz4(), Lab::full());
    let made = lab.path("backup/demo/20990101-000000F");
    fs::create_dir(&made).unwrap();
    fs::copy(lab.path(&manifest(&full)), made.join("backup.manifest.copy")).unwrap();
    lab.refuses("no manifest yet", 2, &["--backup", "20990101-000000F"], &["unfinished", &full]);
    // Without --backup it is not taken for the newest.
    let (out, _) = lab.pgthaw.expect(0, &["backups", lab.repository.to_str().unwrap()]);
    assert!(!out.contains("20990101"), "{out}");
    // A finished one that was half removed.
    fs::remove_file(lab.path(&manifest(&full))).unwrap();
    lab.refuses("manifest gone", 1, &["--backup", &full], &["backup.manifest", "missing"]);

    let lab = Lab::stream();
    fs::remove_file(lab.path("backup_manifest")).unwrap();
    fs::remove_file(lab.path("backup_label")).unwrap();
    lab.refuses("neither label nor manifest", 1, &[], &["backup_label"]);
    let said = lab.refuses("no label, again", 1, &[], &["--atomic-snapshot"]);
    assert!(!said.contains("removing"), "never the server's own hint: {said}");
}

/// Lines that a manifest signed by whoever writes the repository may hold.
#[test]
fn manifests_cannot_lead_out_of_the_tree() {
    let full = Lab::full();
    let entry = r#"={"checksum":"587b596f04f7db9c2cad3d6b87dd2b3a05de4f35","repo-size":22,"size":3,"timestamp":1}"#;
    let lines = [
        ("parent", format!("pg_data/../../../etc/passwd{entry}")),
        ("parent in the middle", format!("pg_data/base/../../x{entry}")),
        ("absolute", format!("/etc/passwd{entry}")),
        ("absolute below", format!("pg_data//etc/passwd{entry}")),
        ("dot", format!("pg_data/./x{entry}")),
        ("tablespace", format!("pg_tblspc/../x{entry}")),
        ("another tree", format!("other/x{entry}")),
        (
            "reference",
            format!(
                "pg_data/x{}",
                entry.replace(r#""repo"#, r#""reference":"../../../etc","repo"#)
            ),
        ),
        (
            "size",
            format!("pg_data/x{}", entry.replace(r#""size":3"#, r#""size":9223372036854775807"#)),
        ),
        (
            "larger size",
            format!("pg_data/x{}", entry.replace(r#""size":3"#, r#""size":99999999999999999999"#)),
        ),
        ("negative size", format!("pg_data/x{}", entry.replace(r#""size":3"#, r#""size":-3"#))),
        (
            "impossible ratio",
            format!("pg_data/x{}", entry.replace(r#""size":3"#, r#""size":1000000000000"#)),
        ),
        (
            "stored size",
            format!("pg_data/x{}", entry.replace(r#"size":22"#, r#"size":18446744073709551615"#)),
        ),
        (
            "bundle",
            format!(
                "pg_data/x{}",
                entry.replace(r#""checksum"#, r#""bni":1,"bno":18446744073709551615,"checksum"#)
            ),
        ),
    ];
    let lab = Lab::lz4();
    let good = fs::read_to_string(lab.path(&manifest(&full))).unwrap();
    for (case, line) in lines {
        lab.edit_signed(&manifest(&full), |_| {
            good.replace("[target:file]\n", &format!("[target:file]\n{line}\n"))
        });
        let said = lab.refuses(case, 1, &["--backup", &full], &["backup.manifest", "hint: "]);
        assert!(!said.contains("checksum is"), "{case}: signed wrongly: {said}");
        assert!(!said.contains("root:"), "{case}: {said}");
    }
    // Links of the cluster that lead elsewhere: they are no roots of the mount.
    lab.edit_signed(&manifest(&full), |_| {
        good.replace(
            "[backup:target]\n",
            "[backup:target]\npg_data/etc={\"path\":\"/etc\",\"type\":\"link\"}\n",
        )
    });
    lab.pgthaw.export(
        &lab.repository,
        &["crm"],
        &lab.pgthaw.target("linked"),
        &["--backup", &full],
    );
}

#[test]
fn links_out_of_the_tree_are_not_followed() {
    let full = Lab::full();
    let lab = Lab::lz4();
    let secret = lab.pgthaw.scratch.join("secret");
    fs::write(&secret, "secret").unwrap();
    for name in [format!("backup/demo/{full}/pg_data/PG_VERSION.lz4"), manifest(&full)] {
        let lab = Lab::lz4();
        fs::remove_file(lab.path(&name)).unwrap();
        std::os::unix::fs::symlink(&secret, lab.path(&name)).unwrap();
        let said = lab.refuses(&name, 1, &["--backup", &full], &["leads out", name.as_str()]);
        assert!(!said.contains("`secret`"), "{said}");
    }
    let lab = Lab::stream();
    std::os::unix::fs::symlink("/etc/passwd", lab.path("base/passwd")).unwrap();
    lab.refuses("a link in a base backup", 1, &[], &["/etc/passwd", "leads out"]);
}
