//! SSH between hosts, and what can be wrong with it.

use std::fs;

use pgthaw_testkit::{Lab, run};

use crate::{failure, possible, ssh, stdout};

#[test]
fn ssh_answers_until_it_is_spoiled() {
    if !possible() {
        return;
    }
    let lab = Lab::new(&["explorer", "staging", "target"]);
    let (explorer, staging) = (lab.host("explorer"), lab.host("staging"));
    let answer = || stdout(&run(&mut ssh(explorer, "ann", "dba@staging", "hostname; id -un")));
    let refused = || failure(&mut ssh(explorer, "ann", "dba@staging", "true"));
    assert_eq!(answer(), "staging\ndba");
    let far = "ssh -o BatchMode=yes ops@target hostname";
    assert_eq!(stdout(&run(&mut ssh(explorer, "ann", "dba@staging", far))), "target");

    explorer.forget_host("ann", staging);
    assert!(refused().contains("Host key verification failed"), "{}", refused());
    let known = fs::read_to_string(explorer.path("/home/ann/.ssh/known_hosts")).unwrap();
    assert!(!known.contains("staging"), "nothing is silently accepted: {known}");
    explorer.learn_host("ann", staging);
    assert_eq!(answer(), "staging\ndba");

    staging.change_host_key();
    assert!(refused().contains("REMOTE HOST IDENTIFICATION HAS CHANGED"), "{}", refused());
    for user in ["ann", "ops"] {
        explorer.learn_host(user, staging);
    }
    assert_eq!(answer(), "staging\ndba");

    staging.refuse_key("dba", "ann@explorer");
    assert!(refused().contains("Permission denied (publickey)"), "{}", refused());
    run(&mut ssh(explorer, "ops", "dba@staging", "true"));
    staging.force_command("dba", "ann@explorer", "echo \"not $SSH_ORIGINAL_COMMAND\"");
    assert_eq!(stdout(&run(&mut ssh(explorer, "ann", "dba@staging", "ls"))), "not ls");
    staging.accept_key("dba", "ann@explorer");
    assert_eq!(answer(), "staging\ndba");
    assert!(failure(&mut ssh(explorer, "ann", "nobody-here@staging", "true")).contains("denied"));

    staging.stop_sshd();
    assert!(refused().contains("Connection refused"), "{}", refused());
    staging.start_sshd();
    assert_eq!(answer(), "staging\ndba");
}
