//! The alphabets of deflate (RFC 1951, 3.2.5).

#![expect(clippy::cast_possible_truncation, reason = "symbols are small numbers")]

/// Literals, the end of the block and lengths.
pub(super) const LITLENS: usize = 286;
/// Distances.
pub(super) const DISTANCES: usize = 30;
/// The symbol for the end of a block.
pub(super) const END: usize = 256;
/// The shortest and the longest match.
pub(super) const MIN_MATCH: usize = 3;
pub(super) const MAX_MATCH: usize = 258;

/// The shortest length of each length symbol, counted from [`END`] + 1.
pub(super) const LENGTH_BASE: [u16; 29] = [
    3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195,
    227, 258,
];
/// The number of extra bits of each length symbol.
pub(super) const LENGTH_EXTRA: [u8; 29] = [
    0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0,
];
/// The shortest distance of each distance symbol.
pub(super) const DISTANCE_BASE: [u16; 30] = [
    1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073,
    4097, 6145, 8193, 12289, 16385, 24577,
];

/// The number of extra bits of a distance symbol.
pub(super) const fn distance_extra(symbol: usize) -> u32 {
    (symbol as u32 / 2).saturating_sub(1)
}

/// The length symbol of each length, counted from [`END`] + 1.
static LENGTH_SYMBOL: [u8; 512] = length_symbols();

const fn length_symbols() -> [u8; 512] {
    let mut symbols = [0; 512];
    let mut symbol = 0;
    while symbol < 29 {
        let mut length = LENGTH_BASE[symbol] as usize;
        while length < 259 {
            symbols[length] = symbol as u8;
            length += 1;
        }
        symbol += 1;
    }
    symbols
}

/// The symbols of distances less one: below 256 by the distance, then in steps of 128.
static DISTANCE_SYMBOL: [u8; 512] = distance_symbols();

const fn distance_symbols() -> [u8; 512] {
    let mut symbols = [0; 512];
    let mut symbol = 0;
    while symbol < 30 {
        let base = DISTANCE_BASE[symbol] as usize - 1;
        let mut less_one = base;
        while less_one < 256 {
            symbols[less_one] = symbol as u8;
            less_one += 1;
        }
        let mut step = base.div_ceil(128);
        if step < 2 {
            step = 2;
        }
        while step < 256 && base + 1 > 256 {
            symbols[256 + step] = symbol as u8;
            step += 1;
        }
        symbol += 1;
    }
    symbols
}

/// The symbol of a length from 3 to 258, counted from [`END`] + 1.
#[inline(always)]
pub(super) fn length_symbol(length: u16) -> usize {
    LENGTH_SYMBOL[usize::from(length) & 511].into()
}

/// The symbol of a distance from 1 to 32768.
#[inline(always)]
pub(super) fn distance_symbol(distance: u16) -> usize {
    let less_one = distance.wrapping_sub(1);
    let index = if less_one < 256 {
        less_one
    } else {
        256 + (less_one >> 7)
    };
    DISTANCE_SYMBOL[usize::from(index) & 511].into()
}
