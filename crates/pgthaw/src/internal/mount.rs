//! The child that serves one mount: it reads and decodes the backup, keeps what the cluster writes, and answers the kernel.
//!
//! It is told what to serve on standard input: a line with a [`MountTask`], then the map ([`super::source::MountSource`]),
//! then one [`MountCommand`] per line. It answers with one [`MountEvent`] per line. The end of its standard input ends it:
//! it lives no longer than the agent that started it.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use pgthaw_mountfs::{Fault, FaultKind, FileSystem, Lower, Owner, ServeOptions, Tree, TreeError};
use pgthaw_mover::{Met, Parts, meet};
use pgthaw_source::map::BackupMap;
use pgthaw_source::reader::{Coverage, ReadError, Reader};
use pgthaw_source::store::{LinkStatus, LocalStore, ObjectStore, RemoteOptions, RemoteStore};
use serde::{Deserialize, Serialize};

use super::source::{MountSource, database_of, with_causes};
use super::wal::{BackupWal, WalTablespaces};
use crate::attach::handing::{Handed, take_over, widen};

/// Threads that answer the kernel.
const FUSE_THREADS: usize = 4;
/// Threads that decode.
const POOL_THREADS: usize = 4;

/// What to serve.
#[derive(Debug, Serialize, Deserialize)]
pub struct MountTask {
    /// Descriptor number of the mounted FUSE device, which the agent hands over.
    pub device: i32,
    /// Where it is mounted; tablespace links lead there.
    pub mountpoint: PathBuf,
    /// Where the cluster's writes go.
    pub layer_directory: PathBuf,
    /// Who owns everything in the mount: user id, group id.
    pub owner: (u32, u32),
    /// Bytes of decoded pages kept in memory.
    pub cache_bytes: u64,
    /// The timeline that is recovered.
    pub timeline: u32,
    /// The Unix socket on which connections for reads arrive, where the repository is on another machine.
    pub reads_socket: Option<PathBuf>,
    /// Seconds that a read waits for a repository that cannot be reached.
    pub stall_timeout: u64,
    /// Bytes of the map that follow.
    pub map_bytes: u64,
}

/// What the agent asks of a running mount.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MountCommand {
    /// Tell how much was read and verified.
    Report,
    /// Read and verify every file of these databases, and of the shared catalogs, whole.
    Verify {
        /// Their OIDs.
        databases: Vec<u32>,
    },
    /// Look through the WAL that replay will read for tablespaces that it makes.
    Tablespaces {
        /// The last record that is replayed, as `X/X`, where that is known.
        until: Option<String>,
    },
    /// Look for WAL after the end of recovery: whether something between was missing or damaged.
    LaterWal {
        /// Where the last replayed record begins, as `X/X`.
        after: String,
    },
    /// Make directories, and allow links to tablespaces beside those of the map.
    Provide {
        /// Paths in the mount, such as `tablespaces/16385`; those above are made too.
        directories: Vec<String>,
        /// OID of each tablespace, and where its link `data/pg_tblspc/OID` may lead; an OID may come several times.
        links: Vec<(u32, Vec<u8>)>,
    },
}

/// What a mount tells.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MountEvent {
    /// It answers from now on.
    Ready,
    /// Something was answered with an error, or could not be kept.
    Fault {
        /// What happened to which file.
        message: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// The answer to [`MountCommand::Report`].
    Report(MountReport),
    /// The answer to [`MountCommand::Verify`]: what is wrong, if anything.
    Verified {
        /// One message per file that could not be read or does not match its checksum.
        wrong: Vec<String>,
    },
    /// The answer to [`MountCommand::Tablespaces`].
    Tablespaces {
        /// What replay will make; or why the WAL cannot be looked through.
        found: Result<WalTablespaces, String>,
    },
    /// The answer to [`MountCommand::LaterWal`].
    LaterWal {
        /// The first valid page of WAL after that, as `X/X`; or why it could not be looked for.
        page: Result<Option<String>, String>,
    },
    /// The answer to [`MountCommand::Provide`].
    Provided {
        /// Why not all of it is there.
        error: Option<String>,
    },
    /// The repository can be reached again (no text), or not, and why and since when.
    Reachable {
        /// Why reads wait.
        waiting: Option<String>,
    },
}

/// What a mount has read so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountReport {
    /// Number of requests answered with an error.
    pub faults: u64,
    /// Files found damaged, whether or not a request has met the damage.
    pub damaged: Vec<DamagedFile>,
    /// Bytes read from the repository.
    pub stored_bytes_read: u64,
    /// Bytes decoded.
    pub decoded_bytes: u64,
    /// Bytes decoded more than once, because the cache was too small.
    pub decoded_again_bytes: u64,
    /// Bytes that the cluster wrote.
    pub layer_bytes: u64,
    /// Per database OID (0: shared catalogs and everything else): how its files were covered.
    pub coverage: Vec<(u32, CoverageCount)>,
}

/// A file of the backup that is not what it was when it was stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedFile {
    /// OID of its database; 0 for shared catalogs and everything else.
    pub database: u32,
    /// Which file, and what is wrong with it.
    pub message: String,
}

/// How many files were covered by what.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoverageCount {
    /// Read whole and equal to the repository's checksum.
    pub whole_file_checksum: u64,
    /// Read in part; PostgreSQL's page checksums cover what was read.
    pub page_checksums: u64,
    /// Read, but the repository knows no checksum of the whole file and the cluster has none of the pages.
    pub none: u64,
    /// Not read.
    pub not_read: u64,
    /// Read and found damaged.
    pub damaged: u64,
}

/// Serves the mount described on standard input until the agent goes or the mount is taken away.
pub fn run() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("{err}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    let mut input = BufReader::new(io::stdin());
    let mut line = String::new();
    input.read_line(&mut line)?;
    let task: MountTask = serde_json::from_str(&line).map_err(io::Error::other)?;
    // SAFETY: the agent hands the device over under this number, and nothing else here owns it.
    let device = unsafe { OwnedFd::from_raw_fd(task.device) };
    rustix::io::fcntl_setfd(&device, rustix::io::FdFlags::CLOEXEC)?;
    let mut bytes = Vec::new();
    input.by_ref().take(task.map_bytes).read_to_end(&mut bytes)?;
    let source: MountSource = postcard::from_bytes(&bytes).map_err(io::Error::other)?;
    drop(bytes);

    let events = Arc::new(Events::default());
    let tree = tree(&source.map, &task.mountpoint)?;
    let databases: Vec<u32> =
        source.map.files.iter().map(|file| database_of(file.path.as_str()).unwrap_or(0)).collect();
    let store: Arc<dyn ObjectStore> = match &task.reads_socket {
        None => Arc::new(LocalStore::open(source.objects)?),
        Some(socket) => remote_store(socket, task.stall_timeout, events.clone())?,
    };
    let reader = Arc::new(Reader::new(store, source.map.files, task.cache_bytes));
    let (uid, gid) = task.owner;
    let told = events.clone();
    let on_fault = Box::new(move |fault: &Fault| {
        told.send(&MountEvent::Fault { message: fault_text(fault), hint: fault_hint(fault) })
    });
    let lower = Arc::new(Backup::new(reader.clone()));
    let fs = Arc::new(FileSystem::new(
        tree,
        lower,
        &task.layer_directory,
        Owner { uid, gid },
        on_fault,
    )?);

    let (service, control, ready) = (fs.clone(), fs, events.clone());
    thread::spawn(move || {
        for line in input.lines() {
            let Ok(line) = line else { break };
            match serde_json::from_str(&line) {
                Ok(MountCommand::Report) => {
                    events.send(&MountEvent::Report(report(&reader, &control, &databases)))
                }
                Ok(MountCommand::Verify { databases: wanted }) => {
                    let (reader, events, databases) =
                        (reader.clone(), events.clone(), databases.clone());
                    thread::spawn(move || {
                        events.send(&MountEvent::Verified {
                            wrong: verify(&reader, &databases, &wanted),
                        })
                    });
                }
                Ok(MountCommand::Tablespaces { until }) => {
                    let found = BackupWal::open(&reader, task.timeline)
                        .and_then(|mut wal| wal.tablespaces(until.as_deref()));
                    events.send(&MountEvent::Tablespaces { found });
                }
                Ok(MountCommand::LaterWal { after }) => {
                    let page = BackupWal::open(&reader, task.timeline)
                        .and_then(|mut wal| wal.later_page(&after));
                    events.send(&MountEvent::LaterWal { page });
                }
                Ok(MountCommand::Provide { directories, links }) => {
                    let provided = provide(&control, &directories, &links);
                    let error = provided.err().map(|err| err.to_string());
                    events.send(&MountEvent::Provided { error });
                }
                Err(_) => break,
            }
        }
        control.abort(); // the agent has gone: nobody waits for an answer any more
        std::process::exit(0);
    });
    let options = ServeOptions { fuse_threads: FUSE_THREADS, pool_threads: POOL_THREADS };
    ready.send(&MountEvent::Ready); // the kernel queues requests until they are read
    pgthaw_mountfs::serve(service, device, options)
}

/// Objects of a repository on another machine: whoever connects to `socket` hands a connection over.
fn remote_store(
    socket: &Path,
    stall_timeout: u64,
    events: Arc<Events>,
) -> io::Result<Arc<RemoteStore>> {
    let listener = UnixListener::bind(socket)?;
    std::fs::set_permissions(socket, PermissionsExt::from_mode(0o600))?;
    let on_change = move |status: &LinkStatus| {
        let waiting = (!status.connected).then(|| {
            let since = jiff::Timestamp::try_from(status.since)
                .map(|since| since.strftime("%H:%M:%S UTC").to_string());
            let why = status.problem.as_deref().map(|why| format!(" ({why})")).unwrap_or_default();
            format!("the repository cannot be reached since {}{why}", since.unwrap_or_default())
        });
        events.send(&MountEvent::Reachable { waiting });
    };
    let options = RemoteOptions::new(Duration::from_secs(stall_timeout));
    let store = Arc::new(RemoteStore::new(options, on_change));
    let connected = store.clone();
    thread::spawn(move || {
        for holder in listener.incoming().flatten() {
            // Whoever has handed over something else is told by the end of his connection.
            let Ok(handed) = take_over(holder) else { continue };
            let store = connected.clone();
            thread::spawn(move || {
                if let Err(err) = use_line(&store, handed) {
                    eprintln!("a connection for reads: {err}");
                }
            });
        }
    });
    Ok(store)
}

/// Meets whoever serves reads at the other end of a line, and reads over the connection that comes of it.
fn use_line(store: &RemoteStore, handed: Handed) -> io::Result<()> {
    let Handed { input, output, holder, .. } = handed;
    widen(&input);
    let end = move || drop(holder.shutdown(std::net::Shutdown::Both)); // its process ends, and with it the line
    let Met { connection, line } = meet(File::from(input), File::from(output), end)?;
    if let Some(line) = line {
        connection.end_with(line);
    }
    let Parts { input, output, close } = connection.into_parts();
    store.connect(input, output, move || close()) // fails only once all is over
}

/// The mounted cluster's tree: the map's, and a link to each tablespace.
fn tree(map: &BackupMap, mountpoint: &std::path::Path) -> io::Result<Tree> {
    let mut tree = Tree::new();
    for directory in &map.directories {
        tree.directory(directory.as_str(), 0).map_err(io::Error::other)?;
        if let Some(oid) =
            directory.as_str().strip_prefix("tablespaces/").filter(|rest| !rest.contains('/'))
        {
            let link = format!("data/pg_tblspc/{oid}");
            tree.symlink(&link, mountpoint.join(directory.as_str())).map_err(io::Error::other)?;
        }
    }
    for (number, file) in map.files.iter().enumerate() {
        tree.file(file.path.as_str(), number, file.size, file.modified)
            .map_err(io::Error::other)?;
    }
    Ok(tree)
}

/// Makes `directories`, and allows the `links` of tablespaces.
fn provide(
    fs: &FileSystem,
    directories: &[String],
    links: &[(u32, Vec<u8>)],
) -> Result<(), TreeError> {
    directories.iter().try_for_each(|path| fs.provide_directory(path))?;
    links.iter().try_for_each(|(oid, destination)| {
        fs.provide_link(&format!("data/pg_tblspc/{oid}"), destination)
    })
}

/// A fault for people.
fn fault_text(fault: &Fault) -> String {
    let Fault { path, offset, kind, error } = fault;
    match kind {
        FaultKind::Read => {
            format!("`{path}` of the backup could not be read at byte {offset}: {error}")
        }
        FaultKind::Write => format!("what PostgreSQL wrote to `{path}` could not be kept: {error}"),
        FaultKind::NoSpace => format!("no space for `{path}` in the write layer: {error}"),
        FaultKind::Poisoned => format!("`{path}` was {error}"), // refused after a lost write
        FaultKind::Link => format!("the mount refused the symbolic link `{path}`: {error}"),
        FaultKind::Aborted => format!("`{path}` was refused: {error}"),
    }
}

/// What to do about a fault, where that is known.
fn fault_hint(fault: &Fault) -> Option<String> {
    if fault.kind == FaultKind::Read {
        let text = "if the repository was only out of reach, `pgthaw retry`; else let the backup's own tool verify it, or export from another backup";
        return Some(text.into());
    }
    if fault.kind == FaultKind::Link {
        let text = "code in the backup, or WAL that pgthaw did not read, tried to make this link; nothing outside the mount was touched. Export from another backup, or to an earlier target";
        return Some(text.into());
    }
    let full = matches!(fault.kind, FaultKind::Write | FaultKind::NoSpace | FaultKind::Poisoned)
        && ["No space left on device", "No space left for pgthaw", "Disk quota exceeded"]
            .iter()
            .any(|sign| fault.error.to_string().contains(sign));
    full.then(|| {
        "free space there and retry, or cancel and export again with another --work-dir".into()
    })
}

/// The backup's files as what lies below the mount. After each read one thread decodes ahead, if the reads go on in sequence.
struct Backup {
    reader: Arc<Reader>,
    ahead: mpsc::SyncSender<usize>,
}

/// Files that may wait for being decoded ahead; more are left to their next read.
const AHEAD_QUEUE: usize = 16;

impl Backup {
    fn new(reader: Arc<Reader>) -> Self {
        let (ahead, files) = mpsc::sync_channel(AHEAD_QUEUE);
        let reads_ahead = reader.clone();
        thread::spawn(move || files.into_iter().for_each(|file| reads_ahead.read_ahead(file)));
        Self { reader, ahead }
    }

    fn done(&self, file: usize, read: Result<(), ReadError>) -> io::Result<()> {
        if self.reader.wants_ahead(file) {
            let _ = self.ahead.try_send(file); // a full queue means that there is enough to do
        }
        read.map_err(|err| io::Error::other(with_causes(&err)))
    }
}

impl Lower for Backup {
    fn try_read_at(&self, file: usize, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        self.reader.try_read_at(file, offset, buf).map(|read| self.done(file, read))
    }

    fn read_at(&self, file: usize, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let read = self.reader.read_at(file, offset, buf);
        self.done(file, read)
    }
}

fn report(reader: &Reader, fs: &FileSystem, databases: &[u32]) -> MountReport {
    let mut coverage = std::collections::BTreeMap::<u32, CoverageCount>::new();
    let damaged = reader.damaged().into_iter();
    let damaged = damaged
        .map(|(file, err)| DamagedFile { database: databases[file], message: with_causes(&err) });
    let damaged = damaged.collect();
    for (number, database) in databases.iter().enumerate() {
        let count = coverage.entry(*database).or_default();
        match reader.coverage(number) {
            Coverage::Untouched => count.not_read += 1,
            Coverage::Partly => count.page_checksums += 1,
            Coverage::WholeVerified => count.whole_file_checksum += 1,
            Coverage::WholeWithoutDigest => count.none += 1,
            Coverage::Damaged => count.damaged += 1,
        }
    }
    let statistics = reader.statistics();
    MountReport {
        faults: fs.fault_count(),
        damaged,
        stored_bytes_read: statistics.stored_bytes_read,
        decoded_bytes: statistics.decoded_bytes,
        decoded_again_bytes: statistics.decoded_again_bytes,
        layer_bytes: fs.layer_bytes(),
        coverage: coverage.into_iter().collect(),
    }
}

fn verify(reader: &Reader, databases: &[u32], wanted: &[u32]) -> Vec<String> {
    let chosen = |database: &u32| *database == 0 || wanted.contains(database);
    let files = databases.iter().enumerate().filter(|(_, database)| chosen(database));
    files
        .filter_map(|(number, _)| reader.verify_whole(number).err())
        .map(|err| with_causes(&err))
        .collect()
}

/// Standard output, one event per line.
#[derive(Default)]
struct Events(Mutex<()>);

impl Events {
    fn send(&self, event: &MountEvent) {
        let _whole_lines = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut line = serde_json::to_vec(event).expect("an event is plain data");
        line.push(b'\n');
        let _ = io::stdout().lock().write_all(&line).and_then(|()| io::stdout().lock().flush()); // an agent that went ends us elsewhere
    }
}

#[cfg(test)]
mod tests {
    use pgthaw_mountfs::ROOT;
    use rustix::io::Errno;

    use super::*;

    /// A lower without files.
    struct Nothing;

    impl Lower for Nothing {
        fn try_read_at(&self, _: usize, _: u64, _: &mut [u8]) -> Option<io::Result<()>> {
            None
        }

        fn read_at(&self, _: usize, _: u64, _: &mut [u8]) -> io::Result<()> {
            Err(io::ErrorKind::NotFound.into())
        }
    }

    /// A file system with a tablespace of the map, 16384; its write layer lives as long.
    fn served() -> (FileSystem, tempfile::TempDir) {
        let map = BackupMap {
            directories: [
                "data/pg_tblspc",
                "tablespaces/16384",
                "tablespaces/16384/PG_15_202209061",
            ]
            .map(|path| path.to_owned().try_into().unwrap())
            .into(),
            files: Vec::new(),
        };
        let tree = tree(&map, Path::new("/run/media/pgthaw/x")).unwrap();
        let layer = tempfile::tempdir().unwrap();
        let owner = Owner { uid: 0, gid: 0 };
        let (lower, on_fault) = (Arc::new(Nothing), Box::new(|_: &Fault| {}));
        (FileSystem::new(tree, lower, layer.path(), owner, on_fault).unwrap(), layer)
    }

    fn find(fs: &FileSystem, path: &str) -> Result<u64, Errno> {
        path.split('/').try_fold(ROOT, |at, name| Ok(fs.lookup(at, name.as_bytes())?.ino))
    }

    #[test]
    fn a_full_write_layer_says_what_to_do() {
        let cases = [
            (FaultKind::Write, "write layer `/w`: No space left for pgthaw: 1.0 MB are free", true),
            (FaultKind::NoSpace, "write layer `/w`: No space left on device (os error 28)", true),
            (FaultKind::Poisoned, "refused after a lost write: Disk quota exceeded", true),
            (FaultKind::Write, "write layer `/w`: Input/output error", false),
        ];
        for (kind, error, full) in cases {
            let fault = Fault { path: "x".into(), offset: 0, kind, error: error.into() };
            let hint = fault_hint(&fault).unwrap_or_default();
            assert_eq!(hint.contains("--work-dir") && hint.contains("free space"), full, "{error}");
        }
    }

    #[test]
    fn links_lead_only_to_tablespaces_that_were_provided() {
        let (fs, _layer) = served();
        let links = find(&fs, "data/pg_tblspc").unwrap();
        let make = |name: &str, destination: &[u8]| {
            fs.symlink(links, name.as_bytes(), destination).map(drop)
        };
        assert_eq!(find(&fs, "tablespaces/16385"), Err(Errno::NOENT));
        provide(
            &fs,
            &["tablespaces/16385/sub".into(), "tablespaces/16385".into()],
            &[(16385, b"/srv/a".into()), (16385, b"/srv/\xff".into()), (16384, b"/srv/c".into())],
        )
        .unwrap();
        find(&fs, "tablespaces/16385/sub").unwrap();
        for (name, destination) in [("16385", &b"/srv/a"[..]), ("16385", b"/srv/\xff")] {
            make(name, destination).unwrap();
            fs.unlink(links, name.as_bytes()).unwrap();
        }
        fs.unlink(links, b"16384").unwrap();
        make("16384", b"/run/media/pgthaw/x/tablespaces/16384").unwrap();
        assert_eq!(make("16386", b"/srv/a"), Err(Errno::PERM));
        assert_eq!(make("16385", b"/srv/live\n"), Err(Errno::PERM));
        let faults: Vec<_> = fs.faults().iter().map(fault_text).collect();
        assert_eq!(faults.len(), 2);
        for part in ["`data/pg_tblspc/16385`", "`/srv/live\\n`"] {
            assert!(faults[1].contains(part), "{}", faults[1]);
        }
        assert!(fault_hint(&fs.faults()[1]).unwrap().contains("WAL that pgthaw did not read"));

        let refused = provide(&fs, &["data/pg_tblspc/16384".into()], &[]).unwrap_err();
        assert!(refused.to_string().contains("data/pg_tblspc/16384"), "{refused}");
        assert!(provide(&fs, &["../x".into()], &[]).is_err());
    }
}
