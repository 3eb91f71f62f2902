//! qcow, version 1: QEMU's first format with allocation on write.
//!
//! ```text
//!   | header, name | L1 table | L2 table | cluster | cluster | encoded | ...
//!
//!   header ──► L1 table ──► L2 tables ──► clusters          guest offset → host offset
//! ```
//!
//! An entry is 0 if its table or cluster is unallocated, else a host offset. In an L2 table, bit 63 says that the
//! cluster is compressed; the next `cluster_bits` bits are then its stored length, the rest its host offset. All
//! numbers are big-endian. Storage is never freed. Clusters may be encrypted (`legacy_aes`); compressed clusters never
//! are.
//!
//! The format is described on the page "The QCOW Image Format". `header` parses the header, `entry` the
//! entries of the tables; [`two_level_map`](crate::layer_kit::two_level_map) reads and changes the tables.

mod create;
mod entry;
mod header;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use diskimage_core::options::Options;
use diskimage_core::{
    Backed, Backing, ByteRange, Capabilities, Codec, CompressionLevel, CreatePlan, CreateRequest, Device,
    Encoded, EncodedCluster, EncodedForm, EncodedPlan, Encoder, Error, Event, Format, FormatProperties, Info,
    Layer, Measure, MeasureSource, Objects, OpenRequest, Probe, ResizeRequest, Result, Run, Score, WritePlan,
    ZeroMode, align_up,
};

use self::entry::{Entries, damaged};
use self::header::{Header, SECTOR};
use crate::codec;
use crate::encryption::legacy_aes::{self, LegacyAes};
use crate::known_formats::KNOWN_FORMATS;
use crate::layer_kit::metadata_cache::{Table, WriteOrder};
use crate::layer_kit::offset::HostOffset;
use crate::layer_kit::reserved::Reserved;
use crate::layer_kit::two_level_map::{Shape, TwoLevelMap};

/// The format's entry in the table of formats.
#[derive(Debug)]
pub struct QcowFormat;

impl Format for QcowFormat {
    fn name(&self) -> &'static str {
        "qcow"
    }

    fn properties(&self) -> &'static FormatProperties {
        const {
            &FormatProperties {
                create_options: Some(create::OPTIONS),
                strong_options: &[legacy_aes::KEY_SECRET],
                has_backing: true,
                has_compression: true,
                ..FormatProperties::READ_ONLY
            }
        }
    }

    fn probe(&self, probe: &Probe<'_>) -> Score {
        let start = [header::MAGIC.to_be_bytes(), header::VERSION.to_be_bytes()].concat();
        if probe.head.starts_with(&start) { 100 } else { 0 }
    }

    fn open(&self, request: OpenRequest<'_>) -> Result<Arc<dyn Layer>> {
        Ok(Arc::new(Qcow::open(request)?))
    }

    fn plan_create<'a>(&self, request: CreateRequest<'a>) -> Result<CreatePlan<'a>> {
        // The errors that qemu-img reports before it creates the file.
        match request.options.text("backing_fmt") {
            Some(name) if !KNOWN_FORMATS.contains(&name) => {
                return Err(Error::invalid(format!("unrecognized backing format '{name}'")));
            }
            _ => legacy_aes::wanted_format(request.options)?,
        };
        Ok(CreatePlan::new(move |files| {
            create::create(&request, &*files.file)
        }))
    }

    fn measure(&self, options: &Options, source: MeasureSource<'_>, _objects: &Objects) -> Result<Measure> {
        create::measure(options, source)
    }
}

/// An open image.
#[derive(Debug)]
struct Qcow {
    tree: TwoLevelMap<Entries>,
    header: Header,
    /// The header, the backing file's name and the L1 table.
    reserved: Reserved,
    write: bool,
}

impl Qcow {
    fn open(mut request: OpenRequest<'_>) -> Result<Self> {
        let header = header::read(&*request.file, request.name)?;
        let found = header.is_encrypted.then_some("aes");
        let passphrase = legacy_aes::passphrase_for(found, &mut request)?;
        let aes = found
            .map(|_| LegacyAes::new(passphrase.map(|(passphrase, _)| passphrase)))
            .transpose()?;
        let file = request.file;
        let reserved = header.reserved();
        if request.write {
            reserved.require_apart()?;
        }
        if request.write && header.end() > align_up(file.len(), SECTOR) {
            // As in qemu-img, such an image can still be opened for reading.
            return Err(Error::corrupt("L1 table lies beyond the end of the file"));
        }
        let l1 = Table {
            class: WriteOrder::L1,
            offset: header.l1_offset,
            len: header.l1_len(),
        };
        let shape = Shape {
            cluster_size: header.cluster_size(),
            l1,
            l2_len: header.l2_len(),
            end: HostOffset::new(file.len().max(header.end())),
        };
        let entries = Entries {
            file: Arc::clone(&file),
            cluster_bits: header.cluster_bits,
            l2_len: header.l2_len(),
            has_backing: header.backing.is_some(),
            aes,
        };
        Ok(Self {
            tree: TwoLevelMap::new(file, shape, entries, reserved.clone(), &request.context.budget),
            reserved,
            header,
            write: request.write,
        })
    }

    fn require_writable(&self) -> Result<()> {
        if self.write {
            Ok(())
        } else {
            Err(Error::read_only())
        }
    }
}

impl Layer for Qcow {
    fn format(&self) -> &'static str {
        "qcow"
    }

    fn len(&self) -> u64 {
        self.header.size
    }

    fn granularity(&self) -> u64 {
        self.header.cluster_size()
    }

    fn map(&self, range: ByteRange) -> Result<Run> {
        self.reserved.require_apart()?;
        self.tree.map(range)
    }

    fn plan_write(&self, range: ByteRange) -> Result<Box<dyn WritePlan + '_>> {
        self.require_writable()?;
        self.tree.plan_write(range)
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.require_writable()?;
        self.tree.zero_clusters(range, mode)
    }

    fn info(&self) -> Result<Info> {
        Ok(Info {
            cluster_size: Some(self.header.cluster_size()),
            encrypted: self.header.is_encrypted,
            ..Info::default()
        })
    }

    fn check_resize(&self, _request: &ResizeRequest) -> Result<()> {
        Err(Error::unsupported("Image format driver does not support resize"))
    }

    fn resize(&self, request: &ResizeRequest) -> Result<()> {
        self.check_resize(request)
    }

    fn flush(&self) -> Result<()> {
        self.tree.flush()
    }

    fn file(&self) -> &Arc<dyn Device> {
        self.tree.file()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities {
            codec: Some(self),
            backed: Some(self),
            ..Capabilities::default()
        }
    }
}

impl Codec for Qcow {
    fn require_encoded(&self, encoded: &Encoded) -> Result<()> {
        self.tree.file().require(encoded.offset, encoded.stored)
    }

    fn decode(&self, encoded: &Encoded, buf: &mut [u8]) -> Result<()> {
        self.decode_and_keep(encoded, buf, &mut Vec::new()).map(drop)
    }

    fn form(&self) -> Option<EncodedForm> {
        Some(EncodedForm {
            codec: codec::DEFLATE,
            cluster: self.granularity(),
        })
    }

    fn decode_and_keep(&self, encoded: &Encoded, buf: &mut [u8], bytes: &mut Vec<u8>) -> Result<bool> {
        let file = self.tree.file();
        // The length field has `cluster_bits` bits, so it is less than a cluster.
        let len = usize::try_from(encoded.stored).map_err(|_| damaged())?;
        bytes.clear();
        bytes.resize(len, 0);
        file.event(Event::READ_COMPRESSED);
        file.require(encoded.offset, encoded.stored)
            .map_err(|_| damaged())?;
        file.read_at(bytes, encoded.offset)?;
        let len = codec::deflate::decode(bytes, buf).map_err(|_| damaged())?;
        bytes.truncate(len.unwrap_or(0));
        Ok(len.is_some())
    }

    fn encoder(&self, level: Option<CompressionLevel>) -> Result<Option<Box<dyn Encoder>>> {
        codec::deflate::encoder(level).map(Some)
    }

    fn plan_encoded(&self, clusters: &[EncodedCluster]) -> Result<Box<dyn EncodedPlan + '_>> {
        self.require_writable()?;
        Ok(Box::new(self.tree.plan_encoded(clusters)?))
    }
}

impl Backed for Qcow {
    fn backing(&self) -> Option<Backing> {
        self.header.backing.as_ref().map(|name| Backing {
            name: name.clone(),
            format: None,
        })
    }

    fn make_empty(&self) -> Result<()> {
        self.require_writable()?;
        self.tree.make_empty(HostOffset::new(self.header.end()))
    }
}
