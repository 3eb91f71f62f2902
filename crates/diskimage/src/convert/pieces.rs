//! What a segment consists of, and what is to be done about it.

use diskimage_core::{ByteRange, is_zero};

/// What a run of the guest's bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The image below the target has it already.
    Below,
    /// Known to be zero.
    Zero,
    /// Bytes to be written as they are.
    Data,
}

/// A run of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) range: ByteRange,
    pub(super) kind: Kind,
}

/// Appends a piece, or makes the last one longer.
pub(super) fn push(pieces: &mut Vec<Piece>, range: ByteRange, kind: Kind) {
    if range.is_empty() {
        return;
    }
    match pieces.last_mut() {
        Some(last) if last.kind == kind && last.range.end() == range.start() => {
            last.range = ByteRange::new(last.range.start(), range.end());
        }
        _ => pieces.push(Piece { range, kind }),
    }
}

/// How zeroes are found in data.
#[derive(Clone, Copy, Debug)]
pub(super) struct ZeroTest {
    /// Blocks at multiples of this are all zero or count as data.
    unit: u64,
    /// Fewer zero bytes than this between data are data.
    shortest: u64,
}

impl ZeroTest {
    /// As `-S` asks for: the blocks are the largest power of two that fits, and gaps shorter than what was asked for
    /// are written. That is how the original's results look.
    pub(super) fn sparse(sparse: u64) -> Self {
        Self {
            unit: 1 << sparse.max(1).ilog2(),
            shortest: sparse,
        }
    }

    /// Whole clusters.
    pub(super) fn clusters(cluster: u64) -> Self {
        Self {
            unit: cluster,
            shortest: 0,
        }
    }

    /// Appends what the bytes of `buf`, which are those from `start` on, are.
    pub(super) fn split(self, buf: &[u8], start: u64, pieces: &mut Vec<Piece>) {
        let end = start + buf.len() as u64;
        // Where the last data ended; what follows it is not decided yet.
        let mut data_end = None;
        let mut at = start;
        let mut rest = buf;
        while at < end {
            let next = (at - at % self.unit).saturating_add(self.unit).min(end);
            let (block, tail) = rest.split_at(usize::try_from(next - at).unwrap_or(rest.len()));
            if !is_zero(block) {
                let gap_from = data_end.unwrap_or(start);
                let gap = ByteRange::new(gap_from, at);
                let short = data_end.is_some() && gap.len() < self.shortest;
                push(pieces, gap, if short { Kind::Data } else { Kind::Zero });
                push(pieces, ByteRange::new(at, next), Kind::Data);
                data_end = Some(next);
            }
            rest = tail;
            at = next;
        }
        push(pieces, ByteRange::new(data_end.unwrap_or(start), end), Kind::Zero);
    }
}

/// Rounds data out to whole units of the target where everything around it is known, so that each unit is written once
/// and nothing has to be read for it. `pieces` are those of `segment` in order and without gaps.
pub(super) fn round_to_units(pieces: &[Piece], segment: ByteRange, unit: u64, out: &mut Vec<Piece>) {
    let mut first = 0;
    let mut at = segment.start();
    while at < segment.end() {
        while pieces.get(first).is_some_and(|piece| piece.range.end() <= at) {
            first += 1;
        }
        let Some(piece) = pieces.get(first) else { return };
        // A piece that goes on for whole units needs no look at each of them.
        let whole = ByteRange::new(at, piece.range.end() - piece.range.end() % unit).intersect(segment);
        if at.is_multiple_of(unit) && !whole.is_empty() {
            push(out, whole, piece.kind);
            at = whole.end();
            continue;
        }
        let cell = ByteRange::new(at, (at - at % unit).saturating_add(unit)).intersect(segment);
        let inside = || {
            pieces[first..]
                .iter()
                .take_while(|piece| piece.range.start() < cell.end())
        };
        if inside().any(|piece| piece.kind == Kind::Below) {
            for piece in inside() {
                push(out, piece.range.intersect(cell), piece.kind);
            }
        } else {
            let data = inside().any(|piece| piece.kind == Kind::Data);
            push(out, cell, if data { Kind::Data } else { Kind::Zero });
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
        let mut pieces = Vec::new();
        ZeroTest::sparse(sparse).split(&buf, start, &mut pieces);
        assert_eq!(pieces.first().map(|piece| piece.range.start()), Some(start));
        assert_eq!(
            pieces.last().map(|piece| piece.range.end()),
            Some(start + len as u64)
        );
        pieces
            .iter()
            .filter(|piece| piece.kind == Kind::Data)
            .map(|piece| (piece.range.start(), piece.range.len()))
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
        // As observed with the original for -S 12k: blocks of 8 KiB, gaps below 12 KiB written, leading and trailing
        // zeroes left out.
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
    fn units_with_any_data_are_data_unless_something_below_shows() {
        let at = |start, end, kind| Piece {
            range: ByteRange::new(start, end),
            kind,
        };
        let rounded = |pieces: &[Piece]| {
            let mut out = Vec::new();
            let end = pieces.last().map_or(0, |piece| piece.range.end());
            round_to_units(pieces, ByteRange::new(0, end), 100, &mut out);
            out
        };
        assert_eq!(
            rounded(&[
                at(0, 250, Kind::Zero),
                at(250, 260, Kind::Data),
                at(260, 420, Kind::Zero)
            ]),
            [
                at(0, 200, Kind::Zero),
                at(200, 300, Kind::Data),
                at(300, 420, Kind::Zero)
            ]
        );
        let mixed = [
            at(0, 50, Kind::Below),
            at(50, 60, Kind::Data),
            at(60, 170, Kind::Zero),
            at(170, 180, Kind::Data),
        ];
        assert_eq!(
            rounded(&mixed),
            [
                at(0, 50, Kind::Below),
                at(50, 60, Kind::Data),
                at(60, 100, Kind::Zero),
                at(100, 180, Kind::Data)
            ]
        );
    }
}
