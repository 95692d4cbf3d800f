//! What a command and all it starts cost, by the kernel's own figures.

use std::process::{Command, Output};

/// The cost of a command, its children, and the daemons it left behind until they ended.
#[derive(Debug, Clone, Copy, PartialEq, serde::Deserialize)]
pub struct Usage {
    /// Bytes that read calls returned, from the page cache or not.
    pub rchar: u64,
    /// Bytes given to write calls.
    pub wchar: u64,
    /// Bytes fetched from storage.
    pub read_bytes: u64,
    /// Bytes sent towards storage.
    pub write_bytes: u64,
    /// When it started, in seconds since 1970.
    pub started: f64,
    /// Wall seconds until the command itself ended.
    pub seconds: f64,
    /// Wall seconds until the last of its descendants ended.
    pub seconds_of_all: f64,
    /// Seconds of processor time in programs.
    pub user: f64,
    /// Seconds of processor time in the kernel.
    pub system: f64,
}

/// Runs a command to its end and to the end of everything it started; returns its output and the cost.
///
/// Needs python3. A descendant that never ends makes this wait for ever: give the test a time limit. A process
/// whose parent ignores SIGCHLD is not counted.
pub fn measure(command: &Command) -> (Output, Usage) {
    let report = tempfile::NamedTempFile::new().expect("temporary file");
    let mut metered = Command::new("python3");
    metered.args(["-c", include_str!("measure.py")]).arg(report.path());
    metered.arg(command.get_program()).args(command.get_args());
    if let Some(dir) = command.get_current_dir() {
        metered.current_dir(dir);
    }
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => metered.env(name, value),
            None => metered.env_remove(name),
        };
    }
    let output = metered.output().expect("python3 runs");
    let text = std::fs::read_to_string(report.path()).expect("our own file");
    let usage = serde_json::from_str(&text).unwrap_or_else(|err| {
        panic!("no report ({err}): {}", String::from_utf8_lossy(&output.stderr))
    });
    (output, usage)
}

/// Uses this many bytes of memory and gives them back, so that what is measured next need not pay for them: a virtual
/// machine gets memory that it has not used lately from its host page by page, ten times as slowly as any other.
pub fn claim_memory(bytes: usize) {
    const PAGE: usize = 4096;
    let mut memory = vec![0_u8; bytes];
    memory.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1);
    std::hint::black_box(memory);
}
