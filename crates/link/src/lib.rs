//! Reaching pgthaw on other machines, through the system's `ssh` with the user's own configuration and keys.
//!
//! Owns the names of machines, the ssh command and what its failures mean, finding the program over there or carrying it
//! over, and the line itself: calls as HTTP/2 over the standard input and output of `pgthaw attach --stdio`. Leaves what is
//! called to the program, and bulk data to connections of their own, so that a call never waits behind it.
//!
//! ```text
//! Line ── ssh HOST ── sshd ── pgthaw attach --stdio
//!   1. the far side says who it is (Welcome), or that pgthaw is not there, and then gets it
//!   2. this side says what the connection is for (Greeting)
//!   3. calls: HTTP/2; anything else: raw bytes
//! ```
//! Start at [`Host`], [`OpenLine::open`] and [`Line::over`].

mod far_side;
mod greeting;
mod host;
mod line;
mod program;
mod ssh;

pub use far_side::{serve_calls, welcome_and_greet};
pub use greeting::{Greeting, GreetingError, PROTOCOL, Purpose, Welcome, read_line, write_line};
pub use host::{BadHost, Host, Place};
pub use line::{Carrier, Carry, Line, LineError, OpenLine};
pub use program::{own_build, remove_if_unused};
