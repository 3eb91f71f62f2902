//! Which clusters of a file a check has come across: a sparse bitmap.
//!
//! Memory goes with what is in use, not with the file's length. For block slots, which lie close together and are allocated
//! as well, there is [`SlotBitmap`](super::slot_bitmap::SlotBitmap).

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use diskimage_core::{Budget, Reservation, Result};

/// Clusters that have a user, in pieces of a bitmap.
pub(crate) struct ClusterSet<'a> {
    budget: &'a Budget,
    pieces: HashMap<u64, Piece>,
    count: u64,
}

struct Piece {
    bits: Box<[u64; WORDS]>,
    /// Held as long as the bits are.
    _memory: Reservation,
}

/// Words of a piece.
const WORDS: usize = 512;
const WORD_BITS: u64 = 64;
const PIECE_BITS: u64 = WORDS as u64 * WORD_BITS;

impl<'a> ClusterSet<'a> {
    /// Nothing seen so far.
    pub(crate) fn new(budget: &'a Budget) -> Self {
        Self {
            budget,
            pieces: HashMap::new(),
            count: 0,
        }
    }

    /// How many clusters were seen.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// Whether any of `count` clusters was marked.
    pub(crate) fn has_any(&self, first: u64, count: u64) -> bool {
        (first..first.saturating_add(count)).any(|cluster| {
            let piece = self.pieces.get(&(cluster / PIECE_BITS));
            let bit = cluster % PIECE_BITS;
            let word = usize::try_from(bit / WORD_BITS).ok();
            let word = piece.zip(word).and_then(|(piece, word)| piece.bits.get(word));
            word.is_some_and(|word| word >> (bit % WORD_BITS) & 1 == 1)
        })
    }

    /// Marks `count` clusters; how many were marked already.
    pub(crate) fn take(&mut self, first: u64, count: u64) -> Result<u64> {
        let (mut next, end) = (first, first.saturating_add(count));
        let mut twice = 0;
        while next < end {
            let number = next / PIECE_BITS;
            let piece = match self.pieces.entry(number) {
                Entry::Occupied(piece) => piece.into_mut(),
                Entry::Vacant(vacant) => vacant.insert(Piece {
                    _memory: self.budget.reserve(size_of::<[u64; WORDS]>() as u64)?,
                    bits: Box::new([0; WORDS]),
                }),
            };
            let in_piece = next..end.min((number + 1).saturating_mul(PIECE_BITS));
            next = in_piece.end;
            for bit in in_piece.map(|cluster| cluster % PIECE_BITS) {
                let word = usize::try_from(bit / WORD_BITS)
                    .ok()
                    .and_then(|word| piece.bits.get_mut(word));
                if let Some(word) = word {
                    let mask = 1 << (bit % WORD_BITS);
                    let known = *word & mask != 0;
                    *word |= mask;
                    twice += u64::from(known);
                    self.count += u64::from(!known);
                }
            }
        }
        Ok(twice)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn clusters_are_counted_once() {
        let budget = Budget::default();
        let mut set = ClusterSet::new(&budget);
        let mut model = BTreeSet::new();
        for (first, count) in [
            (3, 4),
            (5, 1),
            (PIECE_BITS - 2, 2 * PIECE_BITS + 5),
            (1 << 50, 64),
            (PIECE_BITS * 2 - 1, 2),
            (63, 0),
            (0, PIECE_BITS),
        ] {
            let twice = (first..first + count)
                .filter(|cluster| !model.insert(*cluster))
                .count();
            assert_eq!(set.take(first, count).expect("memory"), twice as u64);
            assert_eq!(set.count(), model.len() as u64);
        }
        assert!(set.has_any((1 << 50) - 1, 2) && !set.has_any((1 << 50) - 9, 9));
        assert!(!set.has_any(1 << 60, 2));
    }

    #[test]
    fn memory_comes_from_the_budget() {
        let budget = Budget::new(4096);
        let mut set = ClusterSet::new(&budget);
        set.take(0, PIECE_BITS).expect("one piece");
        assert!(set.take(PIECE_BITS - 1, 2).is_err());
    }
}
