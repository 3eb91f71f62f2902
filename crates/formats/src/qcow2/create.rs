//! Creates images.
//!
//! ```text
//!   cluster 0 header   1 refcount table   2 refcount block   3.. L1 table
//! ```
//!
//! A minimal image of size zero is written and then grown: the L1 table is made by the code for a resize.

use std::sync::Arc;

use diskimage_core::{
    CreateRequest, Device, Error, FilterDevice, Filtered, NewFiles, OpenContext, OpenRequest, Preallocation,
    ResizeRequest, Result, ResultExt, name, saturating_u32, to_index,
};
use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use super::Qcow2;
use super::encrypt::Encryption;
use super::header::extension;
use super::header::feature::{Autoclear, Compatible, Incompatible};
use super::header::{Compression, HEADER_LEN, MAGIC, RawHeader, limit};
use super::options::{CreateOptions, Wording};
use super::refcount::block;
use crate::encryption::legacy_aes;

/// Writes a new image to `files`.
pub(super) fn create(request: &CreateRequest<'_>, files: &mut NewFiles<'_>) -> Result<()> {
    let options = CreateOptions::parse(request.options, Wording::Parameters)?;
    // The length of the data file is set when the image grows to its size.
    let data = match &options.data_file {
        Some(name) => Some((files.make_part)(name)?),
        None => None,
    };
    let file: Arc<dyn Device> = Arc::new(Filtered(Unflushed(Arc::clone(&files.file))));
    write_minimal(&*file, &options)?;
    let context = OpenContext::default().with_objects(Arc::clone(request.objects));
    let open = || {
        Qcow2::open(OpenRequest {
            write: true,
            children: data.iter().map(|data| ("data-file", Arc::clone(data))).collect(),
            ..OpenRequest::new(
                Arc::clone(&file),
                request.name,
                &mut legacy_aes::node(request.options),
                &context,
            )
        })
    };
    if let Some(Encryption::Luks(algorithms)) = &options.encryption {
        open()?.make_volume(algorithms, request)?;
    }
    let image = open()?;
    let preallocation = match (options.preallocation, options.data_file_raw) {
        // The tables of an image with a raw data file must map all of it as data.
        (Preallocation::Off, true) => Preallocation::Metadata,
        (mode, _) => mode,
    };
    let size = ResizeRequest::new(request.size.next_multiple_of(512), preallocation);
    // No `backing_len`: the backing image is visible everywhere.
    image.grow_to(&size).context(|| "Could not resize image")?;
    diskimage_core::Layer::flush(&*image)?;
    files.file.flush()
}

/// Writes the header, the refcount table and one refcount block.
fn write_minimal(file: &dyn Device, options: &CreateOptions) -> Result<()> {
    let size = options.geometry.cluster_size();
    let bytes = |clusters: u64| to_index(clusters * size).map(|len| vec![0; len]);
    let mut cluster = header_cluster(options)?;
    cluster.resize(to_index(size)?, 0);
    file.write_at(&cluster, 0)?;
    let mut tables = bytes(2)?;
    tables[..8].copy_from_slice(&(2 * size).to_be_bytes());
    let order = options.geometry.refcount_order;
    for index in 0..3 {
        let slot = block::Slot::new(index, order);
        let at = to_index(size + slot.byte)?;
        let counted = tables
            .get_mut(at..)
            .and_then(|bytes| block::write(bytes, slot, order, 1));
        counted.ok_or_else(|| Error::invalid("Cluster size too small for its refcounts"))?;
    }
    file.write_at(&tables, size)
}

fn header_cluster(options: &CreateOptions) -> Result<Vec<u8>> {
    let size = options.geometry.cluster_size();
    let mut incompatible = 0;
    let mut autoclear = 0;
    if options.data_file.is_some() {
        incompatible |= Incompatible::DATA_FILE;
    }
    if options.data_file_raw {
        autoclear |= Autoclear::DATA_FILE_RAW;
    }
    if options.compression != Compression::Zlib {
        incompatible |= Incompatible::COMPRESSION;
    }
    if options.geometry.extended_l2 {
        incompatible |= Incompatible::EXTENDED_L2;
    }
    let compatible = if options.lazy_refcounts {
        Compatible::LAZY_REFCOUNTS
    } else {
        0
    };
    // Version 2 has the short header; the fields beyond it are not written.
    let header_len = if options.version >= 3 { HEADER_LEN } else { 72 };
    let backing = name::to_bytes(options.backing_file.as_deref().unwrap_or_default());
    let with_names = options.version >= 3 && size >= MIN_CLUSTER_FOR_NAMES;
    let (format, data_file) = (options.backing_format.as_deref(), options.data_file.as_deref());
    let extensions = extension::write(with_names, format, data_file);
    let backing_offset = header_len + extensions.len();
    if backing.len() as u64 > u64::from(limit::BACKING_NAME) {
        return Err(Error::invalid("Backing file name too long"));
    }
    if (backing_offset + backing.len()) as u64 > size {
        return Err(Error::invalid(
            "Header and backing file name do not fit into one cluster",
        ));
    }
    let raw = RawHeader {
        magic: U32::new(MAGIC),
        version: U32::new(options.version),
        backing_file_offset: U64::new(if backing.is_empty() {
            0
        } else {
            backing_offset as u64
        }),
        // Checked against the limit above.
        backing_file_size: U32::new(saturating_u32(backing.len())),
        cluster_bits: U32::new(options.geometry.cluster_bits),
        size: U64::ZERO,
        crypt_method: U32::new(Encryption::first_crypt_method(options.encryption.as_ref())),
        l1_size: U32::ZERO,
        l1_table_offset: U64::ZERO,
        refcount_table_offset: U64::new(size),
        refcount_table_clusters: U32::new(1),
        nb_snapshots: U32::ZERO,
        snapshots_offset: U64::ZERO,
        incompatible_features: U64::new(incompatible),
        compatible_features: U64::new(compatible),
        autoclear_features: U64::new(autoclear),
        refcount_order: U32::new(options.geometry.refcount_order),
        header_length: U32::new(saturating_u32(header_len)),
        compression_type: u8::from(options.compression == Compression::Zstd),
        padding: [0; 7],
    };
    let mut bytes = raw.as_bytes()[..header_len].to_vec();
    bytes.extend_from_slice(&extensions);
    bytes.extend_from_slice(&backing);
    Ok(bytes)
}

/// Images with smaller clusters have no feature name table, as in qemu-img: the header must fit into the first cluster.
pub(super) const MIN_CLUSTER_FOR_NAMES: u64 = 8192;

/// A device that ignores flushes: a new image holds no data that write order could protect, so it is flushed once, at
/// the end.
#[derive(Debug)]
struct Unflushed(Arc<dyn Device>);

impl FilterDevice for Unflushed {
    fn below(&self) -> &Arc<dyn Device> {
        &self.0
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}
