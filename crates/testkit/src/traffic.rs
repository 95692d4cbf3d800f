//! Writing into a cluster while it is backed up.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::cluster::Cluster;
use crate::scratch::Scratch;

/// Transactions per second: enough for a backup to catch pages in motion, little enough for two cores.
const RATES: [(&str, &str, &str); 3] = [
    ("sales", "tpcb-like", "100"),
    (
        "crm",
        "INSERT INTO public.activity (account_id, what) VALUES ((random() * 1000)::int, md5(random()::text));\n",
        "20",
    ),
    (
        "warehouse",
        "\\set id random(10000000001, 10000010000)\nUPDATE public.fact_events SET amount = amount + 1 WHERE id = :id;\n",
        "50",
    ),
];

/// Traffic on a cluster, until dropped: pgbench's TPC-B in `sales`, inserts into `crm.activity`, updates of
/// `warehouse.fact_events`. See [`crate::is_moved_by_traffic`].
#[derive(Debug)]
pub struct Traffic {
    clients: Vec<Child>,
    _scripts: Scratch,
}

impl Cluster {
    /// Starts the traffic; returns once each client has committed something.
    pub fn traffic(&self) -> Traffic {
        let scripts = Scratch::in_dir(std::path::Path::new("/tmp"));
        let start = |(database, script, rate): (&str, &str, &str)| {
            let mut pgbench = self.client("pgbench");
            pgbench.args(["--no-vacuum", "--time=36000", "--rate", rate]);
            if script == "tpcb-like" {
                pgbench
                    .args(["--builtin", script])
                    .env("PGOPTIONS", format!("{} -c search_path=public", crate::PGOPTIONS));
            } else {
                let path = scripts.join(database);
                std::fs::write(&path, script).expect("write into a directory of ours");
                pgbench.arg("--file").arg(path);
            }
            pgbench
                .arg(database)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("pgbench starts")
        };
        let commits = || {
            self.sql("postgres", "SELECT sum(xact_commit) FROM pg_stat_database WHERE datname IN ('crm', 'sales', 'warehouse')")
        };
        let before: u64 = commits().parse().expect("a number");
        let mut traffic = Traffic { clients: RATES.map(start).into(), _scripts: scripts };
        let end = Instant::now() + Duration::from_secs(30);
        // Statistics arrive late; a hundred transactions are more than the connecting ones.
        while commits().parse::<u64>().expect("a number") < before + 100 {
            for client in &mut traffic.clients {
                assert!(client.try_wait().expect("our child").is_none(), "pgbench ended early");
            }
            assert!(Instant::now() < end, "no traffic arrives");
            std::thread::sleep(Duration::from_millis(50));
        }
        traffic
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        for client in &mut self.clients {
            let _ = client.kill();
            let _ = client.wait();
        }
    }
}
