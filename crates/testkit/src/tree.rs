//! Whole directory trees: equal or not, copied, given away.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, lchown};
use std::path::Path;
use std::process::Command;

use sha2::{Digest, Sha256};

use crate::user::{User, run};

/// Returns a hash over all below `dir`: paths, kinds, modes, owners, modification times, links, contents.
pub fn tree_hash(dir: &Path) -> String {
    let mut hash = Sha256::new();
    add(&mut hash, dir, Path::new("")).unwrap_or_else(|err| panic!("{}: {err}", dir.display()));
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn add(hash: &mut Sha256, root: &Path, path: &Path) -> io::Result<()> {
    let full = root.join(path);
    let found = fs::symlink_metadata(&full)?;
    hash.update(path.as_os_str().as_bytes());
    let facts = (found.mode(), found.uid(), found.gid(), found.mtime(), found.mtime_nsec());
    hash.update(format!("\0{facts:?}"));
    if found.is_symlink() {
        hash.update(fs::read_link(&full)?.as_os_str().as_bytes());
    } else if found.is_dir() {
        let mut names = fs::read_dir(&full)?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<io::Result<Vec<_>>>()?;
        names.sort();
        hash.update(names.len().to_le_bytes());
        for name in names {
            add(hash, root, &path.join(name))?;
        }
    } else if found.is_file() {
        hash.update(found.len().to_le_bytes());
        let (mut file, mut buffer) = (File::open(&full)?, vec![0; 1 << 16]);
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                count => hash.update(&buffer[..count]),
            }
        }
    }
    Ok(())
}

/// Copies a tree with all its attributes; `to` must not exist.
pub fn copy_tree(from: &Path, to: &Path) {
    run(Command::new("cp")
        .args(["--archive", "--reflink=auto", "--no-target-directory"])
        .arg(from)
        .arg(to));
}

/// Gives a tree to an account.
pub fn chown_tree(user: &User, path: &Path) {
    lchown(path, Some(user.uid), Some(user.gid))
        .unwrap_or_else(|err| panic!("chown {}: {err}", path.display()));
    if fs::symlink_metadata(path).is_ok_and(|found| found.is_dir()) {
        for entry in fs::read_dir(path).unwrap_or_else(|err| panic!("{}: {err}", path.display())) {
            chown_tree(user, &entry.expect("an entry").path());
        }
    }
}
