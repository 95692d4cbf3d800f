//! LZ4 frames, one after the other, with bounded memory and an exact end.

use std::ffi::CStr;
use std::io::{self, BufRead, Read};
use std::ptr;

use lz4_sys::{
    LZ4F_VERSION, LZ4F_createDecompressionContext, LZ4F_decompress, LZ4F_freeDecompressionContext,
    LZ4F_getErrorName, LZ4F_isError, LZ4FDecompressOptions, LZ4FDecompressionContext,
};

/// Decodes frames until its input ends.
pub(crate) struct Frames<R> {
    input: R,
    context: Context,
    options: LZ4FDecompressOptions,
    place: Place,
    memory: u64,
}

/// Where in the input the decoder is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Start,
    InFrame,
    AfterFrame,
}

impl<R: BufRead> Frames<R> {
    pub(crate) fn new(input: R) -> io::Result<Self> {
        let options = LZ4FDecompressOptions { stable_dst: 0, reserved: [0; 3] };
        Ok(Self { input, context: Context::new()?, options, place: Place::Start, memory: 0 })
    }

    /// Leaves out the checksums that frames carry; to be called before anything is read.
    pub(super) fn skip_checksums(&mut self) {
        self.options.reserved[0] = 1; // `skipChecksums` since LZ4 1.9.4 (lz4frame.h)
    }

    pub(super) fn input(&mut self) -> &mut R {
        &mut self.input
    }

    pub(super) fn memory(&self) -> u64 {
        self.memory
    }
}

impl<R: BufRead> Read for Frames<R> {
    /// Decodes the next bytes; 0 is the end of the last frame and of the input.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while !buf.is_empty() {
            let available = self.input.fill_buf()?;
            let ended = available.is_empty();
            if ended && self.place == Place::AfterFrame {
                return Ok(0);
            }
            if self.memory == 0 {
                self.memory = memory(available);
            }
            let done = self.context.decompress(buf, available, &self.options)?;
            self.input.consume(done.used);
            self.place = if done.frame_ended { Place::AfterFrame } else { Place::InFrame };
            if done.count > 0 {
                return Ok(done.count);
            }
            if ended {
                return Err(io::Error::other("the frame has no end"));
            }
        }
        Ok(0)
    }
}

/// What LZ4 allocates for a frame that begins with `header`: a stored block and a decoded one, for linked blocks with two windows
/// before it (lz4frame.c; LZ4 frame format: bit 5 of FLG, bits 4 to 6 of BD).
fn memory(header: &[u8]) -> u64 {
    let block: u64 = match header.get(5).map(|byte| (byte >> 4) & 7) {
        Some(4) => 64 << 10,
        Some(5) => 256 << 10,
        Some(6) => 1 << 20,
        _ => 4 << 20,
    };
    let linked = header.get(4).is_none_or(|byte| byte & 0x20 == 0);
    2 * block + if linked { 128 << 10 } else { 0 }
}

/// The library's decompression context; errors leave it of no use.
struct Context(LZ4FDecompressionContext);

// SAFETY: the context is a structure on the heap that belongs to whoever holds it.
unsafe impl Send for Context {}

/// What one call did.
struct Done {
    used: usize,
    count: usize,
    frame_ended: bool,
}

impl Context {
    fn new() -> io::Result<Self> {
        let mut context = Self(LZ4FDecompressionContext(ptr::null_mut()));
        // SAFETY: the library writes a pointer to what it has allocated.
        checked(unsafe { LZ4F_createDecompressionContext(&mut context.0, LZ4F_VERSION) })?;
        Ok(context)
    }

    fn decompress(
        &mut self,
        to: &mut [u8],
        from: &[u8],
        options: &LZ4FDecompressOptions,
    ) -> io::Result<Done> {
        let (mut count, mut used) = (to.len(), from.len());
        // SAFETY: both ranges are as long as said, the context is alive and not used by another thread.
        let left = checked(unsafe {
            LZ4F_decompress(self.0, to.as_mut_ptr(), &mut count, from.as_ptr(), &mut used, options)
        })?;
        Ok(Done { used, count, frame_ended: left == 0 })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: nothing uses the context any more; none was made if it is null, which the library accepts.
        unsafe { LZ4F_freeDecompressionContext(self.0) };
    }
}

fn checked(code: usize) -> io::Result<usize> {
    // SAFETY: these functions look at a number; the name is a string that lives as long as the program.
    unsafe {
        if LZ4F_isError(code) == 0 {
            return Ok(code);
        }
        Err(io::Error::other(CStr::from_ptr(LZ4F_getErrorName(code)).to_string_lossy()))
    }
}
