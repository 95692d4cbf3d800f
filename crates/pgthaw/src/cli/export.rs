//! The commands that follow a session: `export`, `attach`, `retry`, `cancel`.

use std::future::Future;
use std::process::ExitCode;
use std::time::Duration;

use jiff::Timestamp;
use pgthaw_session::{SessionState, Status};

use super::arguments::{AttachArguments, CancelArguments, ExportArguments, Output, RetryArguments};
use super::client::{Client, session_path};
use super::follow::{Ending, Interrupts, Noticed, OnInterrupt, follow};
use super::offering::Offering;
use super::report;
use super::requests::Surroundings;
use super::{Answer, terminal};
use crate::delivered::Delivered;
use crate::wire::{ApiError, LogLine, SessionCreated};

/// `pgthaw export`.
pub async fn export(arguments: &ExportArguments, surroundings: &Surroundings) -> Answer {
    let request = surroundings.export(&arguments.export)?;
    if arguments.detach && Offering::is_needed(&request) {
        return Err(super::usage(
            "--detach leaves nobody here who receives the export or answers for the ssh-agent",
            "name a target that the server reaches by itself, as HOST:DIR, and let it use its own keys",
        ));
    }
    let mut interrupts = Interrupts::notice()?;
    let output = arguments.output.output;
    let begun = Timestamp::now();
    let create = async {
        let server = surroundings.server(Some(&arguments.export.repository));
        let client = Client::connect(server, surroundings.carry()).await?;
        let offering = Offering::for_request(&client, &request);
        let created: SessionCreated = client.post("/v1/sessions", &request).await?;
        Ok::<_, ApiError>((client, created.id, offering))
    };
    let (created, interrupted) = match unless_left(create, &mut interrupts).await {
        Ok(created) => created,
        Err(signal) => {
            terminal::tell("pgthaw: a session may have begun; `pgthaw sessions` shows it");
            return Ok(signal.exit_code());
        }
    };
    let (client, id, _offering) = created?;
    if interrupted {
        client.post::<Status>(&session_path(&id, "/stop"), &()).await?;
    } else if arguments.detach {
        return detached(&client, &id, output).await;
    }
    let on_interrupt = if interrupted { OnInterrupt::Leave } else { OnInterrupt::Stop };
    let ending = follow(&client, &id, 0, on_interrupt, &mut interrupts).await?;
    finish(&client, ending, &id, interrupted, Some(begun), output).await
}

/// `pgthaw attach`.
pub async fn attach(
    client: &Client,
    arguments: &AttachArguments,
    surroundings: &Surroundings,
) -> Answer {
    let mut interrupts = Interrupts::notice()?;
    let id = arguments.id.as_deref().unwrap_or_default(); // the parser wants one
    let status: Status = client.get(&session_path(id, "")).await?;
    let begun = status.state.is_active().then_some(status.created_at);
    let _offering = Offering::for_session(client, &status, &surroundings.own_name);
    let ending = follow(client, &status.id, 0, OnInterrupt::Stop, &mut interrupts).await?;
    finish(client, ending, &status.id, false, begun, arguments.output.output).await
}

/// `pgthaw retry`.
pub async fn retry(
    client: &Client,
    arguments: &RetryArguments,
    surroundings: &Surroundings,
) -> Answer {
    let mut interrupts = Interrupts::notice()?;
    let output = arguments.output.output;
    let path = session_path(&arguments.id, "");
    let before: Status = client.get(&path).await?;
    let log: Vec<LogLine> = client.get(&session_path(&arguments.id, "/log")).await?;
    let begun = Timestamp::now();
    let _offering = Offering::for_session(client, &before, &surroundings.own_name);
    let status: Status =
        client.post_repeatable(&session_path(&arguments.id, "/retry"), &()).await?;
    let id = &status.id;
    if before.state == SessionState::Succeeded {
        terminal::tell(&report::ended_line(&before));
        if output == Output::Json {
            terminal::print_json(&before)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    if arguments.detach {
        return detached(client, id, output).await;
    }
    let retried = before.state == SessionState::Failed;
    let known = if retried { log.len() } else { 0 };
    if let (true, Some(first)) = (retried, log.first()) {
        terminal::tell(&first.text); // where it recovers to, as for every export
    }
    let ending = follow(client, id, known, OnInterrupt::Stop, &mut interrupts).await?;
    let begun = if retried { begun } else { status.created_at };
    finish(client, ending, id, false, Some(begun), output).await
}

/// `pgthaw cancel`.
pub async fn cancel(
    client: &Client,
    arguments: &CancelArguments,
    surroundings: &Surroundings,
) -> Answer {
    let mut interrupts = Interrupts::notice()?;
    let output = arguments.output.output;
    let log: Vec<LogLine> = client.get(&session_path(&arguments.id, "/log")).await?;
    let before: Status = client.get(&session_path(&arguments.id, "")).await?;
    let _offering = Offering::for_session(client, &before, &surroundings.own_name);
    let status: Status =
        client.post_repeatable(&session_path(&arguments.id, "/cancel"), &()).await?;
    let id = &status.id;
    let status = match follow(client, id, log.len(), OnInterrupt::Leave, &mut interrupts).await? {
        Ending::Ended { status, .. } => status,
        Ending::Left { by, .. } => {
            terminal::tell(&format!(
                "pgthaw: session {id} goes on being canceled; `pgthaw session {id}` shows it"
            ));
            return Ok(by.exit_code());
        }
    };
    if output == Output::Json {
        terminal::print_json(&status)?;
    }
    if status.state == SessionState::Canceled {
        terminal::tell(&report::ended_line(&status));
        return Ok(ExitCode::SUCCESS);
    }
    if status.state == SessionState::Succeeded {
        terminal::tell(&report::ended_line(&status)); // it was faster
    } else {
        terminal::tell_error(&report::failure(&status));
    }
    Ok(ExitCode::from(terminal::FAILED))
}

/// Says the session's id and leaves it at work.
async fn detached(client: &Client, id: &str, output: Output) -> Answer {
    let log: Vec<LogLine> = client.get(&session_path(id, "/log")).await?;
    if let Some(first) = log.first() {
        terminal::tell(&first.text);
    }
    match output {
        Output::Text => terminal::print(&format!("{id}\n"))?,
        Output::Json => terminal::print_json(&client.get::<Status>(&session_path(id, "")).await?)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits for `work`, with whether there was one Ctrl-C meanwhile.
///
/// # Errors
/// The signal that leaves it: a second Ctrl-C, or SIGTERM at once.
async fn unless_left<T>(
    work: impl Future<Output = T>,
    interrupts: &mut Interrupts,
) -> Result<(T, bool), Noticed> {
    let mut work = std::pin::pin!(work);
    tokio::select! {
        done = &mut work => return Ok((done, false)),
        signal = interrupts.next() => match signal {
            Noticed::Interrupt => terminal::tell("pgthaw: stopping; Ctrl-C again leaves at once"),
            Noticed::Terminate => return Err(signal),
        }
    }
    tokio::select! {
        done = work => Ok((done, true)),
        signal = interrupts.next() => Err(signal),
    }
}

/// Says how a followed session ended. `begun` is when the work began that was followed.
async fn finish(
    client: &Client,
    ending: Ending,
    id: &str,
    stopped_before: bool,
    begun: Option<Timestamp>,
    output: Output,
) -> Answer {
    let (status, stopped) = match ending {
        Ending::Left { stopped, by } => {
            terminal::tell(&report::left_line(id, stopped || stopped_before));
            return Ok(by.exit_code());
        }
        Ending::Ended { status, stopped } => (status, stopped || stopped_before),
    };
    if output == Output::Json {
        terminal::print_json(&status)?;
    }
    Ok(match status.state {
        SessionState::Succeeded => {
            if output == Output::Text {
                let took = begun.and_then(|begun| {
                    Duration::try_from(Timestamp::now().duration_since(begun)).ok()
                });
                // A server that cannot tell has told the status: the export is there all the same.
                let delivered: Delivered =
                    client.get(&session_path(id, "/delivered")).await.unwrap_or_default();
                terminal::print(&report::success(&status, &delivered, took))?;
            }
            ExitCode::SUCCESS
        }
        SessionState::Failed => {
            match stopped {
                true => terminal::tell(&report::stopped_line(&status)),
                false => terminal::tell_error(&report::failure(&status)),
            }
            for line in report::after_failure(&status) {
                terminal::tell(&line);
            }
            ExitCode::from(if stopped { terminal::INTERRUPTED } else { terminal::FAILED })
        }
        _ => {
            terminal::tell(&report::ended_line(&status));
            ExitCode::from(terminal::FAILED)
        }
    })
}
