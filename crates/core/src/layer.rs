//! One opened image without its backing chain: where bytes live, never the bytes themselves.

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

    /// The guest's disk size in bytes.
    fn len(&self) -> u64;

    /// Whether the disk has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What opening has come across, for whoever opens the image: warnings, and what was found and mended as a check tells
    /// it.
    fn notes(&self) -> &[Note] {
        &[]
    }

    /// The unit of allocation: discarding and compressed writes work on multiples of it. 1 if there is none.
    fn granularity(&self) -> u64;

    /// The smallest piece that gets storage of its own when it is written, and that can be made zero:
    /// [`Layer::granularity`], or less if its units are divided.
    fn write_unit(&self) -> u64 {
        self.granularity()
    }

    /// Where the bytes at the start of `range` live, and how far that holds.
    ///
    /// # Errors
    /// Damage found in the tables.
    fn map(&self, range: ByteRange) -> Result<Run>;

    /// Whether who writes has to know first that the file has all that tables lead to: new data would go where it was, or
    /// make the file longer, and what was lost would read as zeroes from then on.
    fn needs_whole_file(&self) -> bool {
        true
    }

    /// Sets aside where the bytes of `range` will go. Waits while another plan covers some of the same clusters.
    ///
    /// # Errors
    /// Damage, read-only images, a full disk.
    fn plan_write(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>>;

    /// Makes `range` read as zeroes without writing them. It is aligned to [`Layer::granularity`] or ends at the end of
    /// the disk, or it lies inside one such unit and is aligned to [`Layer::write_unit`].
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if the format has no way; the caller writes then.
    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()>;

    /// Gives back the storage of `range`, aligned to [`Layer::granularity`] or ending at the end of the disk.
    ///
    /// # Errors
    /// As for writing.
    fn discard(&self, _range: ByteRange) -> Result<()> {
        Ok(())
    }

    /// What the image says of itself.
    ///
    /// # Errors
    /// Damage in the tables it reads for this.
    fn info(&self) -> Result<Info>;

    /// Refuses what [`Layer::resize`] would refuse, before anything has changed.
    ///
    /// # Errors
    /// As [`Layer::resize`].
    fn check_resize(&self, _request: &ResizeRequest) -> Result<()> {
        Ok(())
    }

    /// Changes the disk's size. Of what is added, nothing may show the backing image at any moment.
    ///
    /// # Errors
    /// What the format cannot do, each in words of its own.
    fn resize(&self, request: &ResizeRequest) -> Result<()>;

    /// Whether a new image of this kind reads as zero everywhere.
    fn is_zero_when_new(&self) -> bool {
        true
    }

    /// Publishes and makes durable all that was written.
    ///
    /// # Errors
    /// What the operating system says.
    fn flush(&self) -> Result<()>;

    /// The device that the format lies on.
    fn file(&self) -> &Arc<dyn Device>;

    /// What else the layer can do. It takes no lock.
    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities::default()
    }
}

/// How many damaged places are passed over in search of bytes that are missing.
const MAX_DAMAGE: u32 = 1000;

impl dyn Layer + '_ {
    /// Checks that the file has all that tables lead to and the disk has. Other damage in the tables is left to the
    /// requests that meet it.
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

/// A run of guest bytes and where they live.
#[derive(Clone, Debug)]
pub struct Run {
    /// How many bytes; never zero, never more than was asked for.
    pub len: u64,
    /// Where they live.
    pub kind: RunKind,
}

/// Where a run's bytes live.
#[derive(Clone, Debug)]
pub enum RunKind {
    /// As they are, at `offset` of `device`.
    Data {
        /// Where.
        device: Arc<dyn Device>,
        /// The offset there.
        offset: u64,
        /// What a hole of `device` there means.
        holes: HoleMeaning,
    },
    /// They read as zero, whatever is below; storage may be set aside.
    Zero {
        /// The storage set aside.
        host: Option<(Arc<dyn Device>, u64)>,
    },
    /// The image below has them, or nobody; storage may be set aside all the same.
    Unallocated {
        /// The storage set aside.
        host: Option<(Arc<dyn Device>, u64)>,
    },
    /// In encoded form; the run lies inside the cluster named.
    Encoded(Encoded),
}

/// What it means for a run of data that the device has no storage for some of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoleMeaning {
    /// Nothing that is worth asking for.
    Ignored,
    /// The bytes are zero; as far as the format is concerned they are data all the same.
    ZeroData,
    /// The bytes are zero and that is all: the format has no say of its own.
    Zero,
}

/// Storage set aside for one write. The caller writes every byte of every run and commits; dropping the plan gives the
/// storage back and leaves the image as it was.
#[must_use]
pub trait WritePlan {
    /// The runs, in guest order and without gaps, together covering what was asked for and, where new clusters are
    /// partly written, the rest of these clusters, which the caller fills with what the disk held there before.
    fn runs(&self) -> &[WriteRun];

    /// Makes the bytes part of the image.
    ///
    /// # Errors
    /// A failure to write tables.
    fn commit(self: Box<Self>) -> Result<()>;
}

/// One contiguous piece of a [`WritePlan`].
#[derive(Clone, Debug)]
pub struct WriteRun {
    /// The guest bytes. May reach past the end of the disk in its last cluster.
    pub guest: ByteRange,
    /// Where they go.
    pub device: Arc<dyn Device>,
    /// The offset there.
    pub offset: u64,
}

impl WriteRun {
    /// Appends it to `runs`, or makes the last one longer if it goes on where that one ends.
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
    /// How much of new space is set aside.
    pub preallocation: Preallocation,
    /// The files of [`MultiFile::new_parts`](crate::MultiFile::new_parts), new and empty. After a failure those that are
    /// empty again belong to nobody.
    pub parts: Vec<Arc<dyn Device>>,
    /// The length of the backing image, 0 if there is none. [`Image::resize_with`](crate::Image::resize_with) sets it.
    pub backing_len: u64,
}

impl ResizeRequest {
    /// A change to `len` bytes in the files that there are.
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
    fn a_run_that_goes_on_makes_the_last_one_longer() {
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
