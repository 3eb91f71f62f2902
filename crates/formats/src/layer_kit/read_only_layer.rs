//! Layers of formats that are only read.
//!
//! As in qemu-img, `map` shows the whole disk as data without host offsets. The disk is one view of the file; the parts of
//! it that the tables say are zero are not read.

use std::sync::Arc;

use diskimage_core::{
    ByteRange, Capabilities, Device, Error, HoleMeaning, Info, Layer, Limits, Note, OpenRequest,
    ReadOnlyView, ResizeRequest, Result, Run, RunKind, View, WritePlan, ZeroMode,
};

/// The disk of one image.
pub(crate) trait Disk: std::fmt::Debug + Send + Sync + 'static {
    /// The format's name.
    const FORMAT: &'static str;

    /// The disk's size in bytes.
    fn len(&self) -> u64;

    /// The image's file.
    fn file(&self) -> &Arc<dyn Device>;

    /// Notes that were collected while the image was opened.
    fn notes(&self) -> &[Note] {
        &[]
    }

    /// What `info` reports of the image.
    fn info(&self) -> Info {
        Info::default()
    }

    /// Whether the tables say that the disk is zero at the start of `range`, which is not empty and inside the disk, and
    /// for how many bytes that holds.
    ///
    /// # Errors
    /// Damage in the tables.
    fn status(&self, range: ByteRange) -> Result<(bool, u64)> {
        Ok((false, range.len()))
    }

    /// Fills `buf` with the guest bytes from `offset` on; the whole range is inside the disk.
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()>;
}

/// Refuses to open an image for writing.
pub(crate) fn refuse_writing(request: &OpenRequest<'_>) -> Result<()> {
    if request.write {
        Err(Error::read_only())
    } else {
        Ok(())
    }
}

/// The layer of a disk.
pub(crate) fn layer(disk: impl Disk) -> Arc<dyn Layer> {
    let limits = Limits {
        alignment: 1,
        ..disk.file().limits().clone()
    };
    Arc::new(ReadOnly(Arc::new(ReadOnlyView(Bytes { disk, limits }))))
}

#[derive(Debug)]
struct ReadOnly<D>(Arc<ReadOnlyView<Bytes<D>>>);

impl<D: Disk> Layer for ReadOnly<D> {
    fn format(&self) -> &'static str {
        D::FORMAT
    }

    fn len(&self) -> u64 {
        self.0.0.disk.len()
    }

    fn notes(&self) -> &[Note] {
        self.0.0.disk.notes()
    }

    fn granularity(&self) -> u64 {
        1
    }

    fn map(&self, range: ByteRange) -> Result<Run> {
        let (is_zero, len) = self.0.0.disk.status(range)?;
        let kind = match is_zero {
            true => RunKind::Zero { host: None },
            false => RunKind::Data {
                device: Arc::clone(&self.0) as Arc<dyn Device>,
                offset: range.start(),
                holes: HoleMeaning::Ignored,
            },
        };
        Ok(Run {
            len: len.min(range.len()),
            kind,
        })
    }

    fn plan_write(&self, _range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        Err(Error::read_only())
    }

    fn write_zeroes(&self, _range: ByteRange, _mode: ZeroMode) -> Result<()> {
        Err(Error::read_only())
    }

    fn info(&self) -> Result<Info> {
        Ok(self.0.0.disk.info())
    }

    fn resize(&self, _request: &ResizeRequest) -> Result<()> {
        Err(Error::read_only())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn file(&self) -> &Arc<dyn Device> {
        self.0.0.disk.file()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities {
            hides_allocation: true,
            ..Capabilities::default()
        }
    }
}

#[derive(Debug)]
struct Bytes<D> {
    disk: D,
    limits: Limits,
}

impl<D: Disk> View for Bytes<D> {
    fn len(&self) -> u64 {
        self.disk.len()
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.disk.read(buf, offset)
    }
}
