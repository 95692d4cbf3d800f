//! Frames: how messages lie on a connection.
//!
//! ```text
//! head length, u32 LE | body length, u32 LE | CRC-32C of the lengths and the head, u32 LE | head | body
//! ```
//! The head is one message (postcard). The body is the data of a chunk, whose checksum is in the head. Both lengths are
//! bounded, and a long head is allocated as it arrives: a peer gets no more memory than it sends bytes.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::chunk::CHUNK;

/// Longest head, in bytes: the names and checksums of about a million files.
pub(super) const HEAD_MAX: usize = 64 << 20;
/// Bytes of a head that are allocated before they have arrived.
const HEAD_AT_ONCE: usize = 1 << 20;

const LENGTHS: usize = 8;
const PREAMBLE: usize = LENGTHS + 4;

/// Why no frame could be read or written.
#[derive(Debug, thiserror::Error)]
pub(super) enum FrameError {
    #[error("the connection broke")]
    Io(#[from] io::Error),
    #[error("the peer closed the connection")]
    Closed,
    #[error("a frame of {head} + {body} bytes is too long")]
    TooLong { head: usize, body: usize },
    #[error("a frame arrived damaged")]
    Damaged,
    #[error("a frame holds no message of this protocol")]
    Malformed,
}

/// Encodes a message.
pub(super) fn encode(message: &impl Serialize) -> Result<Vec<u8>, FrameError> {
    postcard::to_stdvec(message).map_err(|_| FrameError::Malformed)
}

/// Writes one frame; the caller flushes.
pub(super) fn write(output: &mut impl Write, head: &[u8], body: &[u8]) -> Result<(), FrameError> {
    let too_long = || FrameError::TooLong { head: head.len(), body: body.len() };
    if head.len() > HEAD_MAX || body.len() > CHUNK {
        return Err(too_long());
    }
    let mut preamble = [0; PREAMBLE];
    preamble[..4]
        .copy_from_slice(&u32::try_from(head.len()).map_err(|_| too_long())?.to_le_bytes());
    preamble[4..8]
        .copy_from_slice(&u32::try_from(body.len()).map_err(|_| too_long())?.to_le_bytes());
    let sum = crc32c::crc32c_append(crc32c::crc32c(&preamble[..LENGTHS]), head);
    preamble[LENGTHS..].copy_from_slice(&sum.to_le_bytes());
    output.write_all(&preamble)?;
    output.write_all(head)?;
    output.write_all(body)?;
    Ok(())
}

/// A frame that was read.
#[derive(Debug)]
pub(super) struct Frame<M> {
    pub(super) message: M,
    pub(super) body: Vec<u8>,
    /// Bytes of its head.
    pub(super) head: usize,
}

/// Reads one frame; `buffer` is asked for something to hold its body, if it has one.
pub(super) fn read<M: DeserializeOwned>(
    input: &mut impl Read,
    buffer: impl FnOnce() -> Vec<u8>,
) -> Result<Frame<M>, FrameError> {
    let mut preamble = [0; PREAMBLE];
    if !read_first(input, &mut preamble)? {
        return Err(FrameError::Closed);
    }
    let word = |at: usize| {
        u32::from_le_bytes([preamble[at], preamble[at + 1], preamble[at + 2], preamble[at + 3]])
    };
    let length = |at| usize::try_from(word(at)).unwrap_or(usize::MAX);
    let (head_length, body_length) = (length(0), length(4));
    if head_length > HEAD_MAX || body_length > CHUNK {
        return Err(FrameError::TooLong { head: head_length, body: body_length });
    }
    let mut head = Vec::with_capacity(head_length.min(HEAD_AT_ONCE));
    input.take(head_length as u64).read_to_end(&mut head)?;
    if head.len() < head_length {
        return Err(cut_short());
    }
    if crc32c::crc32c_append(crc32c::crc32c(&preamble[..LENGTHS]), &head) != word(LENGTHS) {
        return Err(FrameError::Damaged);
    }
    let message = match postcard::take_from_bytes(&head) {
        Ok((message, [])) => message,
        _ => return Err(FrameError::Malformed),
    };
    let mut body = Vec::new();
    if body_length > 0 {
        body = buffer();
        body.resize(body_length, 0);
        input.read_exact(&mut body)?;
    }
    Ok(Frame { message, body, head: head_length })
}

/// Fills `buffer`; `false` if the input ends before its first byte.
fn read_first(input: &mut impl Read, buffer: &mut [u8]) -> Result<bool, FrameError> {
    let mut filled = 0;
    while filled < buffer.len() {
        match input.read(&mut buffer[filled..]) {
            Ok(0) if filled == 0 => return Ok(false),
            Ok(0) => return Err(cut_short()),
            Ok(count) => filled += count,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err.into()),
        }
    }
    Ok(true)
}

fn cut_short() -> FrameError {
    io::Error::from(io::ErrorKind::UnexpectedEof).into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(message: &(u32, String), body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        write(&mut bytes, &encode(message).unwrap(), body).unwrap();
        bytes
    }

    fn read_back(mut bytes: &[u8]) -> Result<((u32, String), Vec<u8>), FrameError> {
        read(&mut bytes, Vec::new).map(|frame| (frame.message, frame.body))
    }

    #[test]
    fn any_flipped_bit_before_the_body_is_noticed() {
        let whole = frame(&(7, "a head".into()), b"body");
        assert_eq!(read_back(&whole).unwrap(), ((7, "a head".into()), b"body".to_vec()));
        for bit in 0..(whole.len() - 4) * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(read_back(&flipped).is_err(), "bit {bit}");
        }
        for length in 1..whole.len() {
            let cut = read_back(&whole[..length]);
            assert!(matches!(cut, Err(FrameError::Io(_))), "{length}: {cut:?}");
        }
        assert!(matches!(read_back(b""), Err(FrameError::Closed)));
    }

    #[test]
    fn lengths_are_bounded() {
        for (head, body) in
            [(u32::MAX, 0), (0, u32::MAX), (HEAD_MAX as u32 + 1, 0), (0, CHUNK as u32 + 1)]
        {
            let bytes = [head.to_le_bytes(), body.to_le_bytes(), [0; 4]].concat();
            let read = read_back(&bytes);
            assert!(matches!(read, Err(FrameError::TooLong { .. })), "{read:?}");
        }
        assert!(matches!(
            write(&mut Vec::new(), &[], &vec![0; CHUNK + 1]),
            Err(FrameError::TooLong { .. })
        ));
        let mut longer = encode(&(7, "x")).unwrap();
        longer.push(0);
        let mut bytes = Vec::new();
        write(&mut bytes, &longer, b"").unwrap();
        assert!(matches!(read_back(&bytes), Err(FrameError::Malformed)));
    }

    proptest! {
        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_back(&bytes);
        }
    }
}
