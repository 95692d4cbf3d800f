//! Text that comes from somewhere else (names in a backup, words of another host), before it is shown.
//!
//! A terminal obeys control characters, and a newline can make one message look like two. All that is printed goes through here.

use std::fmt::Write as _;

/// Returns `text` on one line: control characters, which names may hold, as `\u{…}`.
pub fn one_line(text: &str) -> String {
    escaped(text, |_| false)
}

/// Returns `text` without what a terminal obeys: only the ends of its lines stay.
pub fn lines(text: &str) -> String {
    escaped(text, |char| char == '\n')
}

fn escaped(text: &str, stays: impl Fn(char) -> bool) -> String {
    let mut safe = String::with_capacity(text.len());
    for char in text.chars() {
        if steers(char) && !stays(char) {
            let _ = write!(safe, "{}", char.escape_default()); // writing to a String cannot fail
        } else {
            safe.push(char);
        }
    }
    safe
}

/// Whether a terminal does something else with it than showing it: control characters, ends of lines and paragraphs, and what turns
/// the direction of writing (Unicode's `Bidi_Control`).
fn steers(char: char) -> bool {
    char.is_control()
        || matches!(char, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Returns the first `most` characters of `text`, and how many follow.
pub fn beginning(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        None => text.into(),
        Some((end, _)) => format!("{} … ({} more bytes)", &text[..end], text.len() - end),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_on_their_line() {
        assert_eq!(one_line("a\nb\x1b[31m"), r"a\nb\u{1b}[31m");
        assert_eq!(one_line("größe"), "größe");
        assert_eq!(one_line("a\u{202e}b\u{9b}"), r"a\u{202e}b\u{9b}");
        assert_eq!(lines("a\nb\r\x1b]0;x\x07\n"), "a\nb\\r\\u{1b}]0;x\\u{7}\n");
        assert_eq!(beginning("größe", 3), "grö … (3 more bytes)");
        assert_eq!(beginning("größe", 5), "größe");
    }
}
