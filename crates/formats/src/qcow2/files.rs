//! Reading the header, and opening the data file that it names.

use std::sync::Arc;

use diskimage_core::{Device, Error, OpenRequest, Permissions, Result, ResultExt};

use super::header::feature::{Autoclear, Incompatible};
use super::header::{self, Header};

/// Bytes of the first cluster that are read at first.
const FIRST_READ: usize = 64 << 10;

/// Reads and checks the header.
pub(super) fn read_header(file: &Arc<dyn Device>, for_check: bool) -> Result<Header> {
    let mut start = [0; header::HEADER_LEN];
    let unreadable = || "Could not read qcow2 header";
    file.read_padded(&mut start, 0).context(unreadable)?;
    let cluster = Header::bytes_needed(&start)?;
    // Nearly all headers end soon. A chain may have hundreds of images with large clusters.
    let mut bytes = vec![0; cluster.min(FIRST_READ)];
    file.read_padded(&mut bytes, 0).context(unreadable)?;
    if bytes.len() < cluster && !Header::is_whole(&bytes)? {
        bytes.resize(cluster, 0);
        file.read_padded(&mut bytes, 0).context(unreadable)?;
    }
    Header::parse(&bytes, for_check)
}

/// Opens the external data file, if the image has one and the request includes data.
pub(super) fn data_file(header: &Header, request: &mut OpenRequest<'_>) -> Result<Option<Arc<dyn Device>>> {
    let given = request.take_child("data-file");
    if !header.features.incompatible.has(Incompatible::DATA_FILE) {
        if given.is_some() {
            return Err(Error::invalid(
                "'data-file' can only be set for images with an external data file",
            ));
        }
        return match header.features.autoclear.has(Autoclear::DATA_FILE_RAW) && request.write {
            true => Err(Error::corrupt(
                "data-file-raw is set, but there is no external data file",
            )),
            false => Ok(None),
        };
    }
    if given.is_some() || request.no_data {
        return Ok(given);
    }
    let name = header.extensions.data_file.as_ref();
    let name = name.ok_or_else(|| Error::corrupt("'data-file' is required for this image"))?;
    let permissions = if request.force_share {
        Permissions::FORCE_SHARE
    } else {
        data_permissions(request.write)
    };
    // As in qemu-img: the name is relative to the current directory, not to the image's.
    request.open_data(name.text(), permissions).map(Some)
}

/// The permissions for a data file: like a raw image, it may be written by others while it is read.
pub(super) fn data_permissions(write: bool) -> Permissions {
    let permissions = if write {
        Permissions::WRITE
    } else {
        Permissions::READ
    };
    Permissions {
        share_write: true,
        ..permissions
    }
}
