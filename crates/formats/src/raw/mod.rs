//! Raw images: the file's bytes are the guest's bytes, without metadata.
//!
//! ```text
//!   file   |---------------------- bytes ---------------------|
//!   disk   |---------------------- bytes ---------------------|00|     zeroes up to the next multiple of 512
//!
//!   with offset and size:
//!   file   |-- offset --|----- size -----|--------------------|
//!   disk                |---- bytes -----|
//! ```

use std::sync::Arc;

use diskimage_core::errno;
use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{
    ByteRange, CreatePlan, CreateRequest, Device, Error, Event, Format, FormatProperties, HoleMeaning, Info,
    Layer, Measure, MeasureSource, NodeOptions, Objects, OpenRequest, Preallocation, Probe, ResizeRequest,
    Result, Run, RunKind, Score, WritePlan, ZeroMode, align_up,
};

use crate::layer_kit::in_place_write::InPlaceWrite;

/// The format's entry in the table.
#[derive(Debug)]
pub struct Raw;

/// The disk's length is the file's length rounded up to this.
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

    fn properties(&self) -> &'static FormatProperties {
        const {
            &FormatProperties {
                create_options: Some(CREATE_OPTIONS),
                strong_options: &["offset", "size"],
                shares_writes: true,
                // Without a header the file is still a raw image of its length, whatever that may be.
                keeps_failed_file: true,
                ..FormatProperties::READ_ONLY
            }
        }
    }

    fn probe(&self, _probe: &Probe<'_>) -> Score {
        // Any file can be a raw image, so every other format has a higher score.
        1
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Arc<dyn Layer>> {
        if request.file.len() > MAX_LEN {
            return Err(Error::from_errno(errno::EFBIG).context("Could not refresh total sector count"));
        }
        let disk = DiskRange::take(request.options)?;
        disk.check(request.file.len())?;
        Ok(Arc::new(RawLayer {
            file: request.file,
            bare: None,
            disk,
        }))
    }

    fn plan_create<'a>(&self, request: CreateRequest<'a>) -> Result<CreatePlan<'a>> {
        Ok(CreatePlan::new(move |files| create(&request, &*files.file)))
    }

    fn measure(&self, options: &Options, source: MeasureSource<'_>, _objects: &Objects) -> Result<Measure> {
        preallocation(options)?;
        let size = align_up(source.len(), SECTOR);
        Ok(Measure {
            required: size,
            fully_allocated: size,
            bitmaps: None,
        })
    }
}

/// Writes a new image to `file`.
fn create(request: &CreateRequest<'_>, file: &dyn Device) -> Result<()> {
    let size = disk_size(request.size)?;
    if file.is_zero_when_new() {
        return file.resize(size, preallocation(request.options)?);
    }
    // A device, which has the storage that it has.
    crate::layer_kit::preallocation::require_off(preallocation_mode(request.options)?)?;
    let there = file.len();
    if size > there {
        return Err(Error::unsupported(file.fixed_len_message()));
    }
    // What the device held before should not be taken for an image's header.
    let head = ByteRange::new(0, SECTOR.min(there));
    file.write_zeroes(head, ZeroMode::KeepAllocated)
}

fn preallocation(options: &Options) -> Result<Preallocation> {
    match preallocation_mode(options)? {
        Preallocation::Metadata => Err(Error::unsupported("Unsupported preallocation mode: metadata")),
        mode => Ok(mode),
    }
}

fn preallocation_mode(options: &Options) -> Result<Preallocation> {
    let name = options.text("preallocation").unwrap_or("off");
    Preallocation::from_name(name).ok_or_else(|| Error::invalid(format!("invalid parameter value: {name}")))
}

fn disk_size(size: u64) -> Result<u64> {
    let rounded = align_up(size, SECTOR);
    if rounded < size || i64::try_from(rounded).is_err() {
        return Err(Error::from_errno(errno::EINVAL).context("Could not resize file"));
    }
    Ok(rounded)
}

/// qemu-img's limit for the size of a disk: whole gibibytes below 2^63.
const MAX_LEN: u64 = (1 << 63) - (1 << 30);

/// Makes a layer from a device without a format. `driver` is the name of its protocol or filter.
pub fn bare_layer(device: Arc<dyn Device>, driver: &'static str) -> Arc<dyn Layer> {
    Arc::new(RawLayer {
        file: device,
        bare: Some(driver),
        disk: DiskRange::default(),
    })
}

/// Makes a raw layer from the `size` bytes of a device from `offset` on.
pub fn window_layer(device: Arc<dyn Device>, offset: u64, size: u64) -> Arc<dyn Layer> {
    Arc::new(RawLayer {
        file: device,
        bare: None,
        disk: DiskRange {
            offset,
            size: Some(size),
        },
    })
}

/// The range of the file that holds the disk.
#[derive(Clone, Copy, Debug, Default)]
struct DiskRange {
    offset: u64,
    /// `None` for the rest of the file.
    size: Option<u64>,
}

const DISK_OPTIONS: &[OptionDef] = &[
    OptionDef {
        name: "offset",
        kind: OptionKind::Size,
        help: "Where the disk starts in the file",
        default: None,
    },
    OptionDef {
        name: "size",
        kind: OptionKind::Size,
        help: "How long the disk is",
        default: None,
    },
];

impl DiskRange {
    fn take(node: &mut NodeOptions) -> Result<Self> {
        let options = node.take_known(DISK_OPTIONS)?;
        Ok(Self {
            offset: options.size("offset").unwrap_or(0),
            size: options.size("size"),
        })
    }

    /// Checks that the range is inside a file of `len` bytes.
    fn check(self, len: u64) -> Result<()> {
        let (offset, len) = (self.offset, align_up(len, SECTOR));
        if offset > len {
            return Err(Error::invalid(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({len})"
            )));
        }
        match self.size {
            Some(size) if size > len - offset => Err(Error::invalid(format!(
                "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of the \
                 containing file ({len})"
            ))),
            Some(size) if !size.is_multiple_of(SECTOR) => {
                Err(Error::invalid("Specified size is not multiple of 512"))
            }
            _ => Ok(()),
        }
    }

    fn len(self, file_len: u64) -> u64 {
        let rest = align_up(file_len, SECTOR).saturating_sub(self.offset);
        self.size.unwrap_or(align_up(rest, SECTOR))
    }

    /// The host range of a guest range.
    fn host(self, guest: ByteRange) -> Result<ByteRange> {
        self.offset
            .checked_add(guest.end())
            .map(|end| ByteRange::new(self.offset + guest.start(), end))
            .ok_or_else(|| Error::from_errno(errno::EFBIG))
    }
}

/// An opened raw image.
#[derive(Debug)]
struct RawLayer {
    file: Arc<dyn Device>,
    /// The name of the protocol or filter, if the layer has no format.
    bare: Option<&'static str>,
    disk: DiskRange,
}

impl RawLayer {
    fn device(&self) -> Arc<dyn Device> {
        Arc::clone(&self.file)
    }
}

impl Layer for RawLayer {
    fn format(&self) -> &'static str {
        self.bare.unwrap_or("raw")
    }

    fn len(&self) -> u64 {
        self.disk.len(self.file.len())
    }

    fn granularity(&self) -> u64 {
        1
    }

    fn map(&self, range: ByteRange) -> Result<Run> {
        let host = self.disk.host(range)?;
        let stored = host.intersect(ByteRange::new(0, self.file.len()));
        Ok(if stored.is_empty() {
            // The part of the last sector that is beyond the end of the file.
            Run {
                len: range.len(),
                kind: RunKind::Zero {
                    host: Some((self.device(), host.start())),
                },
            }
        } else {
            Run {
                len: stored.len(),
                kind: RunKind::Data {
                    device: self.device(),
                    offset: host.start(),
                    holes: HoleMeaning::Zero,
                },
            }
        })
    }

    fn needs_whole_file(&self) -> bool {
        // The disk is as long as the file.
        false
    }

    fn plan_write(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        Ok(Box::new(InPlaceWrite::new(
            range,
            self.device(),
            self.disk.host(range)?.start(),
        )))
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.file.write_zeroes(self.disk.host(range)?, mode)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.file.discard(self.disk.host(range)?)
    }

    fn info(&self) -> Result<Info> {
        let below = self.file.info()?;
        Ok(if self.bare.is_some() {
            below
        } else {
            Info {
                cluster_size: below.cluster_size,
                ..Info::default()
            }
        })
    }

    fn resize(&self, request: &ResizeRequest) -> Result<()> {
        if self.disk.size.is_some() {
            return Err(Error::unsupported("Cannot resize fixed-size raw disks"));
        }
        if request.preallocation == Preallocation::Metadata {
            return Err(Error::unsupported("Unsupported preallocation mode: metadata"));
        }
        let len = self.disk.host(ByteRange::new(0, request.len))?.end();
        self.file.resize(len, request.preallocation)
    }

    fn is_zero_when_new(&self) -> bool {
        self.file.is_zero_when_new()
    }

    fn flush(&self) -> Result<()> {
        self.file.event(Event::FLUSH_TO_DISK);
        self.file.flush()
    }

    fn file(&self) -> &Arc<dyn Device> {
        &self.file
    }
}
