//! Which block slots of a file are in use: a dense bitmap.
//!
//! It takes one bit for each slot that the table could refer to, in use or not, and finds free slots. For clusters
//! anywhere in a file, few of which are in use, there is [`ClusterSet`](super::cluster_set::ClusterSet).

use diskimage_core::{Budget, Error, Reservation, Result};

/// The slots of the file, one bit each: at least as many as the table has entries, so that one is free whenever a block of
/// the disk has none.
#[derive(Debug)]
pub(crate) struct SlotBitmap {
    taken: Vec<u64>,
    /// How many slots there are.
    room: u32,
    /// No slot of the words before this one is free.
    hint: usize,
    /// The slot behind the last that is in use.
    end: u32,
    /// Slots that several entries of the table refer to, in order.
    shared: Vec<u32>,
    _memory: Reservation,
}

impl SlotBitmap {
    /// The first `room` slots, all of them free.
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

    /// Whether this slot is in use.
    pub(crate) fn is_taken(&self, place: u32) -> bool {
        self.taken
            .get(place as usize / 64)
            .is_some_and(|word| word >> (place % 64) & 1 == 1)
    }

    /// Has this slot be in use. Slots beyond the bitmap are ignored.
    pub(crate) fn take(&mut self, place: u32) {
        if place >= self.room {
            return;
        }
        if let Some(word) = self.taken.get_mut(place as usize / 64) {
            *word |= 1 << (place % 64);
            self.end = self.end.max(place.saturating_add(1));
        }
    }

    /// Has this slot be in use for an entry of the table; other entries may refer to it already.
    pub(crate) fn claim(&mut self, place: u32) {
        if self.is_taken(place)
            && let Err(at) = self.shared.binary_search(&place)
        {
            self.shared.insert(at, place);
        }
        self.take(place);
    }

    /// Whether several entries of the table refer to this slot.
    pub(crate) fn is_shared(&self, place: u32) -> bool {
        self.shared.binary_search(&place).is_ok()
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
        let place = found
            .and_then(|place| u32::try_from(place).ok())
            .filter(|place| *place < self.room)
            .ok_or_else(|| Error::corrupt("The image has no place for another block"))?;
        self.take(place);
        Ok(place)
    }

    /// Frees a slot.
    pub(crate) fn free(&mut self, place: u32) {
        if let Some(word) = self.taken.get_mut(place as usize / 64) {
            *word &= !(1 << (place % 64));
            self.hint = self.hint.min(place as usize / 64);
            while self.end > 0 && !self.is_taken(self.end - 1) {
                self.end -= 1;
            }
        }
    }
}
