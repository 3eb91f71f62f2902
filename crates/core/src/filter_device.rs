//! Filters over one device: they change some requests and pass all others on.
//!
//! ```text
//!   Filtered<W>    implements Device: calls W for everything
//!     W            implements FilterDevice: overrides some methods, the others call below()
//!       below()    the filtered device
//! ```

use std::fmt::Debug;
use std::sync::Arc;

use crate::{
    ByteRange, Device, Event, Extent, ExtentKind, Info, Limits, Node, Permissions, Preallocation, Result,
    StatusDetail, ZeroMode,
};

/// A filter over one device. Every method passes the request on unless the filter overrides it. The methods mean the
/// same as those of [`Device`].
#[expect(
    missing_docs,
    clippy::missing_errors_doc,
    reason = "they mean what those of Device mean"
)]
pub trait FilterDevice: Debug + Send + Sync {
    /// The device below.
    fn below(&self) -> &Arc<dyn Device>;

    fn len(&self) -> u64 {
        self.below().len()
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn limits(&self) -> &Limits {
        self.below().limits()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.below().read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.below().write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.below().write_zeroes(range, mode)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.below().discard(range)
    }

    fn status(&self, range: ByteRange, detail: StatusDetail) -> Result<Extent> {
        status_below(self.below(), range, detail)
    }

    fn flush(&self) -> Result<()> {
        self.below().flush()
    }

    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        self.below().resize(len, preallocation)
    }

    /// A filter overrides this only if copies may bypass it.
    fn copy_to(&self, _range: ByteRange, _target: &dyn Device, _target_offset: u64) -> Result<bool> {
        Ok(false)
    }

    fn event(&self, event: Event) {
        self.below().event(event);
    }

    fn lock(&self, permissions: Permissions) -> Result<()> {
        self.below().lock(permissions)
    }

    fn allocated_bytes(&self) -> Option<u64> {
        self.below().allocated_bytes()
    }

    fn node(&self) -> Node {
        self.below().node()
    }

    fn info(&self) -> Result<Info> {
        Ok(Info {
            cluster_size: self.below().info()?.cluster_size,
            ..Info::default()
        })
    }
}

/// The status of the device below. If it names no host device itself, the host is the device below.
///
/// # Errors
/// As [`Device::status`].
pub fn status_below(below: &Arc<dyn Device>, range: ByteRange, detail: StatusDetail) -> Result<Extent> {
    let extent = below.status(range, detail)?;
    let host = match extent.kind {
        ExtentKind::Data | ExtentKind::Zero | ExtentKind::FileHole | ExtentKind::PreallocatedZero
            if extent.host.is_none() && !below.is_view() =>
        {
            Some((Arc::clone(below), range.start()))
        }
        _ => extent.host,
    };
    Ok(Extent { host, ..extent })
}

/// The [`Device`] of a [`FilterDevice`].
#[derive(Debug)]
pub struct Filtered<W>(pub W);

impl<W: FilterDevice> Device for Filtered<W> {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn limits(&self) -> &Limits {
        self.0.limits()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.0.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.0.write_zeroes(range, mode)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.0.discard(range)
    }

    fn status(&self, range: ByteRange, detail: StatusDetail) -> Result<Extent> {
        self.0.status(range, detail)
    }

    fn flush(&self) -> Result<()> {
        self.0.flush()
    }

    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        self.0.resize(len, preallocation)
    }

    fn copy_to(&self, range: ByteRange, target: &dyn Device, target_offset: u64) -> Result<bool> {
        self.0.copy_to(range, target, target_offset)
    }

    fn event(&self, event: Event) {
        self.0.event(event);
    }

    fn lock(&self, permissions: Permissions) -> Result<()> {
        self.0.lock(permissions)
    }

    fn identity(&self) -> Option<(u64, u64)> {
        self.0.below().identity()
    }

    fn is_zero_when_new(&self) -> bool {
        self.0.below().is_zero_when_new()
    }

    fn is_view(&self) -> bool {
        self.0.below().is_view()
    }

    fn allocated_bytes(&self) -> Option<u64> {
        self.0.allocated_bytes()
    }

    fn name(&self) -> String {
        self.node().shown_name()
    }

    fn node(&self) -> Node {
        self.0.node()
    }

    fn info(&self) -> Result<Info> {
        self.0.info()
    }
}
