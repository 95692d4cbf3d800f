//! A Unix socket that counts who connects.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::net::{Shutdown, shutdown};

/// A listener that hangs up on everybody at once, so that nobody waits for it.
#[derive(Debug)]
pub(super) struct Listener {
    path: PathBuf,
    socket: Arc<UnixListener>,
    counting: Option<JoinHandle<usize>>,
}

impl Listener {
    pub fn bind(path: &Path) -> Self {
        let socket = UnixListener::bind(path);
        let socket = Arc::new(socket.unwrap_or_else(|err| panic!("{}: {err}", path.display())));
        let counting = std::thread::spawn({
            let socket = socket.clone();
            // After a shutdown those who wait are accepted still, then there is an error.
            move || socket.incoming().take_while(Result::is_ok).count()
        });
        Self { path: path.into(), socket, counting: Some(counting) }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Stops listening; returns how many have connected.
    pub fn end(&mut self) -> usize {
        let Some(counting) = self.counting.take() else { return 0 };
        match shutdown(&*self.socket, Shutdown::Both) {
            Ok(()) => counting.join().unwrap_or_default(),
            Err(_) => 0,
        }
    }
}
