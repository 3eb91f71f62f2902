//! Creates images, and measures them.

use std::sync::Arc;

use diskimage_core::options::Options;
use diskimage_core::{
    CreateRequest, Device, Error, ErrorKind, Measure, MeasureSource, Objects, Preallocation, Result, errno,
};

use super::options::{Algorithms, VolumeOptions, passphrase};
use super::volume::{Volume, VolumeLocation};

/// Writes a new image to `file`.
pub(super) fn create(request: &CreateRequest<'_>, file: Arc<dyn Device>) -> Result<()> {
    let (algorithms, passphrase) = algorithms_and_passphrase(request.options, request.objects)?;
    let len = Volume::header_len(&algorithms)
        .checked_add(request.size)
        .filter(|len| i64::try_from(*len).is_ok())
        .ok_or_else(|| Error::new(ErrorKind::Limit, "The requested file size is too large"))?;
    if file.is_zero_when_new() {
        let name = request.options.text("preallocation").unwrap_or("off");
        let preallocation = match Preallocation::from_name(name) {
            // The header is the only metadata.
            Some(Preallocation::Metadata) => Preallocation::Off,
            Some(preallocation) => preallocation,
            None => return Err(Error::invalid(format!("invalid parameter value: {name}"))),
        };
        file.resize(len, preallocation)?;
    } else if len > file.len() {
        return Err(Error::unsupported("Cannot grow device files"));
    }
    let location = VolumeLocation {
        device: file,
        offset: 0,
        detached: false,
    };
    Volume::create(location, &algorithms, passphrase).map(|_| ())
}

/// The algorithms of a new volume and its passphrase.
fn algorithms_and_passphrase<'a>(options: &Options, objects: &'a Objects) -> Result<(Algorithms, &'a [u8])> {
    let volume_options = VolumeOptions::read(options, "")?;
    // As in qemu-img: the option is listed, but only QEMU's monitor can use it.
    if options.is_given("detached-header") {
        return Err(Error::invalid("Parameter 'detached-header' is unexpected"));
    }
    let passphrase = passphrase(objects, options.text("key-secret"), "key-secret")?;
    Ok((volume_options.algorithms()?, passphrase))
}

/// The length of the file of a new image.
pub(super) fn measure(options: &Options, source: MeasureSource<'_>, objects: &Objects) -> Result<Measure> {
    let (algorithms, _) = algorithms_and_passphrase(options, objects)?;
    let len = Volume::header_len(&algorithms)
        .checked_add(source.len())
        .ok_or_else(|| Error::from_errno(errno::EFBIG))?;
    Ok(Measure {
        required: len,
        fully_allocated: len,
        bitmaps: None,
    })
}
