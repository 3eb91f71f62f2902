//! Which places for blocks are taken.

use diskimage_core::{Budget, Error, Reservation, Result};

use super::place;
use crate::windows::Windows;

/// The places in the file, one bit each: at least as many as the map has entries, so that one is free whenever a block
/// of the disk has none.
#[derive(Debug)]
pub(super) struct Places {
    taken: Vec<u64>,
    /// No place before is free.
    hint: usize,
    /// The place behind the last that is taken.
    end: u32,
    _memory: Reservation,
}

impl Places {
    /// What the map of `blocks` entries says of the first `room` places. What leads further out is damage that takes
    /// none.
    pub(super) fn of(map: &mut Windows, blocks: u32, room: u32, budget: &Budget) -> Result<Self> {
        let words = (room as usize).div_ceil(64);
        let memory = budget.take(words as u64 * 8)?;
        let mut places = Self {
            taken: vec![0; words],
            hint: 0,
            end: 0,
            _memory: memory,
        };
        let mut block = 0;
        while block < u64::from(blocks) {
            let entries = map.entries(block)?;
            block += entries.len() as u64;
            for taken in entries.iter().filter_map(|entry| place(*entry)) {
                if taken < room {
                    places.take(taken);
                }
            }
        }
        Ok(places)
    }

    /// The place behind the last that is taken.
    pub(super) fn end(&self) -> u32 {
        self.end
    }

    /// Whether a block is at this place.
    pub(super) fn is_taken(&self, place: u32) -> bool {
        self.taken
            .get(place as usize / 64)
            .is_some_and(|word| word >> (place % 64) & 1 == 1)
    }

    /// Takes this place.
    pub(super) fn take(&mut self, place: u32) {
        if let Some(word) = self.taken.get_mut(place as usize / 64) {
            *word |= 1 << (place % 64);
            self.end = self.end.max(place.saturating_add(1));
        }
    }

    /// Takes the first place that is free.
    pub(super) fn take_first(&mut self) -> Result<u32> {
        self.take_first_from(0)
    }

    /// Takes the first place from `least` on that is free.
    pub(super) fn take_first_from(&mut self, least: u32) -> Result<u32> {
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
            .ok_or_else(|| Error::corrupt("The image has no place for another block"))?;
        self.take(place);
        Ok(place)
    }

    /// Makes a place free again.
    pub(super) fn free(&mut self, place: u32) {
        if let Some(word) = self.taken.get_mut(place as usize / 64) {
            *word &= !(1 << (place % 64));
            self.hint = self.hint.min(place as usize / 64);
            while self.end > 0 && !self.is_taken(self.end - 1) {
                self.end -= 1;
            }
        }
    }
}
