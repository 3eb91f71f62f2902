//! The clusters of a file that a check has found in use: a sparse bitmap.
//!
//! Its memory is proportional to the clusters in use, not to the file's length. For block slots, which are contiguous
//! and are also allocated, there is [`SlotBitmap`](super::slot_bitmap::SlotBitmap).

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use diskimage_core::{Budget, Reservation, Result};

/// The clusters that have a user, in chunks of a bitmap.
pub(crate) struct ClusterSet<'a> {
    budget: &'a Budget,
    chunks: HashMap<u64, Chunk>,
    count: u64,
}

struct Chunk {
    bits: Box<[u64; WORDS]>,
    /// The memory of `bits`, reserved from the budget.
    _memory: Reservation,
}

/// Words of a chunk.
const WORDS: usize = 512;
const WORD_BITS: u64 = 64;
const CHUNK_BITS: u64 = WORDS as u64 * WORD_BITS;

impl<'a> ClusterSet<'a> {
    /// An empty set.
    pub(crate) fn new(budget: &'a Budget) -> Self {
        Self {
            budget,
            chunks: HashMap::new(),
            count: 0,
        }
    }

    /// The number of clusters in the set.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// Whether any of `count` clusters from `first` on is in the set.
    pub(crate) fn has_any(&self, first: u64, count: u64) -> bool {
        (first..first.saturating_add(count)).any(|cluster| {
            let chunk = self.chunks.get(&(cluster / CHUNK_BITS));
            let bit = cluster % CHUNK_BITS;
            let word = usize::try_from(bit / WORD_BITS).ok();
            let word = chunk.zip(word).and_then(|(chunk, word)| chunk.bits.get(word));
            word.is_some_and(|word| word >> (bit % WORD_BITS) & 1 == 1)
        })
    }

    /// Adds `count` clusters from `first` on, and returns how many were in the set already.
    pub(crate) fn take(&mut self, first: u64, count: u64) -> Result<u64> {
        let (mut next, end) = (first, first.saturating_add(count));
        let mut twice = 0;
        while next < end {
            let number = next / CHUNK_BITS;
            let chunk = match self.chunks.entry(number) {
                Entry::Occupied(chunk) => chunk.into_mut(),
                Entry::Vacant(vacant) => vacant.insert(Chunk {
                    _memory: self.budget.reserve(size_of::<[u64; WORDS]>() as u64)?,
                    bits: Box::new([0; WORDS]),
                }),
            };
            let in_chunk = next..end.min((number + 1).saturating_mul(CHUNK_BITS));
            next = in_chunk.end;
            for bit in in_chunk.map(|cluster| cluster % CHUNK_BITS) {
                let word = usize::try_from(bit / WORD_BITS)
                    .ok()
                    .and_then(|word| chunk.bits.get_mut(word));
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
            (CHUNK_BITS - 2, 2 * CHUNK_BITS + 5),
            (1 << 50, 64),
            (CHUNK_BITS * 2 - 1, 2),
            (63, 0),
            (0, CHUNK_BITS),
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
        set.take(0, CHUNK_BITS).expect("one chunk");
        assert!(set.take(CHUNK_BITS - 1, 2).is_err());
    }
}
