//! The map of a disk: its extents with their allocation status.

use std::sync::Arc;

use diskimage_core::{ByteRange, Device, Extent, ExtentKind, Image, Result, ResultExt, StatusDetail};

/// An extent of the guest disk: a range whose bytes have the same status.
#[derive(Clone, Debug)]
pub struct MappedExtent {
    /// The guest offsets.
    pub range: ByteRange,
    /// Whether the bytes are data, zero or unallocated.
    pub kind: ExtentKind,
    /// The depth in the chain of the image that has the bytes: 0 is the topmost one.
    pub depth: u32,
    /// The device and the host offset of the first byte, if a file has the bytes unencoded.
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

    /// Whether `next`, which starts at the end of `self`, has the same status and continues it in the file.
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

/// Calls `found` with every extent of `image` in `range`, in guest order. Neighbours that continue each other are
/// joined. The range ends at the end of the disk at the latest.
///
/// Extents are not collected, so the memory does not grow with the map.
///
/// # Errors
/// Tables of the image are unreadable or corrupt, or `found` returns an error.
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
