//! New images.
//!
//! ```text
//!   cluster 0 header   1 refcount table   2 refcount block   3.. L1 table
//! ```
//!
//! A minimal image of size zero is written and then grown: the same code as for a resize makes the L1 table.

use std::sync::Arc;

use diskimage_core::{
    CreateRequest, Device, Error, FilterDevice, Filtered, OpenRequest, Preallocation, ResizeRequest, Result,
    name,
};
use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use super::encrypt::Encryption;
use super::header::extension;
use super::header::feature::{Autoclear, Compatible, Incompatible};
use super::header::{Compression, HEADER_LEN, MAGIC, RawHeader, limit};
use super::options::{CreateOptions, Wording};
use super::refcount::block;
use super::{Qcow2, data_permissions};
use crate::encryption::legacy_aes;

/// Writes a new image to `request.file`.
pub(super) fn create(request: &CreateRequest<'_>) -> Result<()> {
    let wanted = CreateOptions::parse(request.options, Wording::Parameters)?;
    if let Some(name) = &wanted.data_file {
        // Its length is set when the image grows to its size.
        request
            .gate
            .open_data(name, request.name, data_permissions(true))?;
    }
    let file: Arc<dyn Device> = Arc::new(Filtered(Unsynced(Arc::clone(&request.file))));
    write_minimal(&*file, &wanted)?;
    let open = || {
        Qcow2::open(OpenRequest {
            write: true,
            ..OpenRequest::new(
                Arc::clone(&file),
                request.name,
                &mut legacy_aes::node(request.options),
                request.objects,
                request.gate,
            )
        })
    };
    if let Some(Encryption::Luks(algorithms)) = &wanted.encryption {
        open()?.make_volume(algorithms, request)?;
    }
    let image = open()?;
    let preallocation = match (wanted.preallocation, wanted.data_file_raw) {
        // The tables of a raw data file must say that all of it is data.
        (Preallocation::Off, true) => Preallocation::Metadata,
        (mode, _) => mode,
    };
    let size = ResizeRequest::new(request.size.next_multiple_of(512), preallocation);
    // No `backing_len`: the backing image shows everywhere.
    image.grow_to(&size)?;
    diskimage_core::Layer::flush(&*image)?;
    request.file.flush()
}

/// Header, refcount table and one refcount block.
fn write_minimal(file: &dyn Device, wanted: &CreateOptions) -> Result<()> {
    let size = wanted.geometry.cluster_size();
    let bytes = |clusters: u64| vec![0; usize::try_from(clusters * size).unwrap_or(0)];
    let mut cluster = header_cluster(wanted)?;
    cluster.resize(bytes(1).len(), 0);
    file.write_at(&cluster, 0)?;
    let mut tables = bytes(2);
    tables[..8].copy_from_slice(&(2 * size).to_be_bytes());
    let order = wanted.geometry.refcount_order;
    for index in 0..3 {
        let place = block::Slot::new(index, order);
        let at = usize::try_from(size + place.byte).unwrap_or(usize::MAX);
        let counted = tables
            .get_mut(at..)
            .and_then(|bytes| block::write(bytes, place, order, 1));
        counted.ok_or_else(|| Error::invalid("Cluster size too small for its refcounts"))?;
    }
    file.write_at(&tables, size)
}

fn header_cluster(wanted: &CreateOptions) -> Result<Vec<u8>> {
    let size = wanted.geometry.cluster_size();
    let mut incompatible = 0;
    let mut autoclear = 0;
    if wanted.data_file.is_some() {
        incompatible |= Incompatible::DATA_FILE;
    }
    if wanted.data_file_raw {
        autoclear |= Autoclear::DATA_FILE_RAW;
    }
    if wanted.compression != Compression::Zlib {
        incompatible |= Incompatible::COMPRESSION;
    }
    if wanted.geometry.extended_l2 {
        incompatible |= Incompatible::EXTENDED_L2;
    }
    let compatible = if wanted.lazy_refcounts {
        Compatible::LAZY_REFCOUNTS
    } else {
        0
    };
    // Version 2 images are written with the short header, whose fields beyond it read as zero.
    let header_len = if wanted.version >= 3 { HEADER_LEN } else { 72 };
    let backing = name::to_bytes(wanted.backing_file.as_deref().unwrap_or_default());
    let with_names = wanted.version >= 3 && size >= MIN_CLUSTER_FOR_NAMES;
    let (format, data_file) = (wanted.backing_format.as_deref(), wanted.data_file.as_deref());
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
        version: U32::new(wanted.version),
        backing_file_offset: U64::new(if backing.is_empty() {
            0
        } else {
            backing_offset as u64
        }),
        backing_file_size: U32::new(u32::try_from(backing.len()).unwrap_or(0)),
        cluster_bits: U32::new(wanted.geometry.cluster_bits),
        size: U64::ZERO,
        crypt_method: U32::new(Encryption::first_crypt_method(wanted.encryption.as_ref())),
        l1_size: U32::ZERO,
        l1_table_offset: U64::ZERO,
        refcount_table_offset: U64::new(size),
        refcount_table_clusters: U32::new(1),
        nb_snapshots: U32::ZERO,
        snapshots_offset: U64::ZERO,
        incompatible_features: U64::new(incompatible),
        compatible_features: U64::new(compatible),
        autoclear_features: U64::new(autoclear),
        refcount_order: U32::new(wanted.geometry.refcount_order),
        header_length: U32::new(u32::try_from(header_len).unwrap_or(0)),
        compression_type: u8::from(wanted.compression == Compression::Zstd),
        padding: [0; 7],
    };
    let mut bytes = raw.as_bytes()[..header_len].to_vec();
    bytes.extend_from_slice(&extensions);
    bytes.extend_from_slice(&backing);
    Ok(bytes)
}

/// Images with smaller clusters carry no feature names, as with the original: the header has to fit into one.
pub(super) const MIN_CLUSTER_FOR_NAMES: u64 = 8192;

/// A device whose flush waits: a new image holds nothing that order could protect, so it is made durable once, at the
/// end.
#[derive(Debug)]
struct Unsynced(Arc<dyn Device>);

impl FilterDevice for Unsynced {
    fn below(&self) -> &Arc<dyn Device> {
        &self.0
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}
