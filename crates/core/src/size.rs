//! Sizes as users write them: `1.5G`, `0x10000`, `512b`.
//!
//! All options and arguments read sizes by the same rules but have different error messages, so the error only has the
//! *reason*.

/// Why a text is no valid size or number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeError {
    /// The syntax is wrong.
    Malformed,
    /// The syntax is right, but the value is negative or does not fit 64 bits.
    OutOfRange,
}

/// Reads a size in bytes.
///
/// White space and `+` may stand in front. Decimal numbers may have a fraction and end in one of the units
/// `b` (1), `k`, `M`, `G`, `T`, `P`, `E` in either case, 1024 each; a fraction of a byte is dropped where there is a
/// unit and refused where there is none. Hexadecimal numbers (`0x`) are whole and have no unit. There are no
/// exponents: `1e` is an exbibyte.
///
/// # Errors
/// Wrong syntax; negative numbers, `-0` included; 16 EiB and more.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let (negative, digits) = sign(text);
    if let Some(hex) = strip_hex(digits) {
        // qemu-img refuses "-0x5" as malformed, not as out of range.
        if negative || hex.is_empty() {
            return Err(SizeError::Malformed);
        }
        return digits_to_u64(hex, 16);
    }
    let (whole, rest) = split_digits(digits);
    let (fraction, rest) = match rest.strip_prefix('.') {
        Some(rest) => {
            let (fraction, rest) = split_digits(rest);
            (Some(fraction), rest)
        }
        None => (None, rest),
    };
    if whole.is_empty() && fraction.is_none_or(str::is_empty) {
        return Err(SizeError::Malformed);
    }
    let unit = unit(rest).ok_or(SizeError::Malformed)?;
    let whole = if whole.is_empty() {
        Ok(0)
    } else {
        digits_to_u64(whole, 10)
    };
    let part = match fraction {
        None => 0,
        Some(_) if negative || whole.is_err() => return Err(SizeError::Malformed),
        Some(fraction) => fraction_of(fraction, unit).ok_or(SizeError::Malformed)?,
    };
    if negative {
        // In qemu-img only a negative number without a unit is out of range; "-1k" is malformed.
        let bare = rest.is_empty();
        return Err(if bare {
            SizeError::OutOfRange
        } else {
            SizeError::Malformed
        });
    }
    whole?
        .checked_mul(unit)
        .and_then(|bytes| bytes.checked_add(part))
        .ok_or(SizeError::OutOfRange)
}

/// Reads a whole number without a unit: decimal, hexadecimal (`0x`) or octal (`0`), signed.
///
/// The magnitude fits 64 bits; the caller decides what a negative number means.
///
/// # Errors
/// Wrong syntax; a magnitude of 2^64 and more.
pub fn parse_number(text: &str) -> Result<i128, SizeError> {
    let (negative, digits) = sign(text);
    let magnitude = if let Some(hex) = strip_hex(digits) {
        digits_to_u64(hex, 16)?
    } else if digits.len() > 1 && digits.starts_with('0') {
        digits_to_u64(digits, 8)?
    } else {
        digits_to_u64(digits, 10)?
    };
    let magnitude = i128::from(magnitude);
    Ok(if negative { -magnitude } else { magnitude })
}

/// A size for users: three significant digits and the binary unit, `1.5 MiB`.
///
/// A unit is used from 1000 of the smaller one on, so that four digits never appear: 1000 KiB is `0.977 MiB`.
/// Between 999.5 and 1000 the `%0.3g` of `qemu-img` prints `1e+03`, and so does this function.
pub fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    while unit + 1 < UNITS.len() && bytes >= 1000 << (10 * unit) {
        unit += 1;
    }
    let value = bytes as f64 / (1u64 << (10 * unit)) as f64;
    format!("{} {}", three_digits(value), UNITS[unit])
}

/// `value`, which is 0 or from 0.9 to 1000, as C's `%0.3g` prints it.
fn three_digits(value: f64) -> String {
    let decimals = match value {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    if text == "1000" {
        return "1e+03".to_owned();
    }
    if decimals == 0 {
        return text;
    }
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Whether there is a minus sign, and the text after white space and sign.
fn sign(text: &str) -> (bool, &str) {
    let text = text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    }
}

fn strip_hex(digits: &str) -> Option<&str> {
    digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X"))
}

fn split_digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

fn digits_to_u64(digits: &str, radix: u32) -> Result<u64, SizeError> {
    // `from_str_radix` alone would take another sign.
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return Err(SizeError::Malformed);
    }
    u64::from_str_radix(digits, radix).map_err(|_| SizeError::OutOfRange)
}

/// The bytes of the unit that `suffix` names; `None` if it is anything else.
fn unit(suffix: &str) -> Option<u64> {
    let mut chars = suffix.chars();
    let power = match chars.next().map(|c| c.to_ascii_lowercase()) {
        None | Some('b') => 0,
        Some('k') => 1,
        Some('m') => 2,
        Some('g') => 3,
        Some('t') => 4,
        Some('p') => 5,
        Some('e') => 6,
        Some(_) => return None,
    };
    chars.next().is_none().then_some(1 << (10 * power))
}

/// The whole bytes in `0.<digits>` units; `None` for a fraction of a single byte.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the product is from 0 to 2^60, and its fraction is meant to be dropped"
)]
fn fraction_of(digits: &str, unit: u64) -> Option<u64> {
    // Computed in floating point as in qemu-img, so that the last bits agree.
    let fraction: f64 = format!("0.{digits}0").parse().ok()?;
    if unit == 1 && fraction != 0.0 {
        return None;
    }
    Some((fraction * unit as f64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_units_and_fractions() {
        for (text, bytes) in [
            ("0", 0),
            (" 5", 5),
            ("+5", 5),
            ("010", 10),
            ("1b", 1),
            ("1B", 1),
            ("1.", 1),
            ("1.0b", 1),
            (".0", 0),
            ("1k", 1024),
            ("1.5K", 1536),
            ("0.1K", 102),
            (".5G", 1 << 29),
            ("1.E", 1 << 60),
            ("1e", 1 << 60),
            ("0.0000000001E", 115_292_150),
            ("1.999999999E", 2_305_843_008_060_772_480),
            ("7.99E", 9_211_842_821_808_707_328),
            ("1.99999999999999999999M", 2 << 20),
            ("0x10000", 65536),
            ("0X1E", 30),
            ("\t0x1b", 27),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text:?}");
        }
    }

    #[test]
    fn wrong_syntax_is_malformed() {
        for text in [
            "",
            ".",
            "+",
            "-",
            "-K",
            "M",
            "foo",
            "1Q",
            "1e3",
            "1.5",
            "1.5b",
            "0x",
            "0x1K",
            "0x1.8K",
            "0x1p3",
            "-0x5",
            "5 ",
            "1GB",
            "1GiB",
            "1..5",
            "1,5",
            "inf",
            "nan",
            "- 5",
            "+-5",
            "-1.5K",
            "-.5K",
            "-1Q",
            "-5M",
            "99999999999999999999.",
            "99999999999999999999Q",
            "1.5e1K",
            "é",
        ] {
            assert_eq!(parse_size(text), Err(SizeError::Malformed), "{text:?}");
        }
    }

    #[test]
    fn negative_and_huge_sizes_are_out_of_range() {
        for text in [
            "-1",
            "-0",
            "16E",
            "17E",
            "18446744073709551616",
            "0x10000000000000000",
            "15.99999999999999999E",
        ] {
            assert_eq!(parse_size(text), Err(SizeError::OutOfRange), "{text:?}");
        }
    }

    #[test]
    fn numbers_are_decimal_hexadecimal_or_octal() {
        for (text, number) in [
            ("16", Ok(16)),
            (" +0x10", Ok(16)),
            ("020", Ok(16)),
            ("-1", Ok(-1)),
            ("0", Ok(0)),
        ] {
            assert_eq!(parse_number(text), number, "{text:?}");
        }
        for text in ["", " ", "-", "- 1", "08", "0x", "0xg", "1k", "16 ", "1.0", "+-1"] {
            assert_eq!(parse_number(text), Err(SizeError::Malformed), "{text:?}");
        }
        assert_eq!(parse_number("-18446744073709551616"), Err(SizeError::OutOfRange));
    }

    #[test]
    fn human_sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1536, "1.5 KiB"),
            (10240, "10 KiB"),
            (200_704, "196 KiB"),
            (1_022_976, "999 KiB"),
            (1_023_488, "1e+03 KiB"),
            (1_023_999, "1e+03 KiB"),
            (1_024_000, "0.977 MiB"),
            (1_048_064, "1 MiB"),
            (1_054_208, "1.01 MiB"),
            (123_457_024, "118 MiB"),
            (8_000_000_000, "7.45 GiB"),
            (1 << 30, "1 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human_size(bytes), text);
        }
    }
}
