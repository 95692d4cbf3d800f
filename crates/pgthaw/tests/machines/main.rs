//! Exports over several machines: repository, instance, target and command line each on a host of the lab, joined by real `sshd`.
//!
//! The lab needs root: an ordinary account passes these tests by.

#[path = "../support/mod.rs"]
mod support;

mod faults;
mod lab;
mod movers;
mod placements;
mod read_from;
mod refusals;
mod small_disk;
mod table;
mod token;
