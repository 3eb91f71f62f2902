//! One opened image without its backing chain: it maps guest offsets to host offsets and never moves guest data.
//!
//! ```text
//!   map         guest range ─► Run { len, kind: Data, Zero, Unallocated or Encoded }
//!   plan_write  guest range ─► WritePlan: allocated WriteRuns; the caller writes them, then commit updates the tables
//! ```

use std::fmt::Debug;
use std::sync::Arc;

use crate::{
    ByteRange, Capabilities, Device, Encoded, ErrorKind, Info, Note, Preallocation, Result, ZeroMode,
};

/// One opened image without its backing chain.
///
/// [`Image`](crate::Image) promises that every range is non-empty, inside [`Layer::len`] and ends below `i64::MAX`.
/// A layer promises no panic and no allocation sized by an unchecked number.
pub trait Layer: Debug + Send + Sync {
    /// The format's name.
    fn format(&self) -> &'static str;

    /// The virtual size in bytes.
    fn len(&self) -> u64;

    /// Whether the disk has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Notes of opening the image, for the user: warnings, and findings and repairs as a check reports them.
    fn notes(&self) -> &[Note] {
        &[]
    }

    /// The unit of allocation: discards and compressed writes cover multiples of it. 1 if there is none.
    fn granularity(&self) -> u64;

    /// The smallest unit that is allocated or zeroed on its own: [`Layer::granularity`], or less for formats with
    /// subclusters.
    fn write_unit(&self) -> u64 {
        self.granularity()
    }

    /// Maps the start of `range` to a run.
    ///
    /// # Errors
    /// Damage found in the tables.
    fn map(&self, range: ByteRange) -> Result<Run>;

    /// Whether the first write needs a check that the file has all bytes that the tables point to. In a truncated file
    /// new data would be allocated at the lost offsets or extend the file, and lost bytes would read as zeroes from
    /// then on.
    fn needs_whole_file(&self) -> bool {
        true
    }

    /// Allocates storage for the bytes of `range`. Waits while another plan covers some of the same clusters.
    ///
    /// # Errors
    /// Damage, read-only images, a full disk.
    fn plan_write(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>>;

    /// Makes `range` read as zeroes without writing them. It is aligned to [`Layer::granularity`] or ends at the end of
    /// the disk, or it lies inside one such unit and is aligned to [`Layer::write_unit`].
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if the format does not support it; the caller then
    /// writes zero bytes.
    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()>;

    /// Frees the storage of `range`, which is aligned to [`Layer::granularity`] or ends at the end of the disk.
    ///
    /// # Errors
    /// As for writing.
    fn discard(&self, _range: ByteRange) -> Result<()> {
        Ok(())
    }

    /// Facts about the image, for `info`.
    ///
    /// # Errors
    /// Damage in the tables that hold these facts.
    fn info(&self) -> Result<Info>;

    /// Fails as [`Layer::resize`] would, before anything is changed.
    ///
    /// # Errors
    /// As [`Layer::resize`].
    fn check_resize(&self, _request: &ResizeRequest) -> Result<()> {
        Ok(())
    }

    /// Changes the virtual size. New space must not expose the backing image at any moment.
    ///
    /// # Errors
    /// Sizes that the format does not support, and write errors of the file.
    fn resize(&self, request: &ResizeRequest) -> Result<()>;

    /// Whether a new image of this kind reads as zero everywhere.
    fn is_zero_when_new(&self) -> bool {
        true
    }

    /// Writes back dirty metadata and makes all completed writes durable.
    ///
    /// # Errors
    /// Write errors of the file.
    fn flush(&self) -> Result<()>;

    /// The device that the format lies on.
    fn file(&self) -> &Arc<dyn Device>;

    /// The optional features of the layer. The call takes no lock.
    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities::default()
    }
}

/// How many damaged units the search for missing bytes skips.
const MAX_DAMAGE: u32 = 1000;

impl dyn Layer + '_ {
    /// Checks that the file has all bytes of the disk that the tables point to. Other damage in the tables is ignored
    /// here: the requests that find it fail.
    ///
    /// # Errors
    /// Bytes that are missing, and failures to read tables.
    pub fn require_whole_file(&self) -> Result<()> {
        let mut rest = ByteRange::new(0, self.len());
        let mut damage = 0;
        while !rest.is_empty() && damage < MAX_DAMAGE {
            let run = match self.map(rest) {
                Ok(run) => run,
                Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Invalid) => {
                    damage += 1;
                    rest = rest.skip(self.granularity() - rest.start() % self.granularity());
                    continue;
                }
                Err(error) => return Err(error),
            };
            match &run.kind {
                RunKind::Data { device, offset, .. } => device.require(*offset, run.len)?,
                RunKind::Encoded(encoded) => self.codec()?.require_encoded(encoded)?,
                RunKind::Zero { .. } | RunKind::Unallocated { .. } => {}
            }
            rest = rest.skip(run.len);
        }
        Ok(())
    }
}

/// A run of guest bytes and their storage.
#[derive(Clone, Debug)]
pub struct Run {
    /// The length in bytes; never zero, never more than that of the request.
    pub len: u64,
    /// The storage.
    pub kind: RunKind,
}

/// The storage of a run.
#[derive(Clone, Debug)]
pub enum RunKind {
    /// Stored unchanged at host offset `offset` of `device`.
    Data {
        /// The host device.
        device: Arc<dyn Device>,
        /// The host offset.
        offset: u64,
        /// How a hole of `device` in this run is reported.
        holes: HoleMeaning,
    },
    /// A zero cluster, which hides the backing image; storage may be allocated.
    Zero {
        /// The allocated storage: device and host offset.
        host: Option<(Arc<dyn Device>, u64)>,
    },
    /// Read from the backing image, or zero without one; storage may be allocated all the same.
    Unallocated {
        /// The allocated storage: device and host offset.
        host: Option<(Arc<dyn Device>, u64)>,
    },
    /// Part of an encoded cluster.
    Encoded(Encoded),
}

/// How a hole of the host device inside a run of data is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoleMeaning {
    /// The device is not asked for holes.
    Ignored,
    /// The bytes are zero, but allocated data in the tables of the format.
    ZeroData,
    /// The bytes are zero: the format has no tables of its own.
    Zero,
}

/// The storage allocated for one write. The caller writes every byte of every run and commits. A drop without commit
/// frees the storage and leaves the image as it was.
#[must_use]
pub trait WritePlan {
    /// The runs, in guest order and without gaps. They cover the request and the rest of new clusters that it covers in
    /// part; the caller fills the rest with the present data of the disk (copy-on-write).
    fn runs(&self) -> &[WriteRun];

    /// Updates the tables, which makes the bytes part of the image.
    ///
    /// # Errors
    /// A failure to write tables.
    fn commit(self: Box<Self>) -> Result<()>;
}

/// A contiguous run of a [`WritePlan`].
#[derive(Clone, Debug)]
pub struct WriteRun {
    /// The guest range. In the last cluster it may end beyond the end of the disk.
    pub guest: ByteRange,
    /// The host device.
    pub device: Arc<dyn Device>,
    /// The host offset.
    pub offset: u64,
}

impl WriteRun {
    /// Appends the run to `runs`, or extends the last one if it is contiguous with this one in guest and host.
    pub fn push_to(self, runs: &mut Vec<Self>) {
        match runs.last_mut() {
            Some(last)
                if last.guest.end() == self.guest.start()
                    && last.offset.checked_add(last.guest.len()) == Some(self.offset)
                    && Arc::ptr_eq(&last.device, &self.device) =>
            {
                last.guest = ByteRange::new(last.guest.start(), self.guest.end());
            }
            _ => runs.push(self),
        }
    }
}

/// A change of size.
#[derive(Clone, Debug)]
pub struct ResizeRequest {
    /// The new size in bytes.
    pub len: u64,
    /// How new space is allocated.
    pub preallocation: Preallocation,
    /// The files of [`MultiFile::new_parts`](crate::MultiFile::new_parts), new and empty. After a failure those that
    /// are still empty are not part of the image.
    pub parts: Vec<Arc<dyn Device>>,
    /// The length of the backing image, 0 if there is none. [`Image::resize_with`](crate::Image::resize_with) sets it.
    pub backing_len: u64,
}

impl ResizeRequest {
    /// A change to `len` bytes without new files.
    pub fn new(len: u64, preallocation: Preallocation) -> Self {
        Self {
            len,
            preallocation,
            parts: Vec::new(),
            backing_len: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryDevice;

    #[test]
    fn a_contiguous_run_extends_the_last_one() {
        let [one, other] = [0, 1].map(|_| -> Arc<dyn Device> { Arc::new(MemoryDevice::default()) });
        let mut runs = Vec::new();
        for (start, offset, device) in [
            (0, 50, &one),
            (10, 60, &one),
            (20, 70, &other),
            (30, 90, &other),
            (41, 100, &other),
        ] {
            let run = WriteRun {
                guest: ByteRange::at(start, 10),
                device: Arc::clone(device),
                offset,
            };
            run.push_to(&mut runs);
        }
        let runs: Vec<_> = runs
            .iter()
            .map(|run| (run.guest.start(), run.guest.len(), run.offset))
            .collect();
        assert_eq!(runs, [(0, 20, 50), (20, 10, 70), (30, 10, 90), (41, 10, 100)]);
    }
}
