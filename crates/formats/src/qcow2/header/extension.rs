//! Header extensions: type, length, data padded to 8 bytes, until a type of zero.

use diskimage_core::{Error, Name, Result, name};
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

/// What the extensions say. Unknown ones stay where they are, since the header is only ever changed field by field.
#[derive(Clone, Debug, Default)]
pub(in crate::qcow2) struct Extensions {
    pub(in crate::qcow2) backing_format: Option<String>,
    pub(in crate::qcow2) feature_names: Vec<FeatureName>,
    pub(in crate::qcow2) bitmaps: Option<BitmapsExtension>,
    pub(in crate::qcow2) crypto: Option<CryptoExtension>,
    pub(in crate::qcow2) data_file: Option<Name>,
}

/// Where the persistent bitmaps are.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, PartialEq, Eq)]
#[repr(C)]
pub(in crate::qcow2) struct BitmapsExtension {
    /// How many there are.
    pub(in crate::qcow2) nb_bitmaps: U32,
    /// Zero.
    pub(in crate::qcow2) reserved: U32,
    /// Bytes of their directory.
    pub(in crate::qcow2) directory_size: U64,
    /// Where it starts.
    pub(in crate::qcow2) directory_offset: U64,
}

/// Where the encryption header is.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, PartialEq, Eq)]
#[repr(C)]
pub(in crate::qcow2) struct CryptoExtension {
    /// Where it starts.
    pub(in crate::qcow2) offset: U64,
    /// How many bytes it has.
    pub(in crate::qcow2) length: U64,
}

const _: () = assert!(size_of::<BitmapsExtension>() == 24 && size_of::<CryptoExtension>() == 16);

/// The longest name of a format that the original reads.
const MAX_BACKING_FORMAT: usize = 15;

/// Reads the extensions in `area`, the bytes between the header and the backing file's name or the cluster's end.
///
/// # Errors
/// An extension that reaches past the area, or one whose contents cannot be right.
pub(in crate::qcow2) fn parse(area: &[u8]) -> Result<Extensions> {
    let mut found = Extensions::default();
    let mut rest = area;
    while let Some((head, tail)) = rest.split_at_checked(8) {
        let kind = U32::read_from_bytes(&head[..4]).map_or(0, U32::get);
        let len = U32::read_from_bytes(&head[4..]).map_or(0, U32::get);
        if kind == kind::END {
            break;
        }
        let len = usize::try_from(len).unwrap_or(usize::MAX);
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
                found.backing_format = Some(text(data));
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

/// An extension as it stands in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::qcow2) struct Extension {
    pub(in crate::qcow2) kind: u32,
    pub(in crate::qcow2) data: Vec<u8>,
}

impl Extension {
    /// Bytes of the end marker.
    pub(in crate::qcow2) const END: usize = 8;

    /// The extensions in `area` up to the end marker, or to one that reaches past the area.
    pub(in crate::qcow2) fn list(area: &[u8]) -> Vec<Self> {
        let mut list = Vec::new();
        let mut rest = area;
        while let Some((head, tail)) = rest.split_at_checked(8) {
            let word = |at: usize| U32::read_from_bytes(&head[at..at + 4]).map_or(0, U32::get);
            let (kind, len) = (word(0), usize::try_from(word(4)).unwrap_or(usize::MAX));
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

    /// How many bytes it takes.
    pub(in crate::qcow2) fn len(&self) -> usize {
        8 + self.data.len().next_multiple_of(8)
    }

    /// Appends it.
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

/// The last entry may be cut short behind its name.
fn feature_names(data: &[u8]) -> Vec<FeatureName> {
    let names = data
        .chunks(NAME_ENTRY_LEN)
        .filter_map(|entry| entry.split_at_checked(2));
    names
        .map(|(place, name)| FeatureName {
            kind: place[0],
            bit: place[1],
            name: text(name),
        })
        .collect()
}

fn bitmaps(data: &[u8]) -> Result<BitmapsExtension> {
    let extension = BitmapsExtension::read_from_bytes(data)
        .map_err(|_| Error::corrupt("bitmaps_ext: Invalid extension length"))?;
    if extension.reserved.get() != 0 {
        return Err(Error::corrupt("bitmaps_ext: Reserved field is not zero"));
    }
    Ok(extension)
}

/// The extensions of a new image, end marker included. The feature names are left out unless `with_names` is set: images
/// with the smallest clusters, and those of version 2, do without them.
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
    area.extend_from_slice(&u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    area.extend_from_slice(data);
    area.resize(area.len().next_multiple_of(8), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let found = parse(&write(true, Some("raw"), Some("data"))).expect("valid");
        assert_eq!(found.backing_format.as_deref(), Some("raw"));
        assert_eq!(found.data_file, Some("data".into()));
        assert_eq!(found.feature_names.len(), NAMES.len());
    }

    #[test]
    fn an_extension_past_its_area_is_refused() {
        let mut area = write(false, Some("raw"), None);
        area[7] = 200;
        let error = parse(&area).map(|_| ()).map_err(|error| error.chain());
        assert_eq!(error, Err("Header extension too large".to_owned()));
    }

    #[test]
    fn any_bytes_are_survived() {
        for seed in 0..200u8 {
            let area: Vec<u8> = (0..200u8)
                .map(|i| i.wrapping_mul(seed).wrapping_add(seed >> 3))
                .collect();
            let _ = parse(&area);
            let _ = Extension::list(&area);
        }
    }
}
