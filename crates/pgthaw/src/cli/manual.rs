//! The manual pages: one for the program, one for each of its commands.
//!
//! Options come from [`clap_mangen`]; what it renders badly is written here: the synopsis with the names of values, and the text
//! behind the options, whose examples keep their lines.

use clap::{Command, CommandFactory};
use clap_mangen::Man;

use super::arguments::Arguments;

const VERSION: &str = concat!("pgthaw ", env!("CARGO_PKG_VERSION"));

/// A page in the form that `man` reads.
pub struct Page {
    /// Its file, such as `pgthaw-export.1`.
    pub file: String,
    /// What is in it.
    pub text: String,
}

/// Returns all pages, the program's own first.
pub fn pages() -> Vec<Page> {
    let mut program = Arguments::command().disable_help_subcommand(true);
    program.build();
    let shown = program.get_subcommands().filter(|command| !command.is_hide_set());
    std::iter::once(&program).chain(shown).map(page).collect()
}

fn page(command: &Command) -> Page {
    let man = Man::new(command.clone()).source(VERSION).manual("pgthaw manual");
    let render = |section: fn(&Man, &mut dyn std::io::Write) -> std::io::Result<()>| {
        let mut text = Vec::new();
        section(&man, &mut text).expect("a Vec takes all that is written");
        String::from_utf8(text).expect("the help is UTF-8")
    };
    let usage = command.clone().render_usage().to_string();
    let usage = usage.split_whitespace().skip(1).collect::<Vec<_>>().join(" "); // without `Usage:`
    let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let after = Sections::of(&after);
    let mut text = render(Man::render_title) + &render(Man::render_name_section);
    text += &format!(".SH SYNOPSIS\n{}", line(&usage));
    text += &render(Man::render_description_section);
    after.paragraphs.iter().for_each(|paragraph| text += &format!(".PP\n{}", line(paragraph)));
    text += &render(Man::render_options_section);
    if command.get_subcommands().any(|command| !command.is_hide_set()) {
        text += &render(Man::render_subcommands_section);
    }
    for (heading, lines) in &after.lists {
        text += &format!(".SH {}\n.nf\n", line(heading).trim_end());
        lines.iter().for_each(|example| text += &line(example));
        text += ".fi\n";
    }
    Page { file: man.get_filename(), text }
}

/// The text behind a command's options, taken apart.
struct Sections<'a> {
    paragraphs: Vec<&'a str>,
    /// Indented lines, with what stood above them.
    lists: Vec<(String, Vec<&'a str>)>,
}

impl<'a> Sections<'a> {
    fn of(text: &'a str) -> Self {
        let mut sections = Self { paragraphs: Vec::new(), lists: Vec::new() };
        for line in text.lines().filter(|line| !line.is_empty()) {
            match (line.strip_suffix(':'), line.strip_prefix("  "), sections.lists.last_mut()) {
                (_, Some(item), Some((_, items))) => items.push(item),
                (Some("Example" | "Examples"), ..) => {
                    sections.lists.push(("EXAMPLES".into(), Vec::new()));
                }
                (Some("Exit codes"), ..) => {
                    sections.lists.push(("\"EXIT STATUS\"".into(), Vec::new()))
                }
                _ => sections.paragraphs.push(line),
            }
        }
        sections
    }
}

/// Returns a line of text as roff takes it, with its newline.
fn line(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    let guard = if text.starts_with(['.', '\'']) { "\\&" } else { "" };
    format!("{guard}{text}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_hold_synopsis_examples_and_version() {
        let pages = pages();
        assert_eq!(pages[0].file, "pgthaw.1");
        assert!(pages.iter().all(|page| !page.file.contains("internal")));
        assert!(
            pages.iter().all(|page| page.text.starts_with(".ie") || page.text.contains(".TH "))
        );
        assert!(pages.iter().all(|page| page.text.contains(VERSION)));
        assert!(pages.iter().all(|page| !page.text.contains("EXTRA")));
        assert!(pages[0].text.contains(".SH \"EXIT STATUS\"\n.nf\n0    everything"));
        let export = pages.iter().find(|page| page.file == "pgthaw-export.1").unwrap();
        let want = "\n.SH SYNOPSIS\npgthaw export [OPTIONS] \\-\\-to <TARGET> ";
        assert!(export.text.contains(want), "{}", export.text);
        let example = "\npgthaw export /backups/prod \\-d crm \\-d sales \\-\\-to /srv/both \\-j 4 \\-Z zstd:3\n";
        let (_, examples) = export.text.split_once(".SH EXAMPLES\n.nf\n").unwrap();
        assert!(examples.contains(example) && examples.ends_with(".fi\n"), "{examples}");
    }

    #[test]
    fn roff_takes_every_line() {
        assert_eq!(line(".x \\ -y"), "\\&.x \\e \\-y\n");
    }
}
