//! The extents of a disk: which files they are in, and how those are arranged.

use std::sync::Arc;

use diskimage_core::{ByteRange, Device, Error, ErrorKind, OpenRequest, Permissions, Result, errno};

use super::descriptor::{Descriptor, ExtentKind, ExtentLine};
use super::header::{self, Geometry, Hosted, SECTOR};
use crate::layer_kit::reserved::Reserved;

/// A part of the disk.
#[derive(Clone, Debug)]
pub(super) struct Extent {
    /// Where it starts on the disk.
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) place: Place,
    /// Without what its bytes cannot be read.
    pub(super) relied_on: Reserved,
    pub(super) device: Arc<dyn Device>,
    /// Its file's name, for whoever asks.
    pub(super) name: String,
    /// What the descriptor calls it; `None` if the descriptor is inside the extent.
    pub(super) kind: Option<ExtentKind>,
}

/// How an extent's bytes are arranged in its file.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// As they are, from this offset on.
    Flat { offset: u64 },
    /// By grains.
    Sparse(Geometry),
}

impl Place {
    /// Without what bytes that are arranged like this cannot be read.
    pub(super) fn relied_on(&self) -> Reserved {
        match self {
            Self::Flat { .. } => Reserved::default(),
            Self::Sparse(geometry) => geometry.relied_on(),
        }
    }
}

impl Extent {
    pub(super) fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }

    pub(super) fn geometry(&self) -> Option<Geometry> {
        match self.place {
            Place::Flat { .. } => None,
            Place::Sparse(geometry) => Some(geometry),
        }
    }

    /// What places for grains are multiples of.
    pub(super) fn unit(&self) -> u64 {
        match self.geometry() {
            Some(geometry) if !geometry.compressed => geometry.grain,
            _ => SECTOR,
        }
    }

    /// Where the first place for a grain is behind all that the file has.
    pub(super) fn end_of_file(&self) -> u64 {
        self.device.len().next_multiple_of(self.unit())
    }

    /// Bytes from the extent's start up to the disk's offset `guest`.
    pub(super) fn within(&self, guest: u64) -> u64 {
        guest.saturating_sub(self.start)
    }
}

/// The extent with the disk's offset `guest`, and which it is.
pub(super) fn at(extents: &[Extent], guest: u64) -> Result<(usize, &Extent)> {
    let index = extents.partition_point(|extent| extent.end() <= guest);
    let extent = extents.get(index);
    extent
        .map(|extent| (index, extent))
        .ok_or_else(|| Error::from_errno(errno::EIO))
}

/// The pieces of `range` that lie in one extent each.
pub(super) fn pieces(
    extents: &[Extent],
    range: ByteRange,
) -> impl Iterator<Item = Result<(usize, &Extent, ByteRange)>> {
    let mut rest = range;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let piece = at(extents, rest.start()).map(|(index, extent)| {
            let piece = rest.intersect(ByteRange::new(extent.start, extent.end()));
            rest = rest.skip(piece.len());
            (index, extent, piece)
        });
        if piece.is_err() {
            rest = rest.skip(u64::MAX);
        }
        Some(piece)
    })
}

/// The image's own file as the only extent.
pub(super) fn embedded(file: &Arc<dyn Device>, name: &str, hosted: &Hosted) -> Extent {
    Extent {
        start: 0,
        len: hosted.geometry.capacity,
        place: Place::Sparse(hosted.geometry),
        relied_on: hosted.geometry.relied_on(),
        device: Arc::clone(file),
        name: name.to_owned(),
        kind: None,
    }
}

/// Opens the extents that a descriptor names.
pub(super) fn open_all(descriptor: &Descriptor, request: &OpenRequest<'_>) -> Result<Vec<Extent>> {
    let mut extents = Vec::new();
    let mut start: u64 = 0;
    for line in &descriptor.extents {
        let extent = open(line, start, request)?;
        start = start.checked_add(extent.len).ok_or_else(too_large)?;
        extents.push(extent);
    }
    Ok(extents)
}

/// The error of a disk that is longer than any.
pub(super) fn too_large() -> Error {
    Error::from_errno(errno::EFBIG).context("Could not refresh total sector count")
}

fn open(line: &ExtentLine, start: u64, request: &OpenRequest<'_>) -> Result<Extent> {
    if request.name.is_empty() && !line.name.starts_with('/') {
        let node = request.file.node();
        return Err(no_directory(
            &node.shown_name(),
            &format!("Cannot generate a base directory for {} nodes", node.driver),
        ));
    }
    if request.write {
        match line.kind {
            ExtentKind::VmfsSparse | ExtentKind::SeSparse => {
                let kind = if line.kind == ExtentKind::SeSparse {
                    "seSparse"
                } else {
                    "vmfsSparse"
                };
                return Err(Error::unsupported(format!(
                    "No write support for {kind} images available"
                )));
            }
            ExtentKind::Flat | ExtentKind::Vmfs | ExtentKind::Sparse => {}
        }
    }
    let permissions = match (request.force_share, request.write) {
        (true, _) => Permissions::FORCE_SHARE,
        (_, true) => Permissions::WRITE,
        (_, false) => Permissions::READ,
    };
    let (name, device) = open_file(line, request, permissions)?;
    let len = line.sectors.checked_mul(SECTOR).ok_or_else(too_large)?;
    let (len, place) = match line.kind {
        ExtentKind::Flat | ExtentKind::Vmfs => {
            let offset = line.offset.checked_mul(SECTOR).ok_or_else(too_large)?;
            offset.checked_add(len).ok_or_else(too_large)?;
            (len, Place::Flat { offset })
        }
        ExtentKind::Sparse => sparse(Hosted::read(&*device)?.geometry),
        ExtentKind::VmfsSparse => sparse(header::read_cowd(&*device)?),
        ExtentKind::SeSparse => sparse(header::read_sesparse(&*device)?),
    };
    if request.write
        && let Place::Sparse(geometry) = &place
    {
        geometry.require_handled()?;
    }
    Ok(Extent {
        start,
        len,
        relied_on: place.relied_on(),
        place,
        device,
        name,
        kind: Some(line.kind),
    })
}

/// Opens the file of an extent: the one that is called by the very bytes in the descriptor, as in qemu-img, or if there is
/// none, the one that has the name in UTF-8.
fn open_file(
    line: &ExtentLine,
    request: &OpenRequest<'_>,
    permissions: Permissions,
) -> Result<(String, Arc<dyn Device>)> {
    let open = |name: &str| {
        let name = beside(request.name, name)?;
        let device = request.gate.open_data(&name, request.name, permissions)?;
        Ok((name, device))
    };
    let is_missing = |error: &Error| error.kind() == ErrorKind::NotFound;
    match (open(&line.name), &line.decoded_name) {
        (Err(error), Some(decoded)) if is_missing(&error) => match open(decoded) {
            // The first name is the one that the descriptor has.
            Err(other) if is_missing(&other) => Err(error),
            other => other,
        },
        (opened, _) => opened,
    }
}

/// A sparse extent is as long as its own header says.
fn sparse(geometry: Geometry) -> (u64, Place) {
    (geometry.capacity, Place::Sparse(geometry))
}

/// The path that `name` means in the image called `image`: relative to that image's directory.
///
/// # Errors
/// A relative name where the image has no directory.
pub(super) fn beside(image: &str, name: &str) -> Result<String> {
    if name.starts_with('/') {
        return Ok(name.to_owned());
    }
    let protocol = image
        .find([':', '/'])
        .is_some_and(|at| image[at..].starts_with(':'));
    if protocol || image.is_empty() {
        return Err(no_directory(image, "Its name is no path"));
    }
    Ok(match image.rfind('/') {
        Some(slash) => format!("{}{name}", &image[..=slash]),
        None => name.to_owned(),
    })
}

fn no_directory(image: &str, why: &str) -> Error {
    Error::invalid(why).context(format!(
        "Cannot use relative paths with VMDK descriptor file '{image}'"
    ))
}
