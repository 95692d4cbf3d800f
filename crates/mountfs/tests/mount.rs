//! A real mount, compared with what a plain directory does.

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;

use support::{Mounted, Pattern};

#[test]
fn shows_the_tree_and_keeps_writes() {
    let mounted = Mounted::new(Pattern::default(), |tree| {
        tree.directory("data", 1_000_000_000).unwrap();
        tree.file("data/base/1/2619", 7, 20_000, 1_000_000_001).unwrap();
        tree.symlink("data/pg_tblspc/16400", "/elsewhere").unwrap();
    });
    let data = mounted.path().join("data");
    let file = data.join("base/1/2619");
    assert_eq!(fs::metadata(&file).unwrap().mtime(), 1_000_000_001);
    assert_eq!(fs::read(&file).unwrap(), Pattern::default().bytes(7, 0, 20_000));
    assert_eq!(fs::read_link(data.join("pg_tblspc/16400")).unwrap().to_str(), Some("/elsewhere"));
    fs::write(data.join("new"), b"abc").unwrap();
    assert_eq!(fs::read(data.join("new")).unwrap(), b"abc");
    assert!(!data.join("absent").exists());
    assert_eq!(mounted.fs.fault_count(), 0);
}
