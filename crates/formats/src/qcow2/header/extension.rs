//! Header extensions. Each one has a type, a length, and data padded to 8 bytes; type zero ends the list.

use diskimage_core::{Error, Name, Result, name, saturating_index, saturating_u32, to_index};
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::feature::{FeatureName, NAME_ENTRY_LEN, NAMES};

pub(in crate::qcow2) mod kind {
    pub(in crate::qcow2) const END: u32 = 0;
    pub(in crate::qcow2) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(in crate::qcow2) const FEATURE_NAMES: u32 = 0x6803_f857;
    pub(in crate::qcow2) const BITMAPS: u32 = 0x2385_2875;
    pub(in crate::qcow2) const CRYPTO: u32 = 0x0537_be77;
    pub(in crate::qcow2) const DATA_FILE: u32 = 0x4441_5441;
}

/// The parsed extensions. [`FirstCluster`](super::rewrite::FirstCluster) keeps unknown ones when the header is
/// rewritten.
#[derive(Clone, Debug, Default)]
pub(in crate::qcow2) struct Extensions {
    pub(in crate::qcow2) backing_format: Option<String>,
    pub(in crate::qcow2) feature_names: Vec<FeatureName>,
    pub(in crate::qcow2) bitmaps: Option<BitmapsExtension>,
    pub(in crate::qcow2) crypto: Option<CryptoExtension>,
    pub(in crate::qcow2) data_file: Option<Name>,
}

/// The bitmaps extension: locates the directory of persistent bitmaps.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, PartialEq, Eq)]
#[repr(C)]
pub(in crate::qcow2) struct BitmapsExtension {
    /// The number of bitmaps.
    pub(in crate::qcow2) nb_bitmaps: U32,
    /// Must be zero.
    pub(in crate::qcow2) reserved: U32,
    /// The length of the bitmap directory in bytes.
    pub(in crate::qcow2) directory_size: U64,
    /// The host offset of the bitmap directory.
    pub(in crate::qcow2) directory_offset: U64,
}

/// The crypto extension: locates the LUKS header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, PartialEq, Eq)]
#[repr(C)]
pub(in crate::qcow2) struct CryptoExtension {
    /// The host offset of the LUKS header.
    pub(in crate::qcow2) offset: U64,
    /// The length of the LUKS header and its key slots in bytes.
    pub(in crate::qcow2) length: U64,
}

const _: () = assert!(size_of::<BitmapsExtension>() == 24 && size_of::<CryptoExtension>() == 16);

/// qemu-img's limit for the length of the backing format's name.
const MAX_BACKING_FORMAT: usize = 15;

/// Parses the extensions in `area`: the bytes between the header and the backing file's name or the cluster's end.
///
/// # Errors
/// An extension that reaches past the area, or one with invalid data.
pub(in crate::qcow2) fn parse(area: &[u8]) -> Result<Extensions> {
    let mut found = Extensions::default();
    let mut rest = area;
    while let Some((head, tail)) = rest.split_at_checked(8) {
        let kind = U32::read_from_bytes(&head[..4]).map_or(0, U32::get);
        let len = U32::read_from_bytes(&head[4..]).map_or(0, U32::get);
        if kind == kind::END {
            break;
        }
        let len = to_index(u64::from(len))?;
        let data = tail
            .get(..len)
            .ok_or_else(|| Error::corrupt("Header extension too large"))?;
        match kind {
            kind::BACKING_FORMAT => {
                if len > MAX_BACKING_FORMAT {
                    return Err(Error::corrupt(format!(
                        "ERROR: ext_backing_format: len={len} too large (>={})",
                        MAX_BACKING_FORMAT + 1
                    )));
                }
                // An empty name is none, as in qemu-img.
                found.backing_format = Some(text(data)).filter(|name| !name.is_empty());
            }
            kind::FEATURE_NAMES => found.feature_names = feature_names(data),
            kind::BITMAPS => found.bitmaps = Some(bitmaps(data)?),
            kind::CRYPTO => {
                let extension = CryptoExtension::read_from_bytes(data);
                found.crypto =
                    Some(extension.map_err(|_| Error::corrupt("CRYPTO header extension size invalid"))?);
            }
            kind::DATA_FILE => found.data_file = Some(Name::from_bytes(until_zero(data))),
            _ => {}
        }
        rest = tail.get(len.next_multiple_of(8)..).unwrap_or(&[]);
    }
    Ok(found)
}

/// Whether the list of extensions ends inside of `area`.
pub(in crate::qcow2) fn is_ended(area: &[u8]) -> bool {
    let mut rest = area;
    while let Some((head, tail)) = rest.split_at_checked(8) {
        let number = |at: usize| U32::read_from_bytes(&head[at..at + 4]).map_or(0, U32::get);
        if number(0) == kind::END {
            return true;
        }
        let len = saturating_index(number(4).into()).checked_next_multiple_of(8);
        rest = len.and_then(|len| tail.get(len..)).unwrap_or(&[]);
    }
    false
}

/// An extension as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::qcow2) struct Extension {
    pub(in crate::qcow2) kind: u32,
    pub(in crate::qcow2) data: Vec<u8>,
}

impl Extension {
    /// The length of the end marker in bytes.
    pub(in crate::qcow2) const END: usize = 8;

    /// Lists the extensions in `area` up to the end marker, or up to an extension that reaches past the area.
    pub(in crate::qcow2) fn list(area: &[u8]) -> Vec<Self> {
        let mut list = Vec::new();
        let mut rest = area;
        while let Some((head, tail)) = rest.split_at_checked(8) {
            let field = |at: usize| U32::read_from_bytes(&head[at..at + 4]).map_or(0, U32::get);
            // A length that does not fit an index reaches past the area.
            let (kind, len) = (field(0), saturating_index(field(4).into()));
            let Some(data) = tail.get(..len).filter(|_| kind != kind::END) else {
                break;
            };
            list.push(Self {
                kind,
                data: data.to_vec(),
            });
            rest = tail.get(len.next_multiple_of(8)..).unwrap_or(&[]);
        }
        list
    }

    /// The length of the stored extension in bytes, with its padding.
    pub(in crate::qcow2) fn len(&self) -> usize {
        8 + self.data.len().next_multiple_of(8)
    }

    /// Appends the stored extension to `area`.
    pub(in crate::qcow2) fn put(&self, area: &mut Vec<u8>) {
        put(area, self.kind, &self.data);
    }
}

fn text(data: &[u8]) -> String {
    name::from_bytes(until_zero(data)).into_owned()
}

fn until_zero(data: &[u8]) -> &[u8] {
    data.split(|byte| *byte == 0).next().unwrap_or(&[])
}

/// Parses the feature name table. The last entry may be shorter than the others.
fn feature_names(data: &[u8]) -> Vec<FeatureName> {
    let names = data
        .chunks(NAME_ENTRY_LEN)
        .filter_map(|entry| entry.split_at_checked(2));
    names
        .map(|(position, name)| FeatureName {
            kind: position[0],
            bit: position[1],
            name: text(name),
        })
        .collect()
}

fn bitmaps(data: &[u8]) -> Result<BitmapsExtension> {
    // A reserved field that is not zero is damage of the bitmaps, which does not keep the disk from being read.
    BitmapsExtension::read_from_bytes(data)
        .map_err(|_| Error::corrupt("bitmaps_ext: Invalid extension length"))
}

/// The extensions of a new image with the end marker. The feature name table is omitted unless `with_names` is set:
/// images with the smallest clusters and images of version 2 do not have it.
pub(in crate::qcow2) fn write(
    with_names: bool,
    backing_format: Option<&str>,
    data_file: Option<&str>,
) -> Vec<u8> {
    let mut area = Vec::new();
    if let Some(format) = backing_format {
        put(&mut area, kind::BACKING_FORMAT, &name::to_bytes(format));
    }
    if let Some(file) = data_file {
        put(&mut area, kind::DATA_FILE, &name::to_bytes(file));
    }
    if with_names {
        put(&mut area, kind::FEATURE_NAMES, &name_table());
    }
    put(&mut area, kind::END, &[]);
    area
}

pub(in crate::qcow2) fn name_table() -> Vec<u8> {
    let mut table = Vec::new();
    for (kind, bit, name) in NAMES {
        let mut entry = [0; NAME_ENTRY_LEN];
        entry[0] = kind as u8;
        entry[1] = bit;
        entry[2..2 + name.len()].copy_from_slice(name.as_bytes());
        table.extend_from_slice(&entry);
    }
    table
}

fn put(area: &mut Vec<u8>, kind: u32, data: &[u8]) {
    area.extend_from_slice(&kind.to_be_bytes());
    // An extension fits in a cluster, which has at most 2 MiB.
    area.extend_from_slice(&saturating_u32(data.len()).to_be_bytes());
    area.extend_from_slice(data);
    area.resize(area.len().next_multiple_of(8), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_extensions_parse() {
        let found = parse(&write(true, Some("raw"), Some("data"))).expect("valid");
        assert_eq!(found.backing_format.as_deref(), Some("raw"));
        assert_eq!(found.data_file, Some("data".into()));
        assert_eq!(found.feature_names.len(), NAMES.len());
    }

    #[test]
    fn an_empty_backing_format_is_none() {
        for name in ["", "\0raw"] {
            let found = parse(&write(false, Some(name), None)).expect("valid");
            assert_eq!(found.backing_format, None);
        }
    }

    #[test]
    fn an_extension_past_its_area_is_refused() {
        let mut area = write(false, Some("raw"), None);
        area[7] = 200;
        let error = parse(&area).map(|_| ()).map_err(|error| error.chain());
        assert_eq!(error, Err("Header extension too large".to_owned()));
    }

    #[test]
    fn parsing_any_bytes_never_panics() {
        for seed in 0..200u8 {
            let area: Vec<u8> = (0..200u8)
                .map(|i| i.wrapping_mul(seed).wrapping_add(seed >> 3))
                .collect();
            let _ = parse(&area);
            let _ = Extension::list(&area);
        }
    }
}
