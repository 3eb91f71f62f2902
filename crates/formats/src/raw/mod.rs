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
//!
//! # What a crash leaves
//!
//! Each sector as it was or as it was written. There is no place for a mark that a copy into an existing disk is not
//! complete.

mod create;
mod disk_range;

use std::sync::Arc;

use diskimage_core::errno;
use diskimage_core::options::Options;
use diskimage_core::{
    ByteRange, CreatePlan, CreateRequest, Device, Error, Event, Format, FormatProperties, HoleMeaning, Info,
    Layer, MAX_DEVICE_LEN, Measure, MeasureSource, Objects, OpenRequest, Preallocation, Probe, ResizeRequest,
    Result, Run, RunKind, Score, WritePlan, ZeroMode,
};

use crate::layer_kit::in_place_write::InPlaceWrite;
use disk_range::DiskRange;

/// The format's entry in the table.
#[derive(Debug)]
pub struct Raw;

impl Format for Raw {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn properties(&self) -> &'static FormatProperties {
        const {
            &FormatProperties {
                create_options: Some(create::OPTIONS),
                strong_options: &["offset", "size"],
                shares_writes: true,
                // Without a header the file is still a raw image of its length, whatever that may be.
                ..FormatProperties::READ_ONLY
            }
        }
    }

    fn probe(&self, _probe: &Probe<'_>) -> Score {
        // Any file can be a raw image, so every other format has a higher score.
        1
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Arc<dyn Layer>> {
        if request.file.len() > MAX_DEVICE_LEN {
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
        Ok(CreatePlan::new(move |files| {
            create::create(&request, &*files.file)
        }))
    }

    fn measure(&self, options: &Options, source: MeasureSource<'_>, _objects: &Objects) -> Result<Measure> {
        create::measure(options, source)
    }
}

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
