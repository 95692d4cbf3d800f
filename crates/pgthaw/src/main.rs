//! The `pgthaw` program: exports chosen databases out of a physical PostgreSQL backup without restoring it.
//!
//! [`cli`] is what people see and the only place that talks to a terminal; [`server`] owns the sessions; [`agent`] does one
//! session's work on a machine; [`internal`] are the children they start of this same program. [`wire`] is what they say
//! to each other, [`http`] how.

mod admission;
mod agent;
mod attach;
mod cli;
mod configuration;
mod delivered;
mod escapes;
mod http;
mod internal;
mod leftovers;
mod machine;
mod offers;
mod processes;
mod recovery_line;
mod rules;
mod server;
mod sizes;
mod ssh_agent;
mod wire;

fn main() -> std::process::ExitCode {
    cli::main()
}
