//! What a check's report means for a session: what refuses it, as one error, and what is only told.

use pgthaw_session::session::Entry;
use pgthaw_session::{ExportRequest, RecoveryChoice};

use crate::escapes::one_line;
use crate::wire::{ApiError, BackupFacts, CheckReport, Finding};

/// A report's warnings, for the journal.
pub fn warnings(report: &CheckReport) -> Vec<Entry> {
    let warnings = report.findings.iter().filter(|finding| !finding.error);
    warnings.map(|warning| Entry::Message(format!("warning: {}", with_remedy(warning)))).collect()
}

/// All errors of a report as one.
///
/// # Errors
/// That one, unless there is none.
pub fn refusal(report: &CheckReport) -> Result<(), ApiError> {
    let errors: Vec<_> = report.findings.iter().filter(|finding| finding.error).collect();
    let usage = errors.iter().any(|finding| finding.usage);
    match errors[..] {
        [] => Ok(()),
        [only] => Err(ApiError { message: only.message.clone(), hint: only.remedy.clone(), usage }),
        _ => {
            let lines = errors.iter().map(|finding| format!("\n  {}", with_remedy(finding)));
            let message =
                format!("{} things refuse the export:{}", errors.len(), lines.collect::<String>());
            Err(ApiError { message, hint: None, usage })
        }
    }
}

fn with_remedy(finding: &Finding) -> String {
    let remedy = finding.remedy.as_ref().map(|remedy| format!(" ({remedy})"));
    one_line(&format!("{}{}", finding.message, remedy.unwrap_or_default()))
}

/// Refuses names that the backup does not hold, where it is not recovered beyond its end.
pub fn refuse_unknown(request: &ExportRequest, facts: &BackupFacts) -> Result<(), ApiError> {
    let held = |name: &String| facts.databases.iter().any(|database| database.name == *name);
    let unknown: Vec<&str> =
        request.databases.iter().filter(|name| !held(name)).map(String::as_str).collect();
    if unknown.is_empty()
        || facts.databases.is_empty()
        || request.recovery == RecoveryChoice::Latest
    {
        return Ok(());
    }
    let there: Vec<&str> =
        facts.databases.iter().filter(|d| d.allows_connections).map(|d| d.name.as_str()).collect();
    let hint = match &request.requester {
        None => format!("it holds {}", quoted(&there)),
        // not everybody who asks a team's server may know of all of them
        Some(_) => "`pgthaw databases` lists those that you may know of".into(),
    };
    Err(ApiError {
        message: format!("backup {} holds no database {}", facts.backup.id, quoted(&unknown)),
        hint: Some(hint),
        usage: true,
    })
}

fn quoted(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}
