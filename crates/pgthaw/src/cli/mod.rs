//! The command line: what people type, and what they read. The only place that talks to a terminal.
//!
//! Owns spelling, help, rendering, progress and exit codes. All work is the server's: every command but a few asks it over
//! [`client`], which starts one where none runs. Start at [`main`].

mod arguments;
pub mod client;
mod export;
mod follow;
mod lists;
mod manual;
mod offering;
mod pgbackrest_configuration;
mod progress;
mod report;
mod requests;
#[cfg(test)]
mod samples;
mod terminal;
mod text;
mod values;

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use jiff::tz::TimeZone;
use pgthaw_session::{RepositoryChoice, SessionState, Status};

use self::arguments::{
    Arguments, BackupsArguments, CheckArguments, CleanArguments, Command, DatabasesArguments,
    LogArguments, ManArguments, Output, SessionsArguments,
};
use self::client::{Client, session_path};
use self::follow::Interrupts;
use self::offering::Offering;
use self::requests::Surroundings;
use crate::wire::{
    ApiError, BackupsAnswer, CheckAnswer, CleanAnswer, CleanRequest, DatabasesAnswer,
    DatabasesRequest, LogLine,
};

/// What a command ends with; its error is told by [`main`].
type Answer = Result<ExitCode, ApiError>;

/// Does what the command line says.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(message) => return terminal::print_usage(&message),
    };
    let config = arguments.config.as_deref();
    let answer = match arguments.command {
        Command::Serve(arguments) => return crate::server::run(arguments.until_idle, config),
        Command::Internal(arguments) => {
            return crate::internal::run(arguments.child, &arguments.task);
        }
        Command::Attach(arguments) if arguments.build => return crate::attach::print_build(),
        Command::Attach(arguments) if arguments.stdio => {
            return match crate::attach::Restriction::parse(&arguments.only) {
                Ok(restriction) => crate::attach::run(restriction),
                Err(why) => {
                    let error = usage(&why, "see `pgthaw attach --help`");
                    terminal::tell_error(&error);
                    terminal::exit_code(&error)
                }
            };
        }
        Command::Completions(arguments) => completions(arguments.shell),
        Command::Man(arguments) => man(&arguments),
        command => tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|err| ApiError { message: format!("start: {err}"), hint: None, usage: false })
            .and_then(|runtime| runtime.block_on(ask_server(command, config))),
    };
    answer.unwrap_or_else(|error| {
        terminal::tell_error(&error);
        terminal::exit_code(&error)
    })
}

async fn ask_server(command: Command, config: Option<&Path>) -> Answer {
    let surroundings = Surroundings::look(config)?;
    let repository = match &command {
        // Refused before a server is started.
        Command::Log(arguments) if arguments.follow && arguments.output.output == Output::Json => {
            return Err(usage(
                "-f and --output json do not go together",
                "`pgthaw session ID --output json` shows how far it is",
            ));
        }
        Command::Export(arguments) => return export::export(arguments, &surroundings).await,
        Command::Sessions(arguments) => return sessions(arguments, &surroundings).await,
        Command::Backups(BackupsArguments { repository: None, .. }) => None,
        Command::Backups(arguments) => arguments.repository.as_ref(),
        Command::Databases(arguments) => Some(&arguments.repository),
        Command::Check(arguments) => Some(&arguments.export.repository),
        _ => None,
    };
    let client = match id_of(&command) {
        Some(id) => client_of(id, &surroundings).await?,
        None => Client::connect(surroundings.server(repository), surroundings.carry()).await?,
    };
    match command {
        Command::Retry(arguments) => {
            return export::retry(&client, &arguments, &surroundings).await;
        }
        Command::Cancel(arguments) => {
            return export::cancel(&client, &arguments, &surroundings).await;
        }
        Command::Clean(arguments) => return clean(&client, &arguments).await,
        _ => {}
    }
    if let Ok(interrupted) = client.get::<Vec<Status>>("/v1/interrupted").await
        && let Some(line) = report::interrupted_line(&interrupted)
    {
        terminal::tell(&line);
    }
    let zone = TimeZone::system();
    match command {
        Command::Backups(arguments) => backups(&client, &arguments, &surroundings, &zone).await,
        Command::Databases(arguments) => databases(&client, &arguments, &surroundings, &zone).await,
        Command::Check(arguments) => check(&client, &arguments, &surroundings).await,
        Command::Attach(arguments) => export::attach(&client, &arguments, &surroundings).await,
        Command::Log(arguments) => log(&client, &arguments, &zone).await,
        Command::Session(arguments) => {
            if let Some(file) = &arguments.bundle {
                return bundle(&client, &arguments.id, file).await;
            }
            let status: Status = client.get(&session_path(&arguments.id, "")).await?;
            match arguments.output.output {
                Output::Text => terminal::print(&lists::session(&status, &zone))?,
                Output::Json => terminal::print_json(&status)?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Export(_)
        | Command::Sessions(_)
        | Command::Retry(_)
        | Command::Cancel(_)
        | Command::Clean(_) => unreachable!("done above"),
        Command::Serve(_) | Command::Completions(_) | Command::Man(_) | Command::Internal(_) => {
            unreachable!("needs no server")
        }
    }
}

/// The session that a command is about.
fn id_of(command: &Command) -> Option<&str> {
    match command {
        Command::Session(arguments) => Some(&arguments.id),
        Command::Log(arguments) => Some(&arguments.id),
        Command::Attach(arguments) => arguments.id.as_deref(),
        Command::Retry(arguments) => Some(&arguments.id),
        Command::Cancel(arguments) => Some(&arguments.id),
        _ => None,
    }
}

/// The server that knows session `id`, of those that are configured.
async fn client_of(id: &str, surroundings: &Surroundings) -> Result<Client, ApiError> {
    let servers = surroundings.servers();
    let mut first = None;
    for server in &servers {
        let client = Client::connect(*server, surroundings.carry()).await;
        if servers.len() == 1 {
            return client;
        }
        let known = match client {
            Ok(client) => client.get::<Status>(&session_path(id, "")).await.map(|_| client),
            Err(error) => Err(error),
        };
        match known {
            Ok(client) => return Ok(client),
            Err(error) => first = first.or(Some(error)),
        }
    }
    Err(first.unwrap_or_else(|| ApiError::broken("no server is configured")))
}

/// `pgthaw sessions`: of all servers that are configured.
async fn sessions(arguments: &SessionsArguments, surroundings: &Surroundings) -> Answer {
    let mut sessions: Vec<Status> = Vec::new();
    let mut code = ExitCode::SUCCESS;
    for server in surroundings.servers() {
        let asked = async {
            let client = Client::connect(server, surroundings.carry()).await?;
            client.get::<Vec<Status>>("/v1/sessions").await
        };
        match asked.await {
            Ok(more) => sessions.extend(more),
            Err(error) => {
                terminal::tell_error(&error);
                code = ExitCode::from(terminal::FAILED);
            }
        }
    }
    sessions.sort_by_key(|status| status.created_at);
    match arguments.output.output {
        Output::Text => {
            let interrupted: Vec<Status> =
                sessions.iter().filter(|s| s.state == SessionState::Failed).cloned().collect();
            if let Some(line) = report::interrupted_line(&interrupted) {
                terminal::tell(&line);
            }
            terminal::print(&lists::sessions(&sessions, &TimeZone::system()))?;
        }
        Output::Json => terminal::print_json(&sessions)?,
    }
    Ok(code)
}

async fn backups(
    client: &Client,
    arguments: &BackupsArguments,
    surroundings: &Surroundings,
    zone: &TimeZone,
) -> Answer {
    let output = arguments.output.output;
    let choices: Vec<RepositoryChoice> = match &arguments.repository {
        Some(name) => vec![surroundings.repository(name, &arguments.reading)?],
        None => configured(arguments)?,
    };
    let several = choices.len() > 1;
    let mut json = Vec::new();
    let mut code = ExitCode::SUCCESS;
    for (number, choice) in choices.iter().enumerate() {
        let answer: BackupsAnswer = match client.post("/v1/backups", choice).await {
            Ok(answer) => answer,
            Err(error) if several => {
                terminal::tell_error(&error);
                code = ExitCode::from(terminal::FAILED);
                continue;
            }
            Err(error) => return Err(error),
        };
        match output {
            Output::Text if number > 0 => terminal::print(&format!(
                "\n{}",
                lists::backups(Path::new(&choice.to_string()), &answer, zone)
            ))?,
            Output::Text => {
                terminal::print(&lists::backups(Path::new(&choice.to_string()), &answer, zone))?
            }
            Output::Json => {
                json.extend(lists::backups_json(Path::new(&choice.to_string()), &answer))
            }
        }
    }
    if output == Output::Json {
        json.sort_by_key(|backup| backup.started_at);
        terminal::print_json(&json)?;
    }
    Ok(code)
}

/// The repositories of pgBackRest's own configuration.
fn configured(arguments: &BackupsArguments) -> Result<Vec<RepositoryChoice>, ApiError> {
    let (file, configured) = pgbackrest_configuration::read()?;
    if let Some(line) = pgbackrest_configuration::elsewhere_line(&file, &configured.elsewhere) {
        terminal::tell(&line);
    }
    let wanted = arguments.reading.stanza.as_deref();
    let choices: Vec<_> = configured
        .here
        .into_iter()
        .filter(|repository| {
            wanted.is_none()
                || repository.stanza.is_none()
                || repository.stanza.as_deref() == wanted
        })
        .map(|repository| RepositoryChoice {
            name: None,
            path: repository.path,
            kind: Some("pgbackrest".into()),
            stanza: repository.stanza.or_else(|| arguments.reading.stanza.clone()),
            wal_archives: Vec::new(),
            backup_label: None,
            atomic_snapshot: false,
            tablespaces: Vec::new(),
        })
        .collect();
    if choices.is_empty() {
        let message = format!("`{}` names no such repository on this machine", file.display());
        return Err(usage(&message, "name one: `pgthaw backups REPO`"));
    }
    Ok(choices)
}

async fn databases(
    client: &Client,
    arguments: &DatabasesArguments,
    surroundings: &Surroundings,
    zone: &TimeZone,
) -> Answer {
    let repository = surroundings.repository(&arguments.repository, &arguments.reading)?;
    let request = DatabasesRequest { repository, backup: arguments.backup.clone() };
    let answer: DatabasesAnswer = client.post("/v1/databases", &request).await?;
    match arguments.output.output {
        Output::Text => terminal::print(&lists::databases(&answer, zone))?,
        Output::Json => terminal::print_json(&lists::by_oid(&answer.databases))?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn check(client: &Client, arguments: &CheckArguments, surroundings: &Surroundings) -> Answer {
    let request = surroundings.export(&arguments.export)?;
    let _offering = Offering::for_request(client, &request);
    let answer: CheckAnswer = client.post("/v1/check", &request).await?;
    match arguments.output.output {
        Output::Text => terminal::print(&lists::check(&answer))?,
        Output::Json => terminal::print_json(&answer)?,
    }
    Ok(if answer.report.refused() { ExitCode::from(terminal::FAILED) } else { ExitCode::SUCCESS })
}

async fn log(client: &Client, arguments: &LogArguments, zone: &TimeZone) -> Answer {
    if arguments.follow {
        let mut interrupts = Interrupts::notice()?;
        let following = follow::follow_log(client, &arguments.id, |line| {
            terminal::print(&lists::log_line(&line, zone))
        });
        tokio::select! {
            followed = following => followed?,
            signal = interrupts.next() => return Ok(signal.exit_code()),
        }
        return Ok(ExitCode::SUCCESS);
    }
    let lines: Vec<LogLine> = client.get(&session_path(&arguments.id, "/log")).await?;
    match arguments.output.output {
        Output::Text => terminal::print(
            &lines.iter().map(|line| lists::log_line(line, zone)).collect::<String>(),
        )?,
        Output::Json => terminal::print_json(&lines)?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn bundle(client: &Client, id: &str, file: &Path) -> Answer {
    let bundle: serde_json::Value = client.get(&session_path(id, "/bundle")).await?;
    let text = format!("{bundle:#}\n");
    let mut options = OpenOptions::new();
    let created = options.write(true).create_new(true).mode(0o600).open(file);
    created.and_then(|mut created| created.write_all(text.as_bytes())).map_err(|err| {
        let exists = err.kind() == io::ErrorKind::AlreadyExists;
        ApiError {
            message: format!("write `{}`: {err}", file.display()),
            hint: exists.then(|| "name a file that is not there yet".into()),
            usage: exists,
        }
    })?;
    terminal::tell(&format!(
        "`{}` names machines, paths, databases and tables: read it before you hand it on",
        file.display()
    ));
    Ok(ExitCode::SUCCESS)
}

async fn clean(client: &Client, arguments: &CleanArguments) -> Answer {
    let output = arguments.output.output;
    let show = |answer: &CleanAnswer, dry_run| match output {
        Output::Text => terminal::print(&lists::cleaned(answer, dry_run)),
        Output::Json => terminal::print_json(answer),
    };
    let host = arguments.host.as_ref().map(ToString::to_string);
    let request = CleanRequest { dry_run: true, host };
    let preview: CleanAnswer = client.post("/v1/clean", &request).await?;
    if arguments.dry_run || preview.removed.is_empty() {
        show(&preview, true)?;
        return Ok(clean_code(&preview));
    }
    if !arguments.yes {
        for object in lists::cleaned(&preview, true).lines() {
            terminal::tell(object);
        }
        if !terminal::can_ask() {
            return Err(usage(
                "clean asks before it removes anything, and there is no terminal",
                "give --yes, or --dry-run to only look",
            ));
        }
        if !terminal::ask("Do this? None of these sessions can be retried then.") {
            terminal::tell("nothing was removed");
            return Ok(ExitCode::SUCCESS);
        }
    }
    let request = CleanRequest { dry_run: false, ..request };
    let answer: CleanAnswer = client.post("/v1/clean", &request).await?;
    show(&answer, false)?;
    Ok(clean_code(&answer))
}

fn clean_code(answer: &CleanAnswer) -> ExitCode {
    if answer.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(terminal::FAILED) }
}

fn completions(shell: clap_complete::Shell) -> Answer {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut public_commands(), "pgthaw", &mut script);
    terminal::print(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}

/// The command line without the commands that no user types: clap's completions offer hidden ones, too.
fn public_commands() -> clap::Command {
    let all = Arguments::command();
    let shown = all.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    clap::Command::new("pgthaw").version(env!("CARGO_PKG_VERSION")).subcommands(shown)
}

fn man(arguments: &ManArguments) -> Answer {
    let pages = manual::pages();
    let Some(directory) = &arguments.directory else {
        terminal::print(pages.first().map_or("", |page| &page.text))?;
        return Ok(ExitCode::SUCCESS);
    };
    let written = std::fs::create_dir_all(directory).and_then(|()| {
        pages.iter().try_for_each(|page| std::fs::write(directory.join(&page.file), &page.text))
    });
    written.map_err(|err| ApiError {
        message: format!("write the manual pages into `{}`: {err}", directory.display()),
        hint: None,
        usage: false,
    })?;
    Ok(ExitCode::SUCCESS)
}

fn usage(message: &str, hint: &str) -> ApiError {
    ApiError { message: message.into(), hint: Some(hint.into()), usage: true }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completions_offer_what_people_type() {
        let mut script = Vec::new();
        clap_complete::generate(
            clap_complete::Shell::Bash,
            &mut public_commands(),
            "pgthaw",
            &mut script,
        );
        let script = String::from_utf8(script).unwrap();
        assert!(script.contains("export") && script.contains("--wal-archive"));
        assert!(!script.contains("internal"), "{script}");
    }
}
