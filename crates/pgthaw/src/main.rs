//! The `pgthaw` program.

fn main() {}
