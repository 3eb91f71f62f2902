//! The refcounts of a block: big-endian numbers, or bit fields that start at the least significant bit.

use diskimage_core::{saturating_index, saturating_u32};

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

/// The number of leading refcounts for which `keep` is true, among the `count` refcounts from `slot` on. `bytes` begins at
/// the slot's byte; refcounts that it does not have are not examined.
///
/// For runs: the width is looked at once and not for each refcount.
pub(in crate::qcow2) fn count_while(
    bytes: &[u8],
    slot: Slot,
    order: u32,
    count: u64,
    mut keep: impl FnMut(u64) -> bool,
) -> u64 {
    match order {
        3 => count_numbers::<1>(bytes, count, keep),
        4 => count_numbers::<2>(bytes, count, keep),
        5 => count_numbers::<4>(bytes, count, keep),
        6 => count_numbers::<8>(bytes, count, keep),
        _ => {
            let kept = narrow_slots(bytes.len(), slot, order, count)
                .take_while(|(at, slot)| read(&bytes[*at..], *slot, order).is_some_and(&mut keep));
            kept.count() as u64
        }
    }
}

fn count_numbers<const N: usize>(bytes: &[u8], count: u64, mut keep: impl FnMut(u64) -> bool) -> u64 {
    let numbers = bytes.as_chunks::<N>().0.iter().take(saturating_index(count));
    numbers.take_while(|bytes| keep(number(**bytes))).count() as u64
}

/// Replaces the `count` refcounts from `slot` on by the results of `update`, until it fails. Returns how many were
/// replaced, and for a failure the refcount as it is and the error. `bytes` begins at the slot's byte; refcounts that it
/// does not have are not replaced.
pub(in crate::qcow2) fn update_each<E>(
    bytes: &mut [u8],
    slot: Slot,
    order: u32,
    count: u64,
    mut update: impl FnMut(u64) -> Result<u64, E>,
) -> (u64, Option<(u64, E)>) {
    match order {
        3 => update_numbers::<1, E>(bytes, count, update),
        4 => update_numbers::<2, E>(bytes, count, update),
        5 => update_numbers::<4, E>(bytes, count, update),
        6 => update_numbers::<8, E>(bytes, count, update),
        _ => {
            let mut done = 0;
            for (at, slot) in narrow_slots(bytes.len(), slot, order, count) {
                let used = read(&bytes[at..], slot, order).unwrap_or(0);
                match update(used) {
                    // The slot is inside `bytes`.
                    Ok(new) => _ = write(&mut bytes[at..], slot, order, new),
                    Err(error) => return (done, Some((used, error))),
                }
                done += 1;
            }
            (done, None)
        }
    }
}

fn update_numbers<const N: usize, E>(
    bytes: &mut [u8],
    count: u64,
    mut update: impl FnMut(u64) -> Result<u64, E>,
) -> (u64, Option<(u64, E)>) {
    let mut done = 0;
    for bytes in bytes
        .as_chunks_mut::<N>()
        .0
        .iter_mut()
        .take(saturating_index(count))
    {
        let used = number(*bytes);
        match update(used) {
            Ok(new) => bytes.copy_from_slice(&new.to_be_bytes()[8 - N..]),
            Err(error) => return (done, Some((used, error))),
        }
        done += 1;
    }
    (done, None)
}

/// Whether the refcounts of whole bytes at the start of `bytes` are equal to `counts`. `false` for refcounts narrower than
/// a byte, which are not compared.
pub(in crate::qcow2) fn equal(bytes: &[u8], order: u32, counts: &[u8]) -> bool {
    match order {
        3 => equal_numbers::<1>(bytes, counts),
        4 => equal_numbers::<2>(bytes, counts),
        5 => equal_numbers::<4>(bytes, counts),
        6 => equal_numbers::<8>(bytes, counts),
        _ => false,
    }
}

fn equal_numbers<const N: usize>(bytes: &[u8], counts: &[u8]) -> bool {
    let Some(numbers) = bytes.as_chunks::<N>().0.get(..counts.len()) else {
        return false;
    };
    let pairs = numbers.iter().zip(counts);
    // No early end, so that the compiler compares many at once.
    pairs.fold(true, |equal, (bytes, count)| {
        equal & (number(*bytes) == u64::from(*count))
    })
}

/// The big-endian number in `bytes`.
fn number<const N: usize>(bytes: [u8; N]) -> u64 {
    bytes
        .iter()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// The slots of up to `count` refcounts narrower than a byte from `first` on, each with its position in the `len` bytes
/// that begin at the byte of `first`.
fn narrow_slots(len: usize, first: Slot, order: u32, count: u64) -> impl Iterator<Item = (usize, Slot)> {
    let start = u64::from(first.shift) >> order;
    let entries = ((len as u64 * 8) >> order).saturating_sub(start).min(count);
    (start..start + entries).map(move |index| {
        let slot = Slot::new(index, order);
        // Below `len`.
        (saturating_index(slot.byte), slot)
    })
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

    #[test]
    fn runs_are_read_and_changed_as_single_refcounts_are() {
        for order in 0..=6u32 {
            let max = u64::MAX >> (64 - (1u32 << order));
            for (first, count) in [(0, 40), (3, 1), (5, 30), (8, 0), (60, 200)] {
                let start = Slot::new(first, order);
                let at = usize::try_from(start.byte).expect("small");
                let mut block = vec![0; (64 << order) / 8];
                let single = |block: &[u8], index| {
                    let slot = Slot::new(index, order);
                    let at = usize::try_from(slot.byte).expect("small");
                    read(block.get(at..)?, slot, order)
                };
                let entries = count.min(64 - first);
                let updated = update_each(&mut block[at..], start, order, count, |used| {
                    Ok::<_, ()>(used + 1)
                });
                assert_eq!(updated, (entries, None), "order {order} first {first}");
                for index in 0..64 {
                    let inside = (first..first + entries).contains(&index);
                    assert_eq!(
                        single(&block, index),
                        Some(u64::from(inside)),
                        "order {order} index {index}"
                    );
                }
                let used = count_while(&block[at..], start, order, count, |used| used == 1);
                assert_eq!(used, entries, "order {order} first {first}");
                let most = max.min(2);
                let refused = update_each(&mut block[at..], start, order, count, |used| match used < most {
                    true => Ok(most),
                    false => Err("full"),
                });
                let full = (max == 1 && entries > 0).then_some((1, "full"));
                assert_eq!(
                    refused,
                    (if full.is_some() { 0 } else { entries }, full),
                    "order {order}"
                );
            }
        }
    }

    #[test]
    fn whole_refcounts_are_compared_with_counts() {
        let counts = [0, 1, 255, 7];
        for order in 3..=6u32 {
            let mut block = vec![0; 4 << (order - 3)];
            for (index, count) in (0..).zip(counts) {
                let slot = Slot::new(index, order);
                let at = usize::try_from(slot.byte).expect("small");
                write(&mut block[at..], slot, order, count.into()).expect("in the block");
            }
            assert!(equal(&block, order, &counts), "order {order}");
            assert!(equal(&block, order, &counts[..3]), "order {order}");
            assert!(!equal(&block, order, &[0, 1, 255, 8]), "order {order}");
            assert!(!equal(&block, order, &[0; 5]), "order {order}");
            for byte in 0..block.len() {
                block[byte] ^= 1;
                assert!(!equal(&block, order, &counts), "order {order} byte {byte}");
                block[byte] ^= 1;
            }
        }
    }
}
