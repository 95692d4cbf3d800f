//! What a server elsewhere needs of this machine: connections are offered to it for as long as a command follows the session.
//!
//! As a target each of them serves as `pgthaw attach --stdio --only target DIR` does, for the request's own directory; for the ssh-agent each is joined with it. As soon as one
//! is taken the next is offered.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use pgthaw_link::{Carrier, OpenLine, Purpose};
use pgthaw_session::request::CallerMachine;
use pgthaw_session::{ExportRequest, Status};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::client::Client;
use crate::attach::handing::hand_over;
use crate::attach::{self, Restriction};
use crate::http::Address;
use crate::machine::{offered_machine, offered_ssh_agent};
use crate::offers;
use crate::ssh_agent::join;

/// Between two offers when one fails, at first and at most.
const FIRST_REST: Duration = Duration::from_millis(200);
const LONGEST_REST: Duration = Duration::from_secs(5);

/// Offers connections; dropping it stops that.
#[derive(Debug)]
pub struct Offering {
    tasks: Vec<JoinHandle<()>>,
}

impl Offering {
    /// Offers what the server of `client` needs for `request`.
    pub fn for_request(client: &Client, request: &ExportRequest) -> Self {
        let machine = request.target_caller.as_ref().map(|own| (own, request.target.as_path()));
        Self::begin(client, machine, request.ssh_agent_of.as_ref())
    }

    /// Offers what it needs for a session that was asked for from here, which is called `own`.
    pub fn for_session(client: &Client, status: &Status, own: &CallerMachine) -> Self {
        let needed = |name: &Option<String>| {
            (client.is_elsewhere() && name.as_ref() == Some(&own.name)).then_some(own)
        };
        let machine = needed(&status.target_host).map(|own| (own, status.target_directory()));
        Self::begin(client, machine, needed(&status.ssh_keys_of))
    }

    /// Whether `request` needs anything from here while it is at work.
    pub fn is_needed(request: &ExportRequest) -> bool {
        request.target_caller.is_some() || request.ssh_agent_of.is_some()
    }

    fn begin(
        client: &Client,
        machine: Option<(&CallerMachine, &Path)>,
        ssh_agent: Option<&CallerMachine>,
    ) -> Self {
        let mut tasks = Vec::new();
        if let Some((machine, target)) = machine {
            // What arrives is for this account alone.
            rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
            let (address, said) = (client.address(), offered_machine(machine));
            // Whoever is at the other end may do what this export needs, and nothing else of what this account may.
            let kept = Restriction::to_target(target);
            let serve = move |offered, taken| serve_as_target(kept.clone(), offered, taken);
            tasks.push(tokio::spawn(offer_on_and_on(address, said, serve)));
        }
        if let Some(ssh_agent) = ssh_agent {
            let (address, said) = (client.address(), offered_ssh_agent(ssh_agent));
            tasks.push(tokio::spawn(offer_on_and_on(address, said, serve_ssh_agent)));
        }
        Self { tasks }
    }
}

impl Drop for Offering {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// One connection, from the server and to it, and what keeps it up.
type Offered = (pipe::Receiver, pipe::Sender, Option<Carrier>);

/// Offers one connection after the other; `serve` says when its own is taken, and serves it.
async fn offer_on_and_on<F>(
    address: Address,
    said: String,
    serve: impl Fn(Offered, oneshot::Sender<()>) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let mut rest = FIRST_REST;
    let mut serving = tokio::task::JoinSet::new(); // they end with this
    loop {
        while serving.try_join_next().is_some() {}
        if let Ok(offered) = offer(&address, &said).await {
            let (taken, is_taken) = oneshot::channel();
            serving.spawn(serve(offered, taken));
            if is_taken.await.is_ok() {
                rest = FIRST_REST;
                continue;
            }
            // Nobody wanted it in time, or the way to the server is cut.
        }
        tokio::time::sleep(rest).await;
        rest = (rest * 2).min(LONGEST_REST);
    }
}

async fn serve_as_target(
    kept: Restriction,
    (input, output, carrier): Offered,
    taken: oneshot::Sender<()>,
) {
    let greeted = || {
        let _ = taken.send(()); // the offering has ended
    };
    let _ = attach::serve(kept, input, output, greeted).await; // the server sees it, too
    drop(carrier);
}

/// Joins a connection with this account's ssh-agent, from the first byte on.
async fn serve_ssh_agent((input, output, carrier): Offered, taken: oneshot::Sender<()>) {
    let socket = std::env::var_os("SSH_AUTH_SOCK").unwrap_or_default();
    if input.readable().await.is_err() {
        return;
    }
    let mut first = [0; 4096];
    let count = match input.try_read(&mut first) {
        Ok(count @ 1..) => count,
        Ok(0) | Err(_) => return, // the end
    };
    let _ = taken.send(()); // the offering has ended
    if let Ok(mut agent) = tokio::net::UnixStream::connect(socket).await
        && agent.write_all(&first[..count]).await.is_ok()
    {
        let (from_agent, to_agent) = agent.into_split();
        join((input, to_agent), (from_agent, output)).await;
    }
    drop(carrier);
}

/// Makes one connection and offers it.
async fn offer(address: &Address, said: &str) -> io::Result<Offered> {
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
