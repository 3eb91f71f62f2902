//! Blocks: where one ends, and how it is written.

#![expect(
    clippy::cast_possible_truncation,
    reason = "lengths, distances, symbols and parts of a block fit"
)]

use std::ops::Range;

use super::bits::BitWriter;
use super::huffman::Codes;
use super::matches::Match;
use super::symbols::{
    DISTANCE_BASE, DISTANCES, END, LENGTH_BASE, LENGTH_EXTRA, LITLENS, MAX_MATCH, MIN_MATCH, distance_extra,
    distance_symbol, length_symbol,
};

/// The most bits of a literal or a length: one less than RFC 1951 allows, so that four literals fit between two flushes.
const MAX_LITLEN: u8 = 14;

/// Some literals, and a match behind them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sequence {
    literals: u32,
    /// Zero for none.
    length: u16,
    distance: u16,
}

impl Sequence {
    #[inline(always)]
    pub(super) fn new(literals: usize, found: Match) -> Self {
        Self {
            literals: literals as u32,
            length: found.length as u16,
            distance: found.distance as u16,
        }
    }
}

/// How often each symbol occurs.
#[derive(Clone)]
struct Counts {
    litlens: [u32; LITLENS],
    distances: [u32; DISTANCES],
}

impl Counts {
    const fn new() -> Self {
        Self {
            litlens: [0; LITLENS],
            distances: [0; DISTANCES],
        }
    }

    fn add(&mut self, other: &Self) {
        for (count, more) in self.litlens.iter_mut().zip(&other.litlens) {
            *count += more;
        }
        for (count, more) in self.distances.iter_mut().zip(&other.distances) {
            *count += more;
        }
    }

    /// An estimate of the bits of a block with these counts, without extra bits, which are the same in any block.
    fn cost(&self) -> f32 {
        entropy(&self.litlens) + entropy(&self.distances) + BLOCK_COST
    }
}

/// An estimate of the bits that the code tables take for each symbol that occurs.
const TABLE_COST: f32 = 3.0;
/// The same of a block without symbols.
const BLOCK_COST: f32 = 60.0;

fn entropy(counts: &[u32]) -> f32 {
    let mut total = 0;
    let mut sum = 0.0;
    for &count in counts {
        if count > 0 {
            total += count;
            sum += count as f32 * log2(count) - TABLE_COST;
        }
    }
    total as f32 * log2(total.max(1)) - sum
}

/// The binary logarithm, to about one percent of one.
#[inline(always)]
fn log2(value: u32) -> f32 {
    // The exponent, and a parabola over the mantissa.
    let bits = (value as f32).to_bits();
    let exponent = (bits >> 23) as i32 - 127;
    let mantissa = f32::from_bits((bits & 0x7f_ffff) | 0x3f80_0000);
    exponent as f32 + (-0.344_845 * mantissa + 2.024_658) * mantissa - 1.674_877
}

/// The order in which the lengths of the code for code lengths are written.
const LENS_ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

/// The code tables in front of a dynamic block.
struct Header {
    litlens: usize,
    distances: usize,
    lens: usize,
    /// Symbols of the code for lengths, each with its extra bits and their number.
    items: Vec<(u8, u8, u8)>,
    codes: Codes<19>,
}

impl Header {
    fn new(litlens: &[u8; LITLENS], distances: &[u8; DISTANCES]) -> Self {
        let used = |lens: &[u8], least: usize| {
            lens.iter()
                .rposition(|&len| len > 0)
                .map_or(least, |last| least.max(last + 1))
        };
        let (litlen_count, distance_count) = (used(litlens, 257), used(distances, 1));
        let mut all = [0; LITLENS + DISTANCES];
        all[..litlen_count].copy_from_slice(&litlens[..litlen_count]);
        all[litlen_count..litlen_count + distance_count].copy_from_slice(&distances[..distance_count]);
        let mut rest = &all[..litlen_count + distance_count];
        let mut items = Vec::with_capacity(rest.len());
        let mut counts = [0; 19];
        while let Some(&len) = rest.first() {
            let run = rest.iter().take_while(|&&other| other == len).count();
            let (item, taken) = match (len, run) {
                (0, 11..) => ((18, run.min(138) as u8 - 11, 7), run.min(138)),
                (0, 3..) => ((17, run as u8 - 3, 3), run),
                (_, 4..) if len > 0 => {
                    items.push((len, 0, 0));
                    counts[usize::from(len)] += 1;
                    let more = (run - 1).min(6);
                    ((16, more as u8 - 3, 2), more + 1)
                }
                _ => ((len, 0, 0), 1),
            };
            items.push(item);
            counts[usize::from(item.0)] += 1;
            rest = &rest[taken..];
        }
        let codes = Codes::new(&counts, 7);
        let lens = LENS_ORDER
            .iter()
            .rposition(|&symbol| codes.lens[symbol] > 0)
            .map_or(4, |last| 4.max(last + 1));
        Self {
            litlens: litlen_count,
            distances: distance_count,
            lens,
            items,
            codes,
        }
    }

    fn cost(&self) -> u64 {
        let items = self.items.iter();
        let items: u64 = items
            .map(|&(symbol, _, extra)| u64::from(self.codes.lens[usize::from(symbol)]) + u64::from(extra))
            .sum();
        14 + 3 * self.lens as u64 + items
    }

    fn write(&self, out: &mut BitWriter<'_>) {
        out.add(self.litlens as u32 - 257, 5);
        out.add(self.distances as u32 - 1, 5);
        out.add(self.lens as u32 - 4, 4);
        out.flush();
        for symbol in &LENS_ORDER[..self.lens] {
            out.add(self.codes.lens[*symbol].into(), 3);
            out.flush();
        }
        for &(symbol, extra, extra_len) in &self.items {
            let symbol = usize::from(symbol);
            let len = u32::from(self.codes.lens[symbol]);
            out.add(
                u32::from(self.codes.bits[symbol]) | u32::from(extra) << len,
                len + u32::from(extra_len),
            );
            out.flush();
        }
    }
}

/// The codes of one block.
struct BlockCodes {
    litlens: Codes<LITLENS>,
    distances: Codes<DISTANCES>,
}

impl BlockCodes {
    /// Those of RFC 1951, 3.2.6.
    fn fixed() -> Self {
        let mut lens = [8; 288];
        lens[144..256].fill(9);
        lens[256..280].fill(7);
        // The two symbols that do not occur take part in the code.
        let all = Codes::<288>::of_lens(lens);
        let mut litlens = Codes {
            bits: [0; LITLENS],
            lens: [0; LITLENS],
        };
        litlens.bits.copy_from_slice(&all.bits[..LITLENS]);
        litlens.lens.copy_from_slice(&all.lens[..LITLENS]);
        Self {
            litlens,
            distances: Codes::of_lens([5; DISTANCES]),
        }
    }

    fn cost(&self, counts: &Counts) -> u64 {
        self.litlens.cost(&counts.litlens) + self.distances.cost(&counts.distances)
    }
}

/// One or more chunks that share their codes.
#[derive(Clone)]
pub(super) struct Block {
    bytes: Range<usize>,
    sequences: Range<usize>,
    counts: Counts,
    /// See [`Counts::cost`].
    cost: f32,
}

impl Default for Block {
    fn default() -> Self {
        Self::new(0..0, 0..0)
    }
}

impl Block {
    pub(super) fn new(bytes: Range<usize>, sequences: Range<usize>) -> Self {
        Self {
            bytes,
            sequences,
            counts: Counts::new(),
            cost: 0.0,
        }
    }

    /// Counts the symbols, and returns the number of bytes in matches.
    pub(super) fn count(&mut self, bytes: &[u8], sequences: &[Sequence]) -> usize {
        let mut rest = &bytes[self.bytes.clone()];
        let counts = &mut self.counts;
        let mut matched = 0_usize;
        for sequence in &sequences[self.sequences.clone()] {
            let (literals, behind) = rest.split_at(sequence.literals as usize);
            rest = &behind[usize::from(sequence.length)..];
            for &byte in literals {
                let count = &mut counts.litlens[usize::from(byte)];
                *count = count.wrapping_add(1);
            }
            if sequence.length > 0 {
                matched = matched.wrapping_add(sequence.length.into());
                counts.litlens[END + 1 + length_symbol(sequence.length)] += 1;
                counts.distances[distance_symbol(sequence.distance)] += 1;
            }
        }
        self.cost = counts.cost();
        matched
    }

    /// Both as one block, unless two are shorter.
    pub(super) fn join(&self, next: &Self) -> Option<Self> {
        if self.bytes.is_empty() {
            return Some(next.clone());
        }
        let mut joined = self.clone();
        joined.counts.add(&next.counts);
        joined.cost = joined.counts.cost();
        joined.bytes.end = next.bytes.end;
        joined.sequences.end = next.sequences.end;
        (joined.cost <= self.cost + next.cost).then_some(joined)
    }

    /// The first `dropped` sequences, which are before the block, are gone.
    pub(super) fn drop_sequences(&mut self, dropped: usize) {
        self.sequences = self.sequences.start - dropped..self.sequences.end - dropped;
    }

    /// Writes the block in the shortest of its three forms, unless it is longer than `most` bytes then; the result is
    /// `false` then.
    pub(super) fn write(
        &mut self,
        out: &mut BitWriter<'_>,
        bytes: &[u8],
        sequences: &[Sequence],
        is_last: bool,
        most: usize,
    ) -> bool {
        let bytes = &bytes[self.bytes.clone()];
        let sequences = &sequences[self.sequences.clone()];
        let counts = &mut self.counts;
        counts.litlens[END] = 1;
        let dynamic = BlockCodes {
            litlens: Codes::new(&counts.litlens, MAX_LITLEN),
            distances: Codes::new(&counts.distances, 15),
        };
        let header = Header::new(&dynamic.litlens.lens, &dynamic.distances.lens);
        let extra = extra_bits(counts);
        let dynamic_cost = header.cost() + dynamic.cost(counts) + extra;
        let stored_cost = 8 * (bytes.len() as u64 + 5 * (bytes.len() as u64 / 65535 + 1));
        let fixed = (bytes.len() < 4096).then(BlockCodes::fixed);
        let fixed_cost = fixed
            .as_ref()
            .map_or(u64::MAX, |fixed| fixed.cost(counts) + extra);
        let cost = dynamic_cost.min(fixed_cost).min(stored_cost);
        // Three bits say which form it is. A stored block may take some bits less than this.
        if (out.bits() + 3 + cost).div_ceil(8) > most as u64 {
            return false;
        }
        if cost == stored_cost {
            write_stored(out, bytes, is_last);
            return true;
        }
        out.add(is_last.into(), 1);
        match fixed {
            Some(fixed) if cost == fixed_cost => {
                out.add(1, 2);
                write_sequences(out, bytes, sequences, &fixed);
            }
            _ => {
                out.add(2, 2);
                header.write(out);
                write_sequences(out, bytes, sequences, &dynamic);
            }
        }
        true
    }
}

fn extra_bits(counts: &Counts) -> u64 {
    let lengths = counts.litlens[END + 1..].iter().zip(LENGTH_EXTRA);
    let lengths: u64 = lengths
        .map(|(&count, extra)| u64::from(count) * u64::from(extra))
        .sum();
    let distances = counts.distances.iter().enumerate();
    let distances: u64 = distances
        .map(|(symbol, &count)| u64::from(count) * u64::from(distance_extra(symbol)))
        .sum();
    lengths + distances
}

fn write_stored(out: &mut BitWriter<'_>, bytes: &[u8], is_last: bool) {
    let mut parts = bytes.chunks(65535).peekable();
    while let Some(part) = parts.next() {
        out.add((is_last && parts.peek().is_none()).into(), 1);
        out.add(0, 2);
        out.align();
        let len = part.len() as u16;
        out.bytes(&len.to_le_bytes());
        out.bytes(&(!len).to_le_bytes());
        out.bytes(part);
    }
}

fn write_sequences(out: &mut BitWriter<'_>, bytes: &[u8], sequences: &[Sequence], codes: &BlockCodes) {
    // The bits below, their number above.
    let mut literals = [0_u32; 256];
    for (byte, entry) in literals.iter_mut().enumerate() {
        *entry = u32::from(codes.litlens.bits[byte]) | u32::from(codes.litlens.lens[byte]) << 16;
    }
    let mut lengths = [0_u32; 512];
    for (length, entry) in (0_u16..).zip(&mut lengths).take(MAX_MATCH + 1).skip(MIN_MATCH) {
        let symbol = length_symbol(length);
        let len = u32::from(codes.litlens.lens[END + 1 + symbol]);
        let extra = u32::from(length - LENGTH_BASE[symbol]);
        let bits = u32::from(codes.litlens.bits[END + 1 + symbol]) | extra << len;
        *entry = bits | (len + u32::from(LENGTH_EXTRA[symbol])) << 24;
    }
    // And the number of extra bits on top.
    let mut distances = [(0_u32, 0_u16); 32];
    for (symbol, entry) in distances.iter_mut().enumerate().take(DISTANCES) {
        let len = u32::from(codes.distances.lens[symbol]);
        let bits = u32::from(codes.distances.bits[symbol]);
        *entry = (
            bits | len << 16 | distance_extra(symbol) << 24,
            DISTANCE_BASE[symbol],
        );
    }
    let mut rest = bytes;
    for sequence in sequences {
        let (run, behind) = rest.split_at(sequence.literals as usize);
        rest = &behind[usize::from(sequence.length)..];
        // Four literals are 56 bits at most, and up to seven are pending.
        let (fours, others) = run.as_chunks::<4>();
        for four in fours {
            for byte in four {
                let code = literals[usize::from(*byte)];
                out.add(code & 0xffff, code >> 16);
            }
            out.flush();
        }
        if !others.is_empty() {
            for byte in others {
                let code = literals[usize::from(*byte)];
                out.add(code & 0xffff, code >> 16);
            }
            out.flush();
        }
        if sequence.length > 0 {
            let code = lengths[usize::from(sequence.length) & 511];
            out.add(code & 0xff_ffff, code >> 24);
            let (code, base) = distances[distance_symbol(sequence.distance) & 31];
            out.add(code & 0xffff, code >> 16 & 0xff);
            out.add(sequence.distance.wrapping_sub(base).into(), code >> 24);
            out.flush();
        }
    }
    out.add(codes.litlens.bits[END].into(), codes.litlens.lens[END].into());
    out.flush();
}
