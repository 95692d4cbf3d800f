//! The frames in which stored bytes travel between two machines.
//!
//! Owns the layout of the greeting, of requests and of answers' headers, and every limit that either side may rely on.
//! Leaves connections, threads and order to [`super::service`] and [`super::remote`].
//!
//! Each side first sends [`GREETING`]. Then requests of [`Request::SIZE`] bytes go one way, and answers the other:
//! a [`Header`] and as many bytes as it says. Every request gets one answer, in any order; its number tells which.
//! All numbers are little-endian:
//!
//! ```text
//! request   0 kind  1..4 zero  4 object     8 number  16 offset  24 length  28..32 zero
//! answer    0 kind  1 zero     2 error kind  4 length   8 number
//! ```
//!
//! A frame that breaks a rule ends the connection: nothing after it can be trusted.

use std::io::{self, ErrorKind};

use crate::map::ObjectId;

/// What each side sends first; the last byte is the protocol's version.
pub(super) const GREETING: [u8; 8] = *b"pgtread\x01";
/// Most bytes that one request may ask for. Longer ranges are several requests, so no answer waits behind a long one.
pub(super) const MAX_RANGE: u32 = 256 * 1024;
/// Bytes of the longest answer, with its header.
pub(super) const MAX_ANSWER: usize = MAX_RANGE as usize + Header::SIZE;
/// Most bytes of an error's text.
pub(super) const MAX_TEXT: usize = 4096;
/// Most requests that may be without an answer at a time.
pub(super) const MAX_OPEN: usize = 1024;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    /// All of a range; somebody waits for it.
    Exact(AskedRange),
    /// Of a range what there is; somebody may want it later.
    UpTo(AskedRange),
    /// The number of stored bytes of an object.
    Length(ObjectId),
    /// A sign of life.
    Ping,
}

/// A range of an object's stored bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct AskedRange {
    pub(super) object: ObjectId,
    pub(super) offset: u64,
    /// At most [`MAX_RANGE`].
    pub(super) length: u32,
}

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    /// Chosen by who asks; comes back with the answer.
    pub(super) number: u64,
    pub(super) ask: Ask,
}

/// What an answer carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Carries {
    /// The bytes of the range.
    Bytes,
    /// An object's length, as 8 bytes.
    Length,
    /// Why there is no other answer: the error's text.
    Error(ErrorKind),
    /// Nothing: a sign of life.
    Pong,
}

/// What comes before an answer's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) number: u64,
    pub(super) carries: Carries,
    /// Bytes that follow.
    pub(super) length: u32,
}

/// Kinds of errors that keep their meaning on the way; all others become `Other`.
const ERROR_KINDS: [(u16, ErrorKind); 10] = [
    (1, ErrorKind::NotFound),
    (2, ErrorKind::PermissionDenied),
    (3, ErrorKind::UnexpectedEof),
    (4, ErrorKind::InvalidData),
    (5, ErrorKind::InvalidInput),
    (6, ErrorKind::TimedOut),
    (7, ErrorKind::Unsupported),
    (8, ErrorKind::StaleNetworkFileHandle),
    (9, ErrorKind::OutOfMemory),
    (10, ErrorKind::IsADirectory),
];

/// Checks the other side's greeting.
///
/// # Errors
/// `InvalidData` for anything but this version's greeting.
pub(super) fn check_greeting(found: [u8; 8]) -> io::Result<()> {
    if found == GREETING {
        return Ok(());
    }
    Err(broken(if found[..7] == GREETING[..7] {
        format!("the other side speaks version {}, this one {}", found[7], GREETING[7])
    } else {
        "the other side does not greet as a reader or server of stored bytes".to_owned()
    }))
}

/// The error that ends a connection whose other side breaks the protocol.
pub(super) fn broken(text: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, text.into())
}

impl Request {
    pub(super) const SIZE: usize = 32;

    pub(super) fn encode(&self) -> [u8; Self::SIZE] {
        let (kind, range) = match self.ask {
            Ask::Exact(range) => (1, range),
            Ask::UpTo(range) => (2, range),
            Ask::Length(object) => (3, AskedRange { object, offset: 0, length: 0 }),
            Ask::Ping => (4, AskedRange { object: ObjectId(0), offset: 0, length: 0 }),
        };
        let mut frame = [0; Self::SIZE];
        frame[0] = kind;
        frame[4..8].copy_from_slice(&range.object.0.to_le_bytes());
        frame[8..16].copy_from_slice(&self.number.to_le_bytes());
        frame[16..24].copy_from_slice(&range.offset.to_le_bytes());
        frame[24..28].copy_from_slice(&range.length.to_le_bytes());
        frame
    }

    /// # Errors
    /// `InvalidData` for an unknown kind, a range that is too long, or fields that should be zero and are not.
    pub(super) fn decode(frame: &[u8; Self::SIZE]) -> io::Result<Self> {
        let object = ObjectId(u32_at(frame, 4));
        let range = AskedRange { object, offset: u64_at(frame, 16), length: u32_at(frame, 24) };
        if range.length > MAX_RANGE {
            return Err(broken(format!("a request for {} bytes at once", range.length)));
        }
        let ask = match frame[0] {
            1 => Ask::Exact(range),
            2 => Ask::UpTo(range),
            3 => Ask::Length(object),
            4 => Ask::Ping,
            kind => return Err(broken(format!("a request of unknown kind {kind}"))),
        };
        let request = Self { number: u64_at(frame, 8), ask };
        if request.encode() != *frame {
            return Err(broken("a request with bytes set that have no meaning"));
        }
        Ok(request)
    }
}

impl Header {
    pub(super) const SIZE: usize = 16;

    pub(super) fn encode(&self) -> [u8; Self::SIZE] {
        let (kind, error) = match self.carries {
            Carries::Bytes => (1, 0),
            Carries::Length => (2, 0),
            Carries::Error(kind) => {
                let known = ERROR_KINDS.iter().find(|(_, known)| *known == kind);
                (3, known.map_or(0, |(code, _)| *code))
            }
            Carries::Pong => (4, 0),
        };
        let mut frame = [0; Self::SIZE];
        frame[0] = kind;
        frame[2..4].copy_from_slice(&u16::to_le_bytes(error));
        frame[4..8].copy_from_slice(&self.length.to_le_bytes());
        frame[8..16].copy_from_slice(&self.number.to_le_bytes());
        frame
    }

    /// # Errors
    /// `InvalidData` for an unknown kind, or more or fewer bytes than an answer of that kind can carry.
    pub(super) fn decode(frame: &[u8; Self::SIZE]) -> io::Result<Self> {
        let code = u16::from_le_bytes([frame[2], frame[3]]);
        let (carries, most) = match frame[0] {
            1 => (Carries::Bytes, MAX_RANGE),
            2 => (Carries::Length, 8),
            3 => {
                let known = ERROR_KINDS.iter().find(|(known, _)| *known == code);
                (Carries::Error(known.map_or(ErrorKind::Other, |(_, kind)| *kind)), MAX_TEXT as u32)
            }
            4 => (Carries::Pong, 0),
            kind => return Err(broken(format!("an answer of unknown kind {kind}"))),
        };
        let length = u32_at(frame, 4);
        if length > most || (carries == Carries::Length && length != 8) {
            return Err(broken(format!("an answer of kind {} with {length} bytes", frame[0])));
        }
        Ok(Self { number: u64_at(frame, 8), carries, length })
    }
}

fn u32_at(frame: &[u8], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&frame[at..at + 4]);
    u32::from_le_bytes(bytes)
}

fn u64_at(frame: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&frame[at..at + 8]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn requests_come_back(number: u64, object: u32, offset: u64, length in 0..=MAX_RANGE, kind in 0..4) {
            let object = ObjectId(object);
            let range = AskedRange { object, offset, length };
            let ask = [Ask::Exact(range), Ask::UpTo(range), Ask::Length(object), Ask::Ping][kind as usize];
            let request = Request { number, ask };
            prop_assert_eq!(Request::decode(&request.encode()).unwrap(), request);
        }

        #[test]
        fn any_bytes_are_a_valid_frame_or_an_error(bytes: [u8; 32]) {
            if let Ok(request) = Request::decode(&bytes) {
                prop_assert_eq!(request.encode(), bytes);
            }
            let header: [u8; Header::SIZE] = bytes[..Header::SIZE].try_into().unwrap();
            if let Ok(header) = Header::decode(&header) {
                prop_assert!(header.length <= MAX_RANGE);
            }
        }
    }

    #[test]
    fn answers_come_back() {
        let kinds = ERROR_KINDS.map(|(_, kind)| (Carries::Error(kind), 0));
        let others =
            [(Carries::Bytes, MAX_RANGE), (Carries::Length, 8), (Carries::Pong, 0)].into_iter();
        for (carries, length) in kinds.into_iter().chain(others) {
            let header = Header { number: u64::MAX, carries, length };
            assert_eq!(Header::decode(&header.encode()).unwrap(), header);
        }
        let odd = Header { number: 1, carries: Carries::Error(ErrorKind::BrokenPipe), length: 3 };
        let read = Header::decode(&odd.encode()).unwrap();
        assert_eq!(read.carries, Carries::Error(ErrorKind::Other));
    }

    #[test]
    fn what_has_no_meaning_is_refused() {
        let range = AskedRange { object: ObjectId(1), offset: 2, length: 3 };
        let good = Request { number: 7, ask: Ask::Exact(range) }.encode();
        let ping = Request { number: 7, ask: Ask::Ping }.encode();
        for (name, frame, at, byte) in [
            ("an unknown kind", good, 0, 9),
            ("a set byte behind the kind", good, 1, 1),
            ("a set byte at the end", good, 31, 1),
            ("a range that is too long", good, 27, 1),
            ("a ping with an offset", ping, 16, 1),
        ] {
            let mut frame = frame;
            frame[at] = byte;
            assert_eq!(Request::decode(&frame).expect_err(name).kind(), ErrorKind::InvalidData);
        }
        let header = |carries, length| Header { number: 1, carries, length }.encode();
        for (name, frame) in [
            ("more bytes than may be asked for", header(Carries::Bytes, MAX_RANGE + 1)),
            ("a length of seven bytes", header(Carries::Length, 7)),
            ("an endless text", header(Carries::Error(ErrorKind::Other), MAX_TEXT as u32 + 1)),
            ("a pong with bytes", header(Carries::Pong, 1)),
        ] {
            assert_eq!(Header::decode(&frame).expect_err(name).kind(), ErrorKind::InvalidData);
        }
        assert!(check_greeting(*b"pgtread\x02").unwrap_err().to_string().contains("version 2"));
        assert!(check_greeting(*b"SSH-2.0-").unwrap_err().to_string().contains("does not greet"));
    }
}
