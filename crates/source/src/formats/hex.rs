//! Hexadecimal digits.

/// Lower-case hexadecimal digits of `bytes`.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads lower-case or upper-case hexadecimal digits.
pub(crate) fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        assert_eq!(unhex(&hex(&[0, 0xAB, 0xFF])), Some(vec![0, 0xAB, 0xFF]));
        assert_eq!(unhex("ABff"), Some(vec![0xAB, 0xFF]));
        for text in ["a", "0x", "é0", "+1"] {
            assert_eq!(unhex(text), None, "{text}");
        }
    }
}
