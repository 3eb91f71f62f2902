//! Which clusters of a file a check has come across.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use diskimage_core::{Budget, Reservation, Result};

/// Clusters that have a user, in pieces of a map of bits: memory goes with what is in use, not with the file's length.
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
        let mut twice = 0;
        for cluster in first..first + count {
            let piece = match self.pieces.entry(cluster / PIECE_BITS) {
                Entry::Occupied(piece) => piece.into_mut(),
                Entry::Vacant(place) => place.insert(Piece {
                    _memory: self.budget.reserve(size_of::<[u64; WORDS]>() as u64)?,
                    bits: Box::new([0; WORDS]),
                }),
            };
            let bit = cluster % PIECE_BITS;
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
        Ok(twice)
    }
}
