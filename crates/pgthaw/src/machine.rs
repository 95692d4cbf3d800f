//! Another machine: the line for calls to it, made when it is first needed and again after it broke.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use pgthaw_link::{Carry, Host, Line, LineError, OpenLine, Purpose};

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

/// One machine. The line ends when the last owner of this lets go of it.
#[derive(Debug)]
pub struct Machine {
    host: Host,
    reaching: Reaching,
    line: tokio::sync::Mutex<Option<Line>>,
}

impl Machine {
    /// The machine called `host`; nothing is connected yet.
    pub fn new(host: Host, reaching: Reaching) -> Self {
        Self { host, reaching, line: tokio::sync::Mutex::default() }
    }

    /// Its name.
    pub fn host(&self) -> &Host {
        &self.host
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
        let Reaching { carry, forward_agent } = self.reaching;
        Ok(line.insert(Line::connect(&self.host, carry, forward_agent).await?).clone())
    }

    /// Opens a connection of its own for raw bytes.
    ///
    /// # Errors
    /// [`LineError`].
    pub async fn open(&self, purpose: &Purpose) -> Result<OpenLine, LineError> {
        let Reaching { carry, forward_agent } = self.reaching;
        OpenLine::open(&self.host, carry, forward_agent, purpose).await
    }
}

/// The machines in use, each once.
#[derive(Debug, Default)]
pub struct Machines(Mutex<BTreeMap<Host, Weak<Machine>>>);

impl Machines {
    /// The machine called `host`.
    pub fn get(&self, host: &Host) -> Arc<Machine> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, machine| machine.strong_count() > 0);
        if let Some(machine) = known.get(host).and_then(Weak::upgrade) {
            return machine;
        }
        let machine = Arc::new(Machine::new(host.clone(), Reaching::default()));
        known.insert(host.clone(), Arc::downgrade(&machine));
        machine
    }
}
