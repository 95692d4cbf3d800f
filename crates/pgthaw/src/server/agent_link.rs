//! The recovery service's line to a session's agent: starts it, asks it, watches it.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use pgthaw_session::AgentView;
use pgthaw_session::observed::Failure;
use tokio::sync::watch;

use crate::agent;
use crate::http::{self, Address, ClientError};
use crate::internal::{self, Child};
use crate::wire::Assignment;

/// How long a new agent may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How long an agent may take to end what runs.
const END_LIMIT: Duration = Duration::from_secs(30);
/// How often an agent that does not answer is asked again before it counts as dead.
const ASK_AGAIN: u32 = 5;
/// Between two tries, at first and at most.
const FIRST_REST: Duration = Duration::from_millis(200);
const LONGEST_REST: Duration = Duration::from_secs(5);

/// A line to one agent.
#[derive(Debug, Clone)]
pub struct AgentLink {
    address: Address,
}

impl AgentLink {
    /// The line to the agent at `address`, whether or not one listens there.
    pub fn to(address: Address) -> Self {
        Self { address }
    }

    /// Starts the agent for `assignment` on this machine, detached from this process; its errors go to `log`.
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
        let link = Self::to(Address::Socket(agent::socket_of(&assignment.place)));
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
        http::request(&self.address, "POST", &format!("/v1/{verb}"), Some(body)).await
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
        http::put_bytes(&self.address, "/v1/map", map).await
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
        let answer = http::request(&self.address, "GET", &path, None::<()>);
        match tokio::time::timeout(agent::OBSERVE_LIMIT * 3, answer).await {
            Ok(answer) => answer,
            Err(_) => {
                if let Address::Far(machine, _) = &self.address {
                    machine.leave_line();
                }
                Err(ClientError::Broken {
                    address: self.address.to_string(),
                    reason: "no answer in time".into(),
                })
            }
        }
    }

    /// Watches the agent until it is dead: the channel holds what it showed last, nothing once it is dead. A machine that cannot be
    /// reached is waited for: its agent goes on.
    pub async fn watch(&self) -> Watch {
        let first = self.observe(None).await;
        let (tell_trouble, trouble) = watch::channel(match &first {
            Err(err) if self.may_pass(err) => Some(err.to_string()),
            _ => None,
        });
        let (sender, view) = watch::channel(first.ok());
        let link = self.clone();
        tokio::spawn(async move {
            let (mut misses, mut rest) = (0, FIRST_REST);
            while misses < ASK_AGAIN && !sender.is_closed() {
                let version = sender.borrow().as_ref().map(|view| view.version);
                match link.observe(version).await {
                    Ok(view) => {
                        (misses, rest) = (0, FIRST_REST);
                        tell_trouble.send_if_modified(|trouble| trouble.take().is_some());
                        if version != Some(view.version) {
                            let _ = sender.send(Some(view));
                        }
                    }
                    Err(ClientError::NotListening(_)) => misses = ASK_AGAIN,
                    Err(err) if link.may_pass(&err) => {
                        tell_trouble.send_replace(Some(err.to_string()));
                        tokio::time::sleep(rest).await;
                        rest = (rest * 2).min(LONGEST_REST);
                    }
                    Err(_) => {
                        misses += 1;
                        tokio::time::sleep(FIRST_REST).await;
                    }
                }
            }
            tell_trouble.send_replace(None);
            let _ = sender.send(None);
        });
        Watch { view, trouble }
    }

    /// Whether the way to the machine failed, not the agent.
    fn may_pass(&self, err: &ClientError) -> bool {
        match err {
            ClientError::NoLine(_) => true,
            ClientError::Broken { .. } => matches!(self.address, Address::Far(..)),
            ClientError::NotListening(_) | ClientError::Api(_) => false,
        }
    }
}

/// What is seen of an agent.
#[derive(Debug)]
pub struct Watch {
    /// What it showed last; nothing once it is dead, or before its machine was reached.
    pub view: watch::Receiver<Option<AgentView>>,
    /// Why its machine cannot be reached, while it cannot: nothing new is known of it then.
    pub trouble: watch::Receiver<Option<String>>,
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
