//! Instances of the installed PostgreSQL on copies of a real base backup of a hostile cluster.
//!
//! `PGTHAW_TEST_PG_BIN` names the programs of another major version. Started as root the instances run as
//! `postgres`, and the first test is run again by that user himself.

mod lab;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pgthaw_postgres::dump::{Dump, DumpEvent, DumpPlan};
use pgthaw_postgres::globals::{self, GlobalsPlan};
use pgthaw_postgres::inspect;
use pgthaw_postgres::instance::{
    Instance, InstanceError, InstancePlan, Progress, Recovery, StopMode, process_title,
};
use pgthaw_postgres::isolation::{Isolation, try_root};
use pgthaw_postgres::os_user::OsUser;
use pgthaw_postgres::process::ProcessId;
use pgthaw_postgres::superuser::{Candidates, ensure_superuser, temporary_role};

use pgthaw_postgres::root::host::Host;
use pgthaw_postgres::root::layout::{Access, Account, View, layout};
use pgthaw_postgres::root::{self, Confinement};

use lab::{Lab, MARKER, Source, confinement, helper};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// The original cluster: wants to archive, to replicate, to preload, to hide damage, to break connections.
fn hostile(source: &Source<'_>) {
    let lab = source.lab;
    let space = lab.make_directory("space");
    source.sql(
        "postgres",
        &format!("CREATE TABLESPACE \"odd \"\"space\" LOCATION '{}'", space.display()),
    );
    source.sql("postgres", "CREATE DATABASE \"sh'op = x\"");
    for sql in [
        "CREATE TABLE orders(id int PRIMARY KEY, note text); INSERT INTO orders SELECT i, md5(i::text) FROM generate_series(1,1000) i",
        "CREATE TABLE \"Far Away\"(id int) TABLESPACE \"odd \"\"space\"; INSERT INTO \"Far Away\" SELECT generate_series(1,100)",
        "CREATE UNLOGGED TABLE scratch(id int); INSERT INTO scratch SELECT generate_series(1,10)",
        "CREATE TABLE parts(id int) PARTITION BY RANGE(id); CREATE TABLE part1 PARTITION OF parts FOR VALUES FROM (0) TO (10)",
        "CREATE MATERIALIZED VIEW seen AS SELECT count(*) FROM orders",
        "CREATE FUNCTION lost() RETURNS language_handler LANGUAGE c AS '$libdir/plpgsql', 'plpgsql_call_handler'; UPDATE pg_proc SET probin = '$libdir/no_such_library' WHERE proname = 'lost'",
        "CREATE ROLE nobody NOLOGIN; CREATE ROLE \"o'dd\" PASSWORD 'secret'",
        "COMMENT ON ROLE nobody IS 'CREATE TABLESPACE x LOCATION ''/nowhere'';'",
    ] {
        source.sql("sh'op = x", sql);
    }
    source.sql("sh'op = x", "BEGIN; LOCK TABLE orders; INSERT INTO orders VALUES (-1,'prepared'); PREPARE TRANSACTION 'it''s \\ odd'");
    let witness = lab.path("witness");
    let touch = format!("touch {}", witness.display());
    for sql in [
        format!("ALTER SYSTEM SET archive_command = '{touch}'"),
        "ALTER SYSTEM SET archive_mode = on".into(),
        format!("ALTER SYSTEM SET recovery_end_command = '{touch}'"),
        format!("ALTER SYSTEM SET archive_cleanup_command = '{touch}'"),
        format!("ALTER SYSTEM SET restore_command = '{touch}; false'"),
        "ALTER SYSTEM SET primary_conninfo = 'host=127.0.0.1'".into(),
        "ALTER SYSTEM SET recovery_target_time = '2001-01-01'".into(),
        "ALTER SYSTEM SET synchronous_standby_names = '*'".into(),
        "ALTER SYSTEM SET shared_preload_libraries = 'no_such_library'".into(),
        "ALTER SYSTEM SET zero_damaged_pages = on".into(),
        "ALTER SYSTEM SET fsync = on".into(),
    ] {
        source.sql("postgres", &sql);
    }
    for whose in
        ["ROLE postgres", "DATABASE \"sh'op = x\"", "ROLE postgres IN DATABASE \"sh'op = x\""]
    {
        let hostile = [
            "session_preload_libraries = 'no_such_library'",
            "local_preload_libraries = 'no_such_library'",
            "zero_damaged_pages = on",
            "ignore_checksum_failure = on",
            "search_path = evil",
            "statement_timeout = 1",
            "lock_timeout = 1",
            "row_security = on",
            "client_encoding = latin1",
            "log_statement = 'all'",
            "role = nobody",
            "default_transaction_read_only = on",
        ];
        let alter = hostile.map(|setting| format!("ALTER {whose} SET {setting};")).join(" ");
        source.sql("template1", &alter);
    }
}

async fn ready(instance: &mut Instance, user: &str) -> Result<Vec<Progress>, InstanceError> {
    let mut seen = Vec::new();
    let wait = instance.wait_ready(user, |progress| seen.push(progress.clone()));
    tokio::time::timeout(Duration::from_secs(60), wait).await.expect("ready within a minute")?;
    Ok(seen)
}

/// Counts rows; a prepared transaction that still holds the table would block that for ever.
async fn orders(instance: &Instance, user: &str) -> i64 {
    let endpoint = instance.endpoint(user);
    let client = endpoint.connect("template1").await.unwrap();
    let prepared = inspect::prepared_transactions(&client).await.unwrap();
    inspect::roll_back_prepared(&endpoint, &prepared).await.unwrap();
    let client = instance.endpoint(user).connect("sh'op = x").await.unwrap();
    client.query_one("SELECT count(*) FROM public.orders", &[]).await.unwrap().get(0)
}

#[test]
fn a_hostile_cluster_is_recovered_alone_asked_and_dumped() {
    let lab = Lab::new();
    let source = Source::start(&lab);
    hostile(&source);
    source.back_up("postgres");
    // more WAL than the backup needs, as an archive has
    source.sql("sh'op = x", "ROLLBACK PREPARED 'it''s \\ odd'");
    source.sql(
        "sh'op = x",
        "INSERT INTO public.orders SELECT i, 'later' FROM generate_series(2001,2500) i",
    );
    source.sql("template1", "SELECT pg_switch_wal()");
    let wal = format!(
        "cp {}/0000* {}/",
        lab.path("source/pg_wal").display(),
        lab.path("backup/pg_wal").display()
    );
    lab.run("sh", &["-c", &wal]);
    drop(source);

    runtime().block_on(async {
        let data = lab.thaw("first", true);
        let plan = lab.plan(data, "i1", Recovery::EndOfBackup { timeline: 1 });
        let mut instance = Instance::start(plan).unwrap();
        let seen = ready(&mut instance, "postgres").await.unwrap();
        assert_eq!(seen.last(), Some(&Progress::Ready));
        let end = instance.recovery_end().unwrap();
        assert!(end.redo_done.is_some() && end.new_timeline == Some(2), "{end:?}");
        assert!(!lab.path("witness").exists(), "a command of the backup was run");
        alone(&instance);
        settings_hold(&instance).await;

        let mut candidates = Candidates { guessed: Some("postgres"), ..Candidates::default() };
        candidates.named = Some("nosuch");
        let refused = ensure_superuser(&mut instance, &candidates).await.unwrap_err();
        let want = "--superuser \"nosuch\" cannot be used: role \"nosuch\" does not exist; superusers that may log in: ";
        let said = refused.to_string();
        assert!(said.starts_with(want) && said.contains("\"postgres\""), "{said}");
        candidates.named = None;
        let superuser = ensure_superuser(&mut instance, &candidates).await.unwrap();
        assert_eq!((superuser.name.as_str(), superuser.temporary), ("postgres", false));
        prepared_are_rolled_back(&instance).await;
        facts(&instance).await;
        assert_eq!(orders(&instance, "postgres").await, 1000);
        dumps(&lab, &instance).await;
        globals_are_the_originals(&lab, &instance).await;
        let id = instance.id();
        instance.stop(StopMode::Fast).await.unwrap();
        instance.stop(StopMode::Fast).await.unwrap();
        assert!(!id.is_alive());
        assert!(!lab.path("witness").exists(), "a command of the backup was run");

        let plan = lab.plan(lab.thaw("second", true), "i2", Recovery::EndOfWal { timeline: 1 });
        let mut instance = Instance::start(plan).unwrap();
        ready(&mut instance, "postgres").await.unwrap();
        assert_eq!(orders(&instance, "postgres").await, 1500, "the WAL after the backup");
        drop(instance);

        let lsn = end.redo_done.unwrap();
        let plan = lab.plan(lab.thaw("third", true), "i3", Recovery::Lsn { lsn, timeline: 1 });
        let mut instance = Instance::start(plan).unwrap();
        ready(&mut instance, "postgres").await.unwrap();
        assert_eq!(orders(&instance, "postgres").await, 1000, "the same end again");
        assert_eq!(instance.recovery_end().unwrap().redo_done, Some(lsn));
        instance.stop(StopMode::Immediate).await.unwrap();

        // a target past the end fails with the server's words
        let beyond = pgthaw_postgres::lsn::Lsn(lsn.0 + (1 << 40));
        let plan =
            lab.plan(lab.thaw("fourth", true), "i4", Recovery::Lsn { lsn: beyond, timeline: 1 });
        let mut instance = Instance::start(plan).unwrap();
        let error = ready(&mut instance, "postgres").await.unwrap_err();
        assert!(error.to_string().contains("recovery ended before configured"), "{error}");
        assert!(error.hint().is_some_and(|hint| hint.contains("--wal-archive")));
    });
}

/// No network, no other processes' shared memory, nothing that listens, nothing of the caller's environment.
fn alone(instance: &Instance) {
    let pid = instance.id().pid;
    let own = |name: &str| fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
    let its = |name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
    for namespace in ["net", "ipc", "mnt", "pid", "uts"] {
        assert_ne!(own(namespace), its(namespace), "{namespace}");
    }
    for table in ["tcp", "tcp6", "udp", "udp6"] {
        let list = fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap();
        assert_eq!(list.lines().count(), 1, "{table}: {list}");
    }
    let devices = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
    assert_eq!(devices.lines().count(), 3, "only lo: {devices}");
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
    let environment = String::from_utf8_lossy(&environment).replace('\0', "\n");
    assert!(environment.contains(&format!("PGTHAW_SESSION={MARKER}")), "{environment}");
    let mut names: Vec<&str> =
        environment.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
    names.retain(|name| !["HOME", "USER", "LOGNAME"].contains(name));
    names.sort_unstable();
    // PG_GRANDPARENT_PID and the like would show here
    assert_eq!(names, ["LC_ALL", "PATH", "PGTHAW_SESSION"], "{environment}");
}

async fn settings_hold(instance: &Instance) {
    let client = instance.endpoint("postgres").connect("sh'op = x").await.unwrap();
    let title = process_title(MARKER);
    let cases = [
        ("zero_damaged_pages", "off"),
        ("ignore_checksum_failure", "off"),
        ("default_transaction_read_only", "off"),
        ("statement_timeout", "0"),
        ("lock_timeout", "0"),
        ("role", "none"),
        ("search_path", "\"\""),
        ("session_preload_libraries", ""),
        ("local_preload_libraries", ""),
        ("shared_preload_libraries", ""),
        ("archive_mode", "off"),
        ("archive_command", "(disabled)"),
        ("recovery_end_command", ""),
        ("primary_conninfo", ""),
        ("listen_addresses", ""),
        ("fsync", "off"),
        ("max_worker_processes", "0"),
        ("max_wal_senders", "0"),
        ("hot_standby", "off"),
        ("autovacuum", "off"),
        ("cluster_name", title.as_str()),
    ];
    for (name, want) in cases {
        let row = client.query_one(&format!("SHOW {name}"), &[]).await.unwrap();
        let got: String = row.get(0);
        let got = if name == "search_path" && got.is_empty() { "\"\"".into() } else { got };
        assert_eq!(got, want, "{name}");
    }
    let user: String = client.query_one("SELECT current_user::text", &[]).await.unwrap().get(0);
    assert_eq!(user, "postgres");
    client.batch_execute("CREATE TEMP TABLE writable(id int)").await.unwrap();
}

async fn prepared_are_rolled_back(instance: &Instance) {
    let endpoint = instance.endpoint("postgres");
    let client = endpoint.connect("template1").await.unwrap();
    let prepared = inspect::prepared_transactions(&client).await.unwrap();
    assert_eq!(prepared.len(), 1);
    assert_eq!(
        (prepared[0].gid.as_str(), prepared[0].database.as_str()),
        ("it's \\ odd", "sh'op = x")
    );
    assert_eq!(prepared[0].owner, "postgres");
    inspect::roll_back_prepared(&endpoint, &prepared).await.unwrap();
    assert_eq!(inspect::prepared_transactions(&client).await.unwrap(), []);
}

async fn facts(instance: &Instance) {
    let endpoint = instance.endpoint("postgres");
    let client = endpoint.connect("sh'op = x").await.unwrap();
    let databases = inspect::databases(&client).await.unwrap();
    let names: Vec<&str> = databases.iter().map(|database| database.name.as_str()).collect();
    assert_eq!(names, ["postgres", "sh'op = x", "template0", "template1"]);
    let shop = &databases[1];
    assert_eq!(
        (shop.allows_connections, shop.connection_limit, shop.encoding.as_str()),
        (true, -1, "UTF8")
    );
    assert!(!databases[2].allows_connections && databases[2].is_template);
    assert!(inspect::database_size(&client, shop.oid).await.unwrap() > 1 << 20);
    assert_eq!(inspect::unlogged_tables(&client).await.unwrap(), ["public.scratch"]);
    let relations = inspect::relations(&client).await.unwrap();
    assert_eq!((relations.tables, relations.partitioned, relations.materialized_views), (4, 1, 1));
    let tablespaces = inspect::tablespaces(&client).await.unwrap();
    assert_eq!(tablespaces[2].name, "odd \"space");
    assert!(tablespaces[2].location.ends_with("first-space"), "{tablespaces:?}");
    let missing = inspect::missing_libraries(&endpoint, "sh'op = x").await.unwrap();
    assert_eq!(missing.len(), 1, "{missing:?}");
    assert_eq!((missing[0].library.as_str(), missing[0].functions), ("$libdir/no_such_library", 1));
}

async fn dumps(lab: &Lab, instance: &Instance) {
    let plan = DumpPlan {
        binaries: lab.binaries.clone(),
        endpoint: instance.endpoint("postgres"),
        database: "sh'op = x".into(),
        output: lab.path("dump"),
        jobs: 2,
        compress: Some("gzip:1".into()),
        encoding: Some("UTF8".into()),
        arguments: vec!["-T".into(), "public.part1".into()],
        os_user: instance.plan().os_user.clone(),
        lock_wait_timeout: Duration::from_secs(10),
        marker: MARKER.into(),
        confinement: confinement(),
    };
    let events = Arc::new(Mutex::new(Vec::new()));
    let sink = events.clone();
    let mut dump = Dump::start(&plan, move |event| sink.lock().unwrap().push(event)).unwrap();
    let end = dump.wait().await.unwrap();
    let events = std::mem::take(&mut *events.lock().unwrap());
    let complaint = |line: &String| line.contains("error: ") || line.contains("warning: ");
    assert!(end.status.success() && !end.messages.iter().any(complaint), "{end:?}");
    let begun = |table: &str| events.contains(&DumpEvent::TableBegun { table: table.into() });
    assert!(begun("public.orders") && begun("public.Far Away"), "{events:?}");
    let finished = DumpEvent::ItemFinished { what: "TABLE DATA".into(), name: "orders".into() };
    assert!(events.contains(&finished), "{events:?}");
    assert_eq!(fs::metadata(&plan.output).unwrap().permissions().mode() & 0o777, 0o700);
    let list = lab.run(lab.tool("pg_restore"), &["-l", plan.output.to_str().unwrap()]);
    assert!(
        list.contains("TABLE DATA public orders") && !list.contains("TABLE DATA public part1"),
        "{list}"
    );
    assert!(list.contains("Dumped from"), "{list}");
    let script = lab
        .run(lab.tool("pg_restore"), &["-f", "-", "-t", "orders", plan.output.to_str().unwrap()]);
    assert!(script.contains("client_encoding = 'UTF8'") && script.contains("\n1000\t"), "{script}");

    assert!(Dump::start(&plan, |_| ()).is_err(), "the output exists");
    // a lock that pg_dump waits for: it is ended with its workers
    let client = plan.endpoint.connect(&plan.database).await.unwrap();
    client.batch_execute("BEGIN; LOCK TABLE public.orders").await.unwrap();
    let plan = DumpPlan { output: lab.path("dump2"), ..plan };
    let mut waiting = Dump::start(&plan, |_| ()).unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(waiting.id().is_alive());
    let end = waiting.stop().await.unwrap();
    assert!(!end.status.success() && !waiting.id().is_alive());
    // one that stands still is ended as fast
    let plan = DumpPlan { output: lab.path("dump3"), ..plan };
    let mut standing = Dump::start(&plan, |_| ()).unwrap();
    let state = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit(") ").next().unwrap().chars().next()
    };
    let pid = standing.id().pid;
    standing.pause();
    while state(pid) != Some('T') {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    standing.go_on();
    while state(pid) == Some('T') {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    standing.pause();
    let begun = std::time::Instant::now();
    let end = standing.stop().await.unwrap();
    assert!(!end.status.success() && !standing.id().is_alive());
    assert!(begun.elapsed() < Duration::from_secs(4), "it took {:?}", begun.elapsed());
    let plan = DumpPlan {
        output: lab.path("dump4"),
        lock_wait_timeout: Duration::from_millis(50),
        ..plan
    };
    let mut failing = Dump::start(&plan, |_| ()).unwrap();
    // Who waits may look at something else in between, as often as he likes.
    let end = loop {
        tokio::select! {
            biased;
            end = failing.wait() => break end.unwrap(),
            () = tokio::task::yield_now() => {}
        }
    };
    assert!(end.messages.iter().any(|line| line.contains("LOCK TABLE")), "{end:?}");
}

async fn globals_are_the_originals(lab: &Lab, instance: &Instance) {
    let endpoint = instance.endpoint("postgres");
    let plan = GlobalsPlan {
        binaries: &lab.binaries,
        endpoint: &endpoint,
        database: "template1",
        os_user: instance.plan().os_user.as_ref(),
        no_role_passwords: false,
        restrict_key: "abc123",
        marker: MARKER,
        confinement: &confinement(),
    };
    let text = globals::dump(&plan).await.unwrap();
    let mounted = lab.path("first-space");
    assert!(text.contains(mounted.to_str().unwrap()) && text.contains("SCRAM"), "{text}");
    assert!(!text.contains("\\restrict") || text.contains("\\restrict abc123\n"), "{text}");
    let original = lab.path("space").display().to_string();
    let locations = BTreeMap::from([("odd \"space".to_string(), original.clone())]);
    let delivered = globals::rewrite(&text, &locations, &mounted, None).unwrap();
    assert_eq!(delivered, text.replace(mounted.to_str().unwrap(), &original));
    assert!(globals::rewrite(&text, &BTreeMap::new(), &mounted, None).is_err());
    let plan = GlobalsPlan { no_role_passwords: true, ..plan };
    assert!(!globals::dump(&plan).await.unwrap().contains("SCRAM"));
}

#[test]
fn a_root_can_be_had_or_the_reason_is_told() {
    let lab = Lab::new();
    let Confinement::Root(helper) = confinement() else { panic!("no helper") };
    let user = OsUser::current().is_ok_and(|user| user.uid == 0).then_some(&lab.user);
    try_root(&helper, Some(&lab.binaries), user).unwrap();
    // a helper that is no helper
    let wrong = pgthaw_postgres::root::Helper { program: "/bin/false".into(), arguments: vec![] };
    let reason = try_root(&wrong, None, user).unwrap_err();
    assert!(reason.contains("ended without a word"), "{reason}");
    let wrong = pgthaw_postgres::root::Helper { program: "/no/such".into(), ..wrong };
    let reason = try_root(&wrong, None, user).unwrap_err();
    assert!(reason.contains("No such file"), "{reason}");
}

/// What a program sees of mounts in a root that shows one directory to write to: mountpoint and options of each.
fn mounts_inside(shown: &Path) -> Vec<(String, String)> {
    let lab = Lab::new();
    let Confinement::Root(helper) = confinement() else { panic!("no helper") };
    let user = OsUser::current().is_ok_and(|user| user.uid == 0).then_some(&lab.user);
    let ids = root::ids_of(user);
    let host = Host::look(Some(&lab.binaries), &[], user);
    let view = View { shown: vec![(shown.to_owned(), Access::Write)], locations: Vec::new() };
    let account = Account { name: "postgres".into(), uid: ids.0, gid: ids.1 };
    let (steps, _) = layout(&host, &view, &account).unwrap();
    let program = root::Program {
        path: "/bin/cat".into(),
        arguments: vec!["/proc/self/mountinfo".into()],
        environment: Vec::new(),
        directory: "/".into(),
    };
    let plan = root::RootPlan { steps, program: Some(program), ids };
    let path = lab.path("mounts");
    let output = fs::File::create(&path).unwrap();
    let streams = root::Streams { stdout: output.into(), ..root::Streams::null() };
    let mut child = root::start(&helper, &plan, MARKER, streams).unwrap();
    let status = runtime().block_on(child.wait()).unwrap();
    assert!(status.success(), "{status}");
    let text = fs::read_to_string(&path).unwrap();
    let line = |line: &str| {
        let fields: Vec<&str> = line.split(' ').collect();
        (fields[4].to_owned(), fields[5].to_owned())
    };
    text.lines().map(line).collect()
}

#[test]
fn a_root_is_read_only_but_for_what_it_is_told() {
    let directory = tempfile::Builder::new().prefix("pgr").tempdir_in("/tmp").unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mounts = mounts_inside(directory.path());
    let has = |options: &str, wanted: &str| options.split(',').any(|option| option == wanted);
    let writable: Vec<&str> = mounts
        .iter()
        .filter(|(at, options)| !has(options, "ro") && !at.starts_with("/dev/"))
        .map(|(at, _)| at.as_str())
        .collect();
    let mut want = vec!["/tmp", directory.path().to_str().unwrap()];
    want.sort_unstable();
    let mut found = writable.clone();
    found.sort_unstable();
    assert_eq!(found, want, "{mounts:#?}");
    for (at, options) in &mounts {
        assert!(has(options, "nosuid"), "{at}: {options}");
        let runs = ["/usr", "/bin", "/sbin", "/lib", "/opt"].iter().any(|top| at.starts_with(top));
        assert!(has(options, "noexec") || runs, "{at}: {options}");
        assert!(has(options, "nodev") || at.starts_with("/dev/"), "{at}: {options}");
    }
    assert!(mounts.iter().any(|(at, _)| at == "/usr/lib"), "{mounts:#?}");
    assert!(!mounts.iter().any(|(at, _)| at == "/usr" || at == "/home" || at == "/var"));
}

/// As before Linux 5.12, or in a container whose filter does not know the call.
#[test]
fn a_kernel_without_mount_setattr_restricts_each_mount_by_itself() {
    let refuse = || {
        let line =
            |code: u32, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf, k };
        let mut program = [
            line(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0), // the number of the call
            line(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, libc::SYS_mount_setattr as u32),
            line(libc::BPF_RET, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs()),
            line(libc::BPF_RET, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let filter = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
        // SAFETY: the filter and what it points to live through the call, which copies them.
        let done = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
                | libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter)
        };
        if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "a_root_is_read_only_but_for_what_it_is_told", "--nocapture"]);
    // SAFETY: system calls on memory of the closure alone, between fork and exec.
    unsafe { std::os::unix::process::CommandExt::pre_exec(&mut command, refuse) };
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
fn the_same_works_without_root() {
    let current = OsUser::current().unwrap();
    if current.uid != 0 {
        return; // it just did
    }
    let user = OsUser::look_up("postgres").unwrap();
    let directory = tempfile::Builder::new().prefix("pgu").tempdir_in("/tmp").unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = directory.path().join("test");
    // copied by a process of its own: a child that another test forks right now would keep our descriptor
    // open for writing, and the program could not be run ("text file busy")
    let own = std::env::current_exe().unwrap();
    assert!(Command::new("cp").arg(own).arg(&program).status().unwrap().success());
    let beside = directory.path().join("pgthaw-root");
    assert!(Command::new("cp").arg(helper()).arg(&beside).status().unwrap().success());
    let mut command = Command::new(&program);
    command.args([
        "--exact",
        "a_hostile_cluster_is_recovered_alone_asked_and_dumped",
        "a_root_is_read_only_but_for_what_it_is_told",
        "a_kernel_without_mount_setattr_restricts_each_mount_by_itself",
        "--nocapture",
    ]);
    command.current_dir("/").env_remove("TMPDIR");
    user.run_as(&mut command);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("3 passed"), "{said}");
}

#[test]
fn a_renamed_superuser_that_may_not_log_in_is_replaced() {
    let lab = Lab::new();
    let source = Source::start(&lab);
    source.sql("postgres", "CREATE ROLE helper SUPERUSER LOGIN");
    source.sql("postgres", "CREATE ROLE other LOGIN");
    source.sql("postgres", "CREATE ROLE backup LOGIN REPLICATION");
    let host = lab.directory.path().to_str().unwrap();
    let connect = ["-XqAt", "-v", "ON_ERROR_STOP=1", "-h", host, "-U", "helper", "-d", "template1"];
    for sql in [
        "ALTER ROLE postgres RENAME TO \"big boss\"",
        "ALTER ROLE \"big boss\" NOLOGIN",
        "DROP DATABASE postgres",
        "ALTER ROLE helper NOLOGIN",
    ] {
        lab.run(source.psql(), &[&connect[..], &["-c", sql]].concat());
    }
    source.back_up("backup");
    drop(source);
    runtime().block_on(async {
        let plan = lab.plan(lab.thaw("data", true), "i", Recovery::EndOfBackup { timeline: 1 });
        let mut instance = Instance::start(plan).unwrap();
        ready(&mut instance, "other").await.unwrap();
        let first = instance.id();
        let mut candidates =
            Candidates { named: Some("other"), guessed: Some("big boss"), databases: &[] };
        let refused = ensure_superuser(&mut instance, &candidates).await.unwrap_err().to_string();
        assert_eq!(refused, "--superuser \"other\" cannot be used: it is no superuser");
        assert_eq!(instance.id(), first, "nothing is made for a role that was named in vain");
        candidates.named = None;
        let superuser = ensure_superuser(&mut instance, &candidates).await.unwrap();
        assert_eq!(
            (superuser.name.as_str(), superuser.temporary),
            (temporary_role(MARKER).as_str(), true)
        );
        assert_ne!(instance.id(), first, "the server was started again");
        let again = ensure_superuser(&mut instance, &candidates).await.unwrap();
        assert_eq!(again, superuser, "found again after an agent's restart");

        let endpoint = instance.endpoint(&superuser.name);
        let plan = GlobalsPlan {
            binaries: &lab.binaries,
            endpoint: &endpoint,
            database: "template1",
            os_user: instance.plan().os_user.as_ref(),
            no_role_passwords: false,
            restrict_key: "abc123",
            marker: MARKER,
            confinement: &confinement(),
        };
        let text = globals::dump(&plan).await.unwrap();
        assert!(text.contains(&superuser.name));
        let role = Some(superuser.name.as_str());
        let delivered =
            globals::rewrite(&text, &BTreeMap::new(), Path::new("/nowhere"), role).unwrap();
        assert!(!delivered.contains(&superuser.name), "{delivered}");
        assert!(
            delivered.contains("CREATE ROLE \"big boss\";\n")
                && delivered.contains("CREATE ROLE other;\n")
        );
        let kept = |line: &&str| !line.contains(&superuser.name);
        let lines: Vec<&str> = text.lines().filter(kept).collect();
        assert_eq!(delivered.lines().collect::<Vec<_>>(), lines, "nothing else is changed");
    });
}

#[test]
fn nothing_is_left_of_a_killed_server() {
    let lab = Lab::new();
    let source = Source::start(&lab);
    source.back_up("postgres");
    drop(source);
    runtime().block_on(async {
        let plan = lab.plan(lab.thaw("data", true), "i", Recovery::EndOfBackup { timeline: 1 });
        let plan = InstancePlan { confinement: Confinement::Unisolated, ..plan };
        let nothing = Isolation::Unisolated { network: false };
        let mut instance = Instance::start_isolated(plan, nothing).unwrap();
        ready(&mut instance, "postgres").await.unwrap();
        let id = instance.id();
        let children = pgthaw_postgres::process::children(id.pid);
        assert!(!children.is_empty());
        let created = || {
            let list = fs::read_to_string("/proc/sysvipc/shm").unwrap();
            let fields = |line: &str| line.split_ascii_whitespace().nth(4).map(str::to_owned);
            list.lines().filter(|line| fields(line) == Some(id.pid.to_string())).count()
        };
        assert_eq!(created(), 1, "the detector sees the segment");
        id.signal(rustix::process::Signal::KILL).unwrap();
        let status = instance.wait_end().await.unwrap();
        assert!(!status.success());
        assert!(!instance.is_running().unwrap());
        let lines = instance.failure().lines;
        assert!(!lines.iter().any(|line| line.contains("could not")), "no cause of it: {lines:?}");
        instance.stop(StopMode::Fast).await.unwrap();
        // orphans notice their postmaster's death by themselves, within moments
        let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
        let left = || children.iter().any(|child| child.is_alive()) || created() != 0;
        while left() && std::time::Instant::now() < end {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        assert!(!left(), "left: {children:?}");
        // the same directory again, after a crash, as a retry on the same write layer does
        let mut plan = instance.plan().clone();
        plan.recovery = Recovery::None;
        let mut instance = Instance::start(plan).unwrap();
        ready(&mut instance, "postgres").await.unwrap();
        assert!(
            instance.recovery_end().unwrap().redo_done.is_some()
                || instance.recovery_end().unwrap().not_required
        );
    });
}

const AGENT: &str = "PGTHAW_TEST_AGENT";

#[test]
fn a_server_ends_with_its_agent() {
    let lab = Lab::new();
    let source = Source::start(&lab);
    source.back_up("postgres");
    drop(source);
    let mut plan = lab.plan(lab.thaw("data", true), "i", Recovery::EndOfBackup { timeline: 1 });
    plan.marker = format!("{MARKER}-agent");
    let file = lab.path("plan");
    fs::write(&file, serde_json::to_vec(&plan).unwrap()).unwrap();
    let mut agent = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_agent_that_is_killed", "--nocapture"])
        .env(AGENT, &file)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let end = Instant::now() + Duration::from_secs(30);
    let server = loop {
        if let Ok(text) = fs::read_to_string(lab.path("pid"))
            && let Some(server) =
                text.strip_suffix('\n').and_then(|pid| ProcessId::of(pid.parse().ok()?))
        {
            break server;
        }
        assert!(Instant::now() < end, "the agent starts a server");
        std::thread::sleep(Duration::from_millis(20));
    };
    let children = pgthaw_postgres::process::children(server.pid);
    agent.kill().unwrap();
    agent.wait().unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    while server.is_alive() || children.iter().any(|child| child.is_alive()) {
        assert!(Instant::now() < end, "the server outlives its agent");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Is the agent of the test above when started by it; starts the server from a thread that ends.
#[test]
fn the_agent_that_is_killed() {
    let Some(file) = std::env::var_os(AGENT).map(PathBuf::from) else { return };
    let plan: InstancePlan = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let started = std::thread::spawn(|| Instance::start(plan).unwrap());
    let mut instance = started.join().unwrap();
    runtime().block_on(async {
        ready(&mut instance, "postgres").await.unwrap();
        fs::write(file.with_file_name("pid"), format!("{}\n", instance.id().pid)).unwrap();
        tokio::time::sleep(Duration::from_secs(60)).await;
    });
}
