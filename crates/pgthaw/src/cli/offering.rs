//! This machine as the target of a server elsewhere: connections are offered to it for as long as a command follows the session.
//!
//! Each serves as `pgthaw attach --stdio --only target` does; as soon as one is taken the next is offered.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use pgthaw_link::{Carrier, OpenLine, Purpose};
use pgthaw_session::request::CallerMachine;
use pgthaw_session::{ExportRequest, Status};
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;

use super::client::Client;
use crate::attach::handing::hand_over;
use crate::attach::{self, Only};
use crate::http::Address;
use crate::offers;

/// Between two offers when one fails, at first and at most.
const FIRST_REST: Duration = Duration::from_millis(200);
const LONGEST_REST: Duration = Duration::from_secs(5);

/// Offers connections; dropping it stops that.
#[derive(Debug)]
pub struct Offering {
    task: JoinHandle<()>,
}

impl Offering {
    /// Offers this machine, which is called `own`, to the server of `client`.
    pub fn begin(client: &Client, own: &CallerMachine) -> Self {
        // What arrives is for this account alone.
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
        let (address, said) = (client.address(), format!("{} {}", own.name, own.id));
        Self { task: tokio::spawn(async move { offer_on_and_on(&address, &said).await }) }
    }

    /// Offers it if `request` is to be delivered here by the server of `client`.
    pub fn for_request(client: &Client, request: &ExportRequest) -> Option<Self> {
        request.target_caller.as_ref().map(|own| Self::begin(client, own))
    }

    /// Offers it for sessions that were asked for from here before, if that server has to be helped.
    pub fn for_session(client: &Client, status: &Status, own: &CallerMachine) -> Option<Self> {
        let here = client.is_elsewhere() && status.target_host.as_ref() == Some(&own.name);
        here.then(|| Self::begin(client, own))
    }
}

impl Drop for Offering {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn offer_on_and_on(address: &Address, said: &str) {
    let mut rest = FIRST_REST;
    let mut serving = tokio::task::JoinSet::new(); // they end with this
    loop {
        while serving.try_join_next().is_some() {}
        let (taken, is_taken) = tokio::sync::oneshot::channel();
        match offer(address, said).await {
            Ok((input, output, carrier)) => {
                serving.spawn(async move {
                    let greeted = || {
                        let _ = taken.send(()); // the offering has ended
                    };
                    let served = attach::serve(Some(Only::Target), input, output, greeted).await;
                    drop(carrier);
                    served
                });
                if is_taken.await.is_ok() {
                    rest = FIRST_REST;
                    continue;
                }
                // Nobody wanted it in time, or the way to the server is cut.
            }
            Err(_) => drop(taken),
        }
        tokio::time::sleep(rest).await;
        rest = (rest * 2).min(LONGEST_REST);
    }
}

/// Makes one connection and offers it.
async fn offer(
    address: &Address,
    said: &str,
) -> io::Result<(pipe::Receiver, pipe::Sender, Option<Carrier>)> {
    let (input, output, carrier) = match address {
        Address::Far(machine, _) => {
            let open = machine.open(&Purpose::Offer(said.to_owned())).await;
            let OpenLine { carrier, input, output, .. } = open.map_err(io::Error::other)?;
            (output.into_owned_fd()?, input.into_owned_fd()?, Some(carrier))
        }
        Address::Socket(socket) => {
            let (near, far) = UnixStream::pair()?;
            hand_to(&socket.with_file_name(offers::SOCKET), said, far)?;
            (near.try_clone()?.into(), near.into(), None)
        }
    };
    for end in [&input, &output] {
        rustix::io::ioctl_fionbio(end, true)?;
    }
    let input = pipe::Receiver::from_owned_fd_unchecked(input)?;
    Ok((input, pipe::Sender::from_owned_fd_unchecked(output)?, carrier))
}

/// Hands `far` over on a thread that ends when the server lets go of it.
fn hand_to(socket: &Path, said: &str, far: UnixStream) -> io::Result<()> {
    let (socket, said) = (socket.to_owned(), said.to_owned());
    let output: OwnedFd = far.try_clone()?.into();
    std::thread::spawn(move || {
        let _ = hand_over(&socket, &said, far.into(), output); // the connection's end tells
    });
    Ok(())
}
