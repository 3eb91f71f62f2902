//! The header: its bytes, and a checked type that cannot hold an invalid value.
//!
//! ```text
//!    0 magic "QFI\xfb"        4 version             8 backing file offset   16 its length
//!   20 cluster_bits          24 size               32 crypt_method          36 l1_size (entries)
//!   40 l1_table_offset       48 refcount table     56 its clusters          60 nb_snapshots
//!   64 snapshots_offset      version 3 from here:
//!   72 incompatible          80 compatible         88 autoclear             96 refcount_order
//!  100 header_length        104 compression_type  105 padding to 112, then header extensions
//! ```

pub(in crate::qcow2) mod extension;
pub(in crate::qcow2) mod feature;
pub(in crate::qcow2) mod rewrite;

use diskimage_core::{
    Backing, Error, ErrorKind, Name, Note, Result, ResultExt, align_down, errno, require_addressable,
    saturating_index, to_index,
};
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use self::extension::{BitmapsExtension, Extensions};
use self::feature::{Autoclear, Compatible, Features, Incompatible};
use crate::layer_kit::offset::{ClusterIndex, ClusterRange, GuestOffset, HostOffset};

/// The first bytes of every qcow2 image.
pub(super) const MAGIC: u32 = 0x5146_49fb;

/// The header of version 3 with the compression type: the form that this program writes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    /// "QFI\xfb".
    pub(super) magic: U32,
    /// 2 or 3.
    pub(super) version: U32,
    /// The offset of the backing file's name; 0 without a backing file.
    pub(super) backing_file_offset: U64,
    /// The length of the name in bytes. The name is not NUL-terminated.
    pub(super) backing_file_size: U32,
    /// The cluster size is 1 shifted left by this.
    pub(super) cluster_bits: U32,
    /// The disk's size in bytes.
    pub(super) size: U64,
    /// 0 none, 1 AES, 2 LUKS.
    pub(super) crypt_method: U32,
    /// Entries of the active L1 table.
    pub(super) l1_size: U32,
    /// The host offset of the active L1 table.
    pub(super) l1_table_offset: U64,
    /// The host offset of the refcount table.
    pub(super) refcount_table_offset: U64,
    /// The length of the refcount table in clusters.
    pub(super) refcount_table_clusters: U32,
    /// The number of internal snapshots.
    pub(super) nb_snapshots: U32,
    /// The host offset of the snapshot table.
    pub(super) snapshots_offset: U64,
    /// Features: see [`Incompatible`].
    pub(super) incompatible_features: U64,
    /// Features: see [`Compatible`].
    pub(super) compatible_features: U64,
    /// Features: see [`Autoclear`].
    pub(super) autoclear_features: U64,
    /// The width of a refcount in bits is 1 shifted left by this.
    pub(super) refcount_order: U32,
    /// The length of the header in bytes.
    pub(super) header_length: U32,
    /// 0 zlib, 1 zstd.
    pub(super) compression_type: u8,
    /// Must be zero.
    pub(super) padding: [u8; 7],
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

/// The length of the header that this program writes, in bytes.
pub(super) const HEADER_LEN: usize = 112;
/// The length of a version 2 header in bytes.
pub(super) const V2_LEN: usize = 72;
/// The length of the shortest version 3 header in bytes.
const V3_MIN_LEN: usize = 104;

/// Disks have whole sectors.
const SECTOR: u64 = 512;

/// The offsets of fields that are changed in place.
pub(super) mod field {
    pub(in crate::qcow2) const BACKING_FILE_OFFSET: usize = 8;
    pub(in crate::qcow2) const BACKING_FILE_SIZE: usize = 16;
    pub(in crate::qcow2) const SIZE: u64 = 24;
    pub(in crate::qcow2) const CRYPT_METHOD: usize = 32;
    pub(in crate::qcow2) const L1_SIZE: u64 = 36;
    pub(in crate::qcow2) const REFCOUNT_TABLE: u64 = 48;
    pub(in crate::qcow2) const NB_SNAPSHOTS: u64 = 60;
    pub(in crate::qcow2) const INCOMPATIBLE: u64 = 72;
    pub(in crate::qcow2) const COMPATIBLE: u64 = 80;
    pub(in crate::qcow2) const AUTOCLEAR: u64 = 88;
}

/// Limits of the specification and, where they are lower, those of qemu-img.
pub(super) mod limit {
    pub(in crate::qcow2) const MIN_CLUSTER_BITS: u32 = 9;
    pub(in crate::qcow2) const MAX_CLUSTER_BITS: u32 = 21;
    /// Bytes of an L1 table.
    pub(in crate::qcow2) const L1_BYTES: u64 = 32 << 20;
    /// Bytes of the refcount table.
    pub(in crate::qcow2) const REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
    pub(in crate::qcow2) const SNAPSHOTS: u32 = 65536;
    /// Bytes of the backing file's name.
    pub(in crate::qcow2) const BACKING_NAME: u32 = 1023;
    /// Host offsets have at most 56 bits in every table.
    pub(in crate::qcow2) const HOST_OFFSET: u64 = 1 << 56;
    /// Subclusters of an extended L2 entry.
    pub(in crate::qcow2) const SUBCLUSTERS: u64 = 32;
    /// The smallest cluster of an image with extended L2 entries: a subcluster is a sector at least.
    pub(in crate::qcow2) const EXTENDED_L2_CLUSTER: u64 = 512 * SUBCLUSTERS;
    /// Bytes of the shortest entry of the snapshot table: its fixed part.
    pub(in crate::qcow2) const SNAPSHOT_ENTRY: u64 = 40;
}

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    /// Raw deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

impl Compression {
    /// The value of `compression_type` on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

/// How guest data is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CryptMethod {
    None,
    Aes,
    Luks,
}

/// Sizes that follow from the header and do not change while the image is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) cluster_bits: u32,
    pub(super) refcount_order: u32,
    pub(super) extended_l2: bool,
}

impl Geometry {
    pub(super) fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// The length of an L2 entry in bytes.
    pub(super) fn l2_entry_size(self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// The number of entries of an L2 table.
    pub(super) fn l2_entries(self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    /// The guest bytes that one L2 table maps.
    pub(super) fn l2_coverage(self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// The index of the L1 entry for `guest`.
    pub(super) fn l1_index(self, guest: GuestOffset) -> u64 {
        guest.unit(self.l2_coverage())
    }

    /// The index of the L2 entry for `guest` in its table.
    pub(super) fn l2_index(self, guest: GuestOffset) -> u64 {
        guest.within(self.l2_coverage()) >> self.cluster_bits
    }

    /// The end of the guest range that the L2 table for `guest` maps; saturates.
    pub(super) fn l2_end(self, guest: GuestOffset) -> GuestOffset {
        guest.unit_end(self.l2_coverage())
    }

    /// The L1 entries that a disk of `size` bytes needs.
    pub(super) fn l1_entries(self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }

    /// The number of refcounts in a refcount block.
    pub(super) fn refcount_block_entries(self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// The index of the refcount block that counts `cluster`.
    pub(super) fn block_index(self, cluster: ClusterIndex) -> u64 {
        cluster.unit(self.refcount_block_entries())
    }

    /// The index of the refcount of `cluster` in its block.
    pub(super) fn index_in_block(self, cluster: ClusterIndex) -> u64 {
        cluster.within(self.refcount_block_entries())
    }

    /// The indexes of the refcount blocks that count `clusters`.
    pub(super) fn block_indices(self, clusters: ClusterRange) -> std::ops::Range<u64> {
        let per_block = self.refcount_block_entries();
        clusters.start.unit(per_block)..clusters.end.align_up(per_block).unit(per_block)
    }

    /// The clusters that the refcount block `index` counts.
    pub(super) fn counted_clusters(self, index: u64) -> ClusterRange {
        let count = self.refcount_block_entries();
        ClusterRange::at(ClusterIndex::new(index.saturating_mul(count)), count)
    }

    /// The first cluster beyond the offsets that tables can hold.
    pub(super) fn cluster_limit(self) -> ClusterIndex {
        HostOffset::new(limit::HOST_OFFSET).cluster(self.cluster_bits)
    }

    /// The largest refcount that fits the width.
    pub(super) fn max_refcount(self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.refcount_order))
    }

    /// The smallest unit that is allocated or marked as zero: a subcluster, or a cluster without extended L2 entries.
    pub(super) fn subcluster_size(self) -> u64 {
        if self.extended_l2 {
            self.cluster_size() / limit::SUBCLUSTERS
        } else {
            self.cluster_size()
        }
    }
}

/// A checked header with its extensions.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) geometry: Geometry,
    pub(super) size: u64,
    pub(super) crypt: CryptMethod,
    pub(super) l1_size: u32,
    pub(super) l1_table_offset: u64,
    pub(super) refcount_table_offset: u64,
    pub(super) refcount_table_clusters: u32,
    pub(super) nb_snapshots: u32,
    pub(super) snapshots_offset: u64,
    pub(super) features: Features,
    pub(super) compression: Compression,
    pub(super) backing: Option<Backing>,
    pub(super) extensions: Extensions,
}

impl Header {
    /// The length of the first cluster, which [`Header::parse`] needs as a whole.
    ///
    /// # Errors
    /// A file that is no qcow2 image, and an invalid cluster size.
    pub(super) fn bytes_needed(start: &[u8]) -> Result<usize> {
        let raw = raw(start)?;
        Ok(1 << cluster_bits(&raw)?)
    }

    /// Whether `bytes`, the start of the first cluster, contain the header, all its extensions and the name of the backing
    /// file.
    ///
    /// # Errors
    /// As [`Header::bytes_needed`].
    pub(super) fn is_whole(bytes: &[u8]) -> Result<bool> {
        let raw = raw(bytes)?;
        let name = saturating_index(raw.backing_file_offset.get());
        let name_end = name.saturating_add(saturating_index(raw.backing_file_size.get().into()));
        let end = if name == 0 { bytes.len() } else { name };
        let area = bytes.get(raw.len()..end);
        Ok(area.is_some_and(|area| name > 0 || extension::is_ended(area)) && name_end <= bytes.len())
    }

    /// Parses the first cluster of a file, of which the rest may be missing if [`Header::is_whole`]. `for_check` accepts damage that a check can repair.
    ///
    /// # Errors
    /// `qemu-img`'s message for the first field that is wrong.
    pub(super) fn parse(cluster: &[u8], for_check: bool) -> Result<Self> {
        let mut raw = raw(cluster)?;
        let cluster_bits = cluster_bits(&raw)?;
        let cluster_size = 1u64 << cluster_bits;
        if raw.version.get() == 2 {
            raw.incompatible_features = U64::ZERO;
            raw.compatible_features = U64::ZERO;
            raw.autoclear_features = U64::ZERO;
            raw.refcount_order = U32::new(4);
        }
        let extensions = parse_extensions(&raw, cluster, cluster_size)?;
        let compression_type = if raw.len() > V3_MIN_LEN {
            raw.compression_type
        } else {
            0
        };
        let features = Features {
            incompatible: Incompatible(raw.incompatible_features.get()),
            compatible: Compatible(raw.compatible_features.get()),
            autoclear: Autoclear(raw.autoclear_features.get()),
        };
        features.incompatible.refuse_unknown(&extensions.feature_names)?;
        let compression = parse_compression(compression_type, &features)?;
        if raw.refcount_order.get() > 6 {
            return Err(Error::corrupt(
                "Reference count entry width too large; may not exceed 64 bits",
            ));
        }
        let crypt = parse_crypt(&raw)?;
        let geometry = Geometry {
            cluster_bits,
            refcount_order: raw.refcount_order.get(),
            extended_l2: features.incompatible.has(Incompatible::EXTENDED_L2),
        };
        if geometry.extended_l2 && cluster_size < limit::EXTENDED_L2_CLUSTER {
            return Err(Error::corrupt("Invalid subcluster size"));
        }
        check_refcount_table(&raw, cluster_size, for_check)?;
        check_snapshots(&raw, cluster_size, for_check)?;
        check_l1(&raw, geometry)?;
        let backing = parse_backing(&raw, cluster, &extensions)?;
        Ok(Self {
            version: raw.version.get(),
            geometry,
            // As in qemu-img, the rest of a sector is not part of the disk.
            size: align_down(raw.size.get(), SECTOR),
            crypt,
            l1_size: raw.l1_size.get(),
            l1_table_offset: raw.l1_table_offset.get(),
            refcount_table_offset: raw.refcount_table_offset.get(),
            refcount_table_clusters: raw.refcount_table_clusters.get(),
            nb_snapshots: raw.nb_snapshots.get(),
            snapshots_offset: raw.snapshots_offset.get(),
            features,
            compression,
            backing,
            extensions,
        })
    }
}

impl Header {
    /// The bitmaps extension, if the image has bitmaps and their autoclear bit is set.
    pub(super) fn bitmaps(&self) -> Option<BitmapsExtension> {
        self.extensions
            .bitmaps
            .filter(|bitmaps| bitmaps.nb_bitmaps.get() > 0 && self.features.autoclear.has(Autoclear::BITMAPS))
    }

    /// The warning about bitmaps that another program has left behind.
    pub(super) fn stale_bitmaps(&self) -> Option<Note> {
        self.extensions
            .bitmaps
            .filter(|_| !self.features.autoclear.has(Autoclear::BITMAPS))?;
        let what = if self.version < 3 {
            "This qcow2 v2 image contains bitmaps, but they may have been modified by a program without persistent \
             bitmap support; so now they must all be considered inconsistent"
        } else {
            "a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent"
        };
        Some(Note::Several(vec![
            Note::Warning(what.to_owned()),
            Note::from("Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix."),
        ]))
    }
}

/// Reads the fields of a header. Fields beyond the end of `bytes` are zero.
pub(super) fn raw(bytes: &[u8]) -> Result<RawHeader> {
    let mut padded = [0; HEADER_LEN];
    let len = bytes.len().min(HEADER_LEN);
    padded[..len].copy_from_slice(&bytes[..len]);
    let raw =
        RawHeader::read_from_bytes(&padded).map_err(|_| Error::corrupt("Could not read qcow2 header"))?;
    if raw.magic.get() != MAGIC {
        return Err(Error::corrupt("Image is not in qcow2 format"));
    }
    if !matches!(raw.version.get(), 2 | 3) {
        return Err(Error::unsupported(format!(
            "Unsupported qcow2 version {}",
            raw.version
        )));
    }
    Ok(raw)
}

impl RawHeader {
    /// The length of the stored header in bytes. A length that does not fit an index saturates: it exceeds every
    /// cluster.
    pub(super) fn len(&self) -> usize {
        if self.version.get() == 2 {
            V2_LEN
        } else {
            saturating_index(self.header_length.get().into())
        }
    }
}

/// Parses the header extensions, which lie between the header and the name of the backing file.
fn parse_extensions(raw: &RawHeader, cluster: &[u8], cluster_size: u64) -> Result<Extensions> {
    let header_len = raw.len();
    if raw.version.get() > 2 && header_len < V3_MIN_LEN {
        return Err(Error::corrupt("qcow2 header too short"));
    }
    if header_len as u64 > cluster_size {
        return Err(Error::corrupt("qcow2 header exceeds cluster size"));
    }
    let end = match raw.backing_file_offset.get() {
        0 => cluster_size,
        offset if offset > cluster_size => return Err(Error::corrupt("Invalid backing file offset")),
        offset => offset,
    };
    let area = usize::try_from(end)
        .ok()
        .and_then(|end| cluster.get(header_len..end.min(cluster.len())));
    extension::parse(area.unwrap_or(&[]))
}

fn parse_crypt(raw: &RawHeader) -> Result<CryptMethod> {
    match raw.crypt_method.get() {
        0 => Ok(CryptMethod::None),
        1 => Ok(CryptMethod::Aes),
        2 => Ok(CryptMethod::Luks),
        other => Err(Error::unsupported(format!(
            "Unsupported encryption method {other}"
        ))),
    }
}

fn cluster_bits(raw: &RawHeader) -> Result<u32> {
    match raw.cluster_bits.get() {
        bits @ limit::MIN_CLUSTER_BITS..=limit::MAX_CLUSTER_BITS => Ok(bits),
        bits => Err(Error::corrupt(format!("Unsupported cluster size: 2^{bits}"))),
    }
}

fn parse_compression(value: u8, features: &Features) -> Result<Compression> {
    let flagged = features.incompatible.has(Incompatible::COMPRESSION);
    match (value, flagged) {
        (0, false) => Ok(Compression::Zlib),
        (0, true) => Err(Error::corrupt(
            "qcow2: Compression type incompatible feature bit must not be set",
        )),
        (_, false) => Err(Error::corrupt(
            "qcow2: Compression type incompatible feature bit must be set",
        )),
        (1, true) => Ok(Compression::Zstd),
        (other, true) => Err(Error::unsupported(format!(
            "qcow2: unknown compression type: {other}"
        ))),
    }
}

/// Whether a table of `bytes` bytes may be at `offset`: it starts on a cluster and ends below the largest file offset.
fn is_valid_range(offset: u64, bytes: u64, cluster_size: u64) -> bool {
    offset.is_multiple_of(cluster_size)
        && offset
            .checked_add(bytes)
            .is_some_and(|end| i64::try_from(end).is_ok())
}

fn check_refcount_table(raw: &RawHeader, cluster_size: u64, for_check: bool) -> Result<()> {
    let clusters = u64::from(raw.refcount_table_clusters.get());
    if clusters == 0 && !for_check {
        return Err(Error::corrupt("Image does not contain a reference count table"));
    }
    if clusters * cluster_size > limit::REFCOUNT_TABLE_BYTES {
        return Err(Error::new(ErrorKind::Limit, "Reference count table too large"));
    }
    if !is_valid_range(
        raw.refcount_table_offset.get(),
        clusters * cluster_size,
        cluster_size,
    ) {
        return Err(Error::corrupt("Reference count table offset invalid"));
    }
    Ok(())
}

fn check_snapshots(raw: &RawHeader, cluster_size: u64, for_check: bool) -> Result<()> {
    // A check reads the table itself: it reports errors in its own form and cuts a table that is too long.
    if for_check {
        return Ok(());
    }
    if raw.nb_snapshots.get() > limit::SNAPSHOTS {
        return Err(Error::new(ErrorKind::Limit, "Snapshot table too large"));
    }
    let bytes = u64::from(raw.nb_snapshots.get()) * limit::SNAPSHOT_ENTRY;
    if !is_valid_range(raw.snapshots_offset.get(), bytes, cluster_size) {
        return Err(Error::corrupt("Snapshot table offset invalid"));
    }
    Ok(())
}

fn check_l1(raw: &RawHeader, geometry: Geometry) -> Result<()> {
    let bytes = u64::from(raw.l1_size.get()) * 8;
    if bytes > limit::L1_BYTES {
        return Err(Error::new(ErrorKind::Limit, "Active L1 table too large"));
    }
    if !is_valid_range(raw.l1_table_offset.get(), bytes, geometry.cluster_size()) {
        return Err(Error::corrupt("Active L1 table offset invalid"));
    }
    if raw.size.get() > u64::MAX - geometry.l2_coverage() {
        return Err(Error::from_errno(errno::EFBIG).context("Could not refresh total sector count"));
    }
    let needed = geometry.l1_entries(raw.size.get());
    if needed > u64::from(i32::MAX.unsigned_abs()) {
        return Err(Error::new(ErrorKind::Limit, "Image is too big"));
    }
    if u64::from(raw.l1_size.get()) < needed {
        return Err(Error::corrupt("L1 table is too small"));
    }
    require_addressable(raw.l1_table_offset.get(), bytes).context(|| "Could not read L1 table")
}

fn parse_backing(raw: &RawHeader, cluster: &[u8], extensions: &Extensions) -> Result<Option<Backing>> {
    let (offset, len) = (raw.backing_file_offset.get(), raw.backing_file_size.get());
    if offset == 0 {
        return Ok(None);
    }
    let max = (1u64 << raw.cluster_bits.get()) - offset;
    if u64::from(len) > max.min(u64::from(limit::BACKING_NAME)) {
        return Err(Error::corrupt("Backing file name too long"));
    }
    let start = to_index(offset)?;
    let name = cluster
        .get(start..)
        .and_then(|rest| rest.get(..usize::try_from(len).ok()?));
    let name = name.ok_or_else(|| Error::corrupt("Could not read backing file name"))?;
    // As in qemu-img: a NUL ends the name.
    let name = name.split(|byte| *byte == 0).next().unwrap_or(&[]);
    if name.is_empty() {
        return Ok(None);
    }
    Ok(Some(Backing {
        name: Name::from_bytes(name),
        format: extensions.backing_format.clone(),
    }))
}
