//! What the command line accepts and refuses.

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use super::{Arguments, Command, Output};

fn parse(line: &str) -> Result<Command, clap::Error> {
    let words = std::iter::once("pgthaw").chain(line.split_whitespace());
    Arguments::try_parse_from(words).map(|arguments| arguments.command)
}

#[test]
fn the_definition_is_sound() {
    Arguments::command().debug_assert();
}

#[test]
fn good_lines_are_accepted() {
    let lines = [
        "backups",
        "backups /backups/prod",
        "backups pgbackrest:/b --stanza main --output json",
        "databases /b --backup 20261122-101112F",
        "databases /b --wal-archive /wal --wal-archive /wal2 --atomic-snapshot",
        "check /b -d crm --to /o",
        "export /b -d crm --to /o",
        "export --to /o /b --dbname crm --dbname=sales",
        "export /b --database crm --to /o",
        "export /b --all --exclude-database test* --to o --replace --detach --yes",
        "export /b -dcrm --to /o -j4 -Zzstd:3 -t a -t b -n s -T x -N y --exclude-table-data z -s",
        "export /b -d crm --to /o --target-latest --no-globals --dump-dir /d --work-dir /w --cache-size 512MB",
        "export /b -d crm --to /o --pg-bin /p --os-user u --superuser r --preload l --allow-damaged --verify-source",
        "export /b -d crm --to /o --output json -- --no-owner -x",
        "sessions",
        "sessions --output json",
        "session 20261122-101112-kqvd",
        "session ID --bundle report.json",
        "log ID -f",
        "log --follow ID",
        "attach ID",
        "retry ID --detach",
        "cancel ID --output json",
        "clean --dry-run",
        "clean dba@db-stage --dry-run",
        "clean --yes",
        "serve",
        "serve --until-idle",
        "completions bash",
        "man /tmp/man",
        "internal source",
    ];
    for line in lines {
        if let Err(err) = parse(line) {
            panic!("{line}: {err}");
        }
    }
}

#[test]
fn bad_lines_are_usage_errors() {
    use ErrorKind as K;
    let lines = [
        ("export /b --to /o", K::MissingRequiredArgument, "--dbname"),
        ("export /b -d crm", K::MissingRequiredArgument, "--to <TARGET>"),
        ("export -d crm --to /o", K::MissingRequiredArgument, "REPO"),
        ("export /b -d crm --all --to /o", K::ArgumentConflict, "--all"),
        (
            "export /b -d crm --exclude-database x --to /o",
            K::ArgumentConflict,
            "--exclude-database",
        ),
        ("export /b -d crm --to -oProxyCommand=x:/o", K::UnknownArgument, "-o"),
        ("export /b -d crm --to=-oProxyCommand=x:/o", K::ValueValidation, "no host"),
        ("export /b -d crm --to ssh://u@host", K::ValueValidation, "no host"),
        ("export /b -d crm --to /o --staging ssh://h:x", K::ValueValidation, "no host"),
        ("export s3://b -d crm --to /o", K::ValueValidation, "no kind of repository"),
        ("export /b -d crm --to /o -j 0", K::ValueValidation, "0 is not in 1..=256"),
        ("export /b -d crm --to /o -Z brotli", K::ValueValidation, "no compression"),
        ("export /b -d crm --to /o --cache-size lots", K::ValueValidation, "no size"),
        (
            "export /b -d crm --to /o --no-globals --no-role-passwords",
            K::ArgumentConflict,
            "--no-globals",
        ),
        ("export /b -d crm --to /o --target-time now", K::UnknownArgument, "--target-time"),
        ("export /b crm -d crm --to /o", K::UnknownArgument, "crm"),
        ("databases", K::MissingRequiredArgument, "REPO"),
        ("session ID --bundle f --output json", K::ArgumentConflict, "--bundle"),
        ("databases /b --atomic-snapshot --backup-label f", K::ArgumentConflict, "--backup-label"),
        ("sessions --output yaml", K::InvalidValue, "yaml"),
        ("retry", K::MissingRequiredArgument, "ID"),
        ("completions tcsh", K::InvalidValue, "tcsh"),
        ("publish /b", K::InvalidSubcommand, "publish"),
    ];
    for (line, kind, words) in lines {
        let err = parse(line).expect_err(line);
        assert_eq!(err.kind(), kind, "{line}: {err}");
        assert_eq!(err.exit_code(), 2, "{line}");
        assert!(err.to_string().contains(words), "{line}: {err}");
    }
}

#[test]
fn names_that_are_no_utf8_are_refused() {
    use std::os::unix::ffi::OsStringExt;
    let name = std::ffi::OsString::from_vec(vec![b'/', 0xff]);
    let words = ["pgthaw", "backups"].map(std::ffi::OsString::from).into_iter().chain([name]);
    assert_eq!(Arguments::try_parse_from(words).unwrap_err().kind(), ErrorKind::InvalidUtf8);
}

#[test]
fn output_is_text_unless_asked_otherwise() {
    let output = |line| match parse(line) {
        Ok(Command::Sessions(arguments)) => arguments.output.output,
        other => panic!("{other:?}"),
    };
    assert_eq!(output("sessions"), Output::Text);
    assert_eq!(output("sessions --output json"), Output::Json);
}

#[test]
fn every_visible_command_and_option_explains_itself() {
    for command in Arguments::command().get_subcommands().filter(|command| !command.is_hide_set()) {
        assert!(command.get_about().is_some(), "{}", command.get_name());
        assert!(
            command.get_after_help().is_some_and(|help| help.to_string().contains("pgthaw ")),
            "{}",
            command.get_name()
        );
        for option in command.get_arguments().filter(|option| !option.is_hide_set()) {
            assert!(option.get_help().is_some(), "{} {}", command.get_name(), option.get_id());
        }
    }
}
