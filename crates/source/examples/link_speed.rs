//! Measures reads over a socket pair against reads of the same file without one:
//! `cargo run --release -p pgthaw-source --example link_speed [FILE]`.
//!
//! Without FILE, 1 GiB of zeros in a temporary file. Prints GB/s of sequential reads of 16 KiB, and the processor time
//! that both ends together needed per GB (user and system, from `/proc/self/stat`).

use std::fs::{self, File};
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pgthaw_source::map::{ObjectId, ObjectTable, StoredObject};
use pgthaw_source::store::{LocalStore, ObjectStore, RemoteOptions, RemoteStore, serve};

const READ: usize = 16 * 1024;
const ROUNDS: u64 = 4;
const OBJECT: ObjectId = ObjectId(0);

fn main() -> io::Result<()> {
    let made = tempfile::NamedTempFile::new()?;
    let named = std::env::args_os().nth(1);
    let path = named.as_ref().map_or(made.path(), Path::new);
    if named.is_none() {
        File::create(path)?.set_len(1 << 30)?;
    }
    let path = fs::canonicalize(path)?;
    let (root, name) = (path.parent().unwrap_or(&path), path.file_name().unwrap_or_default());
    let object = StoredObject { root: 0, path: name.to_string_lossy().into_owned() };
    let table = ObjectTable { roots: vec![root.into()], objects: vec![object] };
    let local: Arc<dyn ObjectStore> = Arc::new(LocalStore::open(table)?);

    let (here, there) = UnixStream::pair()?;
    let store = Arc::clone(&local);
    let serving = thread::spawn(move || serve(store, there.try_clone()?, there, 4));
    let remote = RemoteStore::new(RemoteOptions::new(Duration::from_secs(60)), |_| {});
    let closing = here.try_clone()?;
    remote.connect(here.try_clone()?, here, move || {
        let _ = closing.shutdown(Shutdown::Both); // it may be closed already
    })?;

    measure("local ", &*local)?; // so that the file is cached
    measure("local ", &*local)?;
    measure("remote", &remote)?;
    drop(remote);
    serving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn measure(name: &str, store: &dyn ObjectStore) -> io::Result<()> {
    let length = store.length(OBJECT)?;
    let mut buf = vec![0; READ];
    let (started, processor) = (Instant::now(), processor_seconds()?);
    for _ in 0..ROUNDS {
        for start in (0..length).step_by(READ) {
            let count = READ.min((length - start) as usize);
            store.read_exact_at(OBJECT, start, &mut buf[..count])?;
        }
    }
    let gigabytes = (length * ROUNDS) as f64 / 1e9;
    let speed = gigabytes / started.elapsed().as_secs_f64();
    let cost = (processor_seconds()? - processor) / gigabytes;
    println!("{name} {speed:5.2} GB/s, {cost:.2} s of processor time per GB");
    Ok(())
}

/// Processor time of this process in seconds; the kernel counts in ticks of 10 ms (proc_pid_stat(5), fields 14 and 15).
fn processor_seconds() -> io::Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks = fields.skip(11).take(2).filter_map(|field| field.parse::<f64>().ok());
    Ok(ticks.sum::<f64>() / 100.0)
}
