//! LZ4's frames, with bounded memory.

use std::ffi::CStr;
use std::io;
use std::ptr;

use lz4_sys::{
    LZ4F_VERSION, LZ4F_createDecompressionContext, LZ4F_decompress, LZ4F_freeDecompressionContext,
    LZ4F_getErrorName, LZ4F_isError, LZ4FDecompressOptions, LZ4FDecompressionContext,
};

use super::frames::{FrameDecoder, Step};

/// The library's context, and what was asked of it.
pub(crate) struct Lz4 {
    context: LZ4FDecompressionContext,
    options: LZ4FDecompressOptions,
    content_checksum: bool,
    /// 0 before the first frame's header is known.
    memory: u64,
}

// SAFETY: the context is a structure on the heap that belongs to whoever holds it.
unsafe impl Send for Lz4 {}

impl Lz4 {
    pub(crate) fn new() -> io::Result<Self> {
        let options = LZ4FDecompressOptions { stable_dst: 0, reserved: [0; 3] };
        let context = LZ4FDecompressionContext(ptr::null_mut());
        let mut lz4 = Self { context, options, content_checksum: true, memory: 0 };
        // SAFETY: the library writes a pointer to what it has allocated.
        checked(unsafe { LZ4F_createDecompressionContext(&mut lz4.context, LZ4F_VERSION) })?;
        Ok(lz4)
    }

    /// Leaves out the checksum over all of a frame's content; to be called before the first step.
    pub(super) fn without_content_checksum(&mut self) {
        self.content_checksum = false;
    }

    /// Looks at the header of the first frame (LZ4 frame format: FLG is byte 4, BD byte 5).
    fn begin(&mut self, header: &[u8]) {
        let flags = header.get(4).copied();
        let block: u64 = match header.get(5).map(|byte| (byte >> 4) & 7) {
            Some(4) => 64 << 10,
            Some(5) => 256 << 10,
            Some(6) => 1 << 20,
            _ => 4 << 20,
        };
        // The library (lz4frame.c) holds a stored block and a decoded one, and 128 KiB more for blocks that are linked.
        let linked = flags.is_none_or(|flags| flags & 0x20 == 0);
        self.memory = 2 * block + if linked { 128 << 10 } else { 0 };
        // It can leave out all checksums or none; those of blocks are worth their time to whoever reads only a part.
        let of_blocks = flags.is_none_or(|flags| flags & 0x10 != 0);
        self.options.reserved[0] = u32::from(!self.content_checksum && !of_blocks); // `skipChecksums` since 1.9.4
    }
}

impl FrameDecoder for Lz4 {
    fn step(&mut self, from: &[u8], to: &mut [u8]) -> io::Result<Step> {
        if self.memory == 0 {
            self.begin(from);
        }
        let (mut used, mut decoded) = (from.len(), to.len());
        let (from, to) = (from.as_ptr(), to.as_mut_ptr());
        // SAFETY: both ranges are as long as said, the context is alive and not used by another thread.
        let left = checked(unsafe {
            LZ4F_decompress(self.context, to, &mut decoded, from, &mut used, &self.options)
        })?;
        Ok(Step { used, decoded, frame_ended: left == 0 })
    }

    fn memory(&self) -> u64 {
        self.memory
    }
}

impl Drop for Lz4 {
    fn drop(&mut self) {
        // SAFETY: nothing uses the context any more; none was made if it is null, which the library accepts.
        unsafe { LZ4F_freeDecompressionContext(self.context) };
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
