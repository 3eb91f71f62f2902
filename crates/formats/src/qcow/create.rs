//! Creates images, and measures them.

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{
    ByteRange, CompressionLevel, CreateRequest, Device, Error, Measure, MeasureSource, Preallocation, Result,
    ZeroMode,
};

use super::header::{Header, SECTOR};
use crate::codec::NOT_MEASURED;
use crate::encryption::legacy_aes;
use crate::layer_kit::{count_used, preallocation};
use crate::luks::options::passphrase;

/// The options of creation.
pub(super) const OPTIONS: &[OptionDef] = &[
    OptionDef::SIZE,
    OptionDef::BACKING_FILE,
    OptionDef::new("backing_fmt", OptionKind::Text, "Format of the backing image"),
    legacy_aes::ENCRYPTION,
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
    OptionDef::COMPRESSION_LEVEL,
];

/// The size of an image of `source`.
pub(super) fn measure(options: &Options, source: MeasureSource<'_>) -> Result<Measure> {
    preallocation::check(options)?;
    CompressionLevel::require_absent(options, NOT_MEASURED)?;
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

/// Writes a new image to `file`.
pub(super) fn create(request: &CreateRequest<'_>, file: &dyn Device) -> Result<()> {
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
