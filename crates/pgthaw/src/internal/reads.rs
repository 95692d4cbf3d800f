//! The child that serves another machine's mount with ranges of this backup's stored objects: requests come on standard input,
//! answers go to standard output.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;

use pgthaw_source::map::ObjectTable;
use pgthaw_source::store::{LocalStore, serve};

use crate::attach::handing::widen;

/// Number of the descriptor from which the table of objects is read.
pub const OBJECTS: i32 = 3;
/// Threads that read: as many as may wait for a slow disk at once.
const THREADS: usize = 8;

/// Serves reads until the connection ends.
pub fn run() -> ExitCode {
    match work() {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("pgthaw reads: {err}");
            ExitCode::FAILURE
        }
    }
}

fn work() -> io::Result<()> {
    // SAFETY: the server hands the file over under this number, and nothing else here owns it.
    let mut objects = File::from(unsafe { OwnedFd::from_raw_fd(OBJECTS) });
    let mut bytes = Vec::new();
    io::Seek::rewind(&mut objects)?;
    objects.read_to_end(&mut bytes)?;
    let table: ObjectTable = postcard::from_bytes(&bytes).map_err(io::Error::other)?;
    let store = Arc::new(LocalStore::open(table)?);
    let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    widen(&output);
    serve(store, input, output, THREADS)
}
