//! Input that is wrong, damaged or hostile: each is refused with its own message and exit code, and nothing is left or delivered.

#[path = "../support/mod.rs"]
mod support;

mod damage;
mod lab;
mod manifests;
mod surroundings;
mod usage;
