//! The order in which `qemu-img` prints the members of objects that no schema describes.
//!
//! `qemu-img` keeps them in a hash table with 512 buckets and prints bucket by bucket. Scripts compare such output as
//! text, so this order has to be the same.

use crate::saturating_u32;

const BUCKETS: u32 = 512;

/// The bucket that `name` falls into.
pub(super) fn bucket(name: &str) -> u32 {
    let len = saturating_u32(name.len());
    let shifts = (0u32..).map(|at| at.wrapping_mul(5) % 24);
    let sum = name
        .bytes()
        .zip(shifts)
        .fold(len.wrapping_mul(0x238f_13af), |sum, (byte, shift)| {
            sum.wrapping_add(u32::from(byte) << shift)
        });
    sum.wrapping_mul(1_103_515_243).wrapping_add(12_345) % BUCKETS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn observed_orders_hold() {
        for names in [
            &["offset", "driver", "size", "file"][..],
            &["driver", "filename"],
            &[
                "children",
                "virtual-size",
                "filename",
                "cluster-size",
                "format",
                "actual-size",
            ],
            &[
                "compat",
                "compression-type",
                "lazy-refcounts",
                "refcount-bits",
                "corrupt",
            ],
        ] {
            assert!(names.is_sorted_by_key(|name| bucket(name)), "{names:?}");
        }
    }
}
