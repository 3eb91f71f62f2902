//! Which block slots of a file are in use: a dense bitmap.
//!
//! It has one bit for each slot that the table could refer to, and finds free slots. For a few clusters anywhere in a
//! file there is [`ClusterSet`](super::cluster_set::ClusterSet).

use diskimage_core::{Budget, Error, Reservation, Result};

/// The slots of the file, one bit each. There are at least as many slots as the table has entries, so that one is free
/// whenever a block is unallocated.
#[derive(Debug)]
pub(crate) struct SlotBitmap {
    taken: Vec<u64>,
    /// The number of slots.
    room: u32,
    /// The first word of `taken` that may have a free slot.
    hint: usize,
    /// The slot behind the last that is in use.
    end: u32,
    /// Slots that several entries of the table refer to, in order.
    shared: Vec<u32>,
    _memory: Reservation,
}

impl SlotBitmap {
    /// A bitmap of `room` slots, all of them free.
    pub(crate) fn new(room: u32, budget: &Budget) -> Result<Self> {
        let words = (room as usize).div_ceil(64);
        let memory = budget.reserve(words as u64 * 8)?;
        Ok(Self {
            taken: vec![0; words],
            room,
            hint: 0,
            end: 0,
            shared: Vec::new(),
            _memory: memory,
        })
    }

    /// The slot behind the last that is in use.
    pub(crate) fn end(&self) -> u32 {
        self.end
    }

    /// Whether `slot` is in use.
    pub(crate) fn is_taken(&self, slot: u32) -> bool {
        self.taken
            .get(slot as usize / 64)
            .is_some_and(|word| word >> (slot % 64) & 1 == 1)
    }

    /// Marks `slot` as in use. Slots beyond the bitmap are ignored.
    pub(crate) fn take(&mut self, slot: u32) {
        if slot >= self.room {
            return;
        }
        if let Some(word) = self.taken.get_mut(slot as usize / 64) {
            *word |= 1 << (slot % 64);
            self.end = self.end.max(slot.saturating_add(1));
        }
    }

    /// Marks `slot` as in use by one more entry of the table. If it was in use, it is shared from now on.
    pub(crate) fn claim(&mut self, slot: u32) {
        if self.is_taken(slot)
            && let Err(at) = self.shared.binary_search(&slot)
        {
            self.shared.insert(at, slot);
        }
        self.take(slot);
    }

    /// Whether several entries of the table refer to `slot`.
    pub(crate) fn is_shared(&self, slot: u32) -> bool {
        self.shared.binary_search(&slot).is_ok()
    }

    /// Allocates the first free slot.
    pub(crate) fn take_first(&mut self) -> Result<u32> {
        self.take_first_from(0)
    }

    /// Allocates the first free slot from `least` on.
    pub(crate) fn take_first_from(&mut self, least: u32) -> Result<u32> {
        let full = |word: &u64| *word == u64::MAX;
        self.hint += self.taken[self.hint..]
            .iter()
            .take_while(|word| full(word))
            .count();
        let from = self.hint.max(least as usize / 64);
        let mut words = self.taken.iter().enumerate().skip(from);
        let found = words.find_map(|(at, word)| {
            let below = match u32::try_from(at).map(|at| at * 64) {
                Ok(base) if base < least => (1 << (least - base)) - 1,
                _ => 0,
            };
            let free = (word | below).trailing_ones();
            (free < 64).then_some(at * 64 + free as usize)
        });
        let slot = found
            .and_then(|slot| u32::try_from(slot).ok())
            .filter(|slot| *slot < self.room)
            .ok_or_else(|| Error::corrupt("The image has no place for another block"))?;
        self.take(slot);
        Ok(slot)
    }

    /// Frees `slot`.
    pub(crate) fn free(&mut self, slot: u32) {
        if let Some(word) = self.taken.get_mut(slot as usize / 64) {
            *word &= !(1 << (slot % 64));
            self.hint = self.hint.min(slot as usize / 64);
            while self.end > 0 && !self.is_taken(self.end - 1) {
                self.end -= 1;
            }
        }
    }
}
