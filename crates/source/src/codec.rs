//! Codecs: from stored bytes to a file's bytes, as a stream.
//!
//! Owns the exactness of it: a file has the size its map says, its stored range holds nothing else, and the frames'
//! own checksums match; anything else is an error. Leaves digests over files and the order of reads to
//! [`crate::reader`]. Memory is bounded whatever the input says. Start at [`Decoder`].

mod zstd;

use std::fmt;
use std::io::{self, BufRead, Read};

use flate2::bufread::{MultiGzDecoder, ZlibDecoder};
use lz4_flex::frame::FrameDecoder;

use crate::map::Codec;

/// Memory of an inflate stream: its 32 KiB window and state, rounded up.
const INFLATE_MEMORY: u64 = 64 * 1024;

/// Why a stream cannot be decoded.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The stored bytes could not be read; the data itself may be good.
    #[error("read stored bytes")]
    Stored(#[source] io::Error),
    /// The stored bytes are not what their codec demands.
    #[error("{codec} data is damaged after {decoded} decoded bytes: {reason}")]
    Damaged {
        /// The codec.
        codec: Codec,
        /// Bytes decoded before.
        decoded: u64,
        /// What the codec says.
        reason: String,
    },
    /// The stream ends early.
    #[error("decodes to {decoded} bytes instead of {size}")]
    TooShort {
        /// Bytes there are.
        decoded: u64,
        /// Bytes there should be.
        size: u64,
    },
    /// The stream goes on after the file's last byte.
    #[error("decodes to more than its {size} bytes")]
    TooLong {
        /// Bytes there should be.
        size: u64,
    },
    /// The stored range goes on after the stream's end.
    #[error("its {codec} data is followed by something else")]
    Trailing {
        /// The codec.
        codec: Codec,
    },
}

impl fmt::Display for Codec {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::None => "uncompressed",
            Self::Gzip => "gzip",
            Self::Zlib => "zlib",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        })
    }
}

/// Decodes one stored range, from its start, to a file of known size. After an error it is of no more use.
pub struct Decoder<R: BufRead> {
    codec: Codec,
    stream: Stream<R>,
    decoded: u64,
    size: u64,
}

enum Stream<R: BufRead> {
    Plain(Input<R>),
    Gzip(Box<MultiGzDecoder<Input<R>>>),
    Zlib(Box<ZlibDecoder<Input<R>>>),
    Lz4(Box<Lz4<R>>),
    Zstd(zstd::Frames<Input<R>>),
}

impl<R: BufRead> Decoder<R> {
    /// Returns a decoder of `stored`, which ends where the stored range ends, for a file of `size` bytes.
    ///
    /// `stored` should hand out some ten KiB at once. The first of it may be read here; if that fails, the first
    /// [`Decoder::fill`] says so.
    ///
    /// # Errors
    /// [`DecodeError::Damaged`] when there is no memory for the codec's context.
    pub fn new(codec: Codec, stored: R, size: u64) -> Result<Self, DecodeError> {
        let input = Input { stored, failed: None, ended: false };
        let stream = match codec {
            Codec::None => Stream::Plain(input),
            Codec::Gzip => Stream::Gzip(Box::new(MultiGzDecoder::new(input))),
            Codec::Zlib => Stream::Zlib(Box::new(ZlibDecoder::new(input))),
            Codec::Lz4 => Stream::Lz4(Box::new(Lz4::new(input))),
            Codec::Zstd => Stream::Zstd(zstd::Frames::new(input).map_err(|err| {
                DecodeError::Damaged { codec, decoded: 0, reason: err.to_string() }
            })?),
        };
        Ok(Self { codec, stream, decoded: 0, size })
    }

    /// Fills `buf` with the next bytes, as far as the file's size reaches, and returns how many they are.
    ///
    /// # Errors
    /// [`DecodeError`]; fewer bytes than the size promises is one.
    pub fn fill(&mut self, buf: &mut [u8]) -> Result<usize, DecodeError> {
        let left = usize::try_from(self.size - self.decoded).unwrap_or(usize::MAX);
        let wanted = left.min(buf.len());
        let mut filled = 0;
        while filled < wanted {
            match self.stream.read(&mut buf[filled..wanted]) {
                Ok(0) => {
                    return Err(DecodeError::TooShort { decoded: self.decoded, size: self.size });
                }
                Ok(count) => {
                    filled += count;
                    self.decoded += count as u64;
                }
                Err(err) => return Err(self.explain(err)),
            }
        }
        Ok(filled)
    }

    /// Checks, after the file's last byte, that the stream ends here too, with the checksums it carries, and that
    /// its range holds nothing else.
    ///
    /// # Errors
    /// [`DecodeError`]; also when called before the last byte.
    pub fn finish(&mut self) -> Result<(), DecodeError> {
        if self.decoded < self.size {
            return Err(DecodeError::TooShort { decoded: self.decoded, size: self.size });
        }
        match self.stream.read(&mut [0]) {
            Ok(0) => {}
            Ok(_) => return Err(DecodeError::TooLong { size: self.size }),
            Err(err) => return Err(self.explain(err)),
        }
        match self.stream.input().fill_buf().map(<[u8]>::is_empty) {
            Ok(true) => Ok(()),
            Ok(false) => Err(DecodeError::Trailing { codec: self.codec }),
            Err(err) => Err(self.explain(err)),
        }
    }

    /// Bytes of memory the stream holds now, apart from `stored`'s own.
    pub fn memory(&self) -> u64 {
        match &self.stream {
            Stream::Plain(_) => 0,
            Stream::Gzip(_) | Stream::Zlib(_) => INFLATE_MEMORY,
            Stream::Lz4(lz4) => lz4.memory,
            Stream::Zstd(frames) => frames.memory(),
        }
    }

    fn explain(&mut self, err: io::Error) -> DecodeError {
        match self.stream.input().failed.take() {
            Some(failed) => DecodeError::Stored(failed),
            None => DecodeError::Damaged {
                codec: self.codec,
                decoded: self.decoded,
                reason: err.to_string(),
            },
        }
    }
}

impl<R: BufRead> Stream<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(input) => input.read(buf),
            Self::Gzip(stream) => stream.read(buf),
            Self::Zlib(stream) => stream.read(buf),
            Self::Lz4(stream) => stream.read(buf),
            Self::Zstd(stream) => stream.read(buf),
        }
    }

    fn input(&mut self) -> &mut Input<R> {
        match self {
            Self::Plain(input) => input,
            Self::Gzip(stream) => stream.get_mut(),
            Self::Zlib(stream) => stream.get_mut(),
            Self::Lz4(stream) => stream.frames.get_mut(),
            Self::Zstd(stream) => stream.input(),
        }
    }
}

/// The stored bytes, which remember their own error (the decoders above know only their own) and their end.
struct Input<R> {
    stored: R,
    failed: Option<io::Error>,
    ended: bool,
}

impl<R: BufRead> BufRead for Input<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        match self.stored.fill_buf() {
            Ok(bytes) => {
                self.ended |= bytes.is_empty();
                Ok(bytes)
            }
            Err(err) => {
                // Of a kind that no decoder takes for an end of input or a reason to try again.
                let told = io::Error::other(err.to_string());
                self.failed = Some(err);
                Err(told)
            }
        }
    }

    fn consume(&mut self, count: usize) {
        self.stored.consume(count);
    }
}

impl<R: BufRead> Read for Input<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buf)?;
        self.consume(count);
        Ok(count)
    }
}

/// LZ4 frames, one after the other. `lz4_flex` takes an end of input between two blocks for the end of the frame;
/// here that is an error.
struct Lz4<R: BufRead> {
    frames: FrameDecoder<Input<R>>,
    /// The last frame ended as it should.
    complete: bool,
    memory: u64,
}

impl<R: BufRead> Lz4<R> {
    fn new(input: Input<R>) -> Self {
        Self { frames: FrameDecoder::new(input), complete: false, memory: 0 }
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.memory == 0 {
            self.memory = lz4_memory(self.frames.get_mut().fill_buf()?);
        }
        loop {
            let count = self.frames.read(buf)?;
            if count > 0 {
                return Ok(count);
            }
            let input = self.frames.get_mut();
            if !input.ended {
                self.complete = input.fill_buf()?.is_empty(); // else there is one more frame
            }
            if input.ended {
                return if self.complete {
                    Ok(0)
                } else {
                    Err(io::Error::other("the frame has no end"))
                };
            }
        }
    }
}

/// What `lz4_flex` allocates for a frame that begins with `header`: one block, and for linked blocks two more and a
/// window (LZ4 frame format: bit 5 of FLG, bits 4 to 6 of BD).
fn lz4_memory(header: &[u8]) -> u64 {
    let block: u64 = match header.get(5).map(|byte| (byte >> 4) & 7) {
        Some(4) => 64 << 10,
        Some(5) => 256 << 10,
        Some(6) => 1 << 20,
        _ => 4 << 20,
    };
    let linked = header.get(4).is_none_or(|byte| byte & 0x20 == 0);
    if linked { 3 * block + (64 << 10) } else { 2 * block }
}
