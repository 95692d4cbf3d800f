//! Zstandard's frames, with bounded memory.

use std::io;

use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, get_error_name};

use super::frames::{FrameDecoder, Step};

/// Largest window that is accepted, as a power of two: 128 MiB, what the `zstd` command accepts by default.
const WINDOW_LOG_MAX: u32 = 27;

/// The library's context.
pub(super) struct Zstd(DCtx<'static>);

impl Zstd {
    pub(super) fn new() -> io::Result<Self> {
        let mut context = DCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
        context.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX)).map_err(named)?;
        Ok(Self(context))
    }
}

impl FrameDecoder for Zstd {
    fn step(&mut self, from: &[u8], to: &mut [u8]) -> io::Result<Step> {
        let (mut from, mut to) = (InBuffer::around(from), OutBuffer::around(to));
        let left = self.0.decompress_stream(&mut to, &mut from).map_err(named)?;
        Ok(Step { used: from.pos(), decoded: to.pos(), frame_ended: left == 0 })
    }

    fn memory(&self) -> u64 {
        self.0.sizeof() as u64
    }
}

fn named(code: usize) -> io::Error {
    io::Error::other(get_error_name(code))
}
