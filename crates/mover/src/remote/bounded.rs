//! Lists in messages of the other mover, decoded within bounds.
//!
//! A list's elements may take a byte each on the connection and fifty in memory: the bound on a message's bytes is none on what it
//! becomes.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

/// Most elements of a list: more files than a database has relations.
pub(super) const LIST_MAX: usize = 1_200_000;
/// Elements that are allocated before they have arrived.
const AT_ONCE: usize = 4096;

/// Decodes a list of at most [`LIST_MAX`] elements.
pub(super) fn list<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    deserializer.deserialize_seq(List(PhantomData))
}

/// As [`list`], where there may be none.
pub(super) fn optional_list<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<Vec<T>>, D::Error> {
    Ok(Option::<Bounded<T>>::deserialize(deserializer)?.map(|list| list.0))
}

struct Bounded<T>(Vec<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Bounded<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        list(deserializer).map(Self)
    }
}

struct List<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for List<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {LIST_MAX} elements")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let announced = list.size_hint().unwrap_or(0);
        if announced > LIST_MAX {
            return Err(A::Error::invalid_length(announced, &self));
        }
        let mut elements = Vec::with_capacity(announced.min(AT_ONCE));
        while let Some(element) = list.next_element()? {
            if elements.len() == LIST_MAX {
                return Err(A::Error::invalid_length(LIST_MAX + 1, &self));
            }
            elements.push(element);
        }
        Ok(elements)
    }
}
