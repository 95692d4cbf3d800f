//! Where the server keeps its sessions: one directory per session in the state directory, each with its journal.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pgthaw_session::journal::{self, Contents, Journal, JournalError};

/// A child that a killed server was just starting holds its locks until it runs its own program: so long may that take.
const LETTING_GO: Duration = Duration::from_secs(1);

/// The directory of all sessions of this server.
#[derive(Debug, Clone)]
pub struct SessionsDirectory {
    state: PathBuf,
    path: PathBuf,
}

impl SessionsDirectory {
    /// Opens `sessions/` below `state_directory`, for its only server; makes both (0700) where they are missing. A session whose server
    /// died before its first record was written has made nothing and was told to nobody: it is removed.
    ///
    /// # Errors
    /// When one of them cannot be made.
    pub fn open(state_directory: &Path) -> io::Result<Self> {
        let path = state_directory.join("sessions");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
        for session in fs::read_dir(&path)?.flatten() {
            remove_if_never_begun(&session.path());
        }
        Ok(Self { state: state_directory.into(), path })
    }

    /// The server's state directory.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The directory of session `id`.
    pub fn of(&self, id: &str) -> PathBuf {
        self.path.join(id)
    }

    /// The ids of all sessions, oldest first (an id begins with its date and time).
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn ids(&self) -> io::Result<Vec<String>> {
        let mut ids = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            if let Ok(name) = entry?.file_name().into_string()
                && self.of(&name).join(journal::FILE_NAME).is_file()
            {
                ids.push(name);
            }
        }
        ids.sort();
        Ok(ids)
    }

    /// Makes a new session's directory and journal; returns its id.
    ///
    /// # Errors
    /// [`JournalError`] when the file system says no.
    pub fn create(&self) -> Result<(String, Journal), JournalError> {
        let id = new_id();
        let journal = Journal::create(&self.of(&id))?;
        Ok((id, journal))
    }

    /// Opens and locks the journal of session `id`.
    ///
    /// # Errors
    /// [`JournalError`], also when another process works on the session.
    pub fn own(&self, id: &str) -> Result<(Journal, Contents), JournalError> {
        let end = Instant::now() + LETTING_GO;
        loop {
            match Journal::open(&self.of(id)) {
                Err(JournalError::Owned { .. }) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                opened => return opened,
            }
        }
    }
}

/// Removes a session's directory that holds nothing but a journal without a whole record. Where there is more, as an agent's log, the
/// session had begun and its journal was damaged: that is for somebody to look at.
fn remove_if_never_begun(directory: &Path) {
    let journal = directory.join(journal::FILE_NAME);
    let other = |entry: io::Result<fs::DirEntry>| {
        entry.is_ok_and(|entry| entry.file_name() != journal::FILE_NAME)
    };
    if fs::read_dir(directory).is_ok_and(|mut entries| entries.any(other)) {
        return;
    }
    let begun = match fs::read(&journal) {
        Ok(bytes) => bytes.contains(&b'\n'),
        Err(err) => err.kind() != io::ErrorKind::NotFound,
    };
    if !begun {
        let _ = fs::remove_file(journal); // one that is not there, or stays, is no harm
        let _ = fs::remove_dir(directory);
    }
}

/// A session's id: date, time and four random letters, such as `20261122-101112-kqvd`.
fn new_id() -> String {
    let now = jiff::Zoned::now().strftime("%Y%m%d-%H%M%S").to_string();
    let letters: String =
        random_bytes::<4>().iter().map(|byte| char::from(b'a' + byte % 26)).collect();
    format!("{now}-{letters}")
}

/// An unguessable marker: 32 hex digits.
pub fn new_marker() -> String {
    random_bytes::<16>().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let read = fs::File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut bytes));
    read.expect("every Linux has /dev/urandom");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_is_waited_for_while_a_child_of_its_last_server_lets_go() {
        let state = tempfile::tempdir().unwrap();
        let sessions = SessionsDirectory::open(state.path()).unwrap();
        let (id, held) = sessions.create().unwrap();
        let letting_go = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(held);
        });
        let (_held, _) = sessions.own(&id).unwrap();
        letting_go.join().unwrap();
        assert!(matches!(sessions.own(&id), Err(JournalError::Owned { .. })));
    }

    #[test]
    fn sessions_that_were_never_begun_are_removed() {
        let state = tempfile::tempdir().unwrap();
        let cases = [
            ("no journal", None, false),
            ("an empty journal", Some(("journal", "")), false),
            ("a torn first record", Some(("journal", "0123abcd {\"at\"")), false),
            ("a whole record", Some(("journal", "0123abcd {}\n")), true),
            ("a torn second record", Some(("journal", "0123abcd {}\n0123")), true),
            ("somebody's file", Some(("notes", "x")), true),
        ];
        for (name, file, _) in cases {
            let directory = state.path().join("sessions").join(name);
            fs::create_dir_all(&directory).unwrap();
            if let Some((file, text)) = file {
                fs::write(directory.join(file), text).unwrap();
            }
        }
        let begun = state.path().join("sessions/its agent had begun");
        fs::create_dir_all(&begun).unwrap();
        fs::write(begun.join("journal"), "0123abcd {\"at\"").unwrap();
        fs::write(begun.join("agent.log"), "").unwrap();
        let sessions = SessionsDirectory::open(state.path()).unwrap();
        assert_eq!(sessions.ids().unwrap().last().unwrap(), "its agent had begun");
        for (name, _, stays) in cases {
            assert_eq!(sessions.of(name).exists(), stays, "{name}");
        }
    }
}
