//! Codecs: from stored bytes to a file's bytes, as a stream.
//!
//! Owns the exactness of it: a file has the size its map says, its stored range holds nothing else, and the frames'
//! own checksums match (unless whoever decodes has a better one); anything else is an error. Leaves digests over files and the order of reads to
//! [`crate::reader`]. Memory is bounded whatever the input says. Start at [`Decoder`].

pub(crate) mod frames;
pub(crate) mod lz4;
mod zstd;

use std::fmt;
use std::io::{self, BufRead, Read};

use flate2::bufread::{MultiGzDecoder, ZlibDecoder};

use crate::map::Codec;
use frames::Frames;
use lz4::Lz4;
use zstd::Zstd;

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
    Lz4(Frames<Input<R>, Lz4>),
    Zstd(Frames<Input<R>, Zstd>),
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
        let input = Input { stored, failed: None };
        let no_context = |err: io::Error| {
            let reason = err.to_string();
            DecodeError::Damaged { codec, decoded: 0, reason }
        };
        let stream = match codec {
            Codec::None => Stream::Plain(input),
            Codec::Gzip => Stream::Gzip(Box::new(MultiGzDecoder::new(input))),
            Codec::Zlib => Stream::Zlib(Box::new(ZlibDecoder::new(input))),
            Codec::Lz4 => Stream::Lz4(Frames::new(input, Lz4::new().map_err(no_context)?)),
            Codec::Zstd => Stream::Zstd(Frames::new(input, Zstd::new().map_err(no_context)?)),
        };
        Ok(Self { codec, stream, decoded: 0, size })
    }

    /// Leaves out the checksum over all of an LZ4 frame's content, which takes longer than decoding: for whoever compares a
    /// digest over the whole file. Checksums of blocks are looked at all the same. To be called before [`Decoder::fill`].
    pub fn without_content_checksum(mut self) -> Self {
        if let Stream::Lz4(frames) = &mut self.stream {
            frames.decoder().without_content_checksum();
        }
        self
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
            Stream::Lz4(frames) => frames.memory(),
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
            Self::Lz4(stream) => stream.input(),
            Self::Zstd(stream) => stream.input(),
        }
    }
}

/// The stored bytes, which remember their own error (the decoders above know only their own).
struct Input<R> {
    stored: R,
    failed: Option<io::Error>,
}

impl<R: BufRead> BufRead for Input<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.stored.fill_buf().map_err(|err| {
            // Of a kind that no decoder takes for an end of input or a reason to try again.
            let told = io::Error::other(err.to_string());
            self.failed = Some(err);
            told
        })
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
