//! Numbers in messages.

/// Formats a number like C's `%#x`: 0 has no prefix.
pub(super) fn hex(number: u64) -> String {
    if number == 0 {
        "0".to_owned()
    } else {
        format!("{number:#x}")
    }
}
