//! A limit in bytes per second for what is written.

use std::io::{self, Write};
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

/// Largest piece that is written at once.
const PIECE_MAX: u64 = 256 << 10;
/// How many pieces a second has, so that the peer sees a steady stream.
const PIECES: u64 = 20;

/// Passes bytes on, no more per second than a limit; without a limit it does nothing.
///
/// A token bucket: what was not used while nothing was written is not saved up for later, beyond one piece.
pub(super) struct Throttled<W> {
    output: W,
    limit: Option<NonZeroU64>,
    /// When the next piece may go.
    next: Instant,
}

impl<W: Write> Throttled<W> {
    pub(super) fn new(output: W, limit: Option<NonZeroU64>) -> Self {
        Self { output, limit, next: Instant::now() }
    }
}

impl<W: Write> Write for Throttled<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(limit) = self.limit else { return self.output.write(bytes) };
        let piece = (limit.get() / PIECES).clamp(1, PIECE_MAX);
        let piece = usize::try_from(piece).unwrap_or(bytes.len()).min(bytes.len());
        std::thread::sleep(self.next.saturating_duration_since(Instant::now()));
        let count = self.output.write(&bytes[..piece])?;
        #[expect(clippy::cast_precision_loss, reason = "a rate need not be exact to the byte")]
        let cost = Duration::from_secs_f64(count as f64 / limit.get() as f64);
        self.next = self.next.max(Instant::now() - cost) + cost;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_to_the_limit() {
        let mut throttled = Throttled::new(Vec::new(), NonZeroU64::new(1 << 20));
        let begun = Instant::now();
        throttled.write_all(&vec![7; 256 << 10]).unwrap();
        assert!(begun.elapsed() > Duration::from_millis(180), "{:?}", begun.elapsed());
        assert_eq!(throttled.output.len(), 256 << 10);

        let mut free = Throttled::new(Vec::new(), None);
        assert_eq!(
            free.write(&vec![7; 4 << 20]).unwrap(),
            4 << 20,
            "without a limit all goes at once"
        );
    }
}
