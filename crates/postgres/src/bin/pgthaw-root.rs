//! The process that builds a root of its own for an instance, by itself: this crate's tests start it, where the program
//! starts itself.

use std::process::ExitCode;

fn main() -> ExitCode {
    let numbers: Vec<String> = std::env::args().skip(1).collect();
    pgthaw_postgres::root::init::run(&numbers)
}
