//! Growing an image, which qemu-img does not support.
//!
//! The last extent grows up to the extent limit of the create type: a flat extent gets a longer file, a sparse extent
//! new directories (see `layout`). The rest of the new length goes to further extents, in new files.
//!
//! The new files are written first, then the last extent grows, and the descriptor is changed last. The length of a
//! sparse extent is that in its own header; a flat extent keeps its old length until its line changes. So a crash
//! leaves the old disk, a disk that ends with the grown last extent, or the new disk.

use std::sync::{Arc, PoisonError};

use diskimage_core::{
    ByteRange, Error, MAX_DEVICE_LEN, Preallocation, ResizeRequest, Result, ZeroMode, errno,
};

use super::create::{self, MAX_EXTENTS};
use super::descriptor::{Access, Descriptor, ExtentKind};
use super::extent::{Extent, Storage, beside};
use super::header::{self, SECTOR};
use super::layout::Layout;
use super::{State, VmdkLayer};
use crate::layer_kit::clear::zero_existing;
use crate::layer_kit::foreign_name::own_name;
use crate::layer_kit::preallocation;

/// The extents of the grown disk.
struct Growth {
    /// The index of the extent that grows.
    index: usize,
    /// Its new length.
    len: u64,
    /// The new extents behind it.
    added: Vec<Added>,
}

/// A new extent.
struct Added {
    len: u64,
    /// Its name in the descriptor.
    name: String,
    path: String,
}

impl VmdkLayer {
    /// Refuses a request that cannot be carried out, before anything changes.
    pub(super) fn check_size(&self, request: &ResizeRequest) -> Result<()> {
        self.growth_into_parts(request).map(drop)
    }

    /// The extents of the grown disk, once the request has a file for each new one.
    fn growth_into_parts(&self, request: &ResizeRequest) -> Result<Growth> {
        let growth = self.growth(request)?;
        if growth.added.len() != request.parts.len() {
            return Err(Error::unsupported(
                "The disk would need further files, which are made only where its size is all that changes",
            ));
        }
        Ok(growth)
    }

    /// The paths of the new files that the request needs.
    pub(super) fn added_parts(&self, request: &ResizeRequest) -> Result<Vec<String>> {
        let added = self.growth(request)?.added.into_iter();
        Ok(added.map(|extent| extent.path).collect())
    }

    /// Makes the disk larger.
    pub(super) fn grow(&self, request: &ResizeRequest) -> Result<()> {
        let growth = self.growth_into_parts(request)?;
        let extents = self.extents();
        let last = last_of(&extents)?.1;
        if request.len == last.end() {
            return Ok(());
        }
        if request.backing_len > last.end() {
            return Err(Error::unsupported(
                "The image below is longer than this one, and would show in what is added",
            ));
        }
        let mut state = self.claims.wait_idle(|| self.lock());
        let prepared = make_added(&growth, last, request)
            .and_then(|added| Ok((added, self.grow_last(&mut state, &extents, &growth, request)?)));
        let (added, storage) = prepared.inspect_err(|_| {
            // The descriptor does not refer to the new files yet.
            for part in &request.parts {
                // The error that led here is the one to report.
                let _ = part.resize(0, Preallocation::Off);
            }
        })?;
        self.change_descriptor(|old| growth.descriptor(old, request.len, last))?;
        self.file.flush()?;
        state.free.extend(added.iter().map(Extent::end_of_file));
        let mut grown = extents[..growth.index].to_vec();
        grown.push(Extent {
            len: growth.len,
            relied_on: storage.relied_on(),
            storage,
            ..last.clone()
        });
        grown.extend(added);
        *self.extents.write().unwrap_or_else(PoisonError::into_inner) = grown.into();
        Ok(())
    }

    /// Makes the last extent longer, and returns its new storage.
    fn grow_last(
        &self,
        state: &mut State,
        extents: &[Extent],
        growth: &Growth,
        request: &ResizeRequest,
    ) -> Result<Storage> {
        let (index, last) = last_of(extents)?;
        if let Storage::Sparse(geometry) = last.storage {
            self.require_whole(state, extents, index, &geometry)?;
        }
        self.mark_changed(state)?;
        match last.storage {
            Storage::Flat { offset } => grow_flat(last, offset, growth.len, request.preallocation),
            Storage::Sparse(geometry) => self.grow_sparse(state, extents, index, &geometry, growth.len),
            Storage::Zero | Storage::NoAccess => Err(Error::from_errno(errno::EINVAL)),
        }
    }

    /// Computes the extents of the grown disk.
    fn growth(&self, request: &ResizeRequest) -> Result<Growth> {
        let extents = self.extents();
        let (index, last) = last_of(&extents)?;
        if request.len < last.end() {
            return Err(Error::unsupported("Images of this format can only grow"));
        }
        if !request.len.is_multiple_of(SECTOR) {
            return Err(Error::invalid("The new size must be a multiple of 512"));
        }
        if request.len > MAX_DEVICE_LEN {
            return Err(Error::from_errno(errno::EFBIG));
        }
        require_growable(&extents, last)?;
        let kind = self.descriptor.create_type.as_deref().unwrap_or_default();
        let limit = create::extent_limit(kind).unwrap_or(u64::MAX).max(last.len);
        let len = (request.len - last.start).min(limit);
        match (last.storage, request.preallocation) {
            (Storage::Flat { .. }, Preallocation::Metadata) => {
                return Err(preallocation::unsupported(request.preallocation));
            }
            (Storage::Flat { .. } | Storage::Zero | Storage::NoAccess, _) => {}
            (Storage::Sparse(geometry), mode) => {
                preallocation::require_off(mode)?;
                Layout::of(&geometry, self.lock().end(index, last)?, len)?;
            }
        }
        let added = self.added(&extents, request.len - last.start - len)?;
        let growth = Growth { index, len, added };
        let old = self.read_descriptor()?;
        self.require_room(&growth.descriptor(&old, request.len, last))?;
        Ok(growth)
    }

    /// The new extents for `len` bytes behind the present ones.
    fn added(&self, extents: &[Extent], len: u64) -> Result<Vec<Added>> {
        let kind = self.descriptor.create_type.as_deref().unwrap_or_default();
        let Some(limit) = create::extent_limit(kind).filter(|_| len > 0) else {
            return Ok(Vec::new());
        };
        let (index, last) = last_of(extents)?;
        if last
            .geometry()
            .is_some_and(|geometry| !create::has_default_layout(&geometry))
        {
            return Err(Error::unsupported(
                "Further extents would have other grains than those there are",
            ));
        }
        let before = index as u64 + 1;
        if before + len.div_ceil(limit) > MAX_EXTENTS {
            return Err(Error::from_errno(errno::EFBIG));
        }
        // The name in the descriptor; that of the open file may differ.
        let lines = Descriptor::parse(&self.read_descriptor()?)?.extents;
        let line = lines.last();
        let is_named_so = |name: &String| beside(&self.name, name).is_ok_and(|path| path == last.name);
        let name = match line {
            Some(line) if is_named_so(&line.name) || line.decoded_name.as_ref().is_some_and(is_named_so) => {
                line.name.as_str()
            }
            // The descriptor names a file of another machine; the new ones come beside the one that was found.
            _ => own_name(&last.name),
        };
        let mut left = len;
        (before + 1..)
            .map_while(|number| {
                let len = left.min(limit);
                left -= len;
                (len > 0).then_some((number, len))
            })
            .map(|(number, len)| {
                let name = create::next_name(kind, &self.name, (before, name), number)
                    .ok_or_else(|| Error::from_errno(errno::EINVAL))?;
                let path = beside(&self.name, &name)?;
                Ok(Added { len, name, path })
            })
            .collect()
    }
}

impl Growth {
    /// The descriptor of the grown disk of `disk` bytes, whose last extent was `last` before.
    fn descriptor(&self, old: &[u8], disk: u64, last: &Extent) -> Vec<u8> {
        let is_flat = last.geometry().is_none();
        let lines = self.added.iter();
        let lines: Vec<String> = lines
            .map(|added| create::line(is_flat, added.len / SECTOR, &added.name))
            .collect();
        Descriptor::grown(old, self.len / SECTOR, &lines, disk / SECTOR)
    }
}

/// Writes the extents that follow `last` into the new files.
fn make_added(growth: &Growth, last: &Extent, request: &ResizeRequest) -> Result<Vec<Extent>> {
    let mut start = last.start + growth.len;
    let mut extents = Vec::new();
    for (added, device) in growth.added.iter().zip(&request.parts) {
        let (kind, storage) = match last.geometry() {
            None => {
                device.resize(added.len, request.preallocation)?;
                (ExtentKind::Flat, Storage::Flat { offset: 0 })
            }
            Some(geometry) => {
                let zeroed_grain = geometry.form == header::Form::Hosted { zeroed_grain: true };
                create::write_sparse(&**device, added.len / SECTOR, zeroed_grain, false)?;
                let hosted = header::Hosted::read(&**device)?;
                (ExtentKind::Sparse, Storage::Sparse(hosted.geometry))
            }
        };
        device.flush()?;
        extents.push(Extent {
            start,
            len: added.len,
            relied_on: storage.relied_on(),
            storage,
            device: Arc::clone(device),
            name: added.path.clone(),
            access: Access::ReadWrite,
            kind: Some(kind),
        });
        start += added.len;
    }
    Ok(extents)
}

/// Refuses growth of a last extent that is not writable, or whose file has another extent behind it.
fn require_growable(extents: &[Extent], last: &Extent) -> Result<()> {
    last.require_writable()?;
    let shares = |extent: &&Extent| extent.has_part() && Arc::ptr_eq(&extent.device, &last.device);
    if extents.iter().filter(shares).count() > 1 {
        return Err(Error::unsupported(format!(
            "Several extents are in '{}', so the last one cannot grow",
            last.name
        )));
    }
    Ok(())
}

fn last_of(extents: &[Extent]) -> Result<(usize, &Extent)> {
    let last = extents.iter().enumerate().next_back();
    last.ok_or_else(|| Error::unsupported("An image without extents cannot grow"))
}

impl State {
    /// The end of the contents of an extent's file, with the grains that are allocated and not yet written. An
    /// end-of-stream marker is not counted.
    pub(super) fn end(&self, index: usize, extent: &Extent) -> Result<u64> {
        let free = self.free.get(index);
        let free = *free.ok_or_else(|| Error::from_errno(errno::EIO))?;
        Ok(match extent.geometry() {
            Some(geometry) if geometry.compressed || extent.is_on_device() => free,
            _ => extent.device.len().max(free),
        })
    }
}

fn grow_flat(extent: &Extent, offset: u64, len: u64, mode: Preallocation) -> Result<Storage> {
    let end = offset
        .checked_add(len)
        .ok_or_else(|| Error::from_errno(errno::EFBIG))?;
    let old_end = offset.saturating_add(extent.len);
    let there = extent.device.len();
    // Bytes behind the old end of the disk must not become guest data.
    let added = ByteRange::new(old_end, end);
    zero_existing(&*extent.device, added, ZeroMode::KeepAllocated)?;
    if there < end {
        extent.device.resize(end, mode)?;
    }
    extent.device.flush()?;
    Ok(Storage::Flat { offset })
}
