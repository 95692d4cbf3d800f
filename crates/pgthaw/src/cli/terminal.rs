//! The only place that writes to standard output and standard error, and asks.
//!
//! Data goes to standard output, everything else to standard error. A reader that went away, or a terminal that is lost, is never an error:
//! the session goes on without us. Data that cannot be written for another reason is one.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use serde::Serialize;

use super::text;
use crate::wire::ApiError;

/// Exit code of a failure, and of an export that was delivered in part.
pub const FAILED: u8 = 1;
/// Exit code of wrong usage.
pub const USAGE: u8 = 2;
/// Exit code after Ctrl-C.
pub const INTERRUPTED: u8 = 130;
/// Exit code after SIGTERM.
pub const TERMINATED: u8 = 143;

/// The longest line that is said, in characters: words of another host may be endless.
const LONGEST_LINE: usize = 4000;

/// Prints data on standard output; `text` ends with a newline. What a terminal would obey, which names in a backup may hold, is
/// escaped.
///
/// # Errors
/// It cannot be written, on a full disk for example. A reader that went away is none: nobody wants to know.
pub fn print(text: &str) -> Result<(), ApiError> {
    let mut output = io::stdout().lock();
    written(output.write_all(text::lines(text).as_bytes()).and_then(|()| output.flush()))
}

/// Prints `value` as JSON on standard output.
///
/// # Errors
/// As [`print()`].
pub fn print_json(value: &impl Serialize) -> Result<(), ApiError> {
    let json = serde_json::to_string_pretty(value).expect("what is printed is plain data");
    print(&format!("{json}\n"))
}

/// Says the help or the version that was asked for, or what is wrong with the command line; returns the exit code.
pub fn print_usage(message: &clap::Error) -> ExitCode {
    let printed = message.print().and_then(|()| io::stdout().flush());
    match written(printed) {
        Ok(()) => ExitCode::from(u8::try_from(message.exit_code()).unwrap_or(USAGE)),
        Err(error) => {
            tell_error(&error);
            ExitCode::from(FAILED)
        }
    }
}

fn written(result: io::Result<()>) -> Result<(), ApiError> {
    match result {
        Err(err) if err.kind() != io::ErrorKind::BrokenPipe => Err(ApiError {
            message: format!("write to standard output: {err}"),
            hint: None,
            usage: false,
        }),
        _ => Ok(()),
    }
}

/// Says one line, or several, on standard error; what a terminal would obey is escaped.
pub fn tell(lines: &str) {
    let lines = lines.lines().map(shown);
    let _ = writeln!(io::stderr().lock(), "{}", lines.collect::<Vec<_>>().join("\n")); // a lost terminal
}

/// Says an error, one line for each of its lines, and its hint. Lines after the first are indented: whatever words of another host
/// are in it, no error and no hint begins there.
pub fn tell_error(error: &ApiError) {
    let label = if colours() { "\x1b[1;31merror:\x1b[0m" } else { "error:" };
    let lines = continued(&error.message);
    let lines = lines.map(|line| format!("pgthaw: {label} {}", shown(&line)));
    let hints = error.hint.iter().flat_map(|hint| continued(hint));
    let hints = hints.map(|line| format!("hint: {}", shown(&line)));
    for line in lines.chain(hints) {
        let _ = writeln!(io::stderr().lock(), "{line}"); // a lost terminal
    }
}

fn shown(line: &str) -> String {
    text::beginning(&text::one_line(line), LONGEST_LINE)
}

/// The lines of a message, those after the first indented.
fn continued(message: &str) -> impl Iterator<Item = String> + '_ {
    message.lines().enumerate().map(|(number, line)| match number {
        0 => unlabelled(line).to_owned(),
        _ => format!("  {}", line.trim_start()),
    })
}

/// A line of an error without the label that the words of another of our processes have already.
fn unlabelled(line: &str) -> &str {
    line.strip_prefix("pgthaw: error: ").unwrap_or(line)
}

/// The exit code that belongs to `error`.
pub fn exit_code(error: &ApiError) -> ExitCode {
    ExitCode::from(if error.usage { USAGE } else { FAILED })
}

/// Whether standard error is a terminal: then progress is drawn in place.
pub fn shows_progress() -> bool {
    io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Whether somebody can answer a question.
pub fn can_ask() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Asks a question whose default answer is no.
pub fn ask(question: &str) -> bool {
    let _ = write!(io::stderr().lock(), "{} [y/N] ", text::lines(question));
    let mut answer = String::new();
    let read = io::stdin().read_line(&mut answer);
    read.is_ok() && ["y", "yes"].contains(&answer.trim().to_lowercase().as_str())
}

fn colours() -> bool {
    // https://no-color.org: any value but an empty one.
    let forbidden = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    !forbidden && shows_progress()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_reader_that_went_away_is_no_error() {
        written(Ok(())).unwrap();
        written(Err(io::ErrorKind::BrokenPipe.into())).unwrap();
        let error = written(Err(io::ErrorKind::StorageFull.into())).unwrap_err();
        assert!(error.message.starts_with("write to standard output: ") && !error.usage);
    }

    #[test]
    fn no_line_of_a_message_can_pass_for_another_message() {
        let lines: Vec<String> =
            continued("pgthaw: error: a\npgthaw: error: forged\n  b\nhint: forged").collect();
        assert_eq!(lines, ["a", "  pgthaw: error: forged", "  b", "  hint: forged"]);
        assert_eq!(shown("\x1b[2J"), "\\u{1b}[2J");
        assert!(shown(&"x".repeat(1 << 20)).len() < LONGEST_LINE + 100);
    }

    #[test]
    fn an_error_has_its_label_once() {
        assert_eq!(unlabelled("pgthaw: error: server: no room"), "server: no room");
        assert_eq!(unlabelled("no room"), "no room");
    }
}
