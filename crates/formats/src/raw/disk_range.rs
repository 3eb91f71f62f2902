//! The part of the file that is the disk.

use diskimage_core::options::{OptionDef, OptionKind};
use diskimage_core::{ByteRange, Error, NodeOptions, Result, align_up, errno};

/// The disk's length is the file's length rounded up to this.
pub(super) const SECTOR: u64 = 512;

/// The range of the file that holds the disk.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct DiskRange {
    pub(super) offset: u64,
    /// `None` for the rest of the file.
    pub(super) size: Option<u64>,
}

const DISK_OPTIONS: &[OptionDef] = &[
    OptionDef {
        name: "offset",
        kind: OptionKind::Size,
        help: "Where the disk starts in the file",
        default: None,
        is_listed: true,
    },
    OptionDef {
        name: "size",
        kind: OptionKind::Size,
        help: "How long the disk is",
        default: None,
        is_listed: true,
    },
];

impl DiskRange {
    /// Takes the options of the node.
    pub(super) fn take(node: &mut NodeOptions) -> Result<Self> {
        let options = node.take_known(DISK_OPTIONS)?;
        Ok(Self {
            offset: options.size("offset").unwrap_or(0),
            size: options.size("size"),
        })
    }

    /// Checks that the range is inside a file of `len` bytes.
    pub(super) fn check(self, len: u64) -> Result<()> {
        let (offset, len) = (self.offset, align_up(len, SECTOR));
        if offset > len {
            return Err(Error::invalid(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({len})"
            )));
        }
        match self.size {
            Some(size) if size > len - offset => Err(Error::invalid(format!(
                "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of the \
                 containing file ({len})"
            ))),
            Some(size) if !size.is_multiple_of(SECTOR) => {
                Err(Error::invalid("Specified size is not multiple of 512"))
            }
            _ => Ok(()),
        }
    }

    /// Bytes of the disk in a file of `file_len` bytes.
    pub(super) fn len(self, file_len: u64) -> u64 {
        let rest = align_up(file_len, SECTOR).saturating_sub(self.offset);
        self.size.unwrap_or(align_up(rest, SECTOR))
    }

    /// The host range of a guest range.
    pub(super) fn host(self, guest: ByteRange) -> Result<ByteRange> {
        self.offset
            .checked_add(guest.end())
            .map(|end| ByteRange::new(self.offset + guest.start(), end))
            .ok_or_else(|| Error::from_errno(errno::EFBIG))
    }
}
