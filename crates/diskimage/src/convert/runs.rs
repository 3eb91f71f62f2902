//! The runs of a segment: data, zeroes, or data that the target's backing image has already.
//!
//! ```text
//!   source        [dddd][zzzzzzzz][dd][z][bbbbbbbb]       d data, z zero, b in the backing image
//!   split         zeroes inside of data runs are found (`ZeroTest`)
//!   round_to_units data runs grow to whole units of the target where no backing data shows
//! ```

use diskimage_core::{ByteRange, is_zero, saturating_index};

/// How a run of guest data is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CopyKind {
    /// Not at all: the target's backing image has the same bytes.
    InBacking,
    /// As zeroes.
    Zero,
    /// As data.
    Data,
}

/// A run of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CopyRun {
    pub(super) range: ByteRange,
    pub(super) kind: CopyKind,
}

/// Appends a run, or extends the last one if it is of the same kind and ends at `range`.
pub(super) fn push_run(runs: &mut Vec<CopyRun>, range: ByteRange, kind: CopyKind) {
    if range.is_empty() {
        return;
    }
    match runs.last_mut() {
        Some(last) if last.kind == kind && last.range.end() == range.start() => {
            last.range = ByteRange::new(last.range.start(), range.end());
        }
        _ => runs.push(CopyRun { range, kind }),
    }
}

/// How zeroes are found in data.
#[derive(Clone, Copy, Debug)]
pub(super) struct ZeroTest {
    /// Blocks of this size at its multiples are data unless all their bytes are zero.
    unit: u64,
    /// A run of zeroes between data that is shorter than this is data.
    shortest: u64,
}

impl ZeroTest {
    /// For `-S SIZE`: blocks have the largest power of two up to SIZE, and gaps shorter than SIZE are written, as
    /// observed in the images that qemu-img makes.
    pub(super) fn sparse(sparse: u64) -> Self {
        Self {
            unit: 1 << sparse.max(1).ilog2(),
            shortest: sparse,
        }
    }

    /// For whole clusters.
    pub(super) fn clusters(cluster: u64) -> Self {
        Self {
            unit: cluster,
            shortest: 0,
        }
    }

    /// Appends the runs of `buf`, whose first byte is at guest offset `start`.
    pub(super) fn split(self, buf: &[u8], start: u64, runs: &mut Vec<CopyRun>) {
        let end = start + buf.len() as u64;
        // The end of the last data run. The zeroes after it have not been appended yet.
        let mut data_end = None;
        let mut at = start;
        let mut rest = buf;
        while at < end {
            let next = (at - at % self.unit).saturating_add(self.unit).min(end);
            let (block, tail) = rest.split_at(saturating_index(next - at).min(rest.len()));
            if !is_zero(block) {
                let gap_from = data_end.unwrap_or(start);
                let gap = ByteRange::new(gap_from, at);
                let short = data_end.is_some() && gap.len() < self.shortest;
                push_run(runs, gap, if short { CopyKind::Data } else { CopyKind::Zero });
                push_run(runs, ByteRange::new(at, next), CopyKind::Data);
                data_end = Some(next);
            }
            rest = tail;
            at = next;
        }
        push_run(
            runs,
            ByteRange::new(data_end.unwrap_or(start), end),
            CopyKind::Zero,
        );
    }
}

/// Extends data runs to whole units of the target where the rest of the unit is data or zero, so that each unit is
/// written once and without a read. `runs` cover `segment` in order and without gaps.
pub(super) fn round_to_units(runs: &[CopyRun], segment: ByteRange, unit: u64, out: &mut Vec<CopyRun>) {
    let mut first = 0;
    let mut at = segment.start();
    while at < segment.end() {
        while runs.get(first).is_some_and(|run| run.range.end() <= at) {
            first += 1;
        }
        let Some(run) = runs.get(first) else { return };
        // A run of several whole units is taken at once.
        let whole = ByteRange::new(at, run.range.end() - run.range.end() % unit).intersect(segment);
        if at.is_multiple_of(unit) && !whole.is_empty() {
            push_run(out, whole, run.kind);
            at = whole.end();
            continue;
        }
        let cell = ByteRange::new(at, (at - at % unit).saturating_add(unit)).intersect(segment);
        let inside = || {
            runs[first..]
                .iter()
                .take_while(|run| run.range.start() < cell.end())
        };
        if inside().any(|run| run.kind == CopyKind::InBacking) {
            for run in inside() {
                push_run(out, run.range.intersect(cell), run.kind);
            }
        } else {
            let data = inside().any(|run| run.kind == CopyKind::Data);
            push_run(out, cell, if data { CopyKind::Data } else { CopyKind::Zero });
        }
        at = cell.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(sparse: u64, start: u64, data: &[(usize, usize)], len: usize) -> Vec<(u64, u64)> {
        let mut buf = vec![0; len];
        for (at, len) in data {
            buf[*at..at + len].fill(1);
        }
        let mut runs = Vec::new();
        ZeroTest::sparse(sparse).split(&buf, start, &mut runs);
        assert_eq!(runs.first().map(|run| run.range.start()), Some(start));
        assert_eq!(runs.last().map(|run| run.range.end()), Some(start + len as u64));
        runs.iter()
            .filter(|run| run.kind == CopyKind::Data)
            .map(|run| (run.range.start(), run.range.len()))
            .collect()
    }

    #[test]
    fn blocks_are_aligned_to_the_disk() {
        assert_eq!(split(4096, 0, &[(4095, 2)], 16384), [(0, 8192)]);
        assert_eq!(split(4096, 512, &[(0, 1)], 512), [(512, 512)]);
        assert_eq!(
            split(4096, 3584, &[(0, 1), (8000, 1)], 10240),
            [(3584, 512), (8192, 4096)]
        );
    }

    #[test]
    fn short_gaps_between_data_are_data() {
        // As observed with qemu-img -S 12k: blocks of 8 KiB, gaps below 12 KiB written, leading and trailing zeroes
        // left out.
        assert_eq!(
            split(12288, 0, &[(8192, 1), (30000, 1), (65535, 1)], 65536),
            [(8192, 24576), (57344, 8192)]
        );
        assert_eq!(
            split(12288, 0, &[(0, 1), (40000, 1)], 49152),
            [(0, 8192), (32768, 8192)]
        );
    }

    #[test]
    fn units_with_any_data_are_data_unless_backing_data_shows() {
        let at = |start, end, kind| CopyRun {
            range: ByteRange::new(start, end),
            kind,
        };
        let rounded = |runs: &[CopyRun]| {
            let mut out = Vec::new();
            let end = runs.last().map_or(0, |run| run.range.end());
            round_to_units(runs, ByteRange::new(0, end), 100, &mut out);
            out
        };
        assert_eq!(
            rounded(&[
                at(0, 250, CopyKind::Zero),
                at(250, 260, CopyKind::Data),
                at(260, 420, CopyKind::Zero)
            ]),
            [
                at(0, 200, CopyKind::Zero),
                at(200, 300, CopyKind::Data),
                at(300, 420, CopyKind::Zero)
            ]
        );
        let mixed = [
            at(0, 50, CopyKind::InBacking),
            at(50, 60, CopyKind::Data),
            at(60, 170, CopyKind::Zero),
            at(170, 180, CopyKind::Data),
        ];
        assert_eq!(
            rounded(&mixed),
            [
                at(0, 50, CopyKind::InBacking),
                at(50, 60, CopyKind::Data),
                at(60, 100, CopyKind::Zero),
                at(100, 180, CopyKind::Data)
            ]
        );
    }
}
