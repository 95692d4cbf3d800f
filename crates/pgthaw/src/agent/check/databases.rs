//! Which databases are exported, as far as the backup tells before PostgreSQL has recovered it.

use pgthaw_postgres::locale::plan_locales;
use pgthaw_session::observed::Failure;
use pgthaw_session::{ExportRequest, RecoveryChoice};

use super::environment::Locales;
use crate::agent::space::human_size;
use crate::wire::{BackupDatabase, CheckReport, CheckTask};

/// The databases of the backup that are selected.
pub fn chosen(task: &CheckTask) -> Vec<&BackupDatabase> {
    task.facts.databases.iter().filter(|database| database.is_selected_by(&task.request)).collect()
}

/// Judges the choice of databases and returns those of the backup that it selects.
pub fn judge<'a>(report: &mut CheckReport, task: &'a CheckTask) -> Vec<&'a BackupDatabase> {
    let (request, databases) = (&task.request, &task.facts.databases);
    let chosen = chosen(task);
    if databases.is_empty() {
        let text = "the backup does not tell its databases before it is recovered: their names and sizes are not checked";
        report.warning(text, None);
        return chosen;
    }
    // Recovery to the end of the archived WAL may bring databases that the backup does not know yet.
    let certain = request.recovery == RecoveryChoice::EndOfBackup;
    let missing =
        request.databases.iter().filter(|name| !databases.iter().any(|known| known.name == **name));
    let missing: Vec<String> = missing.map(|name| format!("\"{name}\"")).collect();
    if !missing.is_empty() && certain {
        let there: Vec<&str> =
            databases.iter().filter(|d| d.allows_connections).map(|d| d.name.as_str()).collect();
        let text =
            format!("backup {} holds no database {}", task.facts.backup.id, missing.join(", "));
        report.usage_error(text, Some(format!("it holds {}", there.join(", "))));
    } else if !missing.is_empty() {
        let names = missing.join(", ");
        let text = format!(
            "database {names} was not there when the backup was made; it is looked for after recovery"
        );
        report.warning(text, None);
    }
    if chosen.is_empty() && missing.is_empty() {
        let text = format!("no database of backup {} is selected", task.facts.backup.id);
        let remedy = "name databases with -d, or take all with --all; see `pgthaw databases`";
        report.usage_error(text, Some(remedy.into()));
    }
    for database in &chosen {
        judge_one(report, database, request, certain);
    }
    let bytes = chosen.iter().map(|database| database.bytes).fold(0, u64::saturating_add);
    if !chosen.is_empty() {
        let count = chosen.len();
        let plural = if count == 1 { "" } else { "s" };
        report.passed.push(format!("{count} database{plural} of {} to export", human_size(bytes)));
    }
    chosen
}

fn judge_one(
    report: &mut CheckReport,
    database: &BackupDatabase,
    request: &ExportRequest,
    certain: bool,
) {
    let name = &database.name;
    if !database.allows_connections {
        let text =
            format!("database \"{name}\" does not accept connections: pg_dump cannot read it");
        match certain || name == "template0" {
            true => report.usage_error(text, Some("leave it out".into())),
            false => report.warning(format!("{text}, unless recovery changes that"), None),
        }
    }
    if database.damaged && request.allow_damaged {
        let text = format!(
            "database \"{name}\" had damaged pages when it was backed up; what is in them may be missing"
        );
        report.warning(text, None);
    } else if database.damaged {
        let text = format!("database \"{name}\" had damaged pages when it was backed up");
        let remedy = "choose another backup, or export what can be read with --allow-damaged";
        report.error(text, Some(remedy.into()));
    }
}

/// Judges the locales of the chosen databases: PostgreSQL opens no database whose locale is missing.
pub fn locales(
    report: &mut CheckReport,
    locales: &Result<Locales, Failure>,
    chosen: &[&BackupDatabase],
) {
    let locales = match locales {
        Ok(locales) => locales,
        Err(failure) => return report.error(&failure.message, failure.hint.clone()),
    };
    let databases = chosen.iter().map(|database| database.locales());
    let plan = plan_locales(databases, &locales.installed, &locales.sources);
    for build in plan.build.iter().filter(|build| !locales.installed.contains(&build.name)) {
        let text = format!(
            "the locale {} is not installed here and is built by `localedef` for this export",
            build.name
        );
        report.warning(text, None);
    }
    for missing in plan.missing {
        let text = format!(
            "database \"{}\" needs the locale {}, which is not installed here",
            missing.database, missing.locale
        );
        report.error(text, Some(missing.remedy));
    }
}
