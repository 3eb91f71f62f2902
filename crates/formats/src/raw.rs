//! Raw images: the guest's bytes as they are, and nothing else.
//!
//! ```text
//!   file   |---------------------- bytes ---------------------|
//!   disk   |---------------------- bytes ---------------------|00|     up to the next multiple of 512
//! ```

use std::sync::Arc;

use diskimage_core::errno;
use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{
    ByteRange, CreateRequest, Device, Error, Format, Holes, Info, Layer, Measure, MeasureSource, OpenRequest,
    Permissions, Preallocation, Probe, ResizeRequest, Result, Run, RunKind, Score, WritePlan, WriteRun,
    ZeroMode, align_up,
};

/// The format's entry in the table.
#[derive(Debug)]
pub struct Raw;

/// The guest sees whole sectors, whatever the file's length.
const SECTOR: u64 = 512;

const CREATE_OPTIONS: &[OptionDef] = &[OptionDef {
    name: "size",
    kind: OptionKind::Size,
    help: "Virtual disk size",
    default: None,
}];

impl Format for Raw {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn probe(&self, _probe: &Probe<'_>) -> Score {
        // Any bytes can be a raw image; every other format knows its own better.
        1
    }

    fn permissions(&self, write: bool) -> Permissions {
        // There are no tables that another writer could spoil.
        Permissions {
            write,
            ..Permissions::READ_SHARED
        }
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Arc<dyn Layer>> {
        if request.file.len() > MAX_LEN {
            return Err(Error::from_errno(errno::EFBIG).context("Could not refresh total sector count"));
        }
        Ok(Arc::new(RawLayer { file: request.file }))
    }

    fn create_options(&self) -> &'static [OptionDef] {
        CREATE_OPTIONS
    }

    fn create(&self, request: CreateRequest<'_>) -> Result<()> {
        let preallocation = preallocation(request.options)?;
        let size = disk_size(request.size)?;
        if request.file.is_zero_when_new() {
            return request.file.resize(size, preallocation);
        }
        // A device, which has the storage that it has.
        if preallocation != Preallocation::Off {
            return Err(Error::unsupported(format!(
                "Unsupported preallocation mode '{}'",
                preallocation.name()
            )));
        }
        let there = request.file.len();
        if size > there {
            return Err(Error::unsupported("Cannot grow device files"));
        }
        // What the device held before should not be taken for an image's header.
        let head = ByteRange::new(0, SECTOR.min(there));
        request.file.write_zeroes(head, ZeroMode::KeepAllocated)
    }

    fn measure(&self, options: &Options, source: MeasureSource<'_>) -> Result<Measure> {
        preallocation(options)?;
        let size = align_up(source.len(), SECTOR);
        Ok(Measure {
            required: size,
            fully_allocated: size,
            bitmaps: None,
        })
    }
}

fn preallocation(options: &Options) -> Result<Preallocation> {
    let name = options.text("preallocation").unwrap_or("off");
    match Preallocation::from_name(name) {
        Some(Preallocation::Metadata) => Err(Error::unsupported("Unsupported preallocation mode: metadata")),
        Some(mode) => Ok(mode),
        None => Err(Error::invalid(format!("invalid parameter value: {name}"))),
    }
}

fn disk_size(size: u64) -> Result<u64> {
    let rounded = align_up(size, SECTOR);
    if rounded < size || i64::try_from(rounded).is_err() {
        return Err(Error::from_errno(errno::EINVAL).context("Could not resize file"));
    }
    Ok(rounded)
}

/// The longest disk of the original: whole gibibytes below 2^63.
const MAX_LEN: u64 = (1 << 63) - (1 << 30);

/// An opened raw image.
#[derive(Debug)]
struct RawLayer {
    file: Arc<dyn Device>,
}

impl RawLayer {
    fn device(&self) -> Arc<dyn Device> {
        Arc::clone(&self.file)
    }
}

impl Layer for RawLayer {
    fn format(&self) -> &'static str {
        "raw"
    }

    fn len(&self) -> u64 {
        align_up(self.file.len(), SECTOR)
    }

    fn granularity(&self) -> u64 {
        1
    }

    fn map(&self, range: ByteRange) -> Result<Run> {
        let there = range.intersect(ByteRange::new(0, self.file.len()));
        Ok(if there.is_empty() {
            // The rest of the last sector.
            Run {
                len: range.len(),
                kind: RunKind::Zero {
                    host: Some((self.device(), range.start())),
                },
            }
        } else {
            Run {
                len: there.len(),
                kind: RunKind::Data {
                    device: self.device(),
                    offset: range.start(),
                    holes: Holes::Zero,
                },
            }
        })
    }

    fn plan_write(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        Ok(Box::new(Straight([WriteRun {
            guest: range,
            device: self.device(),
            offset: range.start(),
        }])))
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.file.write_zeroes(range, mode)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.file.discard(range)
    }

    fn info(&self) -> Result<Info> {
        Ok(Info::default())
    }

    fn resize(&self, request: &ResizeRequest) -> Result<()> {
        if request.preallocation == Preallocation::Metadata {
            return Err(Error::unsupported("Unsupported preallocation mode: metadata"));
        }
        self.file.resize(request.len, request.preallocation)
    }

    fn is_zero_when_new(&self) -> bool {
        self.file.is_zero_when_new()
    }

    fn flush(&self) -> Result<()> {
        self.file.flush()
    }

    fn file(&self) -> &Arc<dyn Device> {
        &self.file
    }
}

/// A write that goes where the guest says.
struct Straight([WriteRun; 1]);

impl WritePlan for Straight {
    fn runs(&self) -> &[WriteRun] {
        &self.0
    }

    fn commit(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}
