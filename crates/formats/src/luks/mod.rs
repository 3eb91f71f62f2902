//! LUKS, version 1: an encrypted disk behind a header with eight slots for passphrases.
//!
//! ```text
//!   file   |header|slots|-------------- payload --------------|
//!   disk                |-------- decrypted payload ----------|
//! ```
//!
//! # What a crash leaves
//!
//! Each sector of the payload as it was or as it was written, as in a raw disk. A slot for a passphrase becomes
//! active once its key material is durable, and opens nothing from the moment at which that is erased.
//!
//! [`Volume`] is the header with its key slots, in a file of its own or inside a qcow2 image. [`EncryptedDevice`] is
//! the decrypted payload.

pub(crate) mod amend;
mod create;
mod header;
mod info;
pub(crate) mod options;
mod resize;
#[cfg(test)]
mod tests;
pub(crate) mod volume;

use std::sync::Arc;

use crate::encryption::SECTOR;
use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{
    Amend, AmendRequest, ByteRange, Capabilities, CreatePlan, CreateRequest, Device, Error, Format,
    FormatProperties, HoleMeaning, Info, Layer, Measure, MeasureSource, Objects, OpenRequest, Probe,
    ResizeRequest, Result, Run, RunKind, Score, WritePlan, ZeroMode, align_up, errno,
};

use crate::encryption::encrypted_device::EncryptedDevice;
use crate::layer_kit::in_place_write::InPlaceWrite;
use options::{CREATE_OPTIONS, passphrase};
use volume::{Volume, VolumeLocation};

/// The format's entry in the table.
#[derive(Debug)]
pub struct Luks;

/// The options of a node.
const NODE_OPTIONS: &[OptionDef] = &[
    OptionDef::new(
        "key-secret",
        OptionKind::Text,
        "ID of the secret that provides the passphrase",
    ),
    options::MAX_ITERATIONS,
];

impl Format for Luks {
    fn name(&self) -> &'static str {
        "luks"
    }

    fn properties(&self) -> &'static FormatProperties {
        const {
            &FormatProperties {
                create_options: Some(CREATE_OPTIONS),
                amend_options: Some(amend::AMEND_OPTIONS),
                children: &["header"],
                strong_options: &["key-secret"],
                ..FormatProperties::READ_ONLY
            }
        }
    }

    fn probe(&self, probe: &Probe<'_>) -> Score {
        if header::is_luks(probe.head) { 100 } else { 0 }
    }

    fn open(&self, mut request: OpenRequest<'_>) -> Result<Arc<dyn Layer>> {
        let separate = request.take_child("header");
        let options = request.options.take_known(NODE_OPTIONS)?;
        let passphrase = match options.text("key-secret") {
            _ if request.no_data => None,
            id => Some(passphrase(&request.context.objects, id, "key-secret")?),
        };
        let location = VolumeLocation {
            detached: separate.is_some(),
            device: separate.unwrap_or_else(|| Arc::clone(&request.file)),
            offset: 0,
        };
        let most = options.number(options::MAX_ITERATIONS.name);
        let volume = Volume::open(location, passphrase, most)?;
        let start = volume.payload_offset();
        if align_up(request.file.len(), SECTOR as u64) < start {
            return Err(Error::from_errno(errno::EIO).context("Could not refresh total sector count"));
        }
        let payload = volume.cipher().map(|cipher| {
            let view = EncryptedDevice::new(Arc::clone(&request.file), start, 0, Arc::clone(cipher));
            Arc::new(view.padded()) as Arc<dyn Device>
        });
        Ok(Arc::new(LuksLayer {
            file: request.file,
            volume,
            payload,
        }))
    }

    fn plan_create<'a>(&self, request: CreateRequest<'a>) -> Result<CreatePlan<'a>> {
        Ok(CreatePlan::new(move |files| create::create(&request, files.file)))
    }

    fn measure(&self, options: &Options, source: MeasureSource<'_>, objects: &Objects) -> Result<Measure> {
        create::measure(options, source, objects)
    }
}

/// An opened image.
#[derive(Debug)]
struct LuksLayer {
    file: Arc<dyn Device>,
    volume: Volume,
    /// The payload, if the volume is unlocked.
    payload: Option<Arc<dyn Device>>,
}

impl LuksLayer {
    fn payload(&self) -> Result<Arc<dyn Device>> {
        self.payload
            .clone()
            .ok_or_else(|| Error::invalid("Parameter 'key-secret' is required for cipher"))
    }
}

impl Layer for LuksLayer {
    fn format(&self) -> &'static str {
        "luks"
    }

    fn len(&self) -> u64 {
        align_up(self.file.len(), SECTOR as u64).saturating_sub(self.volume.payload_offset())
    }

    fn granularity(&self) -> u64 {
        1
    }

    fn map(&self, range: ByteRange) -> Result<Run> {
        Ok(Run {
            len: range.len(),
            kind: RunKind::Data {
                device: self.payload()?,
                offset: range.start(),
                holes: HoleMeaning::Ignored,
            },
        })
    }

    fn needs_whole_file(&self) -> bool {
        // The disk is as long as the file.
        false
    }

    fn plan_write(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        Ok(Box::new(InPlaceWrite::new(range, self.payload()?, range.start())))
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.payload()?.write_zeroes(range, mode)
    }

    fn info(&self) -> Result<Info> {
        Ok(Info {
            encrypted: true,
            specific: Some(self.volume.details()),
            ..Info::default()
        })
    }

    fn resize(&self, request: &ResizeRequest) -> Result<()> {
        self.resize_payload(request)
    }

    fn is_zero_when_new(&self) -> bool {
        false
    }

    fn flush(&self) -> Result<()> {
        self.file.flush()
    }

    fn file(&self) -> &Arc<dyn Device> {
        &self.file
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities {
            amend: Some(self),
            ..Capabilities::default()
        }
    }
}

impl Amend for LuksLayer {
    fn amend(&self, request: &AmendRequest<'_>) -> Result<()> {
        let change = amend::SlotChange {
            options: request.options,
            prefix: "",
            objects: request.objects,
            force: request.force,
        };
        change.apply(&self.volume)
    }
}
