//! The recovery service's line to a session's agent: starts it, asks it, watches it.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use pgthaw_session::AgentView;
use pgthaw_session::observed::Failure;
use pgthaw_session::session::Place;
use tokio::sync::watch;

use crate::agent;
use crate::internal::{self, Child};
use crate::unix_http::{self, ClientError};
use crate::wire::Assignment;

/// How long a new agent may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How long an agent may take to end what runs.
const END_LIMIT: Duration = Duration::from_secs(30);
/// How often an agent that does not answer is asked again before it counts as dead.
const ASK_AGAIN: u32 = 5;

/// A line to one agent.
#[derive(Debug, Clone)]
pub struct AgentLink {
    socket: PathBuf,
}

impl AgentLink {
    /// The line to the agent at `place`, whether or not one listens there.
    pub fn to(place: &Place) -> Self {
        Self { socket: agent::socket_of(place) }
    }

    /// Starts the agent for `assignment`, detached from this process; its errors go to `log`.
    ///
    /// # Errors
    /// When it cannot be started or ends before it answers.
    pub async fn start(assignment: &Assignment, log: &Path) -> Result<Self, Failure> {
        let failed = |what: &str, err: io::Error| Failure::new(format!("{what}: {err}"));
        let log_file = OpenOptions::new().create(true).append(true).mode(0o600).open(log);
        let log_file = log_file.map_err(|err| failed(&format!("open `{}`", log.display()), err))?;
        let mut command = internal::command(Child::Agent);
        command.env(agent::MARKER_VARIABLE, &assignment.place.marker);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log_file);
        // SAFETY: setsid is a plain system call.
        unsafe {
            std::os::unix::process::CommandExt::pre_exec(&mut command, || {
                rustix::process::setsid().map(drop).map_err(io::Error::from)
            });
        }
        let mut child = command.spawn().map_err(|err| failed("start the session's agent", err))?;
        let mut input = child.stdin.take().expect("piped");
        let told = serde_json::to_vec(assignment).expect("an assignment is plain data");
        let (ended, mut has_ended) = watch::channel(None);
        std::thread::spawn(move || {
            let _ = input.write_all(&told); // an agent that ended early says why in its log
            drop(input);
            let _ = ended.send(child.wait().ok());
        });
        let link = Self::to(&assignment.place);
        let deadline = tokio::time::Instant::now() + START_LIMIT;
        loop {
            if link.observe(None).await.is_ok() {
                return Ok(link);
            }
            let ended =
                tokio::time::timeout(Duration::from_millis(30), has_ended.changed()).await.is_ok();
            if ended || tokio::time::Instant::now() > deadline {
                let said = last_lines(log);
                return Err(Failure::new(format!("the session's agent did not start: {said}")));
            }
        }
    }

    /// Asks the agent to do something; it answers at once and goes on by itself.
    ///
    /// # Errors
    /// When the agent does not answer, or refuses.
    pub async fn ask(
        &self,
        verb: &str,
        body: &(impl serde::Serialize + Sync),
    ) -> Result<(), ClientError> {
        unix_http::request(&self.socket, "POST", &format!("/v1/{verb}"), Some(body)).await
    }

    /// Asks the agent to end everything that runs, and itself; waits until it has, for a while.
    pub async fn end(&self) {
        let asked = self.ask("gone", &());
        let _ = tokio::time::timeout(END_LIMIT, asked).await; // whatever it leaves is removed by the journal
    }

    /// Hands the map over.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub async fn put_map(&self, map: Vec<u8>) -> Result<(), ClientError> {
        unix_http::put_bytes(&self.socket, "/v1/map", map).await
    }

    /// Looks at the agent; with a version, as soon as there is a newer one (or after a few seconds).
    ///
    /// # Errors
    /// When the agent does not answer.
    pub async fn observe(&self, newer_than: Option<u64>) -> Result<AgentView, ClientError> {
        let path = match newer_than {
            Some(version) => format!("/v1/observe?after={version}"),
            None => "/v1/observe".to_owned(),
        };
        let answer = unix_http::request(&self.socket, "GET", &path, None::<()>);
        match tokio::time::timeout(agent::OBSERVE_LIMIT * 3, answer).await {
            Ok(answer) => answer,
            Err(_) => Err(ClientError::Broken {
                socket: self.socket.clone(),
                reason: "no answer in time".into(),
            }),
        }
    }

    /// Watches the agent until it is dead: the channel holds what it showed last, nothing once it is dead.
    pub async fn watch(&self) -> watch::Receiver<Option<AgentView>> {
        let (sender, receiver) = watch::channel(self.observe(None).await.ok());
        let link = self.clone();
        tokio::spawn(async move {
            let mut misses = 0;
            while misses < ASK_AGAIN && !sender.is_closed() {
                let version = sender.borrow().as_ref().map(|view| view.version);
                match link.observe(version).await {
                    Ok(view) => {
                        misses = 0;
                        if version != Some(view.version) {
                            let _ = sender.send(Some(view));
                        }
                    }
                    Err(ClientError::NotListening(_)) => misses = ASK_AGAIN,
                    Err(_) => {
                        misses += 1;
                        tokio::time::sleep(Duration::from_millis(200)).await;
                    }
                }
            }
            let _ = sender.send(None);
        });
        receiver
    }
}

fn last_lines(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(3).collect();
    if lines.is_empty() {
        "it said nothing".into()
    } else {
        lines.into_iter().rev().collect::<Vec<_>>().join("; ")
    }
}
