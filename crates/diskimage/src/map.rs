//! Where the bytes of a disk are.

use std::sync::Arc;

use diskimage_core::{ByteRange, Device, Extent, ExtentKind, Image, Result, ResultExt, StatusDetail};

/// A run of bytes of the guest's disk that are alike.
#[derive(Clone, Debug)]
pub struct MappedExtent {
    /// The bytes.
    pub range: ByteRange,
    /// What they are.
    pub kind: ExtentKind,
    /// How many images further down the chain they come from.
    pub depth: u32,
    /// Where the first one lies, if it lies anywhere as it is.
    pub host: Option<(Arc<dyn Device>, u64)>,
}

impl MappedExtent {
    pub(crate) fn new(start: u64, extent: Extent) -> Self {
        Self {
            range: ByteRange::at(start, extent.len),
            kind: extent.kind,
            depth: extent.depth,
            host: extent.host,
        }
    }

    /// Whether `next`, which follows, is more of the same.
    pub(crate) fn continues_in(&self, next: &Self) -> bool {
        let hosts_follow = match (&self.host, &next.host) {
            (None, None) => true,
            (Some((device, offset)), Some((other, next_offset))) => {
                Arc::ptr_eq(device, other) && offset + self.range.len() == *next_offset
            }
            _ => false,
        };
        self.kind == next.kind && self.depth == next.depth && hosts_follow
    }
}

/// Tells `found` of every extent of `image` in `range`, in order, neighbours that are alike joined. What lies beyond the
/// end of the disk is left out.
///
/// The image is walked as `found` is called, so that a map of any length takes no memory.
///
/// # Errors
/// Damage found in tables, and the first error of `found`.
pub fn map(image: &Image, range: ByteRange, mut found: impl FnMut(MappedExtent) -> Result<()>) -> Result<()> {
    let mut rest = range.intersect(ByteRange::new(0, image.len()));
    if image.layer().capabilities().hides_allocation && !rest.is_empty() {
        return found(MappedExtent {
            range: rest,
            kind: ExtentKind::Data,
            depth: 0,
            host: None,
        });
    }
    let mut pending: Option<MappedExtent> = None;
    while !rest.is_empty() {
        let extent = image
            .status(rest, StatusDetail::Zeroes)
            .context(|| "Could not read file metadata")?;
        let next = MappedExtent::new(rest.start(), extent);
        rest = rest.skip(next.range.len());
        pending = match pending.take() {
            Some(before) if before.continues_in(&next) => Some(MappedExtent {
                range: ByteRange::new(before.range.start(), next.range.end()),
                ..before
            }),
            Some(before) => {
                found(before)?;
                Some(next)
            }
            None => Some(next),
        };
    }
    pending.map_or(Ok(()), found)
}
