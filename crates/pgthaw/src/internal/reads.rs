//! The child that serves another machine's mount with ranges of this backup's stored objects. Standard input and output are a line to
//! it; they meet over it, and connect directly where they can. The first line on standard error tells which way was taken, as JSON.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;

use pgthaw_mover::{ListenAt, Met, lead};
use pgthaw_session::TakenWay;
use pgthaw_source::map::{ObjectId, ObjectTable};
use pgthaw_source::store::{LocalStore, ObjectStore, serve};
use serde::{Deserialize, Serialize};

use crate::attach::handing::widen;

/// Number of the descriptor from which the table of objects is read.
pub const OBJECTS: i32 = 3;
/// Threads that read: as many as may wait for a slow disk at once.
const THREADS: usize = 8;

/// What the child has to know besides the table.
#[derive(Debug, Serialize, Deserialize)]
pub struct ReadsTask {
    /// The machine that reads, for messages.
    pub machine: String,
    /// Where its mount may listen; or why it may not.
    pub listen_at: Result<ListenAt, String>,
}

/// Serves reads until the connection ends.
pub fn run(task: &str) -> ExitCode {
    match work(task) {
        Ok(()) => ExitCode::SUCCESS,
        // Mounts end like that, too; what it means for the session is known elsewhere.
        Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("pgthaw reads: {err}");
            ExitCode::FAILURE
        }
    }
}

/// The way that was taken: over a port of `machine`, or why over ssh.
pub fn taken(machine: &str, port: Result<u16, String>) -> TakenWay {
    match port {
        Ok(port) => {
            TakenWay { direct: true, text: format!("directly over port {port} of {machine}") }
        }
        Err(why) => TakenWay { direct: false, text: format!("over ssh: {why}") },
    }
}

/// The store whose errors are read on another machine, where its paths are somebody else's.
struct OfMountServer(LocalStore);

impl ObjectStore for OfMountServer {
    fn read_exact_at(&self, object: ObjectId, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(object, offset, buf).map_err(of_mount_server)
    }

    fn length(&self, object: ObjectId) -> io::Result<u64> {
        self.0.length(object).map_err(of_mount_server)
    }
}

fn of_mount_server(err: io::Error) -> io::Error {
    io::Error::new(err.kind(), format!("on the mount server: {err}"))
}

fn work(task: &str) -> io::Result<()> {
    // SAFETY: the server hands the file over under this number, and nothing else here owns it.
    let mut objects = File::from(unsafe { OwnedFd::from_raw_fd(OBJECTS) });
    let mut bytes = Vec::new();
    io::Seek::rewind(&mut objects)?;
    objects.read_to_end(&mut bytes)?;
    let table: ObjectTable = postcard::from_bytes(&bytes).map_err(io::Error::other)?;
    let store = Arc::new(OfMountServer(LocalStore::open(table)?));
    let ReadsTask { machine, listen_at } = serde_json::from_str(task)?;
    let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    widen(&output);
    let (Met { connection, line: _line }, port) = lead(input, output, listen_at, || {})?;
    eprintln!("{}", serde_json::to_string(&taken(&machine, port))?);
    let connection = connection.into_parts();
    serve(store, connection.input, connection.output, THREADS)
}
