//! An encoder of deflate (RFC 1951) for clusters, which are in memory whole.
//!
//! ```text
//!   cluster ─▶ chunks ─▶ parse: sequences of literals and a match ─▶ blocks: chunks with similar counts ─▶ bits
//! ```

mod bits;
mod block;
mod huffman;
mod matches;
mod symbols;

use bits::BitWriter;
use block::{Block, Sequence};
use matches::{Match, Matches, Search};
use symbols::MAX_MATCH;

/// How matches are looked for.
#[derive(Clone, Copy, Debug)]
struct Effort {
    /// How many earlier places are looked at. With zero it is the latest, and no chains are kept.
    depth: u32,
    /// The length at which a match is taken without looking further.
    enough: usize,
    /// Whether a longer match that begins at the next byte is taken instead.
    lazy: bool,
    /// Whether matches of three bytes are looked for.
    short: bool,
    /// Of longer matches, only the last bytes are found again.
    inserted: usize,
}

impl Effort {
    const fn new(depth: u32, enough: usize, lazy: bool, short: bool, inserted: usize) -> Self {
        Self {
            depth,
            enough,
            lazy,
            short,
            inserted,
        }
    }
}

/// The levels from 1, each slower and with shorter output than the one before.
const LEVELS: [Effort; 9] = [
    Effort::new(0, MAX_MATCH, false, false, 4),
    Effort::new(2, 16, false, false, 32),
    Effort::new(4, 16, false, false, 32),
    Effort::new(4, 16, true, false, 32),
    Effort::new(6, 24, true, false, MAX_MATCH),
    Effort::new(8, 32, true, false, MAX_MATCH),
    Effort::new(11, 40, true, true, 128),
    Effort::new(32, 130, true, true, MAX_MATCH),
    Effort::new(128, MAX_MATCH, true, true, MAX_MATCH),
];

/// An encoder with distances up to 4 KiB.
pub(super) type Narrow = Deflater<{ 4 << 10 }, { 8 << 10 }>;
/// An encoder with distances up to about 32 KiB, the window of RFC 1951.
pub(super) type Wide = Deflater<{ 32 << 10 }, { 32 << 10 }>;

/// Bytes of a chunk. Chunks are parsed one by one, and a block has one or more of them.
const CHUNK: usize = 8 << 10;
/// The most sequences of a block and a chunk.
const MAX_SEQUENCES: usize = 64 << 10;
/// A chunk is sparse if less than this fraction of it is in matches.
const SPARSE: usize = 32;
/// Behind a sparse chunk, a match is looked for at every fourth byte only.
const SPARSE_STRIDE: usize = 4;
/// Bytes at the end of the input at which no match begins.
const TAIL: usize = 8;

/// Encodes clusters with distances up to `WINDOW`. Equal clusters have equal output.
pub(super) struct Deflater<const WINDOW: usize, const HASHES: usize> {
    effort: Effort,
    parser: Parser<WINDOW, HASHES>,
}

struct Parser<const WINDOW: usize, const HASHES: usize> {
    matches: Box<Matches<WINDOW, HASHES>>,
    sequences: Vec<Sequence>,
}

impl<const WINDOW: usize, const HASHES: usize> Deflater<WINDOW, HASHES> {
    /// An encoder of a level from 1 to 9.
    pub(super) fn new(level: u8) -> Self {
        let index = usize::from(level.clamp(1, 9)) - 1;
        Self {
            effort: LEVELS[index],
            parser: Parser {
                matches: Box::new(Matches::new()),
                sequences: Vec::new(),
            },
        }
    }

    /// Appends the encoded form of `bytes` to `out`. `false` if `out` would get longer than `most` bytes; then it ends with
    /// a part of it.
    pub(super) fn encode(&mut self, bytes: &[u8], out: &mut Vec<u8>, most: usize) -> bool {
        let mut out = BitWriter::new(out);
        let parser = &mut self.parser;
        parser.matches.clear();
        parser.sequences.clear();
        let mut block = Block::default();
        let mut at = 0;
        let mut is_sparse = false;
        while at < bytes.len() {
            let (start, first) = (at, parser.sequences.len());
            at = parser.parse(bytes, start, self.effort, is_sparse);
            let mut chunk = Block::new(start..at, first..parser.sequences.len());
            let matched = chunk.count(bytes, &parser.sequences);
            is_sparse = matched < (at - start) / SPARSE;
            let is_full = parser.sequences.len() > MAX_SEQUENCES - CHUNK;
            if let Some(joined) = block.join(&chunk).filter(|_| !is_full) {
                block = joined;
                continue;
            }
            if !block.write(&mut out, bytes, &parser.sequences, false, most) {
                return false;
            }
            parser.sequences.drain(..first);
            chunk.drop_sequences(first);
            block = chunk;
        }
        if !block.write(&mut out, bytes, &parser.sequences, true, most) {
            return false;
        }
        out.align();
        true
    }
}

impl<const WINDOW: usize, const HASHES: usize> Parser<WINDOW, HASHES> {
    /// Parses a chunk, and returns its end: a match may reach beyond the length of a chunk.
    fn parse(&mut self, bytes: &[u8], from: usize, effort: Effort, is_sparse: bool) -> usize {
        match effort {
            _ if is_sparse => self.parse_latest::<SPARSE_STRIDE>(bytes, from, effort),
            Effort { depth: 0, .. } => self.parse_latest::<1>(bytes, from, effort),
            Effort {
                lazy: false,
                short: false,
                ..
            } => self.parse_chains::<false, false>(bytes, from, effort),
            Effort {
                lazy: false,
                short: true,
                ..
            } => self.parse_chains::<false, true>(bytes, from, effort),
            Effort {
                lazy: true,
                short: false,
                ..
            } => self.parse_chains::<true, false>(bytes, from, effort),
            Effort {
                lazy: true,
                short: true,
                ..
            } => self.parse_chains::<true, true>(bytes, from, effort),
        }
    }

    /// Looks at the latest place only, at every `STRIDE`th byte.
    fn parse_latest<const STRIDE: usize>(&mut self, bytes: &[u8], from: usize, effort: Effort) -> usize {
        let (end, last) = (chunk_end(bytes, from), bytes.len().saturating_sub(TAIL));
        let limit = end.min(last);
        let (mut at, mut literals) = (from, from);
        while at < limit {
            self.matches.make_room(at);
            let found = self.matches.latest(bytes, at);
            if found.length < 4 {
                at = at.wrapping_add(STRIDE);
                continue;
            }
            self.sequences
                .push(Sequence::new(at.wrapping_sub(literals), found));
            let inside = at.wrapping_add(1);
            at = at.wrapping_add(found.length);
            literals = at;
            let first = if found.length > effort.inserted {
                at.wrapping_sub(2)
            } else {
                inside
            };
            self.matches.insert_latest(bytes, first..at.min(last));
        }
        self.end_chunk(literals, at, end)
    }

    /// Looks along chains.
    fn parse_chains<const LAZY: bool, const SHORT: bool>(
        &mut self,
        bytes: &[u8],
        from: usize,
        effort: Effort,
    ) -> usize {
        let (end, last) = (chunk_end(bytes, from), bytes.len().saturating_sub(TAIL));
        let limit = end.min(last);
        let search = Search {
            depth: effort.depth,
            enough: effort.enough,
        };
        let (mut at, mut literals) = (from, from);
        while at < limit {
            self.matches.make_room(at);
            let mut found = self.matches.longest(bytes, at, 3, search);
            if SHORT && found.length == 0 {
                found = self.matches.short(bytes, at);
            } else if SHORT {
                self.matches.insert_short(bytes, at);
            }
            if found.length == 0 {
                at = at.wrapping_add(1);
                continue;
            }
            let mut inserted = at.wrapping_add(1);
            while LAZY && found.length < effort.enough && inserted < last {
                let next = self
                    .matches
                    .longest(bytes, inserted, found.length, search.after(found));
                if SHORT {
                    self.matches.insert_short(bytes, inserted);
                }
                inserted = inserted.wrapping_add(1);
                if !is_better(next, found) {
                    break;
                }
                found = next;
                at = at.wrapping_add(1);
            }
            self.sequences
                .push(Sequence::new(at.wrapping_sub(literals), found));
            at = at.wrapping_add(found.length);
            literals = at;
            if found.length > effort.inserted {
                inserted = inserted.max(at.wrapping_sub(16));
            }
            self.matches.insert(bytes, inserted..at.min(last));
        }
        self.end_chunk(literals, at, end)
    }

    /// Adds the literals at the end of a chunk.
    fn end_chunk(&mut self, literals: usize, at: usize, end: usize) -> usize {
        let end = at.max(end);
        if end > literals {
            self.sequences
                .push(Sequence::new(end - literals, Match::default()));
        }
        end
    }
}

impl Search {
    /// The search for a match that is better than `found`.
    #[inline(always)]
    fn after(self, found: Match) -> Self {
        let depth = if found.length >= 16 {
            self.depth / 4
        } else {
            self.depth
        };
        Self { depth, ..self }
    }
}

/// Whether a match that begins a byte later is worth the literal. A byte of length weighs as much as four bits of
/// distance.
#[inline(always)]
fn is_better(later: Match, found: Match) -> bool {
    let more = later.length.saturating_sub(found.length);
    let nearness = |found: Match| found.distance.leading_zeros() as usize;
    more > 0 && more.wrapping_mul(4).wrapping_add(nearness(later)) > nearness(found).wrapping_add(2)
}

fn chunk_end(bytes: &[u8], from: usize) -> usize {
    from.saturating_add(CHUNK).min(bytes.len())
}

#[cfg(test)]
mod tests;
