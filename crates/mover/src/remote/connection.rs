//! A connection as it is handed in: two byte streams and a way to end them.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// Two byte streams to the other mover: a socket, or the standard input and output of `ssh`.
///
/// Each stream is used by a thread of its own, and both at once.
pub struct Connection {
    pub(super) input: Box<dyn Read + Send>,
    pub(super) output: Box<dyn Write + Send>,
    pub(super) close: Arc<dyn Fn() + Send + Sync>,
}

impl Connection {
    /// Takes any two streams. Where a blocked read or write can be made to end, [`Connection::closed_by`] says how.
    pub fn new(input: impl Read + Send + 'static, output: impl Write + Send + 'static) -> Self {
        Self { input: Box::new(input), output: Box::new(output), close: Arc::new(|| {}) }
    }

    /// Takes what ends the connection: blocked reads and writes return once it was called (socket shut down, `ssh`
    /// stopped). Without it a thread may wait in a dead connection until the process ends.
    #[must_use]
    pub fn closed_by(mut self, close: impl Fn() + Send + Sync + 'static) -> Self {
        self.close = Arc::new(close);
        self
    }

    /// Does this, too, when the connection is ended.
    pub(crate) fn also_closing(self, more: impl Fn() + Send + Sync + 'static) -> Self {
        let close = self.close.clone();
        self.closed_by(move || {
            close();
            more();
        })
    }

    /// Ends the connection when nothing can come over `line` any more.
    pub fn end_with(&self, mut line: File) {
        let close = self.close.clone();
        thread::spawn(move || {
            let _ = line.read(&mut [0]); // nothing ever comes but the end
            close();
        });
    }

    /// Gives back the two streams, and what ends the connection.
    pub fn into_parts(self) -> Parts {
        let Self { input, output, close } = self;
        Parts { input, output, close }
    }

    /// Takes a TCP socket.
    ///
    /// # Errors
    /// If the process has no descriptors left.
    pub fn of_tcp(socket: TcpStream) -> io::Result<Self> {
        let _ = socket.set_nodelay(true); // it is only faster
        let (output, closer) = (socket.try_clone()?, socket.try_clone()?);
        Ok(Self::new(socket, output).closed_by(move || drop(closer.shutdown(Shutdown::Both))))
    }

    /// Takes a Unix socket.
    ///
    /// # Errors
    /// If the process has no descriptors left.
    pub fn of_unix(socket: UnixStream) -> io::Result<Self> {
        let (output, closer) = (socket.try_clone()?, socket.try_clone()?);
        Ok(Self::new(socket, output).closed_by(move || drop(closer.shutdown(Shutdown::Both))))
    }
}

/// What a [`Connection`] consists of.
pub struct Parts {
    /// From the other side.
    pub input: Box<dyn Read + Send>,
    /// To the other side.
    pub output: Box<dyn Write + Send>,
    /// Makes blocked reads and writes return.
    pub close: Arc<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Connection").finish_non_exhaustive()
    }
}

/// How a silent peer is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heartbeat {
    /// A sign of life is sent this often while there is nothing else to send.
    pub every: Duration,
    /// A peer from which nothing has come for this long is gone. Several times the peer's `every`.
    pub silent: Duration,
}

impl Default for Heartbeat {
    /// Every 5 s; silent after 20 s.
    fn default() -> Self {
        Self { every: Duration::from_secs(5), silent: Duration::from_secs(20) }
    }
}
