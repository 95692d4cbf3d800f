//! Every placement of instance and target on the hosts.

use pgthaw_testkit::Scratch;

use crate::lab::{Machines, assert_nothing_left, possible};
use crate::support::assert_equal;

#[test]
fn instance_and_target_may_lie_anywhere() {
    if !possible() {
        return;
    }
    let machines = Machines::new();
    let placements: [(&str, &[&str], &str, &str); 6] = [
        ("all here", &["--to", "/home/ann/out"], "mount", "/home/ann/out"),
        (
            "instance elsewhere",
            &["--staging", "dba@staging", "--to", "/home/ann/out"],
            "mount",
            "/home/ann/out",
        ),
        ("target elsewhere", &["--to", "ops@target:/home/ops/out"], "target", "/home/ops/out"),
        (
            "three machines",
            &["--staging", "dba@staging", "--to", "ops@target:out"],
            "target",
            "/home/ops/out",
        ),
        (
            "both elsewhere, as two accounts",
            &["--staging", "dba@staging", "--to", "ops@staging:out"],
            "staging",
            "/home/ops/out",
        ),
        (
            "both elsewhere",
            &["--staging", "dba@staging", "--to", "dba@staging:out"],
            "staging",
            "/home/dba/out",
        ),
    ];
    for (case, options, host, directory) in placements {
        let leftovers = machines.leftovers();
        let arguments =
            [&["export", machines.repository(), "-d", "crm", "-d", "sales"], options].concat();
        machines.expect(0, &arguments);
        let scratch = Scratch::new();
        let fetched = machines.fetch(host, directory, scratch.path());
        assert_equal(&fetched, &machines.fixture.expected, &["crm", "sales"]);
        std::fs::remove_dir_all(machines.host(host).path(directory)).unwrap();
        assert_nothing_left(&leftovers, case);
    }
}
