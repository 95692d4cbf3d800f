//! Reads over a link: what breaks, who lies, and what is read ahead.

mod ahead;
mod faults;
mod hostile;
mod support;
