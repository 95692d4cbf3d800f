//! Finding this very program on another machine, and bringing it there.
//!
//! The far side's login shell runs a small POSIX script. It starts the first program that is this build: the one in `PATH`, or
//! one that was carried over earlier. Where there is none it says so, takes the program from its standard input, puts it into
//! the first directory that is private and may execute, and starts it there.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use sha2::{Digest, Sha256};

/// Begins the name of a directory that a program was carried into; what follows is the build.
const CARRIED: &str = "pgthaw-bin-";

/// What the script says when the program is not there: this word, the system and the machine's architecture.
pub(crate) const MISSING: &str = "pgthaw-missing";
/// What the script says when it could not keep the program: this word, and why.
pub(crate) const NOT_KEPT: &str = "pgthaw-not-kept";

/// Hash of this process's program: the first 16 hex digits of its SHA-256.
///
/// # Errors
/// When the program's file cannot be read.
pub fn own_build() -> io::Result<String> {
    static BUILD: OnceLock<String> = OnceLock::new();
    if let Some(build) = BUILD.get() {
        return Ok(build.clone());
    }
    let (mut program, mut hash) = (open_own()?, Sha256::new());
    let mut buffer = vec![0; 256 << 10];
    loop {
        match program.read(&mut buffer)? {
            0 => break,
            count => hash.update(&buffer[..count]),
        }
    }
    let build: String = hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(BUILD.get_or_init(|| build).clone())
}

/// Opens this process's program, whatever has become of its file.
pub(crate) fn open_own() -> io::Result<File> {
    File::open("/proc/self/exe")
}

/// The directory that this process's program was carried into; none if it was installed.
pub fn carried_directory() -> Option<PathBuf> {
    let program = std::fs::read_link("/proc/self/exe").ok()?;
    let directory = program.parent()?;
    is_carried(directory).then(|| directory.to_path_buf())
}

/// Removes the program that this process was started from if it was carried here and nobody else runs it. Whoever ends last calls it: a
/// machine keeps nothing once the last connection and the last session are gone, whether or not the other side can say so.
pub fn remove_if_unused() {
    let (Some(directory), Ok(own)) = (carried_directory(), std::fs::read_link("/proc/self/exe"))
    else {
        return;
    };
    let ours = std::process::id().to_string();
    let others = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let runs_it = |process: &std::fs::DirEntry| {
        process
            .file_name()
            .to_str()
            .is_some_and(|pid| pid.bytes().all(|byte| byte.is_ascii_digit()) && pid != ours)
            && std::fs::read_link(process.path().join("exe")).is_ok_and(|program| program == own)
    };
    if !{ others }.any(|process| runs_it(&process)) {
        let _ = std::fs::remove_dir_all(directory); // another one may have done it just now
    }
}

fn is_carried(directory: &Path) -> bool {
    directory
        .file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.starts_with(CARRIED))
}

/// The script for the far side's shell. `size`: bytes of the program that may be sent; none where carrying is not allowed.
pub(crate) fn script(build: &str, size: Option<u64>) -> String {
    // Owned by us and closed to all others: nobody can have put something else there.
    let private = r#"own() { [ -O "$1" ] && [ -d "$1" ] && [ ! -L "$1" ] && [ -z "$(find "$1" -maxdepth 0 -perm /077 2>/dev/null)" ]; }"#;
    let places = format!(
        r#"home="${{HOME:-/nonexistent}}"
places="${{XDG_CACHE_HOME:-$home/.cache}} /var/tmp /tmp ${{XDG_RUNTIME_DIR:-/run/user/$(id -u)}} $home"
name={CARRIED}{build}-$(id -u)"#
    );
    let find = format!(
        r#"p=$(command -v pgthaw 2>/dev/null) && [ "$("$p" attach --build 2>/dev/null)" = {build} ] && exec "$p" attach --stdio
for place in $places; do
  own "$place/$name" && [ "$("$place/$name/pgthaw" attach --build 2>/dev/null)" = {build} ] && exec "$place/$name/pgthaw" attach --stdio
done
echo "{MISSING} $(uname -s) $(uname -m)""#
    );
    let keep = size.map_or_else(String::new, |size| {
        let kilobytes = size.div_ceil(1024);
        format!(
            r#"
umask 077; have=
room() {{ set -- $(df -Pk "$1" 2>/dev/null | tail -n 1); case "$4" in ''|*[!0-9]*) ;; *) [ "$4" -ge {kilobytes} ];; esac; }}
for place in $places; do
  [ -d "$place" ] || continue
  room "$place" || {{ why="$why $place: no room;"; continue; }}
  mkdir -m 700 "$place/$name" 2>/dev/null || own "$place/$name" || {{ why="$why $place: not to be written;"; continue; }}
  new="$place/$name/new.$$"
  if [ -z "$have" ]; then
    head -c {size} > "$new" || {{ rm -f "$new"; rmdir "$place/$name" 2>/dev/null; echo "{NOT_KEPT} $place: no room"; exit 1; }}
  else
    cp "$have" "$new" || {{ rm -f "$new"; rmdir "$place/$name" 2>/dev/null; why="$why $place: no room;"; continue; }}
    rm -f "$have"; rmdir "${{have%/*}}" 2>/dev/null
  fi
  have="$new"; chmod 700 "$have"
  if [ "$("$have" attach --build 2>&1)" = {build} ]; then mv "$have" "$place/$name/pgthaw"; exec "$place/$name/pgthaw" attach --stdio; fi
  if [ -x "$have" ]; then why="$why $place: $("$have" attach --build 2>&1 | head -n 1);"; else why="$why $place: may execute nothing (noexec);"; fi
done
[ -n "$have" ] && {{ rm -f "$have"; rmdir "${{have%/*}}" 2>/dev/null; }}
echo "{NOT_KEPT}$why""#
        )
    });
    format!("{private}\n{places}\n{find}{keep}\n")
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// A home with the directory that is looked at first.
    fn home() -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join(".cache")).unwrap();
        home
    }

    /// Runs the script with a home of its own and without pgthaw in `PATH`; the "program" is a shell script.
    fn run(home: &Path, script: &str, program: &str) -> String {
        use std::io::Write;
        let mut child = Command::new("sh");
        child.args(["-c", script]).env_clear().env("PATH", "/usr/bin:/bin").env("HOME", home);
        child.env("XDG_RUNTIME_DIR", home.join("run"));
        child.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        let mut child = child.spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all(program.as_bytes()).unwrap();
        input.write_all(b"the greeting\n").unwrap();
        drop(input);
        String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
    }

    /// A program that is build `abc` and echoes what follows on its standard input.
    const PROGRAM: &str = "#!/bin/sh\n[ \"$2\" = --build ] && echo abc || { echo welcome; cat; }\n";

    #[test]
    fn a_program_is_carried_once_and_started() {
        let home = home();
        let script = script("abc", Some(PROGRAM.len() as u64));
        let first = run(home.path(), &script, PROGRAM);
        assert!(first.starts_with(MISSING), "{first}");
        assert!(first.ends_with("welcome\nthe greeting\n"), "{first}");
        let second = run(home.path(), &script, "");
        assert_eq!(second, "welcome\nthe greeting\n");
        let kept = std::fs::read_dir(home.path().join(".cache")).unwrap().next().unwrap().unwrap();
        assert!(is_carried(&kept.path()));
        // What others could have written is not run.
        std::fs::set_permissions(kept.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
        let third = run(home.path(), &super::script("abc", None), "");
        assert!(third.starts_with(MISSING) && !third.contains("welcome"), "{third}");
    }

    #[test]
    fn a_program_that_does_not_run_is_not_kept() {
        let home = home();
        let broken = "#!/no/such/interpreter\n";
        let said = run(home.path(), &script("def", Some(broken.len() as u64)), broken);
        assert!(said.contains(NOT_KEPT), "{said}");
        assert_eq!(std::fs::read_dir(home.path().join(".cache")).unwrap().count(), 0);
    }

    #[test]
    fn without_leave_to_carry_it_only_looks() {
        let home = tempfile::tempdir().unwrap();
        let said = run(home.path(), &script("abc", None), "");
        assert!(said.starts_with(MISSING) && said.lines().count() == 1, "{said}");
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0);
    }
}
