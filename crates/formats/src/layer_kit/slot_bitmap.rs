//! Which places of a file that is divided into blocks are taken.

use diskimage_core::{Budget, Error, Reservation, Result};

/// The places in the file, one bit each: at least as many as the table has entries, so that one is free whenever a block
/// of the disk has none.
#[derive(Debug)]
pub(crate) struct SlotBitmap {
    taken: Vec<u64>,
    /// How many there are.
    room: u32,
    /// No place before is free.
    hint: usize,
    /// The place behind the last that is taken.
    end: u32,
    /// Those that several blocks are at, in order.
    shared: Vec<u32>,
    _memory: Reservation,
}

impl SlotBitmap {
    /// The first `room` places, all of them free.
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

    /// The place behind the last that is taken.
    pub(crate) fn end(&self) -> u32 {
        self.end
    }

    /// Whether a block is at this place.
    pub(crate) fn is_taken(&self, place: u32) -> bool {
        self.taken
            .get(place as usize / 64)
            .is_some_and(|word| word >> (place % 64) & 1 == 1)
    }

    /// Takes this place. One that is further out than these is none of them.
    pub(crate) fn take(&mut self, place: u32) {
        if place >= self.room {
            return;
        }
        if let Some(word) = self.taken.get_mut(place as usize / 64) {
            *word |= 1 << (place % 64);
            self.end = self.end.max(place.saturating_add(1));
        }
    }

    /// Takes this place for a block that an entry of the table leads to; others may have it already.
    pub(crate) fn claim(&mut self, place: u32) {
        if self.is_taken(place)
            && let Err(at) = self.shared.binary_search(&place)
        {
            self.shared.insert(at, place);
        }
        self.take(place);
    }

    /// Whether several blocks are at this place.
    pub(crate) fn is_shared(&self, place: u32) -> bool {
        self.shared.binary_search(&place).is_ok()
    }

    /// Takes the first place that is free.
    pub(crate) fn take_first(&mut self) -> Result<u32> {
        self.take_first_from(0)
    }

    /// Takes the first place from `least` on that is free.
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

    /// Makes a place free again.
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
