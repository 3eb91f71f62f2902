//! The ranges that were written since the bitmaps were last stored.

use std::collections::BTreeMap;

use diskimage_core::ByteRange;

/// A set of guest ranges. Ranges that touch are joined. Memory grows with the number of ranges, which the caller
/// bounds, and not with the number or the size of the bitmaps.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// The end of each range by its start. Ranges neither overlap nor touch.
    ranges: BTreeMap<u64, u64>,
}

/// The number of ranges that are collected before they are stored.
pub(super) const MAX_RANGES: usize = 1 << 16;

impl Written {
    pub(super) fn add(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start(), range.end());
        if let Some((before, until)) = self.ranges.range(..=start).next_back()
            && *until >= start
        {
            if *until >= end {
                return;
            }
            start = *before;
        }
        while let Some((next, until)) = self.ranges.range(start..=end).next() {
            let (next, until) = (*next, *until);
            end = end.max(until);
            self.ranges.remove(&next);
        }
        self.ranges.insert(start, end);
    }

    pub(super) fn len(&self) -> usize {
        self.ranges.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = ByteRange> {
        self.ranges
            .iter()
            .map(|(start, end)| ByteRange::new(*start, *end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_become_one() {
        let mut written = Written::default();
        for (start, end) in [(10, 20), (40, 50), (20, 25), (12, 14), (60, 70), (5, 10), (5, 5)] {
            written.add(ByteRange::new(start, end));
        }
        let all: Vec<_> = written.iter().collect();
        let expect = [(5, 25), (40, 50), (60, 70)].map(|(start, end)| ByteRange::new(start, end));
        assert_eq!(all, expect);
        written.add(ByteRange::new(24, 60));
        assert_eq!(written.iter().collect::<Vec<_>>(), [ByteRange::new(5, 70)]);
    }
}
