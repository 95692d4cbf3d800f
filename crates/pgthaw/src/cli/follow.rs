//! Following a session to its end: its log lines, its progress, Ctrl-C, and a server that goes away meanwhile.
//!
//! A session never depends on its follower. A broken connection is made again, with a new server where the old one is gone; a lost
//! terminal ends this process (SIGHUP) and nothing else.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use pgthaw_session::Status;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::client::{Client, session_path};
use super::progress::Progress;
use super::terminal;
use crate::http::ClientError;
use crate::wire::{ApiError, LogLine};

/// A connection that held longer than this was a good one.
const GOOD_CONNECTION: Duration = Duration::from_secs(10);
/// How long a second Ctrl-C waits for the server to have heard of the first.
const STOP_LIMIT: Duration = Duration::from_secs(1);
/// How many connections in a row may break early: to a server that we start, and to one elsewhere (some minutes).
const TRIES: u32 = 6;
const TRIES_ELSEWHERE: u32 = 200;

/// Signals that end the following of a session, noticed from the moment this is made.
pub struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
}

/// A signal that was noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Noticed {
    /// Ctrl-C (SIGINT).
    Interrupt,
    /// SIGTERM: this process has to end, the session has not.
    Terminate,
}

impl Noticed {
    /// The exit code of a command that it ends.
    pub fn exit_code(self) -> ExitCode {
        ExitCode::from(match self {
            Self::Interrupt => terminal::INTERRUPTED,
            Self::Terminate => terminal::TERMINATED,
        })
    }
}

impl Interrupts {
    /// Begins to notice.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn notice() -> Result<Self, ApiError> {
        let noticed = |kind| {
            let failed = |err| ApiError {
                message: format!("wait for signals: {err}"),
                hint: None,
                usage: false,
            };
            signal(kind).map_err(failed)
        };
        Ok(Self {
            interrupt: noticed(SignalKind::interrupt())?,
            terminate: noticed(SignalKind::terminate())?,
        })
    }

    /// Waits for the next one.
    pub async fn next(&mut self) -> Noticed {
        tokio::select! {
            Some(()) = self.interrupt.recv() => Noticed::Interrupt,
            Some(()) = self.terminate.recv() => Noticed::Terminate,
            else => std::future::pending().await, // the runtime ends
        }
    }
}

/// What the first Ctrl-C does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnInterrupt {
    /// Asks the session to stop; only a second one leaves.
    Stop,
    /// Leaves the session alone.
    Leave,
}

/// How following ended.
#[derive(Debug)]
pub enum Ending {
    /// The session is no longer at work.
    Ended {
        /// Its last status.
        status: Box<Status>,
        /// Whether it was asked to stop.
        stopped: bool,
    },
    /// The user left, or this process has to end; the session goes on.
    Left {
        /// Whether it was asked to stop, and so ends by itself.
        stopped: bool,
        /// What ended the following.
        by: Noticed,
    },
}

/// Follows session `id` until it is no longer at work, showing log lines but the `known` ones.
///
/// # Errors
/// When the server refuses, or cannot be reached any more.
pub async fn follow(
    client: &Client,
    id: &str,
    known: usize,
    on_interrupt: OnInterrupt,
    interrupts: &mut Interrupts,
) -> Result<Ending, ApiError> {
    let mut progress = Progress::new();
    let followed = watch(client, id, known, on_interrupt, interrupts, &mut progress).await;
    progress.finish();
    followed
}

async fn watch(
    client: &Client,
    id: &str,
    known: usize,
    on_interrupt: OnInterrupt,
    interrupts: &mut Interrupts,
    progress: &mut Progress,
) -> Result<Ending, ApiError> {
    let mut messages = messages(client, id);
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    let mut told = known;
    let mut last: Option<Status> = None;
    let mut stopping: Option<mpsc::Receiver<ApiError>> = None;
    loop {
        let stop_refused = async {
            match &mut stopping {
                Some(refusals) => match refusals.recv().await {
                    Some(error) => error,
                    None => std::future::pending().await,
                },
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            message = messages.recv() => match message {
                Some(Message::Log { number, line }) if number >= told => {
                    told = number + 1;
                    progress.tell(&line.text.replace('\n', "\n    "));
                }
                Some(Message::Log { .. }) => {}
                Some(Message::Status(status)) => {
                    if status.state.is_active() {
                        progress.show(&status);
                    }
                    last = Some(*status);
                }
                Some(Message::Lost) => progress.tell("pgthaw: the connection to the server is lost; the session goes on, connecting again"),
                Some(Message::Failed(error)) => return Err(error),
                None => {
                    let Some(status) = last else { return Err(nothing_heard(id)) };
                    return Ok(Ending::Ended { status: Box::new(status), stopped: stopping.is_some() });
                }
            },
            by = interrupts.next() => {
                let leaves = by == Noticed::Terminate || on_interrupt == OnInterrupt::Leave;
                if let Some(refusals) = &mut stopping {
                    // What was asked for must not be lost with this process: the end of the channel says that the server has it.
                    let _ = tokio::time::timeout(STOP_LIMIT, refusals.recv()).await;
                }
                if stopping.is_some() || leaves {
                    return Ok(Ending::Left { stopped: stopping.is_some(), by });
                }
                progress.tell("pgthaw: stopping the session; Ctrl-C again leaves it alone");
                stopping = Some(stop(client, id));
            }
            error = stop_refused => {
                stopping = None;
                progress.tell(&format!("pgthaw: the session cannot be stopped: {}", error.message));
            }
            _ = tick.tick() => progress.tick(),
        }
    }
}

/// Asks the session to stop; a refusal comes out of the channel.
fn stop(client: &Client, id: &str) -> mpsc::Receiver<ApiError> {
    let (refusals, receiver) = mpsc::channel(1);
    let (client, path) = (client.clone(), session_path(id, "/stop"));
    tokio::spawn(async move {
        if let Err(error) = client.post::<Status>(&path, &()).await {
            let _ = refusals.send(error).await; // the follower has left
        }
    });
    receiver
}

fn nothing_heard(id: &str) -> ApiError {
    ApiError {
        message: format!("pgthaw's server told nothing about session {id}"),
        hint: Some(format!("see `pgthaw session {id}`")),
        usage: false,
    }
}

/// What a session's followers hear.
enum Message {
    /// A line of its log; 0 is the first.
    Log { number: usize, line: LogLine },
    /// Its status has changed.
    Status(Box<Status>),
    /// The connection is lost and will be made again.
    Lost,
    /// Nothing more will be heard.
    Failed(ApiError),
}

/// Why a connection ended.
enum Closed {
    /// The session is no longer at work.
    Ended,
    /// Nobody listens to the messages any more.
    Unheard,
    /// The server ended the stream while the session was at work.
    Early,
}

/// Listens to a session's events, over as many connections as it takes. The channel closes when the session is no longer at work.
fn messages(client: &Client, id: &str) -> mpsc::Receiver<Message> {
    let (sender, receiver) = mpsc::channel(64);
    let (client, id) = (client.clone(), id.to_owned());
    tokio::spawn(async move {
        let mut early = 0;
        loop {
            let begun = Instant::now();
            let reason = match listen(&client, &id, &sender).await {
                Ok(Closed::Ended | Closed::Unheard) => return,
                Ok(Closed::Early) => "the server of this account has ended".to_owned(),
                Err(ClientError::Api(error)) => {
                    let _ = sender.send(Message::Failed(error)).await; // nobody listens any more
                    return;
                }
                Err(error) => error.to_string(),
            };
            early = if begun.elapsed() > GOOD_CONNECTION { 1 } else { early + 1 };
            if early == 1 && sender.send(Message::Lost).await.is_err() {
                return;
            }
            // One that others run comes back by somebody else's doing: systemd's, or a machine's that boots.
            let (elsewhere, tries) = match client.is_elsewhere() {
                true => (true, TRIES_ELSEWHERE),
                false => (false, TRIES),
            };
            let again = match early < tries {
                true => client.ensure_server().await.or_else(|error| match elsewhere {
                    true => Ok(()),
                    false => Err(error),
                }),
                false => Err(lost_for_good(&id, &reason)),
            };
            if let Err(error) = again {
                let _ = sender.send(Message::Failed(error)).await; // nobody listens any more
                return;
            }
            tokio::time::sleep(Duration::from_millis(100 << early.min(4))).await;
        }
    });
    receiver
}

fn lost_for_good(id: &str, reason: &str) -> ApiError {
    ApiError {
        message: format!("session {id} cannot be followed: {reason}"),
        hint: Some(format!("it goes on; `pgthaw attach {id}` follows it again")),
        usage: false,
    }
}

/// Listens on one connection.
async fn listen(
    client: &Client,
    id: &str,
    sender: &mpsc::Sender<Message>,
) -> Result<Closed, ClientError> {
    let mut events = client.events(id).await?;
    let mut number = 0;
    let mut active = true;
    while let Some(event) = events.next().await? {
        let message = match event.name.as_str() {
            "log" => serde_json::from_value(event.data).map(|line| {
                number += 1;
                Message::Log { number: number - 1, line }
            }),
            "status" => serde_json::from_value::<Box<Status>>(event.data).map(|status| {
                active = status.state.is_active();
                Message::Status(status)
            }),
            _ => continue, // of a newer server
        };
        let message = message.map_err(|err| {
            let message = format!("an event of session {id} cannot be read: {err}");
            ClientError::Api(ApiError { message, hint: None, usage: false })
        })?;
        if sender.send(message).await.is_err() {
            return Ok(Closed::Unheard);
        }
    }
    Ok(if active { Closed::Early } else { Closed::Ended })
}

/// Hands every log line of a session to `take` until the session is no longer at work.
///
/// # Errors
/// What `take` says; when the server refuses, or cannot be reached any more.
pub async fn follow_log(
    client: &Client,
    id: &str,
    mut take: impl FnMut(LogLine) -> Result<(), ApiError>,
) -> Result<(), ApiError> {
    let mut messages = messages(client, id);
    let mut told = 0;
    while let Some(message) = messages.recv().await {
        match message {
            Message::Log { number, line } if number >= told => {
                told = number + 1;
                take(line)?;
            }
            Message::Failed(error) => return Err(error),
            Message::Log { .. } | Message::Status(_) | Message::Lost => {}
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "follow_tests.rs"]
mod tests;
