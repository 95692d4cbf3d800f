//! How fast pg_dump may go: it stands still while the dump's directory is nearly full and delivered files are about to leave it.
//!
//! So a dump may be larger than the room there is: what has to fit are the tables that are written at a time. Where nothing is on its
//! way that would make room, pg_dump gets the last of it, and fails by name where that is not enough.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pgthaw_postgres::dump::Dump;

use super::space::{free_bytes, human_size};

/// Most room that is kept free; an eighth of what there is at first where that is less.
const RESERVE_MAX: u64 = 1 << 30;
/// As fast as pg_dump's workers may fill a disk, in bytes per second: what lies above the reserve lasts at least so long.
const FASTEST: u64 = 4 << 30;
/// Bounds of the time between two looks.
const LOOKS: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(200));

/// Two marks, so that pg_dump is not stopped and continued all the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Marks {
    /// It stops when less than this is free, in bytes,
    stop: u64,
    /// and goes on when at least this is.
    go_on: u64,
}

impl Marks {
    /// For a directory where `free` bytes can be written before the first dump.
    fn of(free: u64) -> Self {
        let stop = (free / 8).min(RESERVE_MAX);
        Self { stop, go_on: stop * 2 }
    }

    /// Returns whether pg_dump stands still from now on. `makes_room`: files that leave once they are delivered are on their way.
    fn stands(self, stood: bool, free: u64, makes_room: bool) -> bool {
        let enough = if stood { self.go_on } else { self.stop };
        free < enough && makes_room
    }

    /// Returns how long to wait with `free` bytes until it is looked at again.
    fn next_look(self, free: u64) -> Duration {
        let room = Duration::from_micros(free.saturating_sub(self.stop) / (FASTEST / 1_000_000));
        room.clamp(LOOKS.0, LOOKS.1)
    }
}

/// The room of a session's dump directory.
#[derive(Debug)]
pub struct DumpRoom {
    directory: PathBuf,
    /// None where no file leaves before the end.
    marks: Option<Marks>,
    /// Databases whose finished files are on their way.
    on_their_way: AtomicUsize,
}

impl DumpRoom {
    /// Looks at `directory`, which holds no dump yet; `kept`: its files stay.
    pub fn of(directory: &Path, kept: bool) -> Self {
        let free = (!kept).then(|| free_bytes(directory).ok()).flatten();
        let (marks, on_their_way) = (free.map(Marks::of), AtomicUsize::new(0));
        Self { directory: directory.into(), marks, on_their_way }
    }

    /// Says that finished files of a database are being delivered, until what is returned is dropped.
    pub fn delivering(&self) -> Delivering<'_> {
        self.on_their_way.fetch_add(1, Ordering::Relaxed);
        Delivering(self)
    }
}

/// Files are on their way.
#[derive(Debug)]
pub struct Delivering<'a>(&'a DumpRoom);

impl Drop for Delivering<'_> {
    fn drop(&mut self) {
        self.0.on_their_way.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The pace of one pg_dump.
#[derive(Debug, Default)]
pub struct Pace {
    stands: bool,
    stood: bool,
    wait: Duration,
}

impl Pace {
    /// Waits until it is time to look, and returns the bytes that are free then. May be dropped and called again.
    pub async fn look(&self, room: &DumpRoom) -> u64 {
        if room.marks.is_none() {
            return std::future::pending().await;
        }
        tokio::time::sleep(self.wait).await;
        let directory = room.directory.clone();
        let free = tokio::task::spawn_blocking(move || free_bytes(&directory));
        // Where it cannot be told, pg_dump finds out by itself.
        free.await.ok().and_then(Result::ok).unwrap_or(u64::MAX)
    }

    /// Stops or continues `dump`; returns what there is to tell when it stands still for the first time.
    pub fn keep(&mut self, room: &DumpRoom, free: u64, dump: &Dump) -> Option<String> {
        let marks = room.marks?;
        let makes_room = room.on_their_way.load(Ordering::Relaxed) > 0;
        let stands = marks.stands(self.stands, free, makes_room);
        match (self.stands, stands) {
            (false, true) => dump.pause(),
            (true, false) => dump.go_on(),
            _ => {}
        }
        (self.stands, self.wait) = (stands, marks.next_look(free));
        let first = stands && !self.stood;
        self.stood |= stands;
        first.then(|| {
            let directory = room.directory.display();
            format!(
                "`{directory}` is nearly full ({} free): pg_dump goes on as delivered files leave it",
                human_size(free)
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pg_dump_stops_and_goes_on_at_two_marks() {
        let marks = Marks { stop: 10, go_on: 20 };
        let cases = [
            ("room enough", false, 100, true, false),
            ("down to the lower mark", false, 10, true, false),
            ("below it", false, 9, true, true),
            ("nothing would make room", false, 9, false, false),
            ("full, and nothing would make room", false, 0, false, false),
            ("between the marks it stays stopped", true, 19, true, true),
            ("between the marks it stays running", false, 19, true, false),
            ("the upper mark", true, 20, true, false),
            ("all is delivered, and it was not enough", true, 5, false, false),
        ];
        for (name, stood, free, makes_room, want) in cases {
            assert_eq!(marks.stands(stood, free, makes_room), want, "{name}");
        }
    }

    #[test]
    fn the_reserve_fits_the_room() {
        assert_eq!(Marks::of(32 << 20), Marks { stop: 4 << 20, go_on: 8 << 20 });
        assert_eq!(Marks::of(1 << 40).stop, RESERVE_MAX);
        assert_eq!(Marks::of(0), Marks { stop: 0, go_on: 0 });
        assert!(!Marks::of(0).stands(false, 0, true), "without any room pg_dump says so itself");
    }

    #[test]
    fn a_disk_is_looked_at_before_it_can_be_full() {
        let marks = Marks::of(1 << 40);
        assert_eq!(marks.next_look(1 << 40), LOOKS.1);
        assert_eq!(marks.next_look(0), LOOKS.0);
        let free = RESERVE_MAX + (400 << 20);
        assert!(marks.next_look(free) < Duration::from_millis(105), "{:?}", marks.next_look(free));
    }

    #[test]
    fn databases_are_on_their_way_for_as_long_as_it_is_said() {
        let room = DumpRoom::of(Path::new("/"), false);
        let two = (room.delivering(), room.delivering());
        assert_eq!(room.on_their_way.load(Ordering::Relaxed), 2);
        drop(two);
        assert_eq!(room.on_their_way.load(Ordering::Relaxed), 0);
        assert!(DumpRoom::of(Path::new("/"), true).marks.is_none(), "files that stay make no room");
    }
}
