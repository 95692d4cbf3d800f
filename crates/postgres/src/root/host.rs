//! What this machine offers to a root: PostgreSQL's programs and libraries, the system's few files. Reads only.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::layout::{Child, Children, Occupied};
use crate::binaries::Binaries;
use crate::os_user::OsUser;

/// Where every Linux keeps programs, libraries and what belongs to them; at the top most are links with merged `/usr`. Nothing
/// else of `/usr` is shown: somebody's cluster may lie in `/usr/local/pgsql/data`.
#[rustfmt::skip]
const SYSTEM: [&str; 21] = [
    "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/libexec",
    "/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32", "/usr/libexec", "/usr/share",
    "/usr/local/bin", "/usr/local/sbin", "/usr/local/lib", "/usr/local/lib64", "/usr/local/libexec", "/usr/local/share",
];

/// Files and directories outside of those that programs read at every start, or that languages in a database need.
/// Nobody's secrets are among them: `/etc/ssl` holds private keys, so only OpenSSL's settings are shown.
const FILES: [&str; 12] = [
    "/etc/ld.so.cache",
    "/etc/alternatives",
    "/etc/localtime",
    "/etc/locale.alias",
    "/etc/ssl/openssl.cnf",
    "/etc/perl",
    "/etc/python3",
    "/etc/R",
    "/etc/tcl",
    "/etc/java",
    // the dictionaries of Debian's `tsearch_data` are links that lead here
    "/var/cache/postgresql/dicts",
    "/etc/ld.so.conf",
];

/// Reads a directory.
type ReadDirectory = dyn Fn(&Path) -> io::Result<Children>;

/// What this machine offers, and how to ask about the rest.
pub struct Host {
    /// Links among the system's directories, with their destinations: `/bin` to `usr/bin`.
    pub links: Vec<(PathBuf, PathBuf)>,
    /// Directories of programs and libraries, and single libraries, with whether each is a directory; none lies in another.
    pub programs: Vec<(PathBuf, bool)>,
    /// Further files, and whether each is a directory.
    pub files: Vec<(PathBuf, bool)>,
    /// Directories and files among them, or in them, that PostgreSQL's programs are read from, by their real paths.
    pub needed: Vec<PathBuf>,
    /// Whether a path is a directory, links followed.
    pub is_directory: Box<dyn Fn(&Path) -> bool>,
    /// What is at a path, links not followed.
    pub occupied: Box<dyn Fn(&Path) -> Occupied>,
    /// What a directory holds.
    pub children: Box<ReadDirectory>,
}

impl Host {
    /// Looks at this machine for `binaries`, if they are known, and for `libraries`, which the server is to preload (as
    /// `shared_preload_libraries` names them). Programs are asked as `user`.
    pub fn look(binaries: Option<&Binaries>, libraries: &[&str], user: Option<&OsUser>) -> Self {
        let (mut links, mut trees) = (Vec::new(), BTreeSet::new());
        for path in SYSTEM.map(PathBuf::from) {
            match fs::read_link(&path) {
                Ok(to) => links.push((path, to)),
                Err(_) if path.is_dir() => _ = trees.insert(path),
                Err(_) => {}
            }
        }
        let (mut directories, mut libraries) = match binaries {
            Some(binaries) => programs(binaries, libraries, user),
            None => (Vec::new(), Vec::new()),
        };
        let needed = directories.iter().chain(&libraries).cloned().collect();
        directories.retain(|path| outside(path));
        libraries.retain(|path| outside(path));
        let mut programs: Vec<PathBuf> = Vec::new();
        // Parents come first in this order.
        trees.extend(directories.into_iter().filter(|path| path.is_dir()));
        trees.extend(libraries.into_iter().filter(|path| path.is_file()));
        for path in trees {
            let shown = |above: &Path| {
                programs.iter().any(|shown| shown == above)
                    || links.iter().any(|(link, _)| link == above)
            };
            if !path.ancestors().any(shown) {
                programs.push(path);
            }
        }
        let programs = programs.into_iter().map(|path| (path.clone(), path.is_dir())).collect();
        let files = FILES.iter().map(PathBuf::from).filter(|path| path.exists());
        let files = files.map(|path| (path.clone(), path.is_dir())).collect();
        Self {
            links,
            programs,
            files,
            needed,
            is_directory: Box::new(Path::is_dir),
            occupied: Box::new(occupied),
            children: Box::new(children),
        }
    }
}

/// Whether a path lies outside of what every Linux has.
fn outside(path: &Path) -> bool {
    path.is_absolute() && !SYSTEM.iter().any(|system| path.starts_with(system))
}

fn occupied(path: &Path) -> Occupied {
    // root of a user namespace above ours is seen as the overflow account (user_namespaces(7))
    const ROOTS: [u32; 2] = [0, 65_534];
    // A link on the way leads out of the tree that is shown: no directory can be made behind it.
    let is_link = |at: &Path| fs::symlink_metadata(at).is_ok_and(|meta| meta.is_symlink());
    if path.ancestors().skip(1).any(is_link) {
        return Occupied::System;
    }
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() && !ROOTS.contains(&meta.uid()) => Occupied::OwnedDirectory,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Occupied::Free,
        _ => Occupied::System,
    }
}

fn children(directory: &Path) -> io::Result<Children> {
    let entry = |entry: io::Result<fs::DirEntry>| {
        let entry = entry?;
        let kind = entry.file_type()?;
        let child = match () {
            () if kind.is_dir() => Child::Directory,
            () if kind.is_file() => Child::File,
            () if kind.is_symlink() => Child::Link(fs::read_link(entry.path())?),
            () => Child::Other,
        };
        Ok((entry.file_name(), child))
    };
    fs::read_dir(directory)?.map(entry).collect()
}

/// Returns the directories that PostgreSQL's programs are read from, and the single libraries that they and `libraries` load.
/// Those of an installation in the system's directories are not asked for: they are root's, and shown anyway.
fn programs(
    binaries: &Binaries,
    libraries: &[&str],
    user: Option<&OsUser>,
) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let (mut directories, mut files) = (vec![binaries.directory.clone()], Vec::new());
    directories.extend(binaries.directory.canonicalize());
    let programs = [&binaries.postgres, &binaries.pg_dump, &binaries.pg_dumpall];
    for program in programs.into_iter().filter_map(|program| program.canonicalize().ok()) {
        directories.extend(program.parent().map(Path::to_owned));
        if outside(&program) {
            files.extend(loaded_by(&program, user));
        }
    }
    let own = directories.iter().filter(|directory| outside(directory));
    let own: Vec<PathBuf> =
        own.flat_map(|directory| installation(directory, binaries.major.number(), user)).collect();
    directories.extend(own);
    for library in libraries.iter().filter(|library| library.starts_with('/')) {
        // PostgreSQL tries a name as it is and with the suffix of libraries (dfmgr.c)
        for path in [PathBuf::from(library), PathBuf::from(format!("{library}.so"))] {
            if path.is_file() {
                files.extend(loaded_by(&path, user));
                files.push(path);
            }
        }
    }
    directories.retain(|path| path.is_absolute() && path.parent().is_some());
    files.retain(|path| path.is_absolute());
    (directories, files)
}

/// Returns the directories of libraries and shared files of an installation whose programs lie in `directory`. It may
/// have been moved: PostgreSQL finds its files from where its programs are, and `pg_config` tells where.
fn installation(directory: &Path, major: u32, user: Option<&OsUser>) -> Vec<PathBuf> {
    let mut config = Command::new(directory.join("pg_config"));
    config.args(["--sharedir", "--pkglibdir", "--libdir"]);
    let told = ask(config, user).unwrap_or_default();
    let told: Vec<PathBuf> =
        told.lines().map(PathBuf::from).filter(|path| path.is_absolute()).collect();
    if !told.is_empty() {
        return told;
    }
    let mut guessed = Vec::new();
    for above in directory.ancestors().skip(1).take(5).filter(|above| above.parent().is_some()) {
        guessed.push(above.join("share/postgresql").join(major.to_string()));
        guessed.push(above.join("share/postgresql"));
        guessed.push(above.join("lib/postgresql").join(major.to_string()));
        guessed.push(above.join("lib/postgresql"));
    }
    if let Some(prefix) = directory.parent().filter(|prefix| prefix.parent().is_some()) {
        guessed.extend(["lib", "lib64", "share"].map(|name| prefix.join(name)));
    }
    guessed.retain(|path| path.is_dir());
    guessed
}

/// Returns the libraries that the loader names for `file`, a program or a library.
fn loaded_by(file: &Path, user: Option<&OsUser>) -> Vec<PathBuf> {
    // The loader lists what it would load instead of running the file (ld.so(8)); where there is none that we know, a program's own
    // is asked by a variable, which a library without one would not heed.
    let loaders = ["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"];
    let listed = match loaders.iter().find(|loader| Path::new(loader).exists()) {
        Some(loader) => {
            let mut list = Command::new(loader);
            list.arg("--list").arg(file);
            ask(list, user)
        }
        None => {
            let mut trace = Command::new(file);
            trace.env("LD_TRACE_LOADED_OBJECTS", "1");
            ask(trace, user)
        }
    };
    named(&listed.unwrap_or_default())
}

/// Reads the loader's list: `libx.so => /path/libx.so (0x…)` or `/lib64/ld-linux.so (0x…)`.
fn named(list: &str) -> Vec<PathBuf> {
    let path = |line: &str| {
        let (before, _) = line.rsplit_once(" (0x")?;
        let path = before.rsplit(" => ").next()?.trim();
        path.starts_with('/').then(|| PathBuf::from(path))
    };
    list.lines().filter_map(path).collect()
}

/// Runs a program and returns what it printed, if it ended well.
fn ask(mut command: Command, user: Option<&OsUser>) -> Option<String> {
    let trace: Vec<_> = command
        .get_envs()
        .filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())))
        .collect();
    command.env_clear().envs(trace).env("LC_ALL", "C").env("PATH", "/usr/bin:/bin");
    command.current_dir("/").stdin(Stdio::null()).stderr(Stdio::null());
    if let Some(user) = user {
        user.run_as(&mut command);
    }
    let output = command.output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_loaders_list() {
        let list = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibpq.so.5 => /opt/pg 15/lib/libpq.so.5 (0x00007f)\n\
                    \tlibnone.so => not found\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n\tstatically linked\n";
        assert_eq!(
            named(list),
            [Path::new("/opt/pg 15/lib/libpq.so.5"), Path::new("/lib64/ld-linux-x86-64.so.2")]
        );
    }

    #[test]
    fn what_root_owns_is_the_systems_and_what_others_own_is_not() {
        let scratch = tempfile::tempdir().unwrap();
        let (file, directory) = (scratch.path().join("file"), scratch.path().join("directory"));
        fs::write(&file, "").unwrap();
        fs::create_dir(&directory).unwrap();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&directory, Some(1234), None).unwrap();
        }
        for path in [Path::new("/usr/lib"), Path::new("/usr/share"), &file] {
            assert_eq!(occupied(path), Occupied::System, "{path:?}");
        }
        assert_eq!(occupied(&directory), Occupied::OwnedDirectory);
        let scratch = scratch.path().canonicalize().unwrap();
        assert_eq!(occupied(&scratch.join("none")), Occupied::Free);
        std::os::unix::fs::symlink(&directory, scratch.join("link")).unwrap();
        assert_eq!(occupied(&scratch.join("link/none")), Occupied::System);
    }

    #[test]
    fn an_installation_that_was_moved_shows_its_own_directories_only() {
        let scratch = tempfile::tempdir().unwrap();
        for directory in ["pg/bin", "pg/lib", "pg/share/postgresql/15", "pg/secrets", "home"] {
            fs::create_dir_all(scratch.path().join(directory)).unwrap();
        }
        let found = installation(&scratch.path().join("pg/bin"), 15, None);
        assert!(found.contains(&scratch.path().join("pg/share/postgresql/15")), "{found:?}");
        assert!(found.contains(&scratch.path().join("pg/lib")));
        assert!(!found.iter().any(|path| path.ends_with("secrets") || path.ends_with("pg")));
    }
}
