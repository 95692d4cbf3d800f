//! The way of a dump to a target on another machine than the staging server.
//!
//! The server has a line of its own to each half of the mover, and lets them meet. They connect directly where they can; else the two
//! lines are joined here:
//!
//! ```text
//! agent ── (handed over by pgthaw attach) ── [sshd ── ssh] ── server ── [ssh ── sshd] ── pgthaw attach, receiving ── target
//! ```
//! The kernel moves the bytes from the one pipe into the other (splice(2)); they are never copied into this process. A direct
//! connection outlives a line that is cut, but not one that is closed.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use pgthaw_link::{OpenLine, Purpose, read_line, write_line};
use pgthaw_mover::{ACCEPT_LIMIT, Answer, Fingerprint, Order};
use pgthaw_session::{MoverChoice, TakenWay};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use rustix::pipe::{SpliceFlags, splice};
use tokio::sync::watch;

use super::kept::{Connected, Kept};
use super::site::Site;
use crate::wire::{ApiError, CheckReport};

/// Bytes that are asked to be moved at a time; a pipe holds less.
const MOST: usize = 1 << 20;
/// The halves answer sooner than this, whatever firewall lies between them.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// The kept connection between the two halves of a data mover.
#[derive(Debug)]
pub struct Mover {
    /// Whether there is one now.
    pub kept: Kept,
    way: watch::Receiver<Option<TakenWay>>,
}

impl Mover {
    /// Keeps the agent on `staging`, which listens on `socket` there, connected with the receiving half of a data mover on `target`.
    pub fn keep(
        staging: Site,
        socket: PathBuf,
        target: Site,
        receive: Purpose,
        choice: MoverChoice,
    ) -> Self {
        let (tell, way) = watch::channel(None);
        let kept = Kept::keep(move |connected| {
            let (staging, target, tell) = (staging.clone(), target.clone(), tell.clone());
            let (send, receive) = (Purpose::Socket(socket.clone()), receive.clone());
            async move {
                let joined = Joined { staging: &staging, target: &target, choice };
                joined.connect(&send, &receive, &connected, &tell).await
            }
        });
        Self { kept, way }
    }

    /// The way that was taken last; none before, or where one end is this machine and there is no choice.
    pub fn way(&self) -> Option<TakenWay> {
        self.way.borrow().clone()
    }
}

/// Finds out whether the halves of a data mover could connect directly, where neither machine is this one.
pub async fn try_out(staging: &Site, target: &Site, choice: MoverChoice, report: &mut CheckReport) {
    let joined = Joined { staging, target, choice };
    if !joined.both_are_elsewhere() {
        return;
    }
    let found = async {
        let (mut from, mut to) =
            joined.open(&Purpose::Meet, &Purpose::Meet).await.map_err(|err| err.message)?;
        joined.meet(&mut from, &mut to).await
    };
    match found.await {
        Ok(TakenWay { direct: true, text }) => {
            report.passed.push(format!("the dump will go {text}"));
        }
        Ok(TakenWay { direct: false, text }) if choice.ports.is_none() => {
            report.passed.push(format!("the dump will go {text}"));
        }
        Ok(TakenWay { direct: false, text }) => {
            let (first, last) = choice.ports.unwrap_or_default();
            let remedy = format!(
                "to spare this machine the work, let {} connect to ports {first} to {last} of {}, or the other way round",
                staging.name(),
                target.name()
            );
            report.warning(format!("the dump will go {text}"), Some(remedy));
        }
        Err(why) => {
            report.warning(format!("whether movers can connect directly is not known: {why}"), None)
        }
    }
}

/// Two machines to be connected.
struct Joined<'a> {
    staging: &'a Site,
    target: &'a Site,
    choice: MoverChoice,
}

impl Joined<'_> {
    /// Otherwise one ssh connection is all there is between them, and no machine could be left out.
    fn both_are_elsewhere(&self) -> bool {
        self.staging.machine().is_some() && self.target.machine().is_some()
    }

    async fn open(&self, send: &Purpose, receive: &Purpose) -> Result<(Half, Half), ApiError> {
        let (from, to) = tokio::try_join!(self.staging.open(send), self.target.open(receive))?;
        let half = |line, site: &Site| Half { line, name: site.name() };
        Ok((half(from, self.staging), half(to, self.target)))
    }

    /// Makes the two lines, lets the halves meet, and returns why that ended.
    async fn connect(
        &self,
        send: &Purpose,
        receive: &Purpose,
        connected: &Connected,
        tell: &watch::Sender<Option<TakenWay>>,
    ) -> String {
        let (mut from, mut to) = match self.open(send, receive).await {
            Ok(both) => both,
            Err(err) => return err.message,
        };
        let way = match self.meet(&mut from, &mut to).await {
            Ok(way) => way,
            Err(why) => return why,
        };
        let direct = way.direct;
        if self.both_are_elsewhere() {
            tell.send_replace(Some(way));
        }
        let (mut sender, mut receiver) = (from.line.carrier, to.line.carrier);
        // The target's half of a direct connection ends with its line.
        let held = (from.line.input, from.line.output, to.line.input, to.line.output);
        let _held = if direct {
            Some(held)
        } else {
            let (back, forth, input, output) = held;
            let pipes = (
                forth.into_owned_fd(),
                input.into_owned_fd(),
                output.into_owned_fd(),
                back.into_owned_fd(),
            );
            let (Ok(forth), Ok(input), Ok(output), Ok(back)) = pipes else {
                return "the connections' pipes cannot be used".into();
            };
            std::thread::spawn(move || join(&forth, &input));
            std::thread::spawn(move || join(&output, &back));
            None
        };
        connected.yes();
        tokio::select! {
            () = sender.wait() => format!("the connection to {} is lost", from.name),
            () = receiver.wait() => format!("the connection to {} is lost", to.name),
        }
    }

    /// Lets the halves connect directly, the target listening, else the staging server; else over their lines. Fails where a half does
    /// not answer.
    async fn meet(&self, from: &mut Half, to: &mut Half) -> Result<TakenWay, String> {
        let way = match self.choice.ports {
            _ if !self.both_are_elsewhere() => Err("one end is this machine".to_owned()),
            None => Err("direct connections are switched off".to_owned()),
            Some(ports) => introduced(from, to, ports).await?,
        };
        let (order, way) = match way {
            Ok(text) => (Order::Direct, TakenWay { direct: true, text }),
            Err(why) => {
                let text = format!("through this machine: {why}");
                (Order::Relay, TakenWay { direct: false, text })
            }
        };
        tokio::try_join!(from.order(&order), to.order(&order))?;
        Ok(way)
    }
}

/// The way between two halves that know nothing of each other yet, or why there is none.
async fn introduced(
    from: &mut Half,
    to: &mut Half,
    ports: (u16, u16),
) -> Result<Result<String, String>, String> {
    let (sender, receiver) = tokio::try_join!(from.introduce(), to.introduce())?;
    let at_target = match listen_and_dial(to, from, ports, sender).await? {
        Ok(port) => {
            return Ok(Ok(format!("directly from {} to port {port} of {}", from.name, to.name)));
        }
        Err(why) => why,
    };
    let at_staging = match listen_and_dial(from, to, ports, receiver).await? {
        Ok(port) => {
            return Ok(Ok(format!("directly from port {port} of {} to {}", from.name, to.name)));
        }
        Err(why) => why,
    };
    Ok(Err(format!("{at_target}; {at_staging}")))
}

/// Lets one half listen and the other one, which has the certificate `peer`, connect to it; returns the port, or why that is not possible.
async fn listen_and_dial(
    listener: &mut Half,
    dialer: &mut Half,
    ports: (u16, u16),
    peer: Fingerprint,
) -> Result<Result<u16, String>, String> {
    let Some(address) = listener.line.welcome.address else {
        return Ok(Err(format!("ssh does not tell the address of {}", listener.name)));
    };
    let offer =
        match listener.ask(&Order::Listen { address, ports, peer, limit: ACCEPT_LIMIT }).await? {
            Answer::Listening(offer) if offer.is_within(ports) => offer,
            Answer::Failed(why) => return Ok(Err(format!("{}: {why}", listener.name))),
            other => return Err(listener.nonsense(&other)),
        };
    let port = offer.port;
    let dial = Order::Dial { address, offer };
    let (dialed, accepted) = tokio::try_join!(dialer.ask(&dial), listener.answer())?;
    Ok(judge(&dialer.name, &dialed, &accepted).map(|()| port))
}

/// Whether both halves have the connection. What the dialer says tells more: the listener only waited.
fn judge(dialer: &str, dialed: &Answer, accepted: &Answer) -> Result<(), String> {
    match (dialed, accepted) {
        (Answer::Connected, Answer::Connected) => Ok(()),
        (Answer::Failed(why), _) | (_, Answer::Failed(why)) => Err(format!("{dialer}: {why}")),
        _ => Err(format!("{dialer}: no connection")),
    }
}

/// One half of the mover and the line to it.
struct Half {
    line: OpenLine,
    name: String,
}

impl Half {
    async fn order(&mut self, order: &Order) -> Result<(), String> {
        let said = write_line(&mut self.line.input, order).await;
        said.map_err(|err| format!("the connection to {} is lost: {err}", self.name))
    }

    async fn answer(&mut self) -> Result<Answer, String> {
        let line = tokio::time::timeout(ANSWER_LIMIT, read_line(&mut self.line.output)).await;
        let line = line.map_err(|_| format!("the mover on {} does not answer", self.name))?;
        let line = line.map_err(|err| format!("the connection to {} is lost: {err}", self.name))?;
        serde_json::from_str(&line).map_err(|err| format!("the mover on {} says {err}", self.name))
    }

    async fn ask(&mut self, order: &Order) -> Result<Answer, String> {
        self.order(order).await?;
        self.answer().await
    }

    async fn introduce(&mut self) -> Result<Fingerprint, String> {
        match self.ask(&Order::Introduce).await? {
            Answer::Introduced(certificate) => Ok(certificate),
            other => Err(self.nonsense(&other)),
        }
    }

    fn nonsense(&self, answer: &Answer) -> String {
        format!("the mover on {} answers another question: {answer:?}", self.name)
    }
}

/// Moves bytes from one end into the other until one of them ends. One may be a socket, of somebody on this machine.
fn join(from: &OwnedFd, to: &OwnedFd) {
    move_all(from, to);
    // A pipe ends when it is dropped, a socket is still held by the other direction.
    let _ = shutdown(to, Shutdown::Write);
}

fn move_all(from: &OwnedFd, to: &OwnedFd) {
    loop {
        // A splice from a socket holds the lock of the pipe that it writes to while it waits for bytes (Linux, `fs/splice.c`), and
        // with it that pipe's reader: it is to find some.
        match poll(&mut [PollFd::new(from, PollFlags::IN)], None) {
            Err(Errno::INTR) => continue,
            Err(_) => return,
            Ok(_) => {}
        }
        let Ok(1..) = splice(from, None, to, None, MOST, SpliceFlags::MOVE) else { return };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn what_is_in_a_pipe_can_be_read_while_a_socket_is_silent() {
        let (near, far) = UnixStream::pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let (mut reader, mut writer) = (File::from(reader), File::from(writer));
        let to = OwnedFd::from(writer.try_clone().unwrap());
        let joined = std::thread::spawn(move || join(&near.into(), &to));
        std::thread::sleep(Duration::from_millis(50)); // it waits for the socket by now
        writer.write_all(b"before").unwrap();
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            let mut found = [0; 6];
            reader.read_exact(&mut found).unwrap();
            tell.send(found).unwrap();
            reader.read_exact(&mut found).unwrap();
            tell.send(found).unwrap();
        });
        let limit = Duration::from_secs(10);
        assert_eq!(&told.recv_timeout(limit).unwrap(), b"before");
        (&far).write_all(b"behind").unwrap();
        assert_eq!(&told.recv_timeout(limit).unwrap(), b"behind");
        drop(far);
        joined.join().unwrap();
    }

    #[test]
    fn the_end_of_a_pipe_is_the_end_of_a_socket() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let _other_direction = near.try_clone().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let joined = std::thread::spawn(move || join(&reader, &near.into()));
        File::from(writer).write_all(b"all").unwrap();
        far.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut found = Vec::new();
        far.read_to_end(&mut found).unwrap();
        assert_eq!(found, b"all");
        joined.join().unwrap();
    }
}
