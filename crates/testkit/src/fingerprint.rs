//! What a database holds, in a form that can be compared.

use std::collections::BTreeMap;
use std::process::Stdio;

use crate::server::Server;

/// By table, materialized view or sequence: the number of rows and the sum of their hashes. A sequence has its
/// last value and its increment; `large objects` stands for all of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Fingerprint(pub BTreeMap<String, (u64, String)>);

impl Fingerprint {
    /// Returns it without the entries for which `leave_out` holds.
    pub fn without(mut self, leave_out: impl Fn(&str) -> bool) -> Self {
        self.0.retain(|name, _| !leave_out(name));
        self
    }

    /// Returns one line for each entry in which `found` differs; none if they are equal.
    pub fn differences(&self, found: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        for name in self.0.keys().chain(found.0.keys().filter(|name| !self.0.contains_key(*name))) {
            let (here, there) = (self.0.get(name), found.0.get(name));
            if here != there {
                lines.push(format!("{name}: expected {here:?}, found {there:?}"));
            }
        }
        lines
    }
}

/// Returns whether [`crate::Traffic`] changes this entry of a fingerprint, or whether any physical backup does
/// (an unlogged table comes back empty).
pub fn is_moved_by_traffic(name: &str) -> bool {
    name.contains("pgbench_")
        || name.contains("activity")
        || name.contains("fact_events")
        || name.contains("session_cache")
}

/// Returns the fingerprint of one database.
pub fn fingerprint(server: &Server, database: &str) -> Fingerprint {
    // Built by the server and run by the same psql (`\gexec`); one row a query: name, rows, sum of hashes.
    const QUERY: &str = r"
SELECT format('SELECT %L, count(*), coalesce(sum(hashtextextended(t::text, 0)), 0) FROM %s t', c.oid::regclass, c.oid::regclass)
FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
WHERE relkind IN ('r', 'm') AND nspname NOT LIKE 'pg\_%' AND nspname <> 'information_schema' ORDER BY nspname, relname
\gexec
SELECT 'large objects', count(*), coalesce(sum(hashtextextended(encode(lo_get(oid), 'hex'), oid::int8)), 0) FROM pg_largeobject_metadata;
SELECT format('sequence %I.%I', schemaname, sequencename), coalesce(last_value, 0), increment_by FROM pg_sequences ORDER BY 1;
";
    let mut psql = server.psql(database);
    psql.args(["--field-separator-zero", "--record-separator-zero"]);
    psql.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = psql.spawn().expect("psql starts");
    let mut stdin = child.stdin.take().expect("piped");
    let _ = std::io::Write::write_all(&mut stdin, QUERY.as_bytes()); // an error is told by psql itself
    drop(stdin);
    let output = child.wait_with_output().expect("psql ends");
    assert!(output.status.success(), "{database}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let fields: Vec<_> = text.split('\0').map(|field| field.trim_start_matches('\n')).collect();
    let entry = |fields: &[&str]| {
        let [name, rows, hash] = fields else { panic!("not three fields: {fields:?}") };
        (
            (*name).to_owned(),
            (rows.parse().unwrap_or_else(|_| panic!("{name}: {rows:?}")), (*hash).to_owned()),
        )
    };
    let whole = fields.len() / 3 * 3;
    Fingerprint(fields[..whole].chunks(3).map(entry).collect())
}

/// The sums that pgbench keeps equal in every committed state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PgbenchSums {
    /// `sum(abalance)` of `pgbench_accounts`.
    pub accounts: i64,
    /// `sum(tbalance)` of `pgbench_tellers`.
    pub tellers: i64,
    /// `sum(bbalance)` of `pgbench_branches`.
    pub branches: i64,
    /// `sum(delta)` of `pgbench_history`.
    pub history: i64,
    /// Rows of `pgbench_history`: how many transactions there have been.
    pub transactions: i64,
}

impl PgbenchSums {
    /// Returns whether they agree, as they do after any recovery that is right.
    pub fn agree(&self) -> bool {
        [self.tellers, self.branches, self.history].iter().all(|sum| *sum == self.accounts)
    }
}

/// Returns pgbench's sums in a database.
pub fn pgbench_sums(server: &Server, database: &str) -> PgbenchSums {
    // One statement, hence one snapshot.
    let line = server.sql(
        database,
        "SELECT (SELECT coalesce(sum(abalance), 0) FROM public.pgbench_accounts), \
         (SELECT coalesce(sum(tbalance), 0) FROM public.pgbench_tellers), \
         (SELECT coalesce(sum(bbalance), 0) FROM public.pgbench_branches), \
         (SELECT coalesce(sum(delta), 0) FROM public.pgbench_history), (SELECT count(*) FROM public.pgbench_history)",
    );
    let numbers: Vec<i64> =
        line.split('|').map(|number| number.parse().expect("a number")).collect();
    let [accounts, tellers, branches, history, transactions] = numbers[..] else {
        panic!("five numbers: {line}")
    };
    PgbenchSums { accounts, tellers, branches, history, transactions }
}
