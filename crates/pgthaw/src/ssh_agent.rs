//! A caller's ssh-agent on the server's machine: a socket for `ssh`, whose connections go on over those that the caller offers.
//!
//! The keys stay where they are. The socket lies in a 0700 directory, and is there for as long as a session needs it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;

use crate::attach::handing::Handed;
use crate::http;
use crate::offers::{OfferKey, Offers};

/// The socket; dropping this removes it.
#[derive(Debug)]
pub struct SshAgent {
    key: OfferKey,
    socket: PathBuf,
    task: JoinHandle<()>,
}

impl SshAgent {
    /// Listens in `directory` for `ssh`, on behalf of the caller who offers connections as `key`.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn listen(directory: &Path, offers: Arc<Offers>, key: OfferKey) -> io::Result<Self> {
        let socket = directory.join(format!("{}.sock", crate::server::sessions::new_marker()));
        let listener = http::bind(&socket)?;
        let of = key.clone();
        let task = tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((ssh, _)) => {
                        let (offers, of) = (offers.clone(), of.clone());
                        tokio::spawn(async move { pass_on(ssh, &offers, &of).await });
                    }
                    Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                }
            }
        });
        Ok(Self { key, socket, task })
    }

    /// Where `ssh` finds it.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Whose it is.
    pub fn key(&self) -> &OfferKey {
        &self.key
    }
}

impl Drop for SshAgent {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Joins a connection of `ssh` with one to the caller's agent; without one `ssh` is told that the agent is gone.
async fn pass_on(ssh: UnixStream, offers: &Offers, key: &OfferKey) {
    let Some(Handed { input, output, holder, .. }) = offers.take(key).await else { return };
    for end in [&input, &output] {
        if rustix::io::ioctl_fionbio(end, true).is_err() {
            return;
        }
    }
    let ends = (
        pipe::Receiver::from_owned_fd_unchecked(input),
        pipe::Sender::from_owned_fd_unchecked(output),
    );
    if let (Ok(from_agent), Ok(to_agent)) = ends {
        let (from_ssh, to_ssh) = ssh.into_split();
        join((from_ssh, to_agent), (from_agent, to_ssh)).await;
    }
    drop(holder);
}

/// Copies both ways until either ends.
pub async fn join<A, B, C, D>(one: (A, B), other: (C, D))
where
    A: AsyncRead + Unpin,
    B: AsyncWrite + Unpin,
    C: AsyncRead + Unpin,
    D: AsyncWrite + Unpin,
{
    let (mut from, mut to) = one;
    let (mut back_from, mut back_to) = other;
    tokio::select! {
        _ = tokio::io::copy(&mut from, &mut to) => {}
        _ = tokio::io::copy(&mut back_from, &mut back_to) => {}
    }
    let _ = to.flush().await;
    let _ = back_to.flush().await;
}
