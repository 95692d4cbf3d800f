//! Sizes as people read them, everywhere the same.

/// Returns `bytes` with PostgreSQL's units, powers of 1024 as `pg_size_pretty()` has them: `812 bytes`, `77.1 MB`.
pub fn human_size(bytes: u64) -> String {
    if bytes == 1 {
        return "1 byte".into();
    }
    if bytes < 1024 {
        return format!("{bytes} bytes");
    }
    // Precise enough for one digit after the point.
    let mut value = bytes as f64 / 1024.0;
    for unit in ["kB", "MB", "GB", "TB", "PB"] {
        if value < 1023.95 {
            return format!("{value:.1} {unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.1} EB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_one_digit_after_the_point() {
        let cases = [
            (0, "0 bytes"),
            (1, "1 byte"),
            (1023, "1023 bytes"),
            (1024, "1.0 kB"),
            (80_740_352, "77.0 MB"),
            ((1 << 20) - 1, "1.0 MB"),
            (1 << 30, "1.0 GB"),
            (u64::MAX, "16.0 EB"),
        ];
        for (bytes, want) in cases {
            assert_eq!(human_size(bytes), want, "{bytes}");
        }
    }
}
