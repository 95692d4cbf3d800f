//! Export sessions: what was asked, what has happened, and what to do next.
//!
//! Owns the request, the states, the journal and the choice "act, wait or give up".
//! Leaves repositories to `pgthaw-source`, mounting to `pgthaw-mountfs`, PostgreSQL to `pgthaw-postgres`, delivery to
//! `pgthaw-mover`, and every socket and process to the `pgthaw` program.
//!
//! What cannot be observed later is journalled before it happens; everything else is observed, so every action must be
//! safe to repeat. Start at [`decide()`].

pub mod decide;
pub mod journal;
pub mod limits;
pub mod observed;
pub mod request;
pub mod session;
pub mod status;

pub use decide::{Action, decide};
pub use journal::{Journal, JournalError};
pub use observed::{AgentView, Failure, Observed, Progress};
pub use request::{ExportRequest, MoverChoice, RecoveryChoice, RepositoryChoice};
pub use session::{Entry, Record, Session};
pub use status::{DatabaseState, SessionState, Status, Step, TakenWay};
