//! A mount server for a team: `pgthaw serve` beside the repository, asked from a laptop that is also the target.
//!
//! The lab needs root: an ordinary account passes these tests by.

#[path = "../support/mod.rs"]
mod support;

mod floods;
mod lab;
mod laptop;
mod rules;
