//! Feature bits and their names.

use diskimage_core::{Error, Result};

/// The three fields of feature bits of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) struct Features {
    pub(in crate::qcow2) incompatible: Incompatible,
    pub(in crate::qcow2) compatible: Compatible,
    pub(in crate::qcow2) autoclear: Autoclear,
}

/// Incompatible features: unknown bits here make the image unopenable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) struct Incompatible(pub(in crate::qcow2) u64);

impl Incompatible {
    /// Refcounts may be out of date.
    pub(in crate::qcow2) const DIRTY: u64 = 1 << 0;
    /// Damage was found in the image.
    pub(in crate::qcow2) const CORRUPT: u64 = 1 << 1;
    /// Guest data is in an external data file.
    pub(in crate::qcow2) const DATA_FILE: u64 = 1 << 2;
    /// The header names the compression type, which is not zlib.
    pub(in crate::qcow2) const COMPRESSION: u64 = 1 << 3;
    /// L2 entries have a subcluster bitmap.
    pub(in crate::qcow2) const EXTENDED_L2: u64 = 1 << 4;
    const KNOWN: u64 = Self::DIRTY | Self::CORRUPT | Self::DATA_FILE | Self::COMPRESSION | Self::EXTENDED_L2;

    pub(in crate::qcow2) fn has(self, bit: u64) -> bool {
        self.0 & bit != 0
    }

    /// Fails if bits are set that this program does not know. The message has the names from the image's feature name
    /// table.
    pub(in crate::qcow2) fn refuse_unknown(self, names: &[FeatureName]) -> Result<()> {
        let mut unknown = self.0 & !Self::KNOWN;
        if unknown == 0 {
            return Ok(());
        }
        let mut described = Vec::new();
        for entry in names
            .iter()
            .filter(|entry| entry.kind == FeatureKind::Incompatible as u8)
        {
            let bit = 1u64.checked_shl(u32::from(entry.bit)).unwrap_or(0);
            if unknown & bit != 0 {
                described.push(entry.name.clone());
                unknown &= !bit;
            }
        }
        if unknown != 0 {
            described.push(format!("Unknown incompatible feature: {unknown:x}"));
        }
        Err(Error::unsupported(format!(
            "Unsupported qcow2 feature(s): {}",
            described.join(", ")
        )))
    }
}

/// Compatible features: unknown bits here may be ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) struct Compatible(pub(in crate::qcow2) u64);

impl Compatible {
    /// Refcount updates are postponed; the dirty bit is set meanwhile.
    pub(in crate::qcow2) const LAZY_REFCOUNTS: u64 = 1 << 0;

    pub(in crate::qcow2) fn has(self, bit: u64) -> bool {
        self.0 & bit != 0
    }
}

/// Autoclear features: a writer must clear unknown bits here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) struct Autoclear(pub(in crate::qcow2) u64);

impl Autoclear {
    /// The bitmaps extension is consistent with the data.
    pub(in crate::qcow2) const BITMAPS: u64 = 1 << 0;
    /// The data file is a valid raw image of the disk.
    pub(in crate::qcow2) const DATA_FILE_RAW: u64 = 1 << 1;
    /// The bits that this program keeps when it writes.
    pub(in crate::qcow2) const KNOWN: u64 = Self::BITMAPS | Self::DATA_FILE_RAW;

    pub(in crate::qcow2) fn has(self, bit: u64) -> bool {
        self.0 & bit != 0
    }
}

/// The header field to which a feature name belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(in crate::qcow2) enum FeatureKind {
    Incompatible = 0,
    Compatible = 1,
    Autoclear = 2,
}

/// An entry of the feature name table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::qcow2) struct FeatureName {
    pub(in crate::qcow2) kind: u8,
    pub(in crate::qcow2) bit: u8,
    pub(in crate::qcow2) name: String,
}

/// The length of an entry of the feature name table in bytes: kind, bit, 46 bytes of name.
pub(in crate::qcow2) const NAME_ENTRY_LEN: usize = 48;

/// The feature name table of new images: a program that lacks a feature can print its name.
pub(in crate::qcow2) const NAMES: [(FeatureKind, u8, &str); 8] = [
    (FeatureKind::Incompatible, 0, "dirty bit"),
    (FeatureKind::Incompatible, 1, "corrupt bit"),
    (FeatureKind::Incompatible, 2, "external data file"),
    (FeatureKind::Incompatible, 3, "compression type"),
    (FeatureKind::Incompatible, 4, "extended L2 entries"),
    (FeatureKind::Compatible, 0, "lazy refcounts"),
    (FeatureKind::Autoclear, 0, "bitmaps"),
    (FeatureKind::Autoclear, 1, "raw external data"),
];
