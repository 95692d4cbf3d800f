//! What hostile code in a backup tries, one line each: the attempt, and what has to come of it.

/// How an attempt is made.
#[derive(Clone, Copy)]
pub enum Way {
    /// SQL in pg_dump's own transaction; yields a text.
    Sql,
    /// SQL over a connection of its own to the instance, as superuser.
    Back,
    /// A shell command of `COPY … TO PROGRAM`.
    Shell,
}

/// Something that is tried, and what comes of it.
pub struct Attempt {
    pub what: &'static str,
    pub way: Way,
    /// `{…}` stand for things of the host (see [`crate::hostile::Host`]).
    pub how: &'static str,
    /// One of these has to be in the answer.
    pub want: &'static [&'static str],
}

const fn sql(what: &'static str, how: &'static str, want: &'static [&'static str]) -> Attempt {
    Attempt { what, way: Way::Sql, how, want }
}

const fn back(what: &'static str, how: &'static str, want: &'static [&'static str]) -> Attempt {
    Attempt { what, way: Way::Back, how, want }
}

const fn shell(what: &'static str, how: &'static str, want: &'static [&'static str]) -> Attempt {
    Attempt { what, way: Way::Shell, how, want }
}

const NONE: &[&str] = &["No such file or directory"];
const REFUSED: &[&str] = &["Operation not permitted", "errno 1"];

/// Everything that a session survives.
pub const ATTEMPTS: &[Attempt] = &[
    // files
    sql("read /etc/shadow", "select pg_read_file('/etc/shadow')", NONE),
    sql("list /etc", "select string_agg(f, ' ' order by f) from pg_ls_dir('/etc') f", &["passwd"]),
    sql("list /", "select string_agg(f, ' ' order by f) from pg_ls_dir('/') f", &["bin"]),
    sql("list /home", "select string_agg(f, ' ') from pg_ls_dir('/home') f", NONE),
    sql("list /root", "select string_agg(f, ' ') from pg_ls_dir('/root') f", NONE),
    sql("read a file that everybody may read", "select pg_read_file('{secret}')", NONE),
    sql("read it through ..", "select pg_read_file('../../../../../../../..{secret}')", NONE),
    shell(
        "read it through /proc/1/root",
        "cat /proc/1/root{secret}",
        &["Permission denied", "No such file"],
    ),
    shell(
        "read it through /proc/*/root and cwd",
        "cat /proc/*/root{secret} /proc/*/cwd{secret}",
        &["No such file"],
    ),
    shell(
        "look for it everywhere",
        "find / -name '{secret_name}' 2>/dev/null; echo found no more",
        &["found no more"],
    ),
    back("import it as a large object", "select lo_import('{secret}')", NONE),
    back(
        "copy it into a table",
        "create table h.stolen(t text); copy h.stolen from '{secret}'",
        NONE,
    ),
    shell("read block devices", "cat /dev/sda /dev/vda /dev/nvme0n1 /dev/mem", NONE),
    // writing
    sql("copy to a file of the host", "copy (select 1) to '{writable}/by-copy'", NONE),
    shell(
        "write a file that everybody may write",
        "echo x > {writable}/by-shell",
        &["nonexistent", "No such file"],
    ),
    back(
        "export a large object to the host",
        "do $$ declare made oid := lo_from_bytea(0, 'x'); begin perform lo_export(made, '{writable}/by-export'); end $$",
        NONE,
    ),
    shell(
        "write into the dump's directory",
        "echo x > {dump}/by-shell",
        &["nonexistent", "No such file"],
    ),
    shell(
        "write into programs",
        "echo x > {programs}/postgres; echo x > /usr/local/bin/x; echo x > /etc/passwd",
        &["Read-only", "Permission denied"],
    ),
    shell(
        "write into the instance's settings",
        "echo x > $INSTANCE/postgresql.conf; echo x > $INSTANCE/postgres.log",
        &["Read-only"],
    ),
    // other servers
    shell(
        "connect to the live server's socket",
        "{programs}/psql -h {live_sockets} -p {live_port} -U postgres -c 'create table reached()'",
        NONE,
    ),
    shell(
        "connect to the live server over TCP",
        "{programs}/psql -h 127.0.0.1 -p {live_port} -U postgres -c 'create table reached()'",
        &["Network is unreachable", "Connection refused"],
    ),
    back(
        "connect to the live server by dblink",
        "select dblink('host={live_sockets} port={live_port} user=postgres', 'create table reached()')",
        NONE,
    ),
    shell(
        "connect to an abstract socket of the host",
        "perl -MSocket -e 'socket(S,AF_UNIX,SOCK_STREAM,0); print connect(S, pack(\"S a*\", AF_UNIX, \"\\0{abstract}\")) ? \"REACHED\" : \"no: $!\"'",
        &["Connection refused"],
    ),
    shell(
        "ask the network",
        "perl -MSocket -e 'socket(S,AF_INET,SOCK_STREAM,0); print connect(S, sockaddr_in(53, inet_aton(\"9.9.9.9\"))) ? \"REACHED\" : \"no: $!\"'",
        &["Network is unreachable"],
    ),
    shell(
        "a socket of the hypervisor (AF_VSOCK)",
        "perl -e 'print socket(S,40,1,0) ? \"REACHED\" : \"no: $!\"'",
        &["Address family not supported"],
    ),
    shell(
        "a socket of the kernel's ciphers (AF_ALG)",
        "perl -e 'print socket(S,38,5,0) ? \"REACHED\" : \"no: $!\"'",
        &["Address family not supported"],
    ),
    shell(
        "shared memory of the host (SysV)",
        "perl -e 'print defined(shmget({shm_key}, 16, 0)) ? \"REACHED\" : \"no: $!\"'",
        NONE,
    ),
    shell("shared memory of the host (POSIX)", "ls /dev/shm; cat /dev/shm/{shm_name}", NONE),
    shell(
        "keys of the host",
        "perl -e 'print syscall(250, 0, -3, 0) >= 0 ? \"REACHED\" : \"no: $!\"'",
        REFUSED,
    ),
    // processes
    shell(
        "list processes",
        "cat /proc/[0-9]*/cmdline | tr '\\0' ' '; echo that is all",
        &["that is all"],
    ),
    shell("kill a process of this account by its number", "kill -9 {victim}", &["No such process"]),
    shell("kill process 1", "kill -9 1; sleep 0.1; echo went on", &["went on"]),
    shell(
        "trace process 1",
        "perl -e 'print syscall(101, 16, 1, 0, 0) == 0 ? \"REACHED\" : \"no: $!\"'",
        REFUSED,
    ),
    shell(
        "read process 1's memory and environment",
        "cat /proc/1/environ /proc/1/mem | head -c 100",
        &["Permission denied", "No such file"],
    ),
    // the kernel
    shell("a user namespace", "unshare -Ur id", REFUSED),
    shell("another mount namespace", "unshare -m id", REFUSED),
    shell(
        "the namespaces of process 1",
        "nsenter -t 1 -m id",
        &["Permission denied", "Operation not permitted", "No such file"],
    ),
    shell(
        "a user namespace by clone",
        "perl -e 'print syscall(56, 0x10000000|17, 0, 0, 0, 0) < 0 ? \"no: $!\" : \"REACHED\"'",
        REFUSED,
    ),
    shell(
        "mount",
        "perl -e '$t=\"tmpfs\"; $d=\"/tmp\"; print syscall(165, $t, $d, $t, 0, 0) < 0 ? \"no: $!\" : \"REACHED\"'",
        REFUSED,
    ),
    shell("chroot", "perl -e 'print chroot(\"/tmp\") ? \"REACHED\" : \"no: $!\"'", REFUSED),
    shell("a device node in /tmp", "mknod /tmp/disk b 8 0", REFUSED),
    shell(
        "become root through set-user-id programs",
        "su -c id; mount -t tmpfs x /tmp; perl -e '$<=0;$>=0; print \" $> $!\"'",
        &[
            "Operation not permitted",
            "must be suid",
            "must be superuser",
            "Authentication failure",
            "Permission denied",
        ],
    ),
    shell(
        "run a program from the data directory",
        "cp /bin/true $DATA/run && chmod 755 $DATA/run && $DATA/run",
        &["Permission denied"],
    ),
    shell(
        "run a program from /tmp",
        "cp /bin/true /tmp/run && chmod 755 /tmp/run && /tmp/run",
        &["Permission denied"],
    ),
    back(
        "load a C library that lies in the backup",
        "load '{original_data}/hostile.so'",
        &["could not access file", "No such file"],
    ),
    back(
        "load a C library out of the mount",
        "do $$ begin execute format('load %L', current_setting('data_directory') || '/hostile.so'); end $$",
        &["failed to map segment", "could not access file"],
    ),
    // PostgreSQL's own
    back(
        "ALTER SYSTEM",
        "alter system set archive_command = 'touch {writable}/by-archive'",
        &["ALTER SYSTEM", "is empty"],
    ),
    back("reload what ALTER SYSTEM wrote", "select pg_reload_conf()", &["t"]),
    back(
        "a language",
        "create extension plpython3u",
        &["not available", "could not open extension control file", "CREATE EXTENSION", "is empty"],
    ),
    back(
        "let an index's function write to the host",
        "insert into h.indexed values ('x')",
        &["INSERT 0 1"],
    ),
    back("let an event trigger write to the host", "create table h.fired()", &["CREATE TABLE"]),
    // disks
    shell(
        "fill /tmp",
        "said=$(head -c 500000000 /dev/zero 2>&1 > /tmp/full); rm -f /tmp/full; echo $said",
        &["No space left on device"],
    ),
    shell(
        "fill /dev/shm",
        "head -c 500000000 /dev/zero > /dev/shm/full; rm -f /dev/shm/full",
        &["No space left on device"],
    ),
    shell(
        "fill /tmp with files",
        "mkdir /tmp/f; perl -e 'for (1..5000) { open(F, \">/tmp/f/$_\") or print(\"no: $!\"), last }'; rm -rf /tmp/f",
        &["No space left on device"],
    ),
    shell(
        "where this account may write",
        "find / -path /proc -prune -o -writable -type d -print 2>/dev/null | grep -v ^$DATA/ | sort | head -20; echo no more",
        &["no more"],
    ),
    shell(
        "run a program of its own from memory",
        "perl -e '$n=\"x\"; $fd=syscall(319, $n, 0); open(M,\">&=$fd\"); open(T,\"</bin/echo\"); binmode M; { local $/; print M <T>; } M->flush; exec {\"/proc/self/fd/$fd\"} \"echo\", \"it ran, within the same walls\"; print \"no: $!\"' -MIO::Handle",
        &["it ran", "no: "],
    ),
    shell(
        "survive",
        "env -i setsid sleep {survivor} < /dev/null > /dev/null 2>&1 & sleep 0.1; echo started",
        &["started"],
    ),
];
