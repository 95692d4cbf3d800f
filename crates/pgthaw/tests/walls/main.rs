//! What a backup holds reaches nothing of this machine: production clusters beside an export, hostile code in a backup, and
//! what the processes of an instance see.

#[path = "../support/mod.rs"]
mod support;

mod attempts;
mod hostile;
mod inside;
mod production;
mod tablespaces;
