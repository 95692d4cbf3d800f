//! The few fields of `pg_control` that a backup cannot be opened without.
//!
//! Everything else in it, and its checksum, belongs to `pgthaw-postgres`. The head has the same layout in every
//! version; the sizes follow a constant, 1234567.0 as a double, whose own place moves with the version (PostgreSQL
//! source, `pg_control.h`, `FLOATFORMAT_VALUE`), so they are found by it.

/// Path of `pg_control` in a mounted cluster.
pub(crate) const PATH: &str = "data/global/pg_control";
/// Longest `pg_control` that is read, in bytes; real ones have 8192.
pub(crate) const LIMIT: u64 = 64 * 1024;
/// Bytes of the file that hold data (`PG_CONTROL_MAX_SAFE_SIZE`).
const USED: usize = 512;

/// Fields of `pg_control`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Control {
    /// `system_identifier`.
    pub system_identifier: u64,
    /// `catalog_version_no`.
    pub catalog_version: u32,
    /// Redo location of the last checkpoint.
    pub redo_lsn: u64,
    /// Timeline of the last checkpoint.
    pub timeline: u32,
    /// Bytes of a page.
    pub block_size: u64,
    /// Bytes of a full relation segment.
    pub relation_segment_size: u64,
    /// Bytes of a WAL segment.
    pub wal_segment_size: u64,
    /// Whether pages carry checksums, all of them: 1 is the only version there is, other values mean that
    /// checksums are just being switched on or off.
    pub page_checksums: bool,
}

/// Reads the fields.
///
/// # Errors
/// What cannot be right in it.
pub(crate) fn parse(bytes: &[u8]) -> Result<Control, String> {
    let used = bytes.get(..USED).ok_or("it is shorter than 512 bytes")?;
    let u32_at =
        |offset: usize| Some(u32::from_le_bytes(used.get(offset..offset + 4)?.try_into().ok()?));
    let u64_at =
        |offset: usize| Some(u64::from_le_bytes(used.get(offset..offset + 8)?.try_into().ok()?));
    let constant = 1_234_567.0_f64.to_le_bytes();
    let sizes =
        (128..USED - 56).step_by(8).find(|at| used[*at..*at + 8] == constant).map(|at| at + 8);
    let fields = sizes.and_then(|sizes| {
        let block_size = u64::from(u32_at(sizes)?);
        Some(Control {
            system_identifier: u64_at(0)?,
            catalog_version: u32_at(12)?,
            redo_lsn: u64_at(40)?,
            timeline: u32_at(48)?,
            block_size,
            relation_segment_size: block_size * u64::from(u32_at(sizes + 4)?),
            wal_segment_size: u64::from(u32_at(sizes + 12)?),
            page_checksums: u32_at(sizes + 36)? == 1,
        })
    });
    let control = fields.ok_or("it has not the layout of this machine's PostgreSQL versions")?;
    if !control.block_size.is_power_of_two() || !(1024..=32768).contains(&control.block_size) {
        return Err(format!("its block size {} cannot be", control.block_size));
    }
    if !control.wal_segment_size.is_power_of_two()
        || !(1 << 20..=1 << 30).contains(&control.wal_segment_size)
    {
        return Err(format!("its WAL segment size {} cannot be", control.wal_segment_size));
    }
    if control.relation_segment_size == 0 || control.timeline == 0 || control.system_identifier == 0
    {
        return Err("its fields are zero".into());
    }
    Ok(control)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A `pg_control` of version 1300 (PostgreSQL 13 to 17) with only the fields that are read here.
    pub(crate) fn sample(page_checksums: bool) -> Vec<u8> {
        let mut bytes = vec![0; 8192];
        bytes[0..8].copy_from_slice(&7_711_139_811_189_162_683_u64.to_le_bytes());
        bytes[8..12].copy_from_slice(&1300_u32.to_le_bytes());
        bytes[12..16].copy_from_slice(&202_209_061_u32.to_le_bytes());
        bytes[40..48].copy_from_slice(&0x200_0028_u64.to_le_bytes());
        bytes[48..52].copy_from_slice(&1_u32.to_le_bytes());
        bytes[208..216].copy_from_slice(&1_234_567.0_f64.to_le_bytes());
        for (index, value) in
            [8192_u32, 131_072, 8192, 16 << 20, 64, 32, 1996, 2048, 1].into_iter().enumerate()
        {
            bytes[216 + 4 * index..220 + 4 * index].copy_from_slice(&value.to_le_bytes());
        }
        bytes[252] = u8::from(page_checksums);
        bytes
    }

    #[test]
    fn reads_the_fields() {
        let control = parse(&sample(true)).unwrap();
        assert_eq!(control.relation_segment_size, 1 << 30);
        assert_eq!(control.wal_segment_size, 16 << 20);
        assert_eq!((control.timeline, control.redo_lsn), (1, 0x200_0028));
        assert!(control.page_checksums && !parse(&sample(false)).unwrap().page_checksums);
    }

    #[test]
    fn refuses_what_cannot_be() {
        assert!(parse(&[]).is_err());
        assert!(parse(&[0; 8192]).is_err());
        let mut odd = sample(true);
        odd[216] = 1;
        assert!(parse(&odd).unwrap_err().contains("block size"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_told_not_trusted(mut bytes in proptest::collection::vec(any::<u8>(), 512..600), at in 16_usize..64) {
            bytes[at * 8 % 504..at * 8 % 504 + 8].copy_from_slice(&1_234_567.0_f64.to_le_bytes());
            let _ = parse(&bytes);
        }
    }
}
