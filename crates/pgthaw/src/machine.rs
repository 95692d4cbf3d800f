//! Another machine: the line for calls to it, made when it is first needed and again after it broke.

use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use pgthaw_link::{Carry, Host, Line, LineError, OpenLine, Purpose};
use pgthaw_session::request::CallerMachine;
use tokio::net::UnixStream;

use crate::attach::handing::Handed;
use crate::offers::{OfferKey, Offers};
use crate::ssh_agent::SshAgent;

/// How one machine is reached.
#[derive(Debug)]
enum Way {
    /// By ssh, with an ssh-agent of its own or the account's keys.
    Ssh { host: Host, carry: Carry, agent: Option<Arc<SshAgent>> },
    /// By connections that whoever asks offers from there.
    Offered { key: OfferKey, offers: Arc<Offers> },
}

/// One machine. The line ends when the last owner of this lets go of it.
#[derive(Debug)]
pub struct Machine {
    name: String,
    way: Way,
    line: tokio::sync::Mutex<Option<Line>>,
}

impl Machine {
    /// The machine called `host`; nothing is connected yet. It is reached with the keys of `agent`, where there is one.
    pub fn new(host: Host, carry: Carry, agent: Option<Arc<SshAgent>>) -> Self {
        Self {
            name: host.to_string(),
            way: Way::Ssh { host, carry, agent },
            line: tokio::sync::Mutex::default(),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The line for calls; connects where there is none or it has broken. Callers that come meanwhile wait.
    ///
    /// # Errors
    /// [`LineError`].
    pub async fn line(&self) -> Result<Line, LineError> {
        let mut line = self.line.lock().await;
        if let Some(line) = line.as_ref().filter(|line| !line.is_closed()) {
            return Ok(line.clone());
        }
        *line = None; // ends the old ssh before the new one starts
        let open = self.open(&Purpose::Calls).await?;
        Ok(line.insert(Line::over(&self.name, open).await?).clone())
    }

    /// Makes no more calls on the line there is: the next one makes a new line. Calls that are under way may still end.
    pub fn leave_line(&self) {
        if let Ok(mut line) = self.line.try_lock() {
            *line = None; // who holds the lock is making a new one
        }
    }

    /// Whether the line for calls has broken, or was never made.
    pub async fn is_cut(&self) -> bool {
        self.line.lock().await.as_ref().is_none_or(Line::is_closed)
    }

    /// Opens a connection of its own.
    ///
    /// # Errors
    /// [`LineError`].
    pub async fn open(&self, purpose: &Purpose) -> Result<OpenLine, LineError> {
        match &self.way {
            Way::Ssh { host, carry, agent } => {
                let agent = agent.as_ref().map(|agent| agent.socket());
                OpenLine::open(host, *carry, agent, purpose).await
            }
            Way::Offered { key, offers } => {
                let mut trouble = "nobody there receives the export".to_owned();
                while let Some(Handed { input, output, holder, .. }) = offers.take(key).await {
                    let holder =
                        holder.set_nonblocking(true).and_then(|()| UnixStream::from_std(holder));
                    let opened = match holder {
                        Ok(holder) => {
                            OpenLine::offered(&self.name, input, output, holder, purpose).await
                        }
                        Err(err) => return Err(self.away(err.to_string())),
                    };
                    match opened {
                        Ok(open) => return Ok(open),
                        Err(err) => trouble = err.message, // it may have ended just now: the next one
                    }
                }
                Err(self.away(trouble))
            }
        }
    }

    /// The machine offers no connection.
    fn away(&self, message: String) -> LineError {
        LineError {
            host: self.name.clone(),
            message: format!("{message}; on that machine, `pgthaw attach` goes on"),
            hint: Some("on that machine, `pgthaw attach` or `pgthaw retry` goes on".into()),
            passes: true,
        }
    }
}

/// A machine that is reached by ssh, and the caller whose keys are used, if not the account's own.
type SshKey = (Host, Option<OfferKey>);

/// The machines in use, each once.
#[derive(Debug)]
pub struct Machines {
    carry: Carry,
    /// Where ssh-agents of callers listen.
    agents_directory: PathBuf,
    offers: Arc<Offers>,
    hosts: Mutex<BTreeMap<SshKey, Weak<Machine>>>,
    callers: Mutex<BTreeMap<OfferKey, Weak<Machine>>>,
    agents: Mutex<BTreeMap<OfferKey, Weak<SshAgent>>>,
}

impl Machines {
    /// None yet. Makes the directory where forwarded ssh-agents listen, and empties it: nobody listens there any more.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(carry: Carry, agents_directory: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(agents_directory)?;
        for entry in std::fs::read_dir(agents_directory)? {
            std::fs::remove_file(entry?.path())?;
        }
        Ok(Self {
            carry,
            agents_directory: agents_directory.into(),
            offers: Arc::default(),
            hosts: Mutex::default(),
            callers: Mutex::default(),
            agents: Mutex::default(),
        })
    }

    /// Where callers offer connections to their machines.
    pub fn offers(&self) -> &Arc<Offers> {
        &self.offers
    }

    /// The machine called `host`, reached with the keys of `agent`, where there is one.
    pub fn get(&self, host: &Host, agent: Option<&Arc<SshAgent>>) -> Arc<Machine> {
        let key = (host.clone(), agent.map(|agent| agent.key().clone()));
        once(&self.hosts, &key, || Machine::new(host.clone(), self.carry, agent.cloned()))
    }

    /// The machine of a caller, the account `uid` here.
    pub fn caller(&self, caller: &CallerMachine, uid: u32) -> Arc<Machine> {
        let key = OfferKey { uid, caller: offered_machine(caller) };
        once(&self.callers, &key, || Machine {
            name: caller.name.clone(),
            way: Way::Offered { key: key.clone(), offers: self.offers.clone() },
            line: tokio::sync::Mutex::default(),
        })
    }

    /// The ssh-agent of a caller, the account `uid` here.
    ///
    /// # Errors
    /// When its socket cannot be made.
    pub fn ssh_agent(&self, caller: &CallerMachine, uid: u32) -> io::Result<Arc<SshAgent>> {
        let key = OfferKey { uid, caller: offered_ssh_agent(caller) };
        let mut known = self.agents.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, agent| agent.strong_count() > 0);
        if let Some(agent) = known.get(&key).and_then(Weak::upgrade) {
            return Ok(agent);
        }
        let agent =
            Arc::new(SshAgent::listen(&self.agents_directory, self.offers.clone(), key.clone())?);
        known.insert(key, Arc::downgrade(&agent));
        Ok(agent)
    }
}

/// What is said with a connection to a caller's machine.
pub fn offered_machine(caller: &CallerMachine) -> String {
    format!("machine {} {}", caller.name, caller.id)
}

/// What is said with a connection to a caller's ssh-agent.
pub fn offered_ssh_agent(caller: &CallerMachine) -> String {
    format!("ssh-agent {} {}", caller.name, caller.id)
}

/// The machine of this key: the one that is in use, or a new one.
fn once<K: Ord + Clone>(
    known: &Mutex<BTreeMap<K, Weak<Machine>>>,
    key: &K,
    new: impl FnOnce() -> Machine,
) -> Arc<Machine> {
    let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
    known.retain(|_, machine| machine.strong_count() > 0);
    if let Some(machine) = known.get(key).and_then(Weak::upgrade) {
        return machine;
    }
    let machine = Arc::new(new());
    known.insert(key.clone(), Arc::downgrade(&machine));
    machine
}
