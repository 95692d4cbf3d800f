//! What is killed, interrupted or canceled at any moment: at worst a retry is needed, and nothing is left.

mod again;
mod kills;
mod lab;
mod random;
mod stops;
#[path = "../support/mod.rs"]
mod support;
