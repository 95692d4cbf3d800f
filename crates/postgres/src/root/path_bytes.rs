//! Paths and other strings of the system as bytes: what travels to the helper need not be UTF-8.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub fn serialize<S: Serializer>(path: impl AsRef<OsStr>, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_bytes(path.as_ref().as_bytes())
}

pub fn deserialize<'de, T: From<OsString>, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
    Ok(OsString::from_vec(Vec::deserialize(from)?).into())
}

/// Lists of them.
pub mod list {
    use super::*;

    pub fn serialize<S: Serializer>(list: &[OsString], to: S) -> Result<S::Ok, S::Error> {
        let bytes: Vec<&[u8]> = list.iter().map(|item| item.as_bytes()).collect();
        bytes.serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<OsString>, D::Error> {
        let bytes = Vec::<Vec<u8>>::deserialize(from)?;
        Ok(bytes.into_iter().map(OsString::from_vec).collect())
    }
}

/// Lists of pairs of them.
pub mod pairs {
    use super::*;

    pub fn serialize<S: Serializer>(
        list: &[(OsString, OsString)],
        to: S,
    ) -> Result<S::Ok, S::Error> {
        let bytes: Vec<(&[u8], &[u8])> =
            list.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())).collect();
        bytes.serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Vec<(OsString, OsString)>, D::Error> {
        let bytes = Vec::<(Vec<u8>, Vec<u8>)>::deserialize(from)?;
        let owned = |(name, value)| (OsString::from_vec(name), OsString::from_vec(value));
        Ok(bytes.into_iter().map(owned).collect())
    }
}
