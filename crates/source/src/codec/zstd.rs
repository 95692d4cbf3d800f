//! Zstandard frames, one after the other, with bounded memory and an exact end.

use std::io::{self, BufRead};

use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, get_error_name};

/// Largest window that is accepted, as a power of two: 128 MiB, what the `zstd` command accepts by default.
const WINDOW_LOG_MAX: u32 = 27;

/// Decodes frames until its input ends.
pub(super) struct Frames<R> {
    input: R,
    context: DCtx<'static>,
    place: Place,
}

/// Where in the input the decoder is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Start,
    InFrame,
    AfterFrame,
}

impl<R: BufRead> Frames<R> {
    pub(super) fn new(input: R) -> io::Result<Self> {
        let mut context = DCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
        context.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX)).map_err(named)?;
        Ok(Self { input, context, place: Place::Start })
    }

    /// Decodes the next bytes into `buf`, which is not empty; 0 is the end of the last frame and of the input.
    pub(super) fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let available = self.input.fill_buf()?;
            let ended = available.is_empty();
            if ended && self.place == Place::AfterFrame {
                return Ok(0);
            }
            let (mut from, mut to) = (InBuffer::around(available), OutBuffer::around(&mut *buf));
            let left = self.context.decompress_stream(&mut to, &mut from).map_err(named)?;
            let (used, count) = (from.pos(), to.pos());
            self.input.consume(used);
            self.place = if left == 0 { Place::AfterFrame } else { Place::InFrame };
            if count > 0 {
                return Ok(count);
            }
            if ended {
                return Err(io::Error::other("the frame has no end"));
            }
        }
    }

    pub(super) fn input(&mut self) -> &mut R {
        &mut self.input
    }

    pub(super) fn memory(&self) -> u64 {
        self.context.sizeof() as u64
    }
}

fn named(code: usize) -> io::Error {
    io::Error::other(get_error_name(code))
}
