//! The first process of a PID namespace: when it ends, the kernel kills all others in it, also in namespaces
//! below. The scripts that become one are `floor.sh` and `boot.sh`.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

/// A first process; it and its whole namespace are killed when this is dropped.
#[derive(Debug)]
pub(super) struct Init {
    /// Waits for the first process outside of its namespace, and ends with it.
    keeper: Child,
    pid: i32,
}

impl Init {
    /// Runs `command`, which must end in a script that prints `pid` with the number the test sees, and `ready`
    /// once the namespace can be used.
    ///
    /// # Panics
    /// With all the script said, if it ends before.
    pub fn start(command: &mut Command) -> Self {
        let mut keeper = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|err| panic!("{command:?}: {err}"));
        let stdout = BufReader::new(keeper.stdout.take().expect("piped"));
        let (mut pid, mut said) = (0, String::new());
        for line in stdout.lines().map_while(Result::ok) {
            match line.strip_prefix("pid ") {
                _ if line == "ready" => return Self { keeper, pid },
                Some(number) => pid = number.parse().expect("a number"),
                None => said += &format!("{line}\n"),
            }
        }
        let _ = keeper.stderr.take().expect("piped").read_to_string(&mut said);
        panic!("{command:?}: {:?}\n{said}", keeper.wait());
    }

    /// Returns its pid as the test's own namespace has it.
    pub fn pid(&self) -> i32 {
        self.pid
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        // Until the keeper has ended, nobody else can have the pid.
        if let (Ok(None), Some(pid)) = (self.keeper.try_wait(), Pid::from_raw(self.pid)) {
            let _ = kill_process(pid, Signal::KILL); // an error only means that it ended by itself
        }
        let _ = self.keeper.wait();
    }
}
