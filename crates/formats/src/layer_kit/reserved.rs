//! The ranges of a file that hold the format's own structures: neither guest data nor another table is written there.
//!
//! ```text
//!   file       |header|L1 table|cluster|L2 table|cluster|cluster|L2 table|
//!   Reserved   [------][-------]                                              few ranges, each with its name
//!   Pieces                              [-------]               [-------]     many, all of one length, in order
//!
//!   an entry that refers to      ^   or           ^               is refused by comparing ranges
//!   two entries that refer to the same piece share it:            neither may change it
//! ```
//!
//! Entries of tables may have been damaged by a crash, another program or an attacker. A format checks ranges here
//! before it writes guest data in place, changes a table that an entry refers to, or allocates storage. [`Reserved`] is
//! known when an image is opened and is also checked before reads. [`Pieces`] needs a walk over a table, so it is built
//! before the first write.
//!
//! This is for formats with few structures, each of them contiguous or all of one length; an overlap is an error of the
//! request. The cluster-based [`metadata_guard`](super::metadata_guard) is for qcow2: its structures are of ten kinds,
//! move while the image is open, are selected by the option `overlap-check`, and an overlap marks the image as corrupt.

use diskimage_core::{Budget, ByteRange, Error, Reservation, Result};

/// The ranges of a file that hold metadata, each with its name in messages.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reserved(Vec<(&'static str, ByteRange)>);

impl Reserved {
    /// These ranges, without empty ones.
    pub(crate) fn new(ranges: impl IntoIterator<Item = (&'static str, ByteRange)>) -> Self {
        Self(
            ranges
                .into_iter()
                .filter(|(_, range)| !range.is_empty())
                .collect(),
        )
    }

    /// Adds `ranges`, without empty ones.
    pub(crate) fn extend(&mut self, ranges: impl IntoIterator<Item = (&'static str, ByteRange)>) {
        self.0
            .extend(ranges.into_iter().filter(|(_, range)| !range.is_empty()));
    }

    /// The first range that shares a byte with `range`, and its name.
    pub(crate) fn find(&self, range: ByteRange) -> Option<(&'static str, ByteRange)> {
        self.0.iter().find(|(_, other)| other.overlaps(range)).copied()
    }

    /// Refuses `range`, which holds `what`, if it shares a byte with any of these.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](diskimage_core::ErrorKind::Corrupt), with both names.
    pub(crate) fn require_outside(&self, what: &str, range: ByteRange) -> Result<()> {
        match self.find(range) {
            None => Ok(()),
            Some((name, _)) => Err(lies_in(what, range.start(), name)),
        }
    }

    /// Bytes from `offset` to the next range that starts there or behind; `u64::MAX` if there is none.
    pub(crate) fn room_at(&self, offset: u64) -> u64 {
        let starts = self.0.iter().map(|(_, range)| range.start());
        let next = starts.filter(|start| *start >= offset).min();
        next.map_or(u64::MAX, |next| next - offset)
    }

    /// The units that share a byte with any of these ranges, of a file that is divided into units of `unit` bytes from
    /// offset `from` on.
    pub(crate) fn units(&self, from: u64, unit: u64) -> impl Iterator<Item = u64> {
        let behind = move |offset: u64| offset.saturating_sub(from);
        let ranges = self.0.iter();
        ranges.flat_map(move |(_, range)| {
            ByteRange::new(behind(range.start()), behind(range.end())).units(unit)
        })
    }

    /// Refuses ranges that share a byte with one another: a write to one of them would change the other.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](diskimage_core::ErrorKind::Corrupt), with both names.
    pub(crate) fn require_apart(&self) -> Result<()> {
        for (nth, (name, range)) in self.0.iter().enumerate() {
            if let Some((other, _)) = self.0[..nth].iter().find(|(_, other)| other.overlaps(*range)) {
                return Err(Error::corrupt(format!("The {name} overlaps the {other}")));
            }
        }
        Ok(())
    }

    /// The end of the last range.
    pub(crate) fn end(&self) -> u64 {
        self.0.iter().map(|(_, range)| range.end()).max().unwrap_or(0)
    }
}

/// The error for `what` at `offset`, which overlaps the structure called `name`.
pub(crate) fn lies_in(what: &str, offset: u64, name: &str) -> Error {
    Error::corrupt(format!(
        "The {what} at {offset:#x} lies in the {name} of the image"
    ))
}

/// Structures of the same length that one table refers to: L2 tables, or blocks.
#[derive(Debug)]
pub(crate) struct Pieces {
    /// The name of a piece in messages.
    name: &'static str,
    /// Bytes of a piece.
    len: u64,
    /// Their offsets; in order once [`Pieces::sort`] was called.
    starts: Vec<u64>,
    /// Offsets of the pieces that overlap another one, in order.
    shared: Vec<u64>,
    budget: Budget,
    memory: Vec<Reservation>,
}

/// The number of offsets for which memory is reserved at a time.
const STEP: usize = 4096;

impl Pieces {
    /// An empty set of pieces of `len` bytes.
    pub(crate) fn new(name: &'static str, len: u64, budget: &Budget) -> Self {
        Self {
            name,
            len,
            starts: Vec::new(),
            shared: Vec::new(),
            budget: budget.clone(),
            memory: Vec::new(),
        }
    }

    /// Adds the piece at `start`, which an entry refers to.
    ///
    /// # Errors
    /// The memory budget is used up.
    pub(crate) fn add(&mut self, start: u64) -> Result<()> {
        if self.starts.len() >= self.memory.len() * STEP {
            self.memory
                .push(self.budget.reserve((STEP * size_of::<u64>()) as u64)?);
            self.starts.reserve_exact(STEP);
        }
        self.starts.push(start);
        Ok(())
    }

    /// Sorts the pieces and finds those that overlap.
    pub(crate) fn sort(mut self) -> Self {
        self.starts.sort_unstable();
        for pair in self.starts.windows(2) {
            if let [first, second] = *pair
                && second - first < self.len
            {
                self.shared.extend([first, second]);
            }
        }
        self.shared.dedup();
        self.starts.dedup();
        self
    }

    /// Adds a newly allocated piece, which overlaps no other.
    ///
    /// # Errors
    /// As [`Pieces::add`].
    pub(crate) fn insert(&mut self, start: u64) -> Result<()> {
        // Allocation is mostly at the end of the file, where the order stays.
        let is_last = self.starts.last().is_none_or(|last| *last < start);
        self.add(start)?;
        if !is_last {
            self.starts.sort_unstable();
        }
        Ok(())
    }

    /// Refuses `range`, which holds `what`, if it shares a byte with a piece.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](diskimage_core::ErrorKind::Corrupt), with both names.
    pub(crate) fn require_outside(&self, what: &str, range: ByteRange) -> Result<()> {
        let before = self.starts.partition_point(|start| *start < range.end());
        let last = before.checked_sub(1).and_then(|nth| self.starts.get(nth));
        match last {
            Some(start) if start.saturating_add(self.len) > range.start() && !range.is_empty() => {
                let (name, start) = (self.name, *start);
                Err(Error::corrupt(format!(
                    "The {what} at {:#x} overlaps the {name} at {start:#x}",
                    range.start()
                )))
            }
            _ => Ok(()),
        }
    }

    /// Refuses to change the piece at `start` if it shares bytes with another.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](diskimage_core::ErrorKind::Corrupt), with its name.
    pub(crate) fn require_unshared(&self, start: u64) -> Result<()> {
        if self.shared.is_empty() || self.shared.binary_search(&start).is_err() {
            return Ok(());
        }
        let name = self.name;
        Err(Error::corrupt(format!(
            "The {name} at {start:#x} has more than one user"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_found_by_any_byte_they_share() {
        let reserved = Reserved::new([
            ("header", ByteRange::new(0, 512)),
            ("name", ByteRange::new(100, 100)),
            ("table", ByteRange::new(1024, 2048)),
        ]);
        for (start, end, name) in [
            (0, 1, Some("header")),
            (511, 600, Some("header")),
            (512, 1024, None),
            (600, 1025, Some("table")),
            (2047, 4096, Some("table")),
            (2048, 4096, None),
        ] {
            let range = ByteRange::new(start, end);
            assert_eq!(reserved.find(range).map(|(name, _)| name), name, "{range:?}");
        }
        assert_eq!(reserved.end(), 2048);
        assert_eq!(
            [0, 1, 1024, 1025].map(|at| reserved.room_at(at)),
            [0, 1023, 0, u64::MAX]
        );
        assert_eq!(reserved.units(500, 300).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
        assert_eq!(reserved.units(600, 1000).collect::<Vec<_>>(), [0, 1]);
        assert!(reserved.require_apart().is_ok());
        let error = reserved
            .require_outside("cluster", ByteRange::at(1536, 8))
            .expect_err("is taken");
        assert_eq!(
            error.to_string(),
            "The cluster at 0x600 lies in the table of the image"
        );
    }

    #[test]
    fn overlapping_structures_are_refused() {
        let ranges = [
            ("header", ByteRange::new(0, 512)),
            ("table", ByteRange::new(511, 1024)),
        ];
        let error = Reserved::new(ranges).require_apart().expect_err("overlap");
        assert_eq!(error.to_string(), "The table overlaps the header");
    }

    #[test]
    fn pieces_that_share_bytes_are_known() {
        let mut pieces = Pieces::new("L2 table", 100, &Budget::default());
        for start in [500, 100, 250, 700, 100, 320, 401] {
            pieces.add(start).expect("memory");
        }
        let mut pieces = pieces.sort();
        let shared: Vec<u64> = [100, 250, 320, 401, 500, 700]
            .into_iter()
            .filter(|start| pieces.require_unshared(*start).is_err())
            .collect();
        assert_eq!(shared, [100, 250, 320, 401, 500]);
        pieces.insert(900).expect("memory");
        pieces.insert(50).expect("memory");
        let outside = |start, end| {
            pieces
                .require_outside("cluster", ByteRange::new(start, end))
                .is_ok()
        };
        assert!(outside(600, 700) && outside(800, 900) && outside(0, 50) && outside(199, 199));
        assert!(!outside(799, 800) && !outside(0, 51) && !outside(999, 2000) && !outside(0, u64::MAX));
    }

    #[test]
    fn memory_comes_from_the_budget() {
        let mut pieces = Pieces::new("L2 table", 1, &Budget::new(STEP as u64 * 8));
        for start in 0..STEP as u64 {
            pieces.add(start).expect("memory");
        }
        assert!(pieces.add(0).is_err());
    }
}
