//! What of a source is there to be copied, in the clusters of a target: for measuring.

use diskimage_core::{ByteRange, Device, ExtentKind, Image, MeasureSource, Result, StatusDetail};

/// Tells `found` of the clusters that hold data which is not known to be zero, each of them once and in order.
pub(crate) fn for_each_used(image: &Image, cluster: u64, mut found: impl FnMut(ByteRange)) -> Result<()> {
    let mut rest = ByteRange::new(0, image.len());
    while !rest.is_empty() {
        let extent = image.status(rest, StatusDetail::Zeroes)?;
        let mut len = extent.len;
        if !extent.kind.is_zero() && extent.kind != ExtentKind::UnknownHole {
            // The clusters that it touches count as a whole, and the next search starts behind them.
            let touched = ByteRange::at(rest.start(), len).align_out(cluster);
            found(touched);
            len = touched.end() - rest.start();
        }
        rest = rest.skip(len);
    }
    Ok(())
}

/// Bytes of clusters that hold data which is not known to be zero.
pub(crate) fn data_bytes(image: &Image, cluster: u64) -> Result<u64> {
    let mut total = 0;
    for_each_used(image, cluster, |touched| total += touched.len())?;
    Ok(total)
}

/// How many clusters a copy takes and how many tables, each of which is for `coverage` bytes of the disk. What is in
/// the image below, if the copy is `backed`, and need not be copied is not known.
pub(crate) fn clusters(
    source: MeasureSource<'_>,
    cluster: u64,
    coverage: u64,
    backed: bool,
) -> Result<(u64, u64)> {
    let image = match source {
        MeasureSource::Size(_) if !backed => return Ok((0, 0)),
        MeasureSource::Image(image) if !backed => image,
        _ => return Ok(all_clusters(source.len(), cluster, coverage)),
    };
    let (mut clusters, mut tables, mut next) = (0, 0, 0);
    for_each_used(image, cluster, |touched| {
        clusters += touched.len() / cluster;
        let first = (touched.start() / coverage).max(next);
        next = touched.end().div_ceil(coverage).max(next);
        tables += next - first.min(next);
    })?;
    Ok((clusters, tables))
}

/// As [`clusters`], when every byte of `len` has been written.
pub(crate) fn all_clusters(len: u64, cluster: u64, coverage: u64) -> (u64, u64) {
    (len.div_ceil(cluster), len.div_ceil(coverage))
}
