//! The directory of persistent bitmaps: its bytes and its types.
//!
//! ```text
//!   0 bitmap_table_offset   8 bitmap_table_size   12 flags   16 type   17 granularity_bits
//!  18 name_size            20 extra_data_size     24 extra data, name, padding to 8
//! ```

use std::borrow::Cow;

use diskimage_core::{
    Budget, ByteRange, Device, Error, ErrorKind, Reservation, Result, name, resize, saturating_index,
    to_index,
};
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::qcow2::header::Geometry;
use crate::qcow2::header::extension::BitmapsExtension;

/// The fixed part of a directory entry.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(in crate::qcow2) struct RawBitmap {
    /// The host offset of the bitmap table.
    pub(in crate::qcow2) table_offset: U64,
    /// The number of entries of the bitmap table.
    pub(in crate::qcow2) table_size: U32,
    /// See [`flag`].
    pub(in crate::qcow2) flags: U32,
    /// 1: a dirty bitmap.
    pub(in crate::qcow2) kind: u8,
    /// The guest bytes of one bit are 1 shifted left by this.
    pub(in crate::qcow2) granularity_bits: u8,
    /// Bytes of the name.
    pub(in crate::qcow2) name_size: U16,
    /// Bytes of extra data.
    pub(in crate::qcow2) extra_data_size: U32,
}

const _: () = assert!(size_of::<RawBitmap>() == 24);

/// The offset of the flags in an entry.
const FLAGS_AT: u64 = 12;

/// A bitmap of the directory.
#[derive(Clone, Debug)]
pub(in crate::qcow2) struct Bitmap {
    pub(in crate::qcow2) raw: RawBitmap,
    /// Extra data of other programs, kept unchanged. The zeroes at its end are not in memory: a crafted directory has its
    /// names and data in holes.
    extra: Vec<u8>,
    /// The name, kept in the same way.
    name: Vec<u8>,
    /// Whether the entry satisfies the specification. One that does not is kept as it is, and can only be removed.
    is_valid: bool,
}

pub(super) mod flag {
    /// The stored bits are out of date.
    pub(in crate::qcow2) const IN_USE: u32 = 1 << 0;
    /// Writes set bits in this bitmap.
    pub(in crate::qcow2) const AUTO: u32 = 1 << 1;
    /// The bitmap may be used without knowledge of its extra data.
    pub(in crate::qcow2) const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
    pub(in crate::qcow2) const KNOWN: u32 = IN_USE | AUTO | EXTRA_DATA_COMPATIBLE;
}

/// The type of dirty bitmaps, the only type of the specification.
const DIRTY_TRACKING: u8 = 1;

/// qemu-img's limits.
pub(super) mod limit {
    pub(in crate::qcow2) const BITMAPS: usize = 65535;
    /// Bytes of the directory.
    pub(in crate::qcow2) const DIRECTORY: u64 = 64 << 20;
    pub(in crate::qcow2) const NAME: usize = 1023;
    pub(in crate::qcow2) const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
    /// Bytes of one bitmap's bits.
    pub(in crate::qcow2) const BITS: u64 = 512 << 20;
}

impl Bitmap {
    /// Makes a bitmap without a table.
    pub(super) fn new(name: &str, granularity_bits: u8, flags: u32) -> Result<Self> {
        if name.is_empty() {
            return Err(Error::invalid("Bitmap name cannot be empty"));
        }
        let name = name::to_bytes(name);
        let name_size = u16::try_from(name.len())
            .ok()
            .filter(|len| usize::from(*len) <= limit::NAME)
            .ok_or_else(|| {
                Error::invalid(format!(
                    "Name length exceeds maximum ({} characters)",
                    limit::NAME
                ))
            })?;
        Ok(Self {
            raw: RawBitmap {
                table_offset: U64::ZERO,
                table_size: U32::ZERO,
                flags: U32::new(flags),
                kind: DIRTY_TRACKING,
                granularity_bits,
                name_size: U16::new(name_size),
                extra_data_size: U32::ZERO,
            },
            extra: Vec::new(),
            name: name.into_owned(),
            is_valid: true,
        })
    }

    pub(in crate::qcow2) fn name(&self) -> Cow<'_, str> {
        name::from_bytes(&self.name)
    }

    /// The name without control characters, for lines that are printed.
    pub(in crate::qcow2) fn shown_name(&self) -> String {
        // On some terminals these bytes are control characters as well.
        let is_control = |c: char| c.is_control() || name::byte_of(c).is_some_and(|byte| byte < 0xa0);
        self.name()
            .chars()
            .map(|c| if is_control(c) { '\u{fffd}' } else { c })
            .collect()
    }

    /// Checks that the entry satisfies the specification.
    ///
    /// # Errors
    /// It does not: the message names the bitmap.
    pub(in crate::qcow2) fn require_valid(&self) -> Result<()> {
        if self.is_valid {
            Ok(())
        } else {
            Err(self.invalid())
        }
    }

    pub(super) fn has(&self, flag: u32) -> bool {
        self.raw.flags.get() & flag != 0
    }

    pub(super) fn set(&mut self, flag: u32, on: bool) {
        let flags = self.raw.flags.get();
        self.raw.flags = U32::new(if on { flags | flag } else { flags & !flag });
    }

    /// The host range of the bitmap table.
    pub(in crate::qcow2) fn table_range(&self) -> ByteRange {
        ByteRange::at(
            self.raw.table_offset.get(),
            u64::from(self.raw.table_size.get()) * 8,
        )
    }

    /// The length of the directory entry in bytes.
    pub(super) fn entry_len(&self) -> usize {
        let extra = saturating_index(self.raw.extra_data_size.get().into());
        let name = usize::from(self.raw.name_size.get());
        size_of::<RawBitmap>()
            .saturating_add(extra)
            .saturating_add(name)
            .next_multiple_of(8)
    }

    /// The shape of this bitmap for a disk of `len` bytes.
    pub(in crate::qcow2) fn shape(&self, geometry: Geometry, len: u64) -> Shape {
        Shape {
            granularity_bits: u32::from(self.raw.granularity_bits),
            cluster_size: geometry.cluster_size(),
            len,
        }
    }

    /// Checks that the bitmap table has the size that the shape needs.
    ///
    /// # Errors
    /// The table has another size.
    pub(super) fn require_shape(&self, shape: Shape) -> Result<()> {
        if u64::from(self.raw.table_size.get()) == shape.entries() && shape.fits() {
            return Ok(());
        }
        Err(Error::corrupt("Invalid argument")
            .context(format!("Could not read bitmap '{}' from image", self.name())))
    }

    /// The error for a bitmap that is too large.
    pub(super) fn too_large() -> Error {
        Error::invalid("Too much space will be occupied by the bitmap. Use larger granularity")
    }

    pub(super) fn inconsistent(&self) -> Error {
        Error::invalid(format!(
            "Bitmap '{}' is inconsistent and cannot be used",
            self.name()
        ))
        .hint("Try block-dirty-bitmap-remove to delete this bitmap from disk")
    }

    /// [`Bitmap::inconsistent`] where the way out is a command of this program.
    pub(super) fn inconsistent_for_resize(&self) -> Error {
        self.inconsistent().hint(format!(
            "Remove the bitmap with 'qemu-img bitmap --remove FILENAME {}', then resize.",
            self.name()
        ))
    }

    fn invalid(&self) -> Error {
        Error::corrupt(format!(
            "Bitmap '{}' doesn't satisfy the constraints",
            self.shown_name()
        ))
    }

    /// The length of the entry whose fixed part is `head`, without its padding.
    fn entry_len_of(head: &[u8; size_of::<RawBitmap>()]) -> u64 {
        let raw: RawBitmap = zerocopy::transmute!(*head);
        size_of::<RawBitmap>() as u64 + u64::from(raw.extra_data_size.get()) + u64::from(raw.name_size.get())
    }

    /// Parses the entry at the start of `bytes`. Fields that do not satisfy the specification make an entry that is not
    /// valid; an entry whose end cannot be told is an error.
    fn parse(bytes: &[u8], geometry: Geometry) -> Result<Self> {
        let cut = || Error::corrupt("Broken bitmap directory");
        let (raw, rest) = RawBitmap::read_from_prefix(bytes).map_err(|_| cut())?;
        let extra_len = usize::try_from(raw.extra_data_size.get()).map_err(|_| cut())?;
        let (extra, rest) = rest.split_at_checked(extra_len).ok_or_else(cut)?;
        let name = rest.get(..usize::from(raw.name_size.get())).ok_or_else(cut)?;
        let mut bitmap = Self {
            raw,
            extra: without_zeroes(extra).to_vec(),
            name: without_zeroes(name).to_vec(),
            is_valid: true,
        };
        let table_len = u64::from(raw.table_size.get()) * 8;
        let has_valid_range = raw.table_offset.get().is_multiple_of(geometry.cluster_size())
            && raw
                .table_offset
                .get()
                .checked_add(table_len)
                .is_some_and(|end| end <= crate::qcow2::header::limit::HOST_OFFSET);
        let unknown_extra = extra_len > 0 && !bitmap.has(flag::EXTRA_DATA_COMPATIBLE);
        bitmap.is_valid = raw.kind == DIRTY_TRACKING
            && limit::GRANULARITY_BITS.contains(&raw.granularity_bits)
            && raw.flags.get() & !flag::KNOWN == 0
            && !unknown_extra
            && has_valid_range
            && !bitmap.name.is_empty()
            && name.len() <= limit::NAME;
        Ok(bitmap)
    }

    fn append_to(&self, bytes: &mut Vec<u8>) {
        let start = bytes.len();
        bytes.extend_from_slice(self.raw.as_bytes());
        bytes.extend_from_slice(&self.extra);
        bytes.resize(
            start + size_of::<RawBitmap>() + saturating_index(self.raw.extra_data_size.get().into()),
            0,
        );
        bytes.extend_from_slice(&self.name);
        bytes.resize(start + self.entry_len(), 0);
    }
}

/// `bytes` without the zeroes at their end.
fn without_zeroes(bytes: &[u8]) -> &[u8] {
    let len = bytes
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |last| last + 1);
    &bytes[..len]
}

/// The sizes of a bitmap for a disk of a given length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) struct Shape {
    granularity_bits: u32,
    cluster_size: u64,
    len: u64,
}

impl Shape {
    /// The length of the disk in bytes.
    pub(super) fn len(self) -> u64 {
        self.len
    }

    /// The number of bits: one for each granule of the disk.
    pub(super) fn bits(self) -> u64 {
        self.len.div_ceil(1 << self.granularity_bits)
    }

    /// The number of entries of the bitmap table.
    pub(super) fn entries(self) -> u64 {
        self.bits().div_ceil(self.chunk_bits())
    }

    /// The number of bits in a cluster.
    pub(super) fn chunk_bits(self) -> u64 {
        self.cluster_size * 8
    }

    pub(super) fn fits(self) -> bool {
        self.bits().div_ceil(8) <= limit::BITS
    }

    /// The first and the end of the bits whose granules the guest range touches.
    pub(super) fn touched(self, start: u64, end: u64) -> (u64, u64) {
        let end = end.min(self.len);
        if start >= end {
            return (0, 0);
        }
        (
            start >> self.granularity_bits,
            ((end - 1) >> self.granularity_bits) + 1,
        )
    }

    /// The guest range of the bits from `first` up to `end`.
    pub(super) fn guest(self, first: u64, end: u64) -> ByteRange {
        let byte = |bit: u64| bit.saturating_mul(1 << self.granularity_bits).min(self.len);
        ByteRange::new(byte(first), byte(end))
    }
}

/// The advice for damaged bitmaps.
pub(super) const REPAIR: &str = "'qemu-img check -r all' drops what cannot be read of the bitmaps; 'qemu-img bitmap --remove' removes one.";

/// The directory of an image in memory.
#[derive(Debug)]
pub(in crate::qcow2) struct Directory {
    /// The entries that could be read, in order, valid or not.
    pub(in crate::qcow2) bitmaps: Vec<Bitmap>,
    /// Why there may be more entries than those: the directory is damaged behind them, or cannot be read at all.
    broken: Option<Broken>,
    memory: Vec<Reservation>,
}

/// Damage of a directory.
#[derive(Clone, Debug)]
struct Broken {
    kind: ErrorKind,
    message: String,
}

impl Broken {
    /// The damage that `error` reports.
    ///
    /// # Errors
    /// `error` is no damage: a failed read, or too little memory.
    fn from_error(error: Error) -> Result<Self> {
        if is_damage(&error) {
            Ok(Self {
                kind: error.kind(),
                message: error.chain(),
            })
        } else {
            Err(error)
        }
    }
}

/// Whether an error says that what was read is damaged, not that it could not be read.
pub(in crate::qcow2) fn is_damage(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Corrupt | ErrorKind::CutOff | ErrorKind::Invalid
    )
}

impl Directory {
    /// Reads the directory that `extension` locates. Damage is no error here: see [`Directory::require_valid`].
    ///
    /// # Errors
    /// Failed reads, and too little memory.
    pub(super) fn read(
        file: &dyn Device,
        extension: &BitmapsExtension,
        geometry: Geometry,
        budget: &Budget,
    ) -> Result<Self> {
        let mut directory = Self {
            bitmaps: Vec::new(),
            broken: None,
            memory: Vec::new(),
        };
        if let Err(error) = directory.read_entries(file, extension, geometry, budget) {
            directory.broken = Some(Broken::from_error(error)?);
        }
        Ok(directory)
    }

    /// Adds all entries up to the first one that cannot be read.
    fn read_entries(
        &mut self,
        file: &dyn Device,
        extension: &BitmapsExtension,
        geometry: Geometry,
        budget: &Budget,
    ) -> Result<()> {
        if extension.reserved.get() != 0 {
            return Err(Error::corrupt("bitmaps_ext: Reserved field is not zero"));
        }
        let len = extension.directory_size.get();
        let count = to_index(u64::from(extension.nb_bitmaps.get()))?;
        if count > limit::BITMAPS || len > limit::DIRECTORY {
            return Err(Error::corrupt("Too many bitmaps"));
        }
        self.memory
            .push(budget.reserve((count * size_of::<Bitmap>()) as u64)?);
        let offset = extension.directory_offset.get();
        if !offset.is_multiple_of(geometry.cluster_size()) {
            return Err(Error::corrupt("bitmaps_ext: invalid bitmap directory offset"));
        }
        file.require(offset, len)?;
        let mut rest = ByteRange::at(offset, len);
        let mut bytes = Vec::new();
        while !rest.is_empty() {
            if self.bitmaps.len() == count {
                return Err(Error::corrupt(
                    "More bitmaps found than specified in header extension",
                ));
            }
            // An entry is read alone: all of them may have 64 MiB.
            let mut head = [0; size_of::<RawBitmap>()];
            let head_len = rest.len().min(head.len() as u64);
            file.read_at(&mut head[..to_index(head_len)?], rest.start())?;
            let entry_len = Bitmap::entry_len_of(&head).min(rest.len());
            let memory = budget.reserve(entry_len)?;
            resize(&mut bytes, to_index(entry_len)?)?;
            file.read_at(&mut bytes, rest.start())?;
            drop(memory);
            let bitmap = Bitmap::parse(&bytes, geometry)?;
            let stored = bitmap.extra.len() + bitmap.name.len();
            self.memory.push(budget.reserve(stored as u64)?);
            rest = rest.skip(bitmap.entry_len() as u64);
            self.bitmaps.push(bitmap);
        }
        if self.bitmaps.len() < count {
            return Err(Error::corrupt(
                "Less bitmaps found than specified in header extension",
            ));
        }
        Ok(())
    }

    /// An empty directory.
    pub(super) fn empty() -> Self {
        Self {
            bitmaps: Vec::new(),
            broken: None,
            memory: Vec::new(),
        }
    }

    /// Checks that all entries are valid and that there are no others.
    ///
    /// # Errors
    /// The first damage, with advice.
    pub(super) fn require_valid(&self) -> Result<()> {
        self.bitmaps
            .iter()
            .try_for_each(Bitmap::require_valid)
            .and_then(|()| self.require_whole())
            .map_err(|error| error.hint(REPAIR))
    }

    /// Checks that the directory has no entries but those that could be read.
    ///
    /// # Errors
    /// The damage, with advice.
    pub(in crate::qcow2) fn require_whole(&self) -> Result<()> {
        match &self.broken {
            Some(broken) => Err(Error::new(broken.kind, broken.message.clone()).hint(REPAIR)),
            None => Ok(()),
        }
    }

    /// Keeps the entries for whose index `keep` returns true, and forgets what could not be read.
    pub(in crate::qcow2) fn keep_only(&mut self, keep: impl Fn(usize) -> bool) {
        let mut index = 0..;
        self.bitmaps.retain(|_| index.next().is_some_and(&keep));
        self.broken = None;
    }

    /// Encodes the directory.
    pub(super) fn to_bytes(&self) -> Result<Vec<u8>> {
        let len: usize = self.bitmaps.iter().map(Bitmap::entry_len).sum();
        if self.bitmaps.len() > limit::BITMAPS || len as u64 > limit::DIRECTORY {
            return Err(Error::new(ErrorKind::Limit, "Too many bitmaps"));
        }
        let mut bytes = Vec::with_capacity(len);
        for bitmap in &self.bitmaps {
            bitmap.append_to(&mut bytes);
        }
        Ok(bytes)
    }

    /// The bitmaps, each with the offset of its flags in the stored directory.
    pub(super) fn with_flag_offsets(&mut self) -> impl Iterator<Item = (u64, &mut Bitmap)> {
        self.bitmaps.iter_mut().scan(FLAGS_AT, |next, bitmap| {
            let offset = *next;
            *next += bitmap.entry_len() as u64;
            Some((offset, bitmap))
        })
    }

    /// The index of the bitmap with this name.
    ///
    /// # Errors
    /// No bitmap has the name.
    pub(super) fn find(&self, name: &str) -> Result<usize> {
        self.bitmaps
            .iter()
            .position(|bitmap| bitmap.name() == name)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("Dirty bitmap '{name}' not found")))
    }

    /// [`Directory::find`] for a bitmap whose stored bits are up to date.
    pub(super) fn find_consistent(&self, name: &str) -> Result<usize> {
        let index = self.find(name)?;
        match &self.bitmaps[index] {
            bitmap if bitmap.has(flag::IN_USE) => Err(bitmap.inconsistent()),
            _ => Ok(index),
        }
    }
}

#[cfg(test)]
mod tests {
    use diskimage_core::MemoryDevice;

    use super::*;

    const GEOMETRY: Geometry = Geometry {
        cluster_bits: 16,
        refcount_order: 4,
        extended_l2: false,
    };

    fn read(bytes: Vec<u8>, count: u32) -> Result<Directory> {
        let extension = BitmapsExtension {
            nb_bitmaps: U32::new(count),
            reserved: U32::ZERO,
            directory_size: U64::new(bytes.len() as u64),
            directory_offset: U64::ZERO,
        };
        let directory = Directory::read(
            &MemoryDevice::new(bytes),
            &extension,
            GEOMETRY,
            &Budget::default(),
        )?;
        directory.require_valid().map(|()| directory)
    }

    fn two() -> Directory {
        let mut directory = Directory::empty();
        for name in ["b0", "a longer name"] {
            directory
                .bitmaps
                .push(Bitmap::new(name, 16, flag::AUTO).expect("valid"));
        }
        directory
    }

    #[test]
    fn an_encoded_directory_parses() {
        let bytes = two().to_bytes().expect("small");
        let mut back = read(bytes.clone(), 2).expect("valid");
        assert_eq!(back.to_bytes().expect("small"), bytes);
        assert_eq!(back.find("a longer name").expect("exists"), 1);
        assert_eq!(
            back.with_flag_offsets()
                .map(|(offset, _)| offset)
                .collect::<Vec<_>>(),
            [12, 44]
        );
        for (count, message) in [
            (1, "More bitmaps found than specified in header extension"),
            (3, "Less bitmaps found than specified in header extension"),
        ] {
            assert_eq!(
                read(bytes.clone(), count).map(drop).map_err(|e| e.chain()),
                Err(message.into())
            );
        }
    }

    #[test]
    fn invalid_entries_are_refused_with_the_bitmaps_name() {
        for (at, value) in [(15, 8), (16, 2), (17, 8), (17, 32), (6, 1), (12, 0x80)] {
            let mut bytes = two().to_bytes().expect("small");
            bytes[at] = value;
            assert_eq!(
                read(bytes, 2).map(drop).map_err(|e| e.chain()),
                Err("Bitmap 'b0' doesn't satisfy the constraints".to_owned()),
                "byte {at}"
            );
        }
    }

    #[test]
    fn parsing_any_bytes_never_panics() {
        for seed in 0..=255u8 {
            let mut bytes = two().to_bytes().expect("small");
            for i in 0..bytes.len() {
                let old = bytes[i];
                bytes[i] = seed;
                let _ = read(bytes.clone(), 2);
                bytes[i] = old;
            }
        }
        assert!(read(Vec::new(), u32::MAX).is_err());
    }

    #[test]
    fn shapes_follow_the_size_of_the_disk() {
        let shape = |len| Bitmap::new("b", 9, 0).expect("valid").shape(GEOMETRY, len);
        assert_eq!(shape(0).bits(), 0);
        assert_eq!(shape(0).entries(), 0);
        assert_eq!(shape(513).bits(), 2);
        assert_eq!(shape(513).entries(), 1);
        assert_eq!(shape((65536 * 8 + 1) * 512).entries(), 2);
        assert!(shape(2 << 40).fits() && !shape((2 << 40) + 1).fits());
        assert_eq!(shape(2000).touched(511, 5000), (0, 4));
        assert_eq!(shape(2000).touched(2000, 5000), (0, 0));
        assert_eq!(shape(2000).guest(3, 4), ByteRange::new(1536, 2000));
    }
}
