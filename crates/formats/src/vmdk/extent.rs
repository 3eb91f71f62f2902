//! The extents of a disk: the files that hold them, and how these files are laid out.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use diskimage_core::{
    ByteRange, Device, Error, ErrorKind, MemoryDevice, OpenRequest, Permissions, Preallocation, Result,
    ResultExt, ZeroMode, errno, require_addressable,
};

use super::descriptor::{Access, Descriptor, ExtentKind, ExtentLine};
use super::header::{self, Geometry, Hosted, SECTOR};
use crate::layer_kit::foreign_name::{names_beside, own_name};
use crate::layer_kit::new_file::require_room;
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
    /// Empty memory if the extent has no file.
    pub(super) device: Arc<dyn Device>,
    /// The name of its file, as `info` prints it; empty if it has none.
    pub(super) name: String,
    pub(super) access: Access,
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
    /// Nowhere: it reads as zero.
    Zero,
    /// Nowhere: it cannot be read.
    NoAccess,
}

impl Storage {
    /// The metadata that reads of guest data depend on.
    pub(super) fn relied_on(&self) -> Reserved {
        match self {
            Self::Flat { .. } | Self::Zero | Self::NoAccess => Reserved::default(),
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
            Storage::Flat { .. } | Storage::Zero | Storage::NoAccess => None,
            Storage::Sparse(geometry) => Some(geometry),
        }
    }

    /// Whether the extent has a file besides that of the image.
    pub(super) fn has_part(&self) -> bool {
        self.kind.is_some() && !matches!(self.storage, Storage::Zero | Storage::NoAccess)
    }

    /// Refuses writes to an extent that is not writable.
    pub(super) fn require_writable(&self) -> Result<()> {
        let kind = match (self.access, self.storage) {
            (Access::ReadWrite, Storage::Zero) => ExtentKind::Zero.name(),
            (Access::ReadWrite, _) => return Ok(()),
            (access, _) => access.name(),
        };
        Err(Error::unsupported(format!(
            "The extent at {:#x} is {kind}, and cannot be written",
            self.start
        )))
    }

    /// The error for reading an extent that the descriptor gives no access to.
    pub(super) fn no_access(&self) -> Error {
        Error::unsupported(format!(
            "The extent from {:#x} to {:#x} is {}: its data is not part of the image",
            self.start,
            self.end(),
            Access::Denied.name()
        ))
        .report_then(errno::EACCES)
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

    /// Whether the file is a device, whose length is no sign of where its contents end.
    pub(super) fn is_on_device(&self) -> bool {
        !self.device.is_zero_when_new()
    }

    /// Bytes from the extent's start to guest offset `guest`.
    pub(super) fn within(&self, guest: u64) -> u64 {
        guest.saturating_sub(self.start)
    }
}

/// Makes the bytes of a file from `start` to `end` zero, which lie behind its contents: a file grows, a device has them
/// already.
///
/// # Errors
/// A device that is too short, and those of the request.
pub(super) fn add_zeroes(device: &dyn Device, start: u64, end: u64) -> Result<()> {
    if device.is_zero_when_new() {
        return device.resize(end, Preallocation::Off);
    }
    require_room(device, end)?;
    device.write_zeroes(ByteRange::new(start, end), ZeroMode::Unmap)
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
///
/// # Errors
/// Those of [`require_directory`].
pub(super) fn embedded(file: &Arc<dyn Device>, name: &str, hosted: &Hosted) -> Result<Extent> {
    require_directory(&hosted.geometry, name)?;
    Ok(Extent {
        start: 0,
        len: hosted.geometry.capacity,
        storage: Storage::Sparse(hosted.geometry),
        relied_on: hosted.geometry.relied_on(),
        device: Arc::clone(file),
        name: name.to_owned(),
        access: Access::ReadWrite,
        kind: None,
    })
}

/// Refuses a grain directory where no file can have one.
fn require_directory(geometry: &Geometry, name: &str) -> Result<()> {
    let directory = geometry.directory_at(geometry.directory);
    require_addressable(directory.start(), directory.len())
        .context(|| format!("Could not read l1 table from extent '{name}'"))
}

/// Opens the extents that a descriptor names. A file that several extents lie in is opened once.
pub(super) fn open_all(descriptor: &Descriptor, request: &OpenRequest<'_>) -> Result<Vec<Extent>> {
    let lines = &descriptor.extents;
    let mut files = Files {
        request,
        written: lines
            .iter()
            .filter(|line| line.access == Access::ReadWrite)
            .map(|line| line.name.as_str())
            .collect(),
        opened: HashMap::new(),
    };
    let mut extents = Vec::new();
    let mut start: u64 = 0;
    for line in lines {
        let extent = open(line, start, &mut files)?;
        start = start.checked_add(extent.len).ok_or_else(too_large)?;
        extents.push(extent);
    }
    if request.write {
        require_tables_apart(&extents)?;
    }
    Ok(extents)
}

/// Refuses writes to grains in a file that has another extent: that one's data could be overwritten.
fn require_tables_apart(extents: &[Extent]) -> Result<()> {
    let mut users: HashMap<&str, usize> = HashMap::new();
    for extent in extents.iter().filter(|extent| extent.has_part()) {
        *users.entry(extent.name.as_str()).or_default() += 1;
    }
    let shared = extents.iter().find(|extent| {
        extent.geometry().is_some() && users.get(extent.name.as_str()).is_some_and(|n| *n > 1)
    });
    match shared {
        Some(extent) => Err(Error::unsupported(format!(
            "Several extents are in '{}', one of them sparse: they can only be read",
            extent.name
        ))),
        None => Ok(()),
    }
}

/// The error for a disk that is longer than the largest supported one.
pub(super) fn too_large() -> Error {
    Error::from_errno(errno::EFBIG).context("Could not refresh total sector count")
}

fn open<'a>(line: &'a ExtentLine, start: u64, files: &mut Files<'a>) -> Result<Extent> {
    let request = files.request;
    let len = line.sectors.checked_mul(SECTOR).ok_or_else(too_large)?;
    let without_file = match (line.access, line.kind) {
        (Access::Denied, _) => Some(Storage::NoAccess),
        (_, ExtentKind::Zero) => Some(Storage::Zero),
        _ => None,
    };
    if let Some(storage) = without_file {
        return Ok(Extent {
            start,
            len,
            storage,
            relied_on: Reserved::default(),
            device: Arc::new(MemoryDevice::default()),
            name: String::new(),
            access: line.access,
            kind: Some(line.kind),
        });
    }
    if request.name.is_empty() && !line.name.starts_with('/') {
        let node = request.file.node();
        return Err(no_directory(
            &node.shown_name(),
            &format!("Cannot generate a base directory for {} nodes", node.driver),
        ));
    }
    let write = request.write && line.access == Access::ReadWrite;
    let read_only = match line.kind {
        ExtentKind::VmfsSparse => Some("vmfsSparse"),
        ExtentKind::SeSparse => Some("seSparse"),
        _ => None,
    };
    if let Some(kind) = read_only.filter(|_| write) {
        return Err(Error::unsupported(format!(
            "No write support for {kind} images available"
        )));
    }
    let (name, device) = files.open(line)?;
    let (len, storage) = match line.kind {
        ExtentKind::Sparse => sparse(Hosted::read(&*device)?.geometry),
        ExtentKind::VmfsSparse => sparse(header::read_cowd(&*device)?),
        ExtentKind::SeSparse => sparse(header::read_sesparse(&*device)?),
        _ => {
            let offset = line.offset.checked_mul(SECTOR).ok_or_else(too_large)?;
            let end = offset.checked_add(len).ok_or_else(too_large)?;
            if line.kind == ExtentKind::VmfsRdm && device.len() < end {
                return Err(Error::unsupported(format!(
                    "'{name}' is the mapping file of a raw device (VMFSRDM), and does not hold the data of the disk"
                ))
                .hint(RAW_DEVICE));
            }
            (len, Storage::Flat { offset })
        }
    };
    if let Storage::Sparse(geometry) = &storage {
        require_directory(geometry, &name)?;
        if write {
            geometry.require_handled()?;
        }
    }
    Ok(Extent {
        start,
        len,
        relied_on: storage.relied_on(),
        storage,
        device,
        name,
        access: line.access,
        kind: Some(line.kind),
    })
}

/// What helps where the data of a disk is on a device of another machine.
const RAW_DEVICE: &str = "The data is on a device of the machine that made the image. Copy it there to an image with \
                          extents of its own, or let the extent's line name the device of this machine.";

/// The files of extents.
struct Files<'a> {
    request: &'a OpenRequest<'a>,
    /// The names of those that an extent with write access lies in.
    written: HashSet<&'a str>,
    /// The open files and the names that they were found by, by name in the descriptor.
    opened: HashMap<&'a str, (String, Arc<dyn Device>)>,
}

impl<'a> Files<'a> {
    /// The file of an extent, opened if it is not yet.
    fn open(&mut self, line: &'a ExtentLine) -> Result<(String, Arc<dyn Device>)> {
        if let Some(known) = self.opened.get(line.name.as_str()) {
            return Ok(known.clone());
        }
        let write = self.request.write && self.written.contains(line.name.as_str());
        let permissions = match (self.request.force_share, write) {
            (true, _) => Permissions::FORCE_SHARE,
            (_, true) => Permissions::WRITE,
            (_, false) => Permissions::READ,
        };
        let file = self.find(line, permissions)?;
        self.opened.insert(&line.name, file.clone());
        Ok(file)
    }

    /// Opens the file of an extent. As in qemu-img, its name is the very bytes in the descriptor. If no such file exists,
    /// the name decoded to UTF-8 is tried, then the file is looked for beside the image.
    fn find(&self, line: &ExtentLine, permissions: Permissions) -> Result<(String, Arc<dyn Device>)> {
        let request = self.request;
        let open = |path: String| {
            let device = request.open_data(&path, permissions)?;
            Ok((path, device))
        };
        let is_missing = |error: &Error| error.kind() == ErrorKind::NotFound;
        // The error names the file as the descriptor does.
        let error = match open(beside(request.name, &line.name)?) {
            Err(error) if is_missing(&error) => error,
            opened => return opened,
        };
        let name = line.decoded_name.as_ref().unwrap_or(&line.name);
        let others = names_beside(name);
        for other in line.decoded_name.iter().chain(&others) {
            let Ok(path) = beside(request.name, other) else {
                continue;
            };
            match open(path) {
                Err(error) if is_missing(&error) => {}
                opened => return opened,
            }
        }
        let found = request.context.gate.locate(request.name, own_name(name));
        if let Some(path) = found.and_then(|found| beside(request.name, &found).ok()) {
            return open(path);
        }
        let is_device = line.kind == ExtentKind::VmfsRaw || line.name.starts_with(r"\\.\");
        Err(match is_device {
            true => error.hint(RAW_DEVICE),
            false if others.is_empty() => error,
            false => error.hint(format!(
                "No file '{}' is beside the image either.",
                own_name(name)
            )),
        })
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
