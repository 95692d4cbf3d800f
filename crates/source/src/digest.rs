//! Checksums over whole files, computed as their bytes come.

use sha1::{Digest as _, Sha1};
use sha2::{Sha224, Sha256, Sha384, Sha512};

use crate::map::Digest;

/// A checksum that is being computed.
#[derive(Clone)]
pub(crate) enum Hasher {
    Sha1(Sha1),
    Crc32c(u32),
    Sha224(Sha224),
    Sha256(Sha256),
    Sha384(Sha384),
    Sha512(Sha512),
}

impl Hasher {
    /// Returns a hasher of `digest`'s kind; none for a SHA-2 of a length there is not.
    pub(crate) fn like(digest: &Digest) -> Option<Self> {
        Some(match digest {
            Digest::Sha1(_) => Self::Sha1(Sha1::new()),
            Digest::Crc32c(_) => Self::Crc32c(0),
            Digest::Sha2(bytes) => match bytes.len() {
                28 => Self::Sha224(Sha224::new()),
                32 => Self::Sha256(Sha256::new()),
                48 => Self::Sha384(Sha384::new()),
                64 => Self::Sha512(Sha512::new()),
                _ => return None,
            },
        })
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha1(hasher) => hasher.update(bytes),
            Self::Crc32c(crc) => *crc = crc32c::crc32c_append(*crc, bytes),
            Self::Sha224(hasher) => hasher.update(bytes),
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha384(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    pub(crate) fn finish(self) -> Digest {
        match self {
            Self::Sha1(hasher) => Digest::Sha1(hasher.finalize().into()),
            Self::Crc32c(crc) => Digest::Crc32c(crc),
            Self::Sha224(hasher) => Digest::Sha2(hasher.finalize().to_vec()),
            Self::Sha256(hasher) => Digest::Sha2(hasher.finalize().to_vec()),
            Self::Sha384(hasher) => Digest::Sha2(hasher.finalize().to_vec()),
            Self::Sha512(hasher) => Digest::Sha2(hasher.finalize().to_vec()),
        }
    }
}

/// Returns a digest as people write it: its name and hex.
pub(crate) fn shown(digest: &Digest) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    match digest {
        Digest::Sha1(bytes) => format!("SHA1 {}", hex(bytes)),
        Digest::Crc32c(crc) => format!("CRC32C {crc:08x}"),
        Digest::Sha2(bytes) => format!("SHA{} {}", bytes.len() * 8, hex(bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_each_kind() {
        let cases = [
            (Digest::Sha1([0; 20]), "SHA1 a9993e364706816aba3e25717850c26c9cd0d89d"),
            (Digest::Crc32c(0), "CRC32C 364b3fb7"),
            (
                Digest::Sha2(vec![0; 28]),
                "SHA224 23097d223405d8228642a477bda255b32aadbce4bda0b3f7e36c9da7",
            ),
            (
                Digest::Sha2(vec![0; 32]),
                "SHA256 ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            ),
        ];
        for (kind, want) in cases {
            let mut hasher = Hasher::like(&kind).unwrap();
            hasher.update(b"a");
            hasher.update(b"bc");
            assert_eq!(shown(&hasher.finish()), want);
        }
        for length in [48, 64] {
            let found = Hasher::like(&Digest::Sha2(vec![0; length])).unwrap().finish();
            assert!(matches!(found, Digest::Sha2(bytes) if bytes.len() == length));
        }
        assert!(Hasher::like(&Digest::Sha2(vec![0; 7])).is_none());
    }
}
