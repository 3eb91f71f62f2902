//! Huffman codes of limited length from the counts of their symbols.

#![expect(
    clippy::cast_possible_truncation,
    reason = "symbols and nodes are small numbers"
)]

/// The most symbols of an alphabet of deflate.
const MOST: usize = 288;

/// A code: the bits of each symbol, the first bit lowest, and their number, which is zero for symbols that do not occur.
#[derive(Clone, Copy)]
pub(super) struct Codes<const N: usize> {
    pub(super) bits: [u16; N],
    pub(super) lens: [u8; N],
}

impl<const N: usize> Codes<N> {
    /// The code for symbols that occur `counts` times, none longer than `limit`. It has two symbols at least, since
    /// decoders refuse incomplete codes.
    pub(super) fn new(counts: &[u32; N], limit: u8) -> Self {
        Self::of_lens(lens(counts, limit))
    }

    /// The canonical code of these lengths (RFC 1951, 3.2.2).
    pub(super) fn of_lens(lens: [u8; N]) -> Self {
        let mut of_len = [0_u16; 16];
        for len in lens {
            of_len[usize::from(len & 15)] += 1;
        }
        let mut next = [0_u16; 16];
        for len in 2..16 {
            next[len] = next[len - 1].wrapping_add(of_len[len - 1]) << 1;
        }
        let mut bits = [0; N];
        for (bits, len) in bits.iter_mut().zip(lens) {
            if len > 0 {
                let next = &mut next[usize::from(len & 15)];
                *bits = next.reverse_bits() >> (16 - len);
                *next = next.wrapping_add(1);
            }
        }
        Self { bits, lens }
    }

    /// The bits of a text with these counts.
    pub(super) fn cost(&self, counts: &[u32; N]) -> u64 {
        let costs = counts.iter().zip(self.lens);
        costs.map(|(&count, len)| u64::from(count) * u64::from(len)).sum()
    }
}

fn lens<const N: usize>(counts: &[u32; N], limit: u8) -> [u8; N] {
    // The count above, the symbol below: sorted by count, equal counts by symbol.
    let mut keys = [0_u64; MOST];
    let mut used = 0;
    for (symbol, &count) in counts.iter().enumerate() {
        if count > 0 {
            keys[used] = u64::from(count) << 16 | symbol as u64;
            used += 1;
        }
    }
    let mut symbol = 0;
    while used < 2 {
        if counts[symbol] == 0 {
            keys[used] = symbol as u64;
            used += 1;
        }
        symbol += 1;
    }
    let keys = &mut keys[..used];
    keys.sort_unstable();
    let mut of_depth = depths(keys);
    limit_depths(&mut of_depth, usize::from(limit));
    let mut lens = [0; N];
    let mut rarest_first = keys.iter();
    for len in (1..=limit).rev() {
        for key in rarest_first.by_ref().take(of_depth[usize::from(len)] as usize) {
            lens[(key & 0xffff) as usize] = len;
        }
    }
    lens
}

/// The number of leaves at each depth of the Huffman tree over `keys`, which are sorted. Depths beyond the last count as
/// the last.
fn depths(keys: &[u64]) -> [u32; 64] {
    let leaves = keys.len();
    // Inner nodes in order of their weights: first the weight, then the number of the parent, then the depth.
    let mut nodes = [0_u64; MOST];
    let (mut leaf, mut inner) = (0, 0);
    for node in 0..leaves - 1 {
        let mut weight = 0;
        for _ in 0..2 {
            if leaf < leaves && (inner >= node || keys[leaf] >> 16 <= nodes[inner]) {
                weight += keys[leaf] >> 16;
                leaf += 1;
            } else {
                weight += nodes[inner];
                nodes[inner] = node as u64;
                inner += 1;
            }
        }
        nodes[node] = weight;
    }
    let mut of_depth = [0_u32; 64];
    let root = leaves - 2;
    nodes[root] = 0;
    // The root is at depth 0 and has two children; each inner node takes one place of its depth and makes two below.
    let mut inner_at = [0_u32; 64];
    inner_at[0] = 1;
    for node in (0..root).rev() {
        let depth = (nodes[nodes[node] as usize] + 1).min(62);
        nodes[node] = depth;
        inner_at[depth as usize] += 1;
    }
    let mut places = 1_u32;
    for depth in 0..64 {
        let inner = inner_at[depth];
        of_depth[depth] = places.saturating_sub(inner);
        places = inner.saturating_mul(2);
    }
    of_depth
}

/// Moves leaves up to `limit`, and others down until the code fits.
fn limit_depths(of_depth: &mut [u32; 64], limit: usize) {
    let deeper: u32 = of_depth[limit + 1..].iter().sum();
    if deeper == 0 {
        return;
    }
    of_depth[limit] += deeper;
    let whole = 1_u64 << limit;
    let mut taken: u64 = (1..=limit)
        .map(|depth| u64::from(of_depth[depth]) << (limit - depth))
        .sum();
    while taken > whole {
        // A leaf of the deepest level becomes the sibling of one above, which moves down a level.
        let above = (1..limit).rev().find(|&depth| of_depth[depth] > 0).unwrap_or(1);
        of_depth[limit] -= 1;
        of_depth[above] -= 1;
        of_depth[above + 1] += 2;
        taken -= 1;
    }
}
