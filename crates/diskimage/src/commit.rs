//! Committing an overlay: its data is written into one of its backing images.
//!
//! ```text
//!   top         [ a ][   ][ c ][   ]     depth 0
//!   middle      [   ][ b ][   ][   ]     depth 1
//!   base        [ x ][ y ][ z ][ w ]     depth 2, the image committed to
//!       becomes [ a ][ b ][ c ][ w ]
//! ```

use std::sync::Arc;

use diskimage_core::{
    Device, Error, Image, Preallocation, Progress, ResizeRequest, Result, name, saturating_u32,
};

use crate::convert::Conversion;
use crate::graph::full_backing_name;

/// A commit. The chain is opened with [`OpenOptions::write_below`](crate::OpenOptions::write_below) for the base.
#[derive(Debug)]
pub struct Commit<'a> {
    /// The topmost image of the chain.
    pub top: &'a Arc<Image>,
    /// The depth of the base in the chain: 1 is the backing image of `top`.
    pub depth: usize,
    /// The limit of bytes written per second.
    pub rate: Option<u64>,
    /// Receives the number of bytes done and the total.
    pub progress: Progress<'a>,
}

impl Commit<'_> {
    /// Writes the data that the overlays of the base have allocated into the base and flushes it. The base grows first
    /// if the top is larger. Afterwards the base alone reads as the top does; the overlays have not changed.
    ///
    /// # Errors
    /// The chain has no image at `depth`, the base cannot grow, or reading or writing fails.
    pub fn run(&self) -> Result<()> {
        let base = backing_at_depth(self.top, self.depth)
            .ok_or_else(|| Error::invalid("Image does not have a backing file"))?;
        let old = base.len();
        if old < self.top.len() {
            base.resize_with(&ResizeRequest::new(self.top.len(), Preallocation::Off))?;
        }
        let sources = [Arc::clone(self.top)];
        let conversion = Conversion {
            // The base reads as zero beyond its old end.
            target_is_zero: true,
            backing_len: Some(old),
            layers: saturating_u32(self.depth),
            detect_zeroes: false,
            rate: self.rate,
            progress: self.progress,
            ..Conversion::new(&sources, &base)
        };
        conversion.run()?;
        base.flush()
    }
}

/// The image at `depth` of the chain of `top`.
fn backing_at_depth(top: &Arc<Image>, depth: usize) -> Option<Arc<Image>> {
    let mut image = Arc::clone(top);
    for _ in 0..depth {
        image = Arc::clone(image.backing()?);
    }
    Some(image)
}

/// The depth of the backing image that the user calls `name`: either the backing file name that its overlay stores, or
/// a name that is relative to the same directory as that one.
pub fn depth_of(top: &Arc<Image>, name: &str) -> Option<usize> {
    let mut overlay = Arc::clone(top);
    let mut depth = 0;
    loop {
        let image = Arc::clone(overlay.backing()?);
        depth += 1;
        let is_named = overlay
            .layer()
            .backing()
            .is_some_and(|backing| backing.name.text() == name);
        let full = full_backing_name(&overlay.base_name(), name);
        if is_named || image.name() == full || is_same_file(&image.base_name(), &full) {
            return Some(depth);
        }
        overlay = image;
    }
}

fn is_same_file(one: &str, other: &str) -> bool {
    matches!(
        (name::to_path(one).canonicalize(), name::to_path(other).canonicalize()),
        (Ok(one), Ok(other)) if one == other
    )
}

#[cfg(test)]
mod tests {
    use diskimage_core::{ByteRange, RunKind, ZeroMode};

    use super::*;
    use crate::testing::{contents, image_on};

    /// A chain of three images of different sizes; the second and the third are shorter than the first.
    #[test]
    fn the_base_alone_reads_as_the_top_did() {
        for depth in [1, 2] {
            let bottom = image_on("qcow2", "cluster_size=4k", 256 << 10, None);
            bottom.write_at(&[1; 256 << 10], 0).expect("writes");
            let middle = image_on("qcow2", "cluster_size=512", 128 << 10, Some(&bottom));
            middle.write_at(&[2; 5000], 3000).expect("writes");
            let top = image_on("qcow2", "extended_l2=on", 300 << 10, Some(&middle));
            top.write_at(&[3; 700], 100_000).expect("writes");
            let hole = ByteRange::new(8192, 65536);
            top.write_zeroes(hole, ZeroMode::Unmap).expect("zeroes");
            let before = contents(&top);
            let commit = Commit {
                top: &top,
                depth,
                rate: None,
                progress: Progress::none(),
            };
            commit.run().expect("commits");
            let base = if depth == 1 { &middle } else { &bottom };
            assert!(contents(base) == before, "depth {depth}");
            if depth == 1 {
                top.make_empty().expect("empties");
                assert!(contents(&top) == before);
                let all = ByteRange::new(0, top.len());
                let run = top.layer().map(all).expect("maps");
                assert!(
                    matches!(run.kind, RunKind::Unallocated { .. }) && run.len == top.len(),
                    "{run:?}"
                );
            }
        }
    }
}
