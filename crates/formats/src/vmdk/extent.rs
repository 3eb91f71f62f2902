//! The extents of a disk: the files that hold them, and how these files are laid out.

use std::sync::Arc;

use diskimage_core::{ByteRange, Device, Error, ErrorKind, OpenRequest, Permissions, Result, errno};

use super::descriptor::{Descriptor, ExtentKind, ExtentLine};
use super::header::{self, Geometry, Hosted, SECTOR};
use crate::layer_kit::reserved::Reserved;

/// An extent of the disk.
#[derive(Clone, Debug)]
pub(super) struct Extent {
    /// Guest offset of its first byte.
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) storage: Storage,
    /// The metadata that reads of guest data depend on.
    pub(super) relied_on: Reserved,
    pub(super) device: Arc<dyn Device>,
    /// The name of its file, as `info` prints it.
    pub(super) name: String,
    /// The kind in the descriptor's line; `None` if the descriptor is embedded in the extent.
    pub(super) kind: Option<ExtentKind>,
}

/// How an extent's guest data is stored in its file.
#[derive(Clone, Copy, Debug)]
pub(super) enum Storage {
    /// One contiguous run from host offset `offset` on.
    Flat { offset: u64 },
    /// In grains, which tables map.
    Sparse(Geometry),
}

impl Storage {
    /// The metadata that reads of guest data depend on.
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
        match self.storage {
            Storage::Flat { .. } => None,
            Storage::Sparse(geometry) => Some(geometry),
        }
    }

    /// The alignment of grains in the file, in bytes.
    pub(super) fn unit(&self) -> u64 {
        match self.geometry() {
            Some(geometry) if !geometry.compressed => geometry.grain,
            _ => SECTOR,
        }
    }

    /// The host offset of the first grain that can be allocated behind the end of the file.
    pub(super) fn end_of_file(&self) -> u64 {
        self.device.len().next_multiple_of(self.unit())
    }

    /// Bytes from the extent's start to guest offset `guest`.
    pub(super) fn within(&self, guest: u64) -> u64 {
        guest.saturating_sub(self.start)
    }
}

/// The extent that holds guest offset `guest`, with its index.
pub(super) fn at(extents: &[Extent], guest: u64) -> Result<(usize, &Extent)> {
    let index = extents.partition_point(|extent| extent.end() <= guest);
    let extent = extents.get(index);
    extent
        .map(|extent| (index, extent))
        .ok_or_else(|| Error::from_errno(errno::EIO))
}

/// Splits `range` at the boundaries of extents.
pub(super) fn split(
    extents: &[Extent],
    range: ByteRange,
) -> impl Iterator<Item = Result<(usize, &Extent, ByteRange)>> {
    let mut rest = range;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let part = at(extents, rest.start()).map(|(index, extent)| {
            let part = rest.intersect(ByteRange::new(extent.start, extent.end()));
            rest = rest.skip(part.len());
            (index, extent, part)
        });
        if part.is_err() {
            rest = rest.skip(u64::MAX);
        }
        Some(part)
    })
}

/// The image's own file as the only extent.
pub(super) fn embedded(file: &Arc<dyn Device>, name: &str, hosted: &Hosted) -> Extent {
    Extent {
        start: 0,
        len: hosted.geometry.capacity,
        storage: Storage::Sparse(hosted.geometry),
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

/// The error for a disk that is longer than the largest supported one.
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
    let (len, storage) = match line.kind {
        ExtentKind::Flat | ExtentKind::Vmfs => {
            let offset = line.offset.checked_mul(SECTOR).ok_or_else(too_large)?;
            offset.checked_add(len).ok_or_else(too_large)?;
            (len, Storage::Flat { offset })
        }
        ExtentKind::Sparse => sparse(Hosted::read(&*device)?.geometry),
        ExtentKind::VmfsSparse => sparse(header::read_cowd(&*device)?),
        ExtentKind::SeSparse => sparse(header::read_sesparse(&*device)?),
    };
    if request.write
        && let Storage::Sparse(geometry) = &storage
    {
        geometry.require_handled()?;
    }
    Ok(Extent {
        start,
        len,
        relied_on: storage.relied_on(),
        storage,
        device,
        name,
        kind: Some(line.kind),
    })
}

/// Opens the file of an extent. As in qemu-img, its name is the very bytes in the descriptor; if no such file exists,
/// the name decoded to UTF-8 is tried.
fn open_file(
    line: &ExtentLine,
    request: &OpenRequest<'_>,
    permissions: Permissions,
) -> Result<(String, Arc<dyn Device>)> {
    let open = |name: &str| {
        let name = beside(request.name, name)?;
        let device = request.context.open_data(&name, request.name, permissions)?;
        Ok((name, device))
    };
    let is_missing = |error: &Error| error.kind() == ErrorKind::NotFound;
    match (open(&line.name), &line.decoded_name) {
        (Err(error), Some(decoded)) if is_missing(&error) => match open(decoded) {
            // The error names the file as the descriptor does.
            Err(other) if is_missing(&other) => Err(error),
            other => other,
        },
        (opened, _) => opened,
    }
}

/// The length and the storage of a sparse extent, whose length is the capacity in its header.
fn sparse(geometry: Geometry) -> (u64, Storage) {
    (geometry.capacity, Storage::Sparse(geometry))
}

/// The path of `name`, which is relative to the directory of the image called `image`.
///
/// # Errors
/// A relative name, if the image's own name is not a path.
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
