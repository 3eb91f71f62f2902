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
//! The format is described on the page "The QCOW Image Format". `header` parses the header;
//! [`two_level_map`](crate::layer_kit::two_level_map) reads and changes the tables.

mod header;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{
    Backed, Backing, ByteRange, Capabilities, Codec, CreatePlan, CreateRequest, Device, Encoded, Encoder,
    Error, ErrorKind, Event, Format, FormatProperties, Info, Layer, Measure, MeasureSource, Objects,
    OpenRequest, Preallocation, Probe, ResizeRequest, Result, Run, Score, WritePlan, ZeroMode, align_up,
    errno,
};

use self::header::{Header, SECTOR};
use crate::codec;
use crate::encryption::legacy_aes::{self, LegacyAes};
use crate::known_formats::KNOWN_FORMATS;
use crate::layer_kit::metadata_cache::{Table, WriteOrder};
use crate::layer_kit::reserved::Reserved;
use crate::layer_kit::two_level_map::{Cluster, EntryCodec, Shape, TwoLevelMap};
use crate::layer_kit::{count_used, preallocation};
use crate::luks::options::passphrase;

/// The format's entry in the table of formats.
#[derive(Debug)]
pub struct QcowFormat;

const CREATE_OPTIONS: &[OptionDef] = &[
    OptionDef::new("size", OptionKind::Size, "Virtual disk size"),
    OptionDef::new("backing_file", OptionKind::Text, "File name of a base image"),
    OptionDef::new("backing_fmt", OptionKind::Text, "Format of the backing image"),
    OptionDef::new(
        "encryption",
        OptionKind::Flag,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
    OptionDef::new(
        "encrypt.format",
        OptionKind::Text,
        "Encrypt the image, format choices: 'aes'",
    ),
    OptionDef::new(
        "encrypt.key-secret",
        OptionKind::Text,
        "ID of the secret that provides the AES encryption key",
    ),
];

impl Format for QcowFormat {
    fn name(&self) -> &'static str {
        "qcow"
    }

    fn properties(&self) -> &'static FormatProperties {
        const {
            &FormatProperties {
                create_options: Some(CREATE_OPTIONS),
                strong_options: &[legacy_aes::KEY_SECRET],
                has_backing: true,
                has_compression: true,
                keeps_failed_file: true,
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
        Ok(CreatePlan::new(move |files| create(&request, &*files.file)))
    }

    fn measure(&self, options: &Options, source: MeasureSource<'_>, _objects: &Objects) -> Result<Measure> {
        preallocation::check(options)?;
        let header = new_header(options, source.len())?;
        let size = header.cluster_size();
        let used = count_used::clusters(source, size, header.coverage(), header.backing.is_some())?;
        let all = count_used::all_clusters(source.len(), size, header.coverage());
        let empty = header.l1_offset + header.l1_len().next_multiple_of(SECTOR);
        let bytes = |(clusters, tables): (u64, u64)| match clusters {
            0 => empty,
            _ => empty.next_multiple_of(size) + clusters * size + tables * header.l2_len(),
        };
        Ok(Measure {
            required: bytes(used),
            fully_allocated: bytes(all),
            bitmaps: None,
        })
    }
}

/// Writes a new image to `file`.
fn create(request: &CreateRequest<'_>, file: &dyn Device) -> Result<()> {
    preallocation::check(request.options)?;
    let header = new_header(request.options, request.size)?;
    if header.is_encrypted {
        let secret = request.options.text(legacy_aes::KEY_SECRET);
        passphrase(request.objects, secret, legacy_aes::KEY_SECRET)?;
    }
    let table = ByteRange::at(header.l1_offset, header.l1_len().next_multiple_of(SECTOR));
    if file.is_zero_when_new() {
        file.resize(table.end(), Preallocation::Off)?;
    } else {
        file.write_zeroes(table, ZeroMode::KeepAllocated)?;
    }
    file.write_at(&header.to_bytes(), 0)?;
    file.flush()
}

/// The header of a new image of `size` bytes.
fn new_header(options: &Options, size: u64) -> Result<Header> {
    let encryption = legacy_aes::wanted_format(options)?;
    match encryption {
        None if options.is_given(legacy_aes::KEY_SECRET) => return Err(legacy_aes::no_format()),
        None | Some("aes" | "luks") => {}
        Some(other) => return Err(legacy_aes::unknown_format(other)),
    }
    if size == 0 {
        return Err(Error::invalid("Image size is too small, cannot be zero length"));
    }
    if encryption.is_some_and(|format| format != "aes") {
        return Err(Error::invalid("Unsupported encryption format"));
    }
    let backing = options.text("backing_file").filter(|name| !name.is_empty());
    Header::new(size, backing, encryption.is_some())
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
        let aes = found.map(|_| LegacyAes::new(passphrase)).transpose()?;
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
            end: file.len().max(header.end()),
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
        let file = self.tree.file();
        // The length field has `cluster_bits` bits, so it is less than a cluster.
        let len = usize::try_from(encoded.stored).map_err(|_| damaged())?;
        let mut bytes = vec![0; len];
        file.event(Event::READ_COMPRESSED);
        file.require(encoded.offset, encoded.stored)
            .map_err(|_| damaged())?;
        file.read_at(&mut bytes, encoded.offset)?;
        codec::deflate::decode(&bytes, buf).map_err(|_| damaged())
    }

    fn encoder(&self) -> Result<Option<Box<dyn Encoder>>> {
        codec::deflate::encoder().map(Some)
    }

    fn write_encoded(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.require_writable()?;
        self.tree.write_encoded(offset, bytes)
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
        self.tree.make_empty(self.header.end())
    }
}

/// The encoding of qcow's table entries.
#[derive(Debug)]
struct Entries {
    file: Arc<dyn Device>,
    cluster_bits: u8,
    /// Bytes of an L2 table.
    l2_len: u64,
    has_backing: bool,
    /// The cipher of the clusters; `None` if they are not encrypted.
    aes: Option<LegacyAes>,
}

/// The bit of an L2 entry that marks a compressed cluster.
const COMPRESSED: u64 = 1 << 63;

impl Entries {
    /// The lowest bit of a compressed cluster's length in an L2 entry. The bits under it are the host offset.
    fn length_shift(&self) -> u32 {
        63 - u32::from(self.cluster_bits)
    }

    /// Refuses a table or a cluster of `len` bytes at `offset`, in a file that ends at `end`, if it is not aligned or
    /// not in the file. Unlike qemu-img, which reads zeroes beyond the end: a truncated disk would seem to be empty.
    fn require_stored(&self, offset: u64, len: u64, end: u64) -> Result<()> {
        let behind = offset.checked_add(len).ok_or_else(damaged)?;
        if !offset.is_multiple_of(SECTOR) {
            return Err(damaged());
        }
        if behind > end {
            self.file.require(offset, len)?;
        }
        Ok(())
    }
}

/// The error for all damage to tables and compressed clusters; qemu-img has the same errno for all of it.
fn damaged() -> Error {
    Error::damage(ErrorKind::Invalid, errno::EIO)
}

impl EntryCodec for Entries {
    const BIG_ENDIAN: bool = true;
    const TABLES_FIRST: bool = true;

    fn l2_table(&self, entry: u64, end: u64) -> Result<Option<u64>> {
        if entry == 0 {
            return Ok(None);
        }
        // As in qemu-img, a missing table is the same error as an invalid offset.
        self.require_stored(entry, self.l2_len, align_up(end, SECTOR))
            .map_err(|error| Error::damage(error.kind(), errno::EIO))?;
        Ok(Some(entry))
    }

    fn cluster(&self, entry: u64, end: u64) -> Result<Cluster> {
        if entry == 0 {
            Ok(Cluster::None)
        } else if entry & COMPRESSED != 0 {
            let shift = self.length_shift();
            Ok(Cluster::Encoded {
                offset: entry & ((1 << shift) - 1),
                stored: (entry & !COMPRESSED) >> shift,
            })
        } else {
            // The file may have only a part of its last cluster.
            let size = 1 << self.cluster_bits;
            self.require_stored(entry, size, align_up(end, size))?;
            Ok(Cluster::Host(entry))
        }
    }

    fn word(&self, cluster: Cluster) -> u64 {
        match cluster {
            // `Zero` is only encoded in an image without a backing image.
            Cluster::None | Cluster::Zero => 0,
            Cluster::Host(offset) => offset,
            Cluster::Encoded { offset, stored } => COMPRESSED | stored << self.length_shift() | offset,
        }
    }

    fn zero(&self) -> Option<Cluster> {
        (!self.has_backing).then_some(Cluster::None)
    }

    fn encoded_end(&self) -> u64 {
        1 << self.length_shift()
    }

    fn view(&self, file: &Arc<dyn Device>, guest: u64, host: u64) -> Arc<dyn Device> {
        self.aes
            .as_ref()
            .and_then(|aes| aes.view(file, guest, host))
            .unwrap_or_else(|| Arc::clone(file))
    }
}
