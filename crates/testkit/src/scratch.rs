//! Directories for tests, which other accounts can enter.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// A directory of mode 0755 that is removed when dropped. Its path is short enough for Unix sockets, and does
/// not look like one of pgthaw's own.
#[derive(Debug)]
pub struct Scratch(TempDir);

impl Scratch {
    /// Makes one below `/var/tmp`, which is a disk nearly everywhere.
    pub fn new() -> Self {
        Self::in_dir(Path::new("/var/tmp"))
    }

    /// Makes one below `parent`.
    pub fn in_dir(parent: &Path) -> Self {
        let dir =
            tempfile::Builder::new().prefix("tk-").tempdir_in(parent).expect("temporary directory");
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755))
            .expect("chmod of a directory of ours");
        Self(dir)
    }

    /// Returns its path.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Returns the path of an entry.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.path().join(name)
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}
