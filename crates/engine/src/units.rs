//! Numbers as people write them.

/// A number of bytes, alone or with a letter for 1024 of them and so on: `4096`, `512m`, `10G`, `1GiB`, `2gb`.
///
/// # Errors
///
/// Why it is none, to follow the text itself.
pub fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = text.get(digits.len()..).unwrap_or_default();
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(format!("unknown unit {unit:?}: use K, M or G")),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "not a size: write a number with K, M or G, such as 512M".to_owned())?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "too large".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_powers_of_1024() {
        for (text, size) in [
            ("4096", 4096),
            ("7b", 7),
            ("3k", 3 << 10),
            ("512MiB", 512 << 20),
            ("512M", 512 << 20),
            ("10gb", 10 << 30),
            ("8G", 8 << 30),
            ("1t", 1 << 40),
        ] {
            assert_eq!(bytes(text), Ok(size), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_says_why() {
        for (text, why) in [
            ("", "not a size"),
            ("M", "not a size"),
            ("-1", "not a size"),
            ("1.5g", "not a size"),
            ("5X", "unknown unit"),
            ("1 m", "unknown unit"),
            ("1ib", "unknown unit"),
            ("99999999999999G", "too large"),
        ] {
            let said = bytes(text).unwrap_err();
            assert!(said.contains(why), "{text}: {said}");
        }
    }
}
