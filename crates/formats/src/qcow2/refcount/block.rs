//! Refcounts inside a block: big-endian numbers, or bit fields from the least significant bit up.

/// Where a refcount is in its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) struct Slot {
    /// Its first byte.
    pub(in crate::qcow2) byte: u64,
    /// The bit in that byte, if it is narrower than one.
    shift: u32,
}

impl Slot {
    /// The place of entry `index` in a block of counts that are `1 << order` bits wide.
    pub(in crate::qcow2) fn new(index: u64, order: u32) -> Self {
        let bit = index << order;
        Self {
            byte: bit / 8,
            shift: u32::try_from(bit % 8).unwrap_or(0),
        }
    }
}

/// The count at the start of `bytes`, which begin at the place's byte.
pub(in crate::qcow2) fn read(bytes: &[u8], place: Slot, order: u32) -> Option<u64> {
    if order < 3 {
        let mask = u8::MAX >> (8 - (1 << order));
        return bytes.first().map(|byte| u64::from((byte >> place.shift) & mask));
    }
    let bytes = bytes.get(..1 << (order - 3))?;
    Some(bytes.iter().fold(0, |count, byte| count << 8 | u64::from(*byte)))
}

/// Changes the count at the start of `bytes`.
pub(in crate::qcow2) fn write(bytes: &mut [u8], place: Slot, order: u32, count: u64) -> Option<()> {
    let be = count.to_be_bytes();
    if order < 3 {
        let mask = (u8::MAX >> (8 - (1 << order))) << place.shift;
        let byte = bytes.first_mut()?;
        *byte = (*byte & !mask) | ((be[7] << place.shift) & mask);
        return Some(());
    }
    let width = 1 << (order - 3);
    bytes.get_mut(..width)?.copy_from_slice(&be[8 - width..]);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_reads_what_was_written_and_leaves_its_neighbours() {
        for order in 0..=6u32 {
            let max = u64::MAX >> (64 - (1u32 << order));
            let mut block = vec![0xff; 512];
            for index in [0, 1, 2, 7, 8, 33, 63] {
                let place = Slot::new(index, order);
                let at = usize::try_from(place.byte).unwrap_or(0);
                for count in [0, 1, max / 2, max] {
                    write(&mut block[at..], place, order, count).expect("in the block");
                    assert_eq!(
                        read(&block[at..], place, order),
                        Some(count),
                        "order {order} index {index}"
                    );
                }
            }
            assert!(block.iter().all(|byte| *byte == 0xff));
        }
    }

    #[test]
    fn narrow_counts_start_at_the_least_significant_bit() {
        let mut byte = [0];
        write(&mut byte, Slot::new(1, 1), 1, 3).expect("in the block");
        assert_eq!(byte, [0b1100]);
    }
}
