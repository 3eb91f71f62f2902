//! Counts the clusters of a target that a copy of a source would allocate, for `measure`.

use diskimage_core::{ByteRange, Device, ExtentKind, Image, MeasureSource, Result, ResultExt, StatusDetail};

/// Calls `found` with each run of clusters that hold data which is not known to be zero: each cluster once, in order.
pub(crate) fn for_each_used(image: &Image, cluster: u64, mut found: impl FnMut(ByteRange)) -> Result<()> {
    let mut rest = ByteRange::new(0, image.len());
    while !rest.is_empty() {
        let extent = image.status(rest, StatusDetail::Zeroes);
        let extent = extent.context(|| "Unable to get block status")?;
        let mut len = extent.len;
        if !extent.kind.is_zero() && extent.kind != ExtentKind::UnknownHole {
            // The clusters that the extent touches count as a whole, and the next search starts behind them.
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

/// The numbers of clusters and of tables that a copy allocates; each table maps `coverage` guest bytes. If the copy is
/// `backed`, all clusters count: those that the backing image has already are not known.
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

/// The same for a fully allocated disk of `len` bytes.
pub(crate) fn all_clusters(len: u64, cluster: u64, coverage: u64) -> (u64, u64) {
    (len.div_ceil(cluster), len.div_ceil(coverage))
}
