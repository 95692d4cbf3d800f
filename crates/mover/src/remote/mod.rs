//! Delivery to another machine.
//!
//! [`RemoteTarget`] sends, [`receive()`] takes in; what they say to each other is in `message`. Files travel in chunks, many at
//! a time: `sending` decides what to send, `arriving` writes it, `settle` makes sure of it and says so, `journal` keeps what
//! is sure. Connections come from outside (`connection`); `link` keeps one alive and `frame` gives messages their form.

mod arriving;
mod bounded;
mod connection;
mod frame;
mod journal;
mod link;
mod message;
mod queue;
mod receive;
mod remote_target;
mod sending;
mod settle;
mod throttle;
mod wire_error;

pub use connection::{Connection, Heartbeat, Parts};
pub use receive::{ReceiveError, receive};
pub use remote_target::{RemoteOptions, RemoteStatus, RemoteTarget};
