//! Finds earlier places with the same bytes.
//!
//! ```text
//!   heads[hash of four bytes]  ─▶ latest position ─▶ prev ─▶ prev ...      the chain of one hash, as far as the window
//!   shorts[hash of three bytes] ─▶ latest position
//! ```
//!
//! A position is an index of the input plus `shift`, in 16 bits. Before a position gets too large, all are made smaller
//! at once, and those that are behind the window become zero. Zero is never in the window: it stands for none.

use super::symbols::MAX_MATCH;

/// The position of the first byte, and what is subtracted when positions get too large. Not below any window.
const STEP: u16 = 1 << 15;

/// The first position that is too large at the beginning of a match or a literal.
const TOO_LARGE: usize = (1 << 16) - 2 * MAX_MATCH;

const SHORT_BITS: u32 = 12;

/// A match shorter than four bytes pays only if it is close.
const SHORT_DISTANCE: usize = 2048;

/// A match: the length, zero for none, and the distance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Match {
    pub(super) length: usize,
    pub(super) distance: usize,
}

/// Which matches are good enough.
#[derive(Clone, Copy, Debug)]
pub(super) struct Search {
    /// How many positions of a chain are looked at.
    pub(super) depth: u32,
    /// The length at which the search ends.
    pub(super) enough: usize,
}

/// The positions of the last `WINDOW` bytes, with `HASHES` chains. Both are powers of two.
pub(super) struct Matches<const WINDOW: usize, const HASHES: usize> {
    heads: [u16; HASHES],
    /// For each position in the window the one before it with the same hash. Meaningless for positions that are not
    /// in a chain, so it needs no clearing.
    prev: [u16; WINDOW],
    shorts: [u16; 1 << SHORT_BITS],
    /// Wraps: it is negative behind the first 32 KiB.
    shift: usize,
}

impl<const WINDOW: usize, const HASHES: usize> Matches<WINDOW, HASHES> {
    /// With the widest window, the last positions are too near to those that [`Matches::slide`] drops.
    const MAX_DISTANCE: usize = if WINDOW < STEP as usize {
        WINDOW
    } else {
        STEP as usize - 2 * MAX_MATCH - 1
    };

    pub(super) fn new() -> Self {
        const { assert!(WINDOW.is_power_of_two() && WINDOW <= STEP as usize && HASHES.is_power_of_two()) };
        Self {
            heads: [0; HASHES],
            prev: [0; WINDOW],
            shorts: [0; 1 << SHORT_BITS],
            shift: STEP.into(),
        }
    }

    /// Begins a new input.
    pub(super) fn clear(&mut self) {
        self.heads.fill(0);
        self.shorts.fill(0);
        self.shift = STEP.into();
    }

    /// Makes room for positions up to `at` and the longest match from there. Called for each literal and match.
    #[inline(always)]
    pub(super) fn make_room(&mut self, at: usize) {
        if at.wrapping_add(self.shift) >= TOO_LARGE {
            self.slide();
        }
    }

    #[cold]
    fn slide(&mut self) {
        for table in [&mut self.heads[..], &mut self.prev, &mut self.shorts] {
            for position in table {
                *position = position.saturating_sub(STEP);
            }
        }
        self.shift = self.shift.wrapping_sub(STEP.into());
    }

    #[inline(always)]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "`make_room` keeps positions below 65536"
    )]
    fn position(&self, at: usize) -> u16 {
        at.wrapping_add(self.shift) as u16
    }

    /// Enters the position of `at` into its chain, and returns the one before it.
    #[inline(always)]
    fn enter(&mut self, four: u32, position: u16) -> u16 {
        let head = &mut self.heads[hash(four, HASHES)];
        let before = std::mem::replace(head, position);
        self.prev[usize::from(position) % WINDOW] = before;
        before
    }

    /// Enters the positions of `range` into their chains.
    #[inline(always)]
    pub(super) fn insert(&mut self, bytes: &[u8], range: std::ops::Range<usize>) {
        for at in range {
            let position = self.position(at);
            self.enter(load(bytes, at), position);
        }
    }

    /// As [`Matches::insert`], without chains.
    #[inline(always)]
    pub(super) fn insert_latest(&mut self, bytes: &[u8], range: std::ops::Range<usize>) {
        for at in range {
            let position = self.position(at);
            self.heads[hash(load(bytes, at), HASHES)] = position;
        }
    }

    /// Inserts `at` without a chain, and returns the match with the latest place of the same hash.
    #[inline(always)]
    pub(super) fn latest(&mut self, bytes: &[u8], at: usize) -> Match {
        let four = load(bytes, at);
        let position = self.position(at);
        let found = std::mem::replace(&mut self.heads[hash(four, HASHES)], position);
        let distance = usize::from(position.wrapping_sub(found));
        let there = at.wrapping_sub(distance);
        if distance > Self::MAX_DISTANCE || load(bytes, there) != four {
            return Match::default();
        }
        Match {
            length: common(bytes, at, there),
            distance,
        }
    }

    /// Enters the three bytes at `at`.
    #[inline(always)]
    pub(super) fn insert_short(&mut self, bytes: &[u8], at: usize) -> u16 {
        let position = self.position(at);
        let short = &mut self.shorts[hash(load(bytes, at) << 8, 1 << SHORT_BITS)];
        std::mem::replace(short, position)
    }

    /// Enters the three bytes at `at`, and returns their match.
    #[inline(always)]
    pub(super) fn short(&mut self, bytes: &[u8], at: usize) -> Match {
        let found = self.insert_short(bytes, at);
        let distance = usize::from(self.position(at).wrapping_sub(found));
        let there = at.wrapping_sub(distance);
        if distance > SHORT_DISTANCE || (load(bytes, at) ^ load(bytes, there)) << 8 != 0 {
            return Match::default();
        }
        Match { length: 3, distance }
    }

    /// Inserts `at`, and returns its longest match that is longer than `least`, which is 3 or more.
    #[inline(always)]
    pub(super) fn longest(&mut self, bytes: &[u8], at: usize, least: usize, search: Search) -> Match {
        let four = load(bytes, at);
        let position = self.position(at);
        let mut found = self.enter(four, position);
        let most = bytes.len().wrapping_sub(at).min(MAX_MATCH);
        let mut best = Match::default();
        if least >= most {
            return best;
        }
        // A longer match agrees in the four bytes that end with the first byte behind the best one so far.
        let mut tail_at = least.wrapping_sub(3);
        let mut tail = load(bytes, at.wrapping_add(tail_at));
        let mut longest = least;
        for _ in 0..search.depth {
            let distance = usize::from(position.wrapping_sub(found));
            if distance > Self::MAX_DISTANCE {
                break;
            }
            let there = at.wrapping_sub(distance);
            if load(bytes, there.wrapping_add(tail_at)) == tail && load(bytes, there) == four {
                let length = common(bytes, at, there);
                if length > longest {
                    best = Match { length, distance };
                    if length >= search.enough || length >= most {
                        break;
                    }
                    longest = length;
                    tail_at = length.wrapping_sub(3);
                    tail = load(bytes, at.wrapping_add(tail_at));
                }
            }
            // The place of the position that is a whole window back has been taken by `at`.
            if distance == WINDOW {
                break;
            }
            found = self.prev[usize::from(found) % WINDOW];
        }
        best
    }
}

/// Four bytes; zero beyond the end, where nothing is looked for.
#[inline(always)]
fn load(bytes: &[u8], at: usize) -> u32 {
    match bytes.get(at..).and_then(<[u8]>::first_chunk) {
        Some(&four) => u32::from_le_bytes(four),
        None => 0,
    }
}

#[inline(always)]
fn hash(four: u32, hashes: usize) -> usize {
    // The golden ratio spreads the bits upwards.
    (four.wrapping_mul(0x9e37_79b1) >> (32 - hashes.trailing_zeros())) as usize % hashes
}

/// The number of equal bytes at two indices of the input, `here` behind `there`; at most that of the longest match.
#[inline(always)]
fn common(bytes: &[u8], here: usize, there: usize) -> usize {
    let most = bytes.len().wrapping_sub(here).min(MAX_MATCH);
    let part = |at: usize| bytes.get(at..at.wrapping_add(most)).unwrap_or_default();
    let ((left, left_rest), (right, right_rest)) =
        (part(here).as_chunks::<8>(), part(there).as_chunks::<8>());
    let mut length = 0_usize;
    for (left, right) in left.iter().zip(right) {
        let differ = u64::from_le_bytes(*left) ^ u64::from_le_bytes(*right);
        if differ != 0 {
            return length.wrapping_add((differ.trailing_zeros() / 8) as usize);
        }
        length = length.wrapping_add(8);
    }
    let rest = left_rest.iter().zip(right_rest);
    length.wrapping_add(rest.take_while(|(left, right)| left == right).count())
}
