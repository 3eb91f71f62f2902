//! The refcounts of a block: big-endian numbers, or bit fields that start at the least significant bit.

use diskimage_core::saturating_u32;

/// The position of a refcount in its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) struct Slot {
    /// The first byte.
    pub(in crate::qcow2) byte: u64,
    /// The lowest bit in that byte, for refcounts narrower than a byte.
    shift: u32,
}

impl Slot {
    /// The slot of entry `index` in a block of refcounts that are `1 << order` bits wide.
    pub(in crate::qcow2) fn new(index: u64, order: u32) -> Self {
        let bit = index << order;
        Self {
            byte: bit / 8,
            // Below 8.
            shift: saturating_u32(bit % 8),
        }
    }
}

/// Reads the refcount at the start of `bytes`, which begins at the slot's byte.
pub(in crate::qcow2) fn read(bytes: &[u8], slot: Slot, order: u32) -> Option<u64> {
    if order < 3 {
        let mask = u8::MAX >> (8 - (1 << order));
        return bytes.first().map(|byte| u64::from((byte >> slot.shift) & mask));
    }
    match order {
        3 => bytes.first().map(|byte| u64::from(*byte)),
        4 => bytes
            .first_chunk()
            .map(|bytes| u64::from(u16::from_be_bytes(*bytes))),
        5 => bytes
            .first_chunk()
            .map(|bytes| u64::from(u32::from_be_bytes(*bytes))),
        _ => bytes.first_chunk().map(|bytes| u64::from_be_bytes(*bytes)),
    }
}

/// Writes the refcount at the start of `bytes`, which begins at the slot's byte.
pub(in crate::qcow2) fn write(bytes: &mut [u8], slot: Slot, order: u32, count: u64) -> Option<()> {
    let be = count.to_be_bytes();
    if order < 3 {
        let mask = (u8::MAX >> (8 - (1 << order))) << slot.shift;
        let byte = bytes.first_mut()?;
        *byte = (*byte & !mask) | ((be[7] << slot.shift) & mask);
        return Some(());
    }
    match order {
        3 => *bytes.first_mut()? = be[7],
        4 => *bytes.first_chunk_mut()? = [be[6], be[7]],
        5 => *bytes.first_chunk_mut()? = [be[4], be[5], be[6], be[7]],
        _ => *bytes.first_chunk_mut()? = be,
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_every_width_read_back_and_leave_their_neighbours() {
        for order in 0..=6u32 {
            let max = u64::MAX >> (64 - (1u32 << order));
            let mut block = vec![0xff; 512];
            for index in [0, 1, 2, 7, 8, 33, 63] {
                let slot = Slot::new(index, order);
                let at = usize::try_from(slot.byte).unwrap_or(0);
                for count in [0, 1, max / 2, max] {
                    write(&mut block[at..], slot, order, count).expect("in the block");
                    assert_eq!(
                        read(&block[at..], slot, order),
                        Some(count),
                        "order {order} index {index}"
                    );
                }
            }
            assert!(block.iter().all(|byte| *byte == 0xff));
        }
    }

    #[test]
    fn narrow_refcounts_start_at_the_least_significant_bit() {
        let mut byte = [0];
        write(&mut byte, Slot::new(1, 1), 1, 3).expect("in the block");
        assert_eq!(byte, [0b1100]);
    }
}
