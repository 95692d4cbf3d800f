//! Frames of one codec, one after the other, with an exact end.

use std::io::{self, BufRead, Read};

/// Decodes a codec's frames; each begins where the one before has ended. After an error it is of no more use.
pub(crate) trait FrameDecoder {
    /// Decodes some of `from` into `to`, neither of which need be used up.
    fn step(&mut self, from: &[u8], to: &mut [u8]) -> io::Result<Step>;

    /// Bytes of memory it holds now.
    fn memory(&self) -> u64;
}

/// What one step did.
pub(crate) struct Step {
    /// Bytes used and bytes decoded.
    pub(super) used: usize,
    pub(super) decoded: usize,
    /// What was used last was a frame's end, and all of the frame is decoded.
    pub(super) frame_ended: bool,
}

/// Decodes frames until its input ends.
pub(crate) struct Frames<R, D> {
    input: R,
    decoder: D,
    place: Place,
}

/// Where in the input the decoder is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Start,
    InFrame,
    AfterFrame,
}

impl<R, D: FrameDecoder> Frames<R, D> {
    pub(crate) fn new(input: R, decoder: D) -> Self {
        Self { input, decoder, place: Place::Start }
    }

    pub(super) fn input(&mut self) -> &mut R {
        &mut self.input
    }

    pub(super) fn decoder(&mut self) -> &mut D {
        &mut self.decoder
    }

    pub(super) fn memory(&self) -> u64 {
        self.decoder.memory()
    }
}

impl<R: BufRead, D: FrameDecoder> Read for Frames<R, D> {
    /// Decodes the next bytes; 0 is the end of the last frame and of the input.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while !buf.is_empty() {
            let available = self.input.fill_buf()?;
            let ended = available.is_empty();
            if ended && self.place == Place::AfterFrame {
                break;
            }
            let step = self.decoder.step(available, buf)?;
            self.input.consume(step.used);
            self.place = if step.frame_ended { Place::AfterFrame } else { Place::InFrame };
            if step.decoded > 0 {
                return Ok(step.decoded);
            }
            if ended {
                return Err(io::Error::other("the frame has no end"));
            }
        }
        Ok(0)
    }
}
