//! Heap pages and their rows, read without a server.
//!
//! [`rows`] walks a page's line pointers, [`Row::values`] takes a row apart by its table's columns.
//! Visibility is the caller's: a row's header is given as it lies there.
//!
//! Sources: PostgreSQL's `bufpage.h` (layout version 4), `itemid.h`, `htup_details.h`, `tupmacs.h`,
//! `varatt.h`, on little-endian machines.

use crate::bytes::{u16_at, u32_at};

/// Why a page cannot be read. Before recovery pages may be torn, so this need not be damage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// Shorter than a page header, or not as long as the header says.
    #[error("the page has {0} bytes, other than its header says")]
    Length(usize),
    /// A header that PostgreSQL 8.3 and later do not write.
    #[error("the page's header is not one of a heap page")]
    Header,
    /// A line pointer that leads out of the page.
    #[error("line pointer {0} leads out of the page")]
    LinePointer(usize),
    /// A row whose header or columns lead out of the row.
    #[error("the row of line pointer {0} is cut short")]
    Row(usize),
}

/// Returns the page size in a heap page's header; `None` if that is no header of a heap page.
pub(crate) fn page_size(page: &[u8]) -> Option<usize> {
    let word = u16_at(page, 18)?;
    let size = usize::from(word & 0xFF00);
    (word & 0x00FF == 4 && size.is_power_of_two() && size >= 1024).then_some(size)
}

/// A row as it lies in its page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row<'a> {
    /// The line pointer's number, from 1, for messages.
    pub number: usize,
    /// The transaction that inserted it.
    pub xmin: u32,
    /// The transaction or multixact that deleted or locked it; 0 for none.
    pub xmax: u32,
    /// `t_infomask`.
    pub infomask: u16,
    /// `t_infomask2`.
    pub infomask2: u16,
    nulls: Option<&'a [u8]>,
    data: &'a [u8],
}

/// A column's type, as far as its place in a row goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Column {
    /// `oid`, `int4`, `xid`: 4 bytes, aligned to 4.
    Word,
    /// `bool`, `char`: one byte.
    Byte,
    /// `name`: 64 bytes, filled with zeros.
    Name,
    /// `text`: of variable length.
    Text,
}

/// A column's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// NULL.
    Null,
    /// A [`Column::Word`].
    Word(u32),
    /// A [`Column::Byte`].
    Byte(u8),
    /// A [`Column::Name`] or [`Column::Text`]. Bytes that are no UTF-8 are replaced.
    Text(String),
    /// A value that lies elsewhere or is compressed.
    Unknown,
}

/// Returns the rows of a page that have storage, in the order of their line pointers. A page of zeros has none.
///
/// # Errors
/// [`PageError`] if it is no heap page, or a line pointer leads out of it.
pub(crate) fn rows(page: &[u8]) -> Result<Vec<Row<'_>>, PageError> {
    const HEADER: usize = 24;
    let length = || PageError::Length(page.len());
    let field = |offset| u16_at(page, offset).map(usize::from).ok_or_else(length);
    let (lower, upper, special) = (field(12)?, field(14)?, field(16)?);
    if upper == 0 && page.iter().all(|byte| *byte == 0) {
        return Ok(Vec::new()); // allocated, never used
    }
    match page_size(page) {
        Some(size) if size == page.len() => {}
        Some(_) => return Err(length()),
        None => return Err(PageError::Header),
    }
    if lower < HEADER || lower > upper || upper > special || special > page.len() {
        return Err(PageError::Header);
    }
    let mut found = Vec::new();
    for (index, item) in page[HEADER..lower].chunks_exact(4).enumerate() {
        let item = u32_at(item, 0).unwrap_or_default();
        let (offset, flags, length) =
            ((item & 0x7FFF) as usize, item >> 15 & 3, (item >> 17) as usize);
        if flags != 1 {
            continue; // unused, redirected or dead
        }
        let number = index + 1;
        let bytes = page
            .get(offset..offset + length)
            .filter(|_| offset >= upper)
            .ok_or(PageError::LinePointer(number))?;
        found.push(row(number, bytes).ok_or(PageError::Row(number))?);
    }
    Ok(found)
}

fn row(number: usize, bytes: &[u8]) -> Option<Row<'_>> {
    const HAS_NULLS: u16 = 0x0001;
    let (infomask2, infomask) = (u16_at(bytes, 18)?, u16_at(bytes, 20)?);
    let data_offset = usize::from(*bytes.get(22)?);
    let columns = usize::from(infomask2 & 0x07FF);
    let nulls = match infomask & HAS_NULLS {
        0 => None,
        _ => Some(bytes.get(23..23 + columns.div_ceil(8))?),
    };
    let header_end = 23 + nulls.map_or(0, <[u8]>::len);
    let data = bytes.get(data_offset..).filter(|_| data_offset >= header_end)?;
    Some(Row {
        number,
        xmin: u32_at(bytes, 0)?,
        xmax: u32_at(bytes, 4)?,
        infomask,
        infomask2,
        nulls,
        data,
    })
}

impl Row<'_> {
    /// Takes the row apart. Columns that the row does not have are [`Value::Null`], as in PostgreSQL.
    ///
    /// # Errors
    /// [`PageError::Row`] if a column leads out of the row.
    pub(crate) fn values(&self, columns: &[Column]) -> Result<Vec<Value>, PageError> {
        let have = usize::from(self.infomask2 & 0x07FF);
        let mut cursor = Cursor { data: self.data, at: 0, lost: false };
        let mut values = Vec::with_capacity(columns.len());
        for (index, column) in columns.iter().enumerate() {
            let null = self.nulls.is_some_and(|bits| {
                bits.get(index / 8).is_none_or(|byte| byte >> (index % 8) & 1 == 0)
            });
            let value = match index >= have || null {
                true => Some(Value::Null),
                false => cursor.take(*column),
            };
            values.push(value.ok_or(PageError::Row(self.number))?);
        }
        Ok(values)
    }
}

/// Walks over a row's data.
struct Cursor<'a> {
    data: &'a [u8],
    at: usize,
    /// A value of unknown length was met; nothing after it can be found.
    lost: bool,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, column: Column) -> Option<Value> {
        if self.lost {
            return Some(Value::Unknown);
        }
        Some(match column {
            Column::Word => {
                self.at = self.at.next_multiple_of(4);
                Value::Word(u32_at(self.bytes(4)?, 0)?)
            }
            Column::Byte => Value::Byte(self.bytes(1)?[0]),
            Column::Name => {
                let name = self.bytes(64)?;
                let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
                Value::Text(String::from_utf8_lossy(&name[..end]).into_owned())
            }
            Column::Text => self.text()?,
        })
    }

    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let bytes = self.data.get(self.at..self.at.checked_add(count)?)?;
        self.at += count;
        Some(bytes)
    }

    fn text(&mut self) -> Option<Value> {
        const ON_DISK: u8 = 18; // VARTAG_ONDISK
        let first = *self.data.get(self.at)?;
        match first {
            1 => match self.bytes(2)?[1] {
                ON_DISK => {
                    self.bytes(16)?; // varatt_external
                }
                _ => self.lost = true,
            },
            short if short & 1 == 1 => {
                let bytes = self.bytes(usize::from(short >> 1))?;
                return Some(Value::Text(String::from_utf8_lossy(bytes.get(1..)?).into_owned()));
            }
            _ => {
                self.at = self.at.next_multiple_of(4); // only padding begins with a zero byte
                let header = u32_at(self.data, self.at)?;
                let bytes = self.bytes((header >> 2) as usize)?.get(4..)?;
                if header & 3 == 0 {
                    return Some(Value::Text(String::from_utf8_lossy(bytes).into_owned()));
                }
            }
        }
        Some(Value::Unknown)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Returns a page of 8192 bytes with these rows, each a header's fields and the bytes from `t_bits` on.
    pub(crate) fn page(rows: &[Vec<u8>]) -> Vec<u8> {
        let mut page = vec![0; 8192];
        let (mut upper, lower) = (8192, 24 + 4 * rows.len());
        for (index, row) in rows.iter().enumerate() {
            upper = (upper - row.len()) & !7;
            page[upper..upper + row.len()].copy_from_slice(row);
            let item = upper as u32 | 1 << 15 | (row.len() as u32) << 17;
            page[24 + 4 * index..28 + 4 * index].copy_from_slice(&item.to_le_bytes());
        }
        for (offset, value) in [(12, lower as u16), (14, upper as u16), (16, 8192), (18, 8192 | 4)]
        {
            page[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
        }
        page
    }

    /// Returns a row's bytes; `nulls` is the bitmap, empty for none.
    pub(crate) fn row_bytes(
        xmin: u32,
        xmax: u32,
        infomask: u16,
        infomask2: u16,
        nulls: &[u8],
        data: &[u8],
    ) -> Vec<u8> {
        let data_offset = (23 + nulls.len()).next_multiple_of(8);
        let mut bytes = vec![0; data_offset];
        bytes[0..4].copy_from_slice(&xmin.to_le_bytes());
        bytes[4..8].copy_from_slice(&xmax.to_le_bytes());
        bytes[18..20].copy_from_slice(&infomask2.to_le_bytes());
        bytes[20..22].copy_from_slice(&(infomask | u16::from(!nulls.is_empty())).to_le_bytes());
        bytes[22] = data_offset as u8;
        bytes[23..23 + nulls.len()].copy_from_slice(nulls);
        bytes.extend_from_slice(data);
        bytes
    }

    #[test]
    fn takes_texts_of_every_form() {
        let long = |text: &str, flag: u32| {
            [&((text.len() as u32 + 4) << 2 | flag).to_le_bytes(), text.as_bytes()].concat()
        };
        let cases = [
            ("a short one", b"\x0babcd".to_vec(), Value::Text("abcd".into())),
            ("an empty one", b"\x03".to_vec(), Value::Text(String::new())),
            ("one with a long header", long("abcd", 0), Value::Text("abcd".into())),
            ("a compressed one", long("abcd", 2), Value::Unknown),
            ("one that lies elsewhere", [&[1, 18][..], &[0; 16]].concat(), Value::Unknown),
        ];
        for (name, mut data, want) in cases {
            data.extend_from_slice(b"\x05x");
            let page = page(&[row_bytes(3, 0, 0, 2, &[], &data)]);
            let row = rows(&page).unwrap()[0];
            assert_eq!(
                row.values(&[Column::Text, Column::Text]),
                Ok(vec![want, Value::Text("x".into())]),
                "{name}"
            );
        }
        let page = page(&[row_bytes(3, 0, 0, 2, &[], &[1, 99, 0, 0])]);
        assert_eq!(
            rows(&page).unwrap()[0].values(&[Column::Text, Column::Word]),
            Ok(vec![Value::Unknown, Value::Unknown])
        );
    }

    #[test]
    fn aligns_and_knows_nulls() {
        let data =
            [&7_u32.to_le_bytes()[..], b"t", &[0; 3], &9_u32.to_le_bytes(), b"\x05x"].concat();
        let page = page(&[row_bytes(3, 0, 0, 5, &[0b1_0111], &data)]);
        let row = rows(&page).unwrap()[0];
        let columns =
            [Column::Word, Column::Byte, Column::Word, Column::Text, Column::Text, Column::Word];
        let want = [
            Value::Word(7),
            Value::Byte(b't'),
            Value::Word(9),
            Value::Null,
            Value::Text("x".into()),
            Value::Null,
        ];
        assert_eq!(row.values(&columns).unwrap(), want);
    }

    #[test]
    fn refuses_what_is_no_heap_page() {
        let good = page(&[row_bytes(3, 0, 0, 1, &[], &[1, 0, 0, 0])]);
        let change = |offset: usize, bytes: &[u8]| {
            let mut page = good.clone();
            page[offset..offset + bytes.len()].copy_from_slice(bytes);
            page
        };
        assert_eq!(rows(&vec![0; 8192]).unwrap().len(), 0, "a page never used");
        let cases = [
            ("empty", vec![], PageError::Length(0)),
            ("cut", good[..4096].to_vec(), PageError::Length(4096)),
            ("other layout", change(18, &[5]), PageError::Header),
            ("line pointers behind the rows", change(12, &[0xFF, 0x7F]), PageError::Header),
            (
                "line pointer out of the page",
                change(24, &(8190_u32 | 1 << 15 | 40 << 17).to_le_bytes()),
                PageError::LinePointer(1),
            ),
            (
                "row shorter than its header",
                change(24, &(8160_u32 | 1 << 15 | 10 << 17).to_le_bytes()),
                PageError::Row(1),
            ),
        ];
        for (name, page, want) in cases {
            assert_eq!(rows(&page).unwrap_err(), want, "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(noise in proptest::collection::vec((24_usize..8192, any::<u8>()), 0..200), data in proptest::collection::vec(any::<u8>(), 0..100), columns: u16) {
            let mut page = page(&[row_bytes(3, 0, columns & 1, columns, &[], &data), row_bytes(3, 0, 1, columns, &[0xA5; 4], &data)]);
            let all = [Column::Word, Column::Text, Column::Byte, Column::Text, Column::Name, Column::Text];
            for (offset, byte) in noise {
                if let Ok(found) = rows(&page) {
                    for row in found {
                        let _ = row.values(&all);
                    }
                }
                page[offset] = byte;
            }
        }
    }
}
