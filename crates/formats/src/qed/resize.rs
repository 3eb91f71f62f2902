//! Growing the disk.

use std::sync::atomic::Ordering;

use diskimage_core::{ByteRange, Error, Layer, ResizeRequest, Result, ZeroMode};

use super::Qed;
use crate::layer_kit::preallocation;

/// Refuses sizes that the tables do not reach, and smaller ones.
pub(super) fn check(image: &Qed, request: &ResizeRequest) -> Result<()> {
    preallocation::require_off(request.preallocation)?;
    if !image.geometry.fits(request.len) {
        return Err(Error::invalid("Invalid image size specified"));
    }
    // The size in the header may be larger than that of the disk.
    if request.len < image.header().image_size {
        return Err(Error::unsupported("Shrinking images is currently not supported"));
    }
    Ok(())
}

/// Changes the size in the header. What a longer backing image would show in the new range becomes zero before.
pub(super) fn grow(image: &Qed, request: &ResizeRequest) -> Result<()> {
    let shown = ByteRange::new(image.len(), request.backing_len.min(request.len))
        .align_out(image.geometry.cluster_size);
    // The partial last cluster is not zeroed: it holds the end of the disk.
    let shown = ByteRange::new(
        image.len().next_multiple_of(image.geometry.cluster_size),
        shown.end(),
    );
    if !shown.is_empty() {
        image.tree.zero_clusters(shown, ZeroMode::Unmap)?;
    }
    image.tree.flush()?;
    image.tree.scheme().change_header(|header| {
        header.image_size = request.len;
        Ok(())
    })?;
    image.len.store(request.len, Ordering::Relaxed);
    Ok(())
}
