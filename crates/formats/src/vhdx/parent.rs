//! The parent of a differencing disk: its locator among the metadata items, and its identity.

use diskimage_core::{
    Backed, Backing, BackingIdentity, BackingSearch, ByteRange, Device, Error, Layer, OpenRequest, Result,
    to_index,
};
use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::VhdxLayer;
use super::header::Guid;
use crate::layer_kit::parent::{Locators, Parent, utf16};
use crate::layer_kit::random::uuid_text;

/// The item "Parent Locator".
#[derive(Clone, Debug, Default)]
pub(super) struct ParentLocator {
    /// `parent_linkage` and `parent_linkage2`: the `DataWriteGuid` of the parent is one of them.
    linkages: Vec<Guid>,
    /// Where the parent is.
    pub(super) locators: Locators,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawLocator {
    kind: Guid,
    reserved: U16,
    count: U16,
}

/// Offsets are counted from the start of the item.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    key_offset: U32,
    value_offset: U32,
    key_len: U16,
    value_len: U16,
}

const _: () = assert!(size_of::<RawLocator>() == 20 && size_of::<RawEntry>() == 12);

/// Bytes of the longest item: the specification's limit for all items.
const MAX_LEN: u64 = 1 << 20;

/// B04AEFB7-D19E-4A81-B789-25B8E9445913
const VHDX_LOCATOR: Guid = [
    0xb7, 0xef, 0x4a, 0xb0, 0x9e, 0xd1, 0x81, 0x4a, 0xb7, 0x89, 0x25, 0xb8, 0xe9, 0x44, 0x59, 0x13,
];

impl ParentLocator {
    /// Reads the item at `range` of the file.
    ///
    /// # Errors
    /// A locator of another type, and one that reaches beyond its end or says no `parent_linkage`.
    pub(super) fn read(file: &dyn Device, range: ByteRange) -> Result<Self> {
        let damaged = || Error::corrupt("The parent locator of the image is damaged");
        if range.len() > MAX_LEN {
            return Err(damaged());
        }
        let mut bytes = vec![0; to_index(range.len())?];
        file.read_whole(&mut bytes, range.start())?;
        let (raw, entries) = RawLocator::read_from_prefix(&bytes).map_err(|_| damaged())?;
        if raw.kind != VHDX_LOCATOR {
            return Err(Error::unsupported(format!(
                "The parent of the image is no VHDX image, but of the type {}",
                braced(&raw.kind)
            )));
        }
        let text = |offset: U32, len: U16| {
            let start = usize::try_from(offset.get()).ok()?;
            let text = bytes.get(start..start.checked_add(len.get().into())?)?;
            Some(utf16(text, false))
        };
        let mut locator = Self::default();
        let (mut volumes, mut absolute) = (Vec::new(), Vec::new());
        for nth in 0..usize::from(raw.count.get()) {
            let entry = entries.get(nth * size_of::<RawEntry>()..).ok_or_else(damaged)?;
            let (entry, _) = RawEntry::read_from_prefix(entry).map_err(|_| damaged())?;
            let key = text(entry.key_offset, entry.key_len).ok_or_else(damaged)?;
            let value = text(entry.value_offset, entry.value_len).ok_or_else(damaged)?;
            match key.as_str() {
                "parent_linkage" | "parent_linkage2" => {
                    locator.linkages.push(parse_guid(&value).ok_or_else(damaged)?);
                }
                "relative_path" => locator.locators.relative.push(value),
                "volume_path" => volumes.push(value),
                "absolute_win32_path" => absolute.push(value),
                _ => {}
            }
        }
        if locator.linkages.is_empty() {
            return Err(damaged());
        }
        // In the order of the specification.
        locator.locators.absolute = volumes;
        locator.locators.absolute.append(&mut absolute);
        Ok(locator)
    }
}

/// The parent of an open image.
#[derive(Debug)]
pub(super) struct OpenParent {
    pub(super) parent: Parent,
    pub(super) locator: ParentLocator,
}

impl OpenParent {
    /// Looks for the parent that the image of `request` names.
    ///
    /// # Errors
    /// As [`Parent::find`].
    pub(super) fn find(locator: ParentLocator, request: &OpenRequest<'_>) -> Result<Self> {
        let parent = Parent::find(locator.locators.clone(), request.name, &*request.context.gate)?;
        Ok(Self { parent, locator })
    }
}

impl Backed for VhdxLayer {
    fn backing(&self) -> Option<Backing> {
        Some(self.parent.as_ref()?.parent.backing("vhdx"))
    }

    fn check_backing(&self, backing: &dyn Layer) -> Result<BackingIdentity> {
        let Some(OpenParent { locator, .. }) = &self.parent else {
            return Ok(BackingIdentity::Recorded);
        };
        let recorded: Vec<_> = locator.linkages.iter().map(braced).collect();
        let recorded = recorded.join(" or ");
        match backing.capabilities().identity {
            Some(found) if locator.linkages.contains(&found.id) => Ok(BackingIdentity::Recorded),
            Some(found) => Err(Error::corrupt(format!(
                "The parent has the DataWriteGuid {}, but the image was created on the one with {recorded}",
                braced(&found.id)
            ))),
            None => Err(Error::invalid(format!(
                "The parent is to be the VHDX image with the DataWriteGuid {recorded}, and is of format '{}'",
                backing.format()
            ))),
        }
    }

    fn backing_search(&self) -> BackingSearch {
        let search = self.parent.as_ref().map(|open| open.parent.search());
        search.unwrap_or_default()
    }
}

/// The order in which the text of a GUID has its bytes: the first three fields are little-endian.
const TEXT_ORDER: [usize; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];

/// The text of a GUID in braces.
fn braced(guid: &Guid) -> String {
    format!("{{{}}}", uuid_text(&TEXT_ORDER.map(|at| guid[at])))
}

/// The GUID of a text with or without braces.
fn parse_guid(text: &str) -> Option<Guid> {
    let text = text.trim().trim_start_matches('{').trim_end_matches('}');
    let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b'-').collect();
    let mut guid = Guid::default();
    if digits.len() != 32 {
        return None;
    }
    for (pair, at) in digits.as_chunks::<2>().0.iter().zip(TEXT_ORDER) {
        let pair = std::str::from_utf8(pair).ok()?;
        guid[at] = u8::from_str_radix(pair, 16).ok()?;
    }
    Some(guid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guids_are_parsed_as_they_are_printed() {
        let text = "{83ed0ec3-24c8-49a6-a959-5e4bf1288bfb}";
        let guid = parse_guid(text).expect("a GUID");
        assert_eq!(guid[..6], [0xc3, 0x0e, 0xed, 0x83, 0xc8, 0x24]);
        assert_eq!(braced(&guid), text);
        assert_eq!(parse_guid(&text.to_uppercase()), Some(guid));
        for bad in ["", "{}", "{83ed0ec3}", "{83ed0ec3-24c8-49a6-a959-5e4bf1288bfg}"] {
            assert_eq!(parse_guid(bad), None, "{bad}");
        }
    }
}
