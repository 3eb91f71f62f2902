//! Writes of encoded clusters whose storage is allocated together.
//!
//! ```text
//!   buffer   [ first | second      | third ]           the encoded bytes, as the caller has them
//!   file     [ first | second      ][ third ]          neighbours are one write
//! ```
//!
//! Neighbours may have fewer bytes than a sector between them, which alignment has left: they are written as zeroes.

use std::ops::Range;
use std::sync::Arc;

use diskimage_core::{
    Device, EncodedCluster, EncodedPlan, Error, Event, Result, WritePlan, to_index, vec_with_room,
};

use crate::layer_kit::allocating_plan::{AllocatingPlan, Allocator};

/// No alignment leaves as many bytes as this between neighbours.
const SECTOR: u64 = 512;

/// An encoded cluster in the file.
#[derive(Debug)]
pub(crate) struct Piece {
    /// The host offset.
    pub(crate) offset: u64,
    /// What is stored in front of the encoded bytes.
    pub(crate) head: Vec<u8>,
    /// The encoded bytes, as a range of the caller's buffer.
    pub(crate) bytes: Range<usize>,
    /// Bytes in the file, at least those of `head` and `bytes`; the rest are zeroes.
    pub(crate) stored: u64,
}

impl Piece {
    /// The encoded bytes alone.
    pub(crate) fn plain(offset: u64, bytes: &Range<usize>) -> Self {
        Self {
            offset,
            head: Vec::new(),
            bytes: bytes.clone(),
            stored: bytes.len() as u64,
        }
    }

    fn end(&self) -> u64 {
        self.offset.saturating_add(self.stored)
    }

    /// Whether `next` can be written together with this one.
    fn is_before(&self, next: &Self) -> bool {
        (self.end()..self.end().saturating_add(SECTOR)).contains(&next.offset)
    }
}

/// Checks that clusters are in guest order, and that there are any. Returns the guest offsets of the first and the last.
///
/// # Errors
/// Other clusters.
pub(crate) fn in_order(clusters: &[EncodedCluster]) -> Result<(u64, u64)> {
    match clusters {
        [first, .., last] if clusters.is_sorted_by(|a, b| a.offset < b.offset) => {
            Ok((first.offset, last.offset))
        }
        [one] => Ok((one.offset, one.offset)),
        _ => Err(Error::invalid("Encoded clusters are not in guest order")),
    }
}

/// A plan whose clusters are written encoded.
pub(crate) struct EncodedWrite<'a, A: Allocator> {
    pub(crate) plan: AllocatingPlan<'a, A>,
    pub(crate) device: Arc<dyn Device>,
    /// In the order of their host offsets.
    pub(crate) pieces: Vec<Piece>,
}

impl<A: Allocator> EncodedPlan for EncodedWrite<'_, A> {
    fn finish(self: Box<Self>, buf: &[u8]) -> Result<()> {
        let mut rest = &self.pieces[..];
        while !rest.is_empty() {
            let joined = rest
                .windows(2)
                .take_while(|pair| pair[0].is_before(&pair[1]))
                .count();
            let (together, behind) = rest.split_at(joined + 1);
            write(&*self.device, together, buf)?;
            rest = behind;
        }
        Box::new(self.plan).commit()
    }
}

/// Writes neighbours.
///
/// # Errors
/// Those of the device, and a buffer that lacks bytes.
pub(crate) fn write(device: &dyn Device, pieces: &[Piece], buf: &[u8]) -> Result<()> {
    let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else {
        return Ok(());
    };
    let missing = || Error::invalid("Too few bytes to write");
    device.event(Event::WRITE_COMPRESSED);
    let is_bytes_alone = |piece: &Piece| piece.stored == piece.bytes.len() as u64;
    let is_alike = |pair: &[Piece]| {
        let (before, next) = (&pair[0], &pair[1]);
        before.end() == next.offset && before.bytes.end == next.bytes.start
    };
    if pieces.iter().all(is_bytes_alone) && pieces.windows(2).all(is_alike) {
        let bytes = buf.get(first.bytes.start..last.bytes.end).ok_or_else(missing)?;
        return device.write_at(bytes, first.offset);
    }
    let mut out = vec_with_room(to_index(last.end().saturating_sub(first.offset))?)?;
    for piece in pieces {
        out.resize(to_index(piece.offset - first.offset)?, 0);
        out.extend_from_slice(&piece.head);
        out.extend_from_slice(buf.get(piece.bytes.clone()).ok_or_else(missing)?);
        out.resize(to_index(piece.end() - first.offset)?, 0);
    }
    device.write_at(&out, first.offset)
}

#[cfg(test)]
mod tests {
    use diskimage_core::MemoryDevice;
    use diskimage_testing::{Fault, FaultyDevice, Requests};

    use super::*;

    /// Writes neighbours to a device of 0xee bytes, where no second write succeeds. Returns the first `len` bytes.
    fn written(pieces: &[Piece], buf: &[u8], len: usize) -> Result<Vec<u8>> {
        let memory = Arc::new(MemoryDevice::new(vec![0xee; len]));
        let device = FaultyDevice::new(Arc::<MemoryDevice>::clone(&memory));
        device.arm(Fault::from(1).counting(Requests::Writes));
        write(&device, pieces, buf)?;
        Ok(memory.contents())
    }

    #[test]
    fn neighbours_are_one_write() {
        let pieces = [Piece::plain(3, &(1..3)), Piece::plain(5, &(3..4))];
        assert!(pieces[0].is_before(&pieces[1]));
        assert_eq!(
            written(&pieces, b"0123", 8).expect("has all"),
            b"\xee\xee\xee123\xee\xee"
        );
        let apart = [Piece::plain(3, &(0..1)), Piece::plain(6, &(3..4))];
        assert!(apart[0].is_before(&apart[1]));
        assert_eq!(
            written(&apart, b"0123", 8).expect("has all"),
            b"\xee\xee\xee0\0\x003\xee"
        );
    }

    #[test]
    fn what_is_a_sector_away_or_in_front_is_no_neighbour() {
        let at = |offset| Piece::plain(offset, &(0..8));
        assert!(at(1000).is_before(&at(1008 + 511)));
        assert!(!at(1000).is_before(&at(1008 + 512)));
        assert!(!at(1000).is_before(&at(1007)));
    }

    #[test]
    fn heads_are_in_front_and_zeroes_behind() {
        let piece = Piece {
            offset: 1,
            head: b"head".to_vec(),
            bytes: 1..3,
            stored: 9,
        };
        assert_eq!(
            written(&[piece], b"0123", 11).expect("has all"),
            b"\xeehead12\0\0\0\xee"
        );
    }

    #[test]
    fn bytes_that_the_buffer_lacks_are_an_error() {
        assert!(written(&[Piece::plain(0, &(1..5))], b"0123", 8).is_err());
        let pieces = [Piece::plain(0, &(0..1)), Piece::plain(7, &(3..5))];
        assert!(written(&pieces, b"0123", 8).is_err());
    }

    #[test]
    fn only_clusters_in_guest_order_are_taken() {
        let at = |offset| EncodedCluster { offset, bytes: 0..1 };
        assert_eq!(in_order(&[at(5)]).expect("one"), (5, 5));
        assert_eq!(in_order(&[at(5), at(6), at(9)]).expect("in order"), (5, 9));
        for wrong in [vec![], vec![at(5), at(5)], vec![at(5), at(9), at(6)]] {
            assert!(in_order(&wrong).is_err(), "{wrong:?}");
        }
    }
}
