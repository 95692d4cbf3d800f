//! Another machine: the line for calls to it, made when it is first needed and again after it broke.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use pgthaw_link::{Carry, Host, Line, LineError, OpenLine, Purpose};
use pgthaw_session::request::CallerMachine;
use tokio::net::UnixStream;

use crate::attach::handing::Handed;
use crate::offers::{OfferKey, Offers};

/// How machines are reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reaching {
    /// Whether the program may be carried over.
    pub carry: Carry,
    /// Whether ssh forwards the caller's agent.
    pub forward_agent: bool,
}

impl Default for Reaching {
    fn default() -> Self {
        Self { carry: Carry::IfMissing, forward_agent: false }
    }
}

/// How one machine is reached.
#[derive(Debug)]
enum Way {
    /// By ssh.
    Ssh(Host),
    /// By connections that whoever asks offers from there.
    Offered { key: OfferKey, offers: Arc<Offers> },
}

/// One machine. The line ends when the last owner of this lets go of it.
#[derive(Debug)]
pub struct Machine {
    name: String,
    way: Way,
    reaching: Reaching,
    line: tokio::sync::Mutex<Option<Line>>,
}

impl Machine {
    /// The machine called `host`; nothing is connected yet.
    pub fn new(host: Host, reaching: Reaching) -> Self {
        Self {
            name: host.to_string(),
            way: Way::Ssh(host),
            reaching,
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

    /// Opens a connection of its own.
    ///
    /// # Errors
    /// [`LineError`].
    pub async fn open(&self, purpose: &Purpose) -> Result<OpenLine, LineError> {
        match &self.way {
            Way::Ssh(host) => {
                let Reaching { carry, forward_agent } = self.reaching;
                OpenLine::open(host, carry, forward_agent, purpose).await
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

/// The machines in use, each once.
#[derive(Debug, Default)]
pub struct Machines {
    reaching: Reaching,
    offers: Arc<Offers>,
    hosts: Mutex<BTreeMap<Host, Weak<Machine>>>,
    callers: Mutex<BTreeMap<OfferKey, Weak<Machine>>>,
}

impl Machines {
    /// None yet; how they will be reached.
    pub fn new(reaching: Reaching) -> Self {
        Self { reaching, ..Self::default() }
    }

    /// Where callers offer connections to their machines.
    pub fn offers(&self) -> &Arc<Offers> {
        &self.offers
    }

    /// The machine called `host`.
    pub fn get(&self, host: &Host) -> Arc<Machine> {
        once(&self.hosts, host, || Machine::new(host.clone(), self.reaching))
    }

    /// The machine of a caller, the account `uid` here.
    pub fn caller(&self, caller: &CallerMachine, uid: u32) -> Arc<Machine> {
        let key = OfferKey { uid, caller: format!("{} {}", caller.name, caller.id) };
        once(&self.callers, &key, || Machine {
            name: caller.name.clone(),
            way: Way::Offered { key: key.clone(), offers: self.offers.clone() },
            reaching: self.reaching,
            line: tokio::sync::Mutex::default(),
        })
    }
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
