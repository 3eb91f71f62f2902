//! Growing, which the original cannot.
//!
//! The last extent grows as far as an extent of such an image goes: a flat one gets a longer file, a sparse one new
//! directories (see `layout`). What is left goes to further extents, in new files.
//!
//! The new files come first. Then the last extent grows; the descriptor is changed last. Of a sparse extent it is the header
//! that counts, and a flat one whose line is still the old one is as long as before. So a crash leaves the old disk, one that
//! ends with the last of its old files, or the new one.

use std::sync::{Arc, PoisonError};

use diskimage_core::{Error, Preallocation, ResizeRequest, Result, errno};

use super::create::{self, MAX_EXTENTS};
use super::descriptor::{Descriptor, ExtentKind};
use super::extent::{Extent, Place, beside};
use super::header::{self, SECTOR};
use super::layout::{Layout, zero_bytes};
use super::{MAX_LEN, State, VmdkLayer};
use crate::layer_kit::preallocation;

/// What the extents become.
struct Growth {
    /// Which one grows.
    index: usize,
    /// How long it is then.
    len: u64,
    /// Those that follow it then.
    added: Vec<Added>,
}

/// An extent that is added.
struct Added {
    len: u64,
    /// Its name in the descriptor.
    name: String,
    path: String,
}

impl VmdkLayer {
    /// Refuses what cannot be done, before anything has changed.
    pub(super) fn check_size(&self, request: &ResizeRequest) -> Result<()> {
        self.growth_into_parts(request).map(drop)
    }

    /// What has to grow, with a file for each extent that is added.
    fn growth_into_parts(&self, request: &ResizeRequest) -> Result<Growth> {
        let growth = self.growth(request)?;
        if growth.added.len() != request.parts.len() {
            return Err(Error::unsupported(
                "The disk would need further files, which are made only where its size is all that changes",
            ));
        }
        Ok(growth)
    }

    /// The paths of the files that growing needs.
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
        let (added, place) = prepared.inspect_err(|_| {
            // Nothing leads to them yet.
            for part in &request.parts {
                // The failure that led here is the one to report.
                let _ = part.resize(0, Preallocation::Off);
            }
        })?;
        self.change_descriptor(|old| growth.descriptor(old, request.len, last))?;
        self.file.flush()?;
        state.free.extend(added.iter().map(Extent::end_of_file));
        let mut grown = extents[..growth.index].to_vec();
        grown.push(Extent {
            len: growth.len,
            relied_on: place.relied_on(),
            place,
            ..last.clone()
        });
        grown.extend(added);
        *self.extents.write().unwrap_or_else(PoisonError::into_inner) = grown.into();
        Ok(())
    }

    /// Makes the last extent longer. Where its bytes are then.
    fn grow_last(
        &self,
        state: &mut State,
        extents: &[Extent],
        growth: &Growth,
        request: &ResizeRequest,
    ) -> Result<Place> {
        let (index, last) = last_of(extents)?;
        if let Place::Sparse(geometry) = last.place {
            self.require_whole(state, extents, index, &geometry)?;
        }
        self.mark_changed(state)?;
        match last.place {
            Place::Flat { offset } => grow_flat(last, offset, growth.len, request.preallocation),
            Place::Sparse(geometry) => self.grow_sparse(state, extents, index, &geometry, growth.len),
        }
    }

    /// What has to grow, and how far.
    fn growth(&self, request: &ResizeRequest) -> Result<Growth> {
        let extents = self.extents();
        let (index, last) = last_of(&extents)?;
        if request.len < last.end() {
            return Err(Error::unsupported("Images of this format can only grow"));
        }
        if !request.len.is_multiple_of(SECTOR) {
            return Err(Error::invalid("The new size must be a multiple of 512"));
        }
        if request.len > MAX_LEN {
            return Err(Error::from_errno(errno::EFBIG));
        }
        let kind = self.descriptor.create_type.as_deref().unwrap_or_default();
        let limit = create::extent_limit(kind).unwrap_or(u64::MAX).max(last.len);
        let len = (request.len - last.start).min(limit);
        match (last.place, request.preallocation) {
            (Place::Flat { .. }, Preallocation::Metadata) => {
                return Err(preallocation::unsupported(request.preallocation));
            }
            (Place::Flat { .. }, _) => {}
            (Place::Sparse(geometry), mode) => {
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

    /// The extents that take `len` bytes behind those there are.
    fn added(&self, extents: &[Extent], len: u64) -> Result<Vec<Added>> {
        let kind = self.descriptor.create_type.as_deref().unwrap_or_default();
        let Some(limit) = create::extent_limit(kind).filter(|_| len > 0) else {
            return Ok(Vec::new());
        };
        let (index, last) = last_of(extents)?;
        if last
            .geometry()
            .is_some_and(|geometry| !create::is_usual(&geometry))
        {
            return Err(Error::unsupported(
                "Further extents would have other grains than those there are",
            ));
        }
        let before = index as u64 + 1;
        if before + len.div_ceil(limit) > MAX_EXTENTS {
            return Err(Error::from_errno(errno::EFBIG));
        }
        // As the descriptor has it, which the name of the open file need not show.
        let lines = Descriptor::parse(&self.read_descriptor()?)?.extents;
        let name = lines.last().map_or("", |line| line.name.as_str());
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
    /// The descriptor of a disk of `disk` bytes, the last extent of which was `last`.
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
        let (kind, place) = match last.geometry() {
            None => {
                device.resize(added.len, request.preallocation)?;
                (ExtentKind::Flat, Place::Flat { offset: 0 })
            }
            Some(geometry) => {
                let zeroed_grain = geometry.form == header::Form::Hosted { zeroed_grain: true };
                create::write_sparse(&**device, added.len / SECTOR, zeroed_grain, false)?;
                let hosted = header::Hosted::read(&**device)?;
                (ExtentKind::Sparse, Place::Sparse(hosted.geometry))
            }
        };
        device.flush()?;
        extents.push(Extent {
            start,
            len: added.len,
            relied_on: place.relied_on(),
            place,
            device: Arc::clone(device),
            name: added.path.clone(),
            kind: Some(kind),
        });
        start += added.len;
    }
    Ok(extents)
}

fn last_of(extents: &[Extent]) -> Result<(usize, &Extent)> {
    let last = extents.iter().enumerate().next_back();
    last.ok_or_else(|| Error::unsupported("An image without extents cannot grow"))
}

impl State {
    /// Where all that the file of an extent holds ends, or will end once it is written. What ends a stream is not counted.
    pub(super) fn end(&self, index: usize, extent: &Extent) -> Result<u64> {
        let free = self.free.get(index);
        let free = *free.ok_or_else(|| Error::from_errno(errno::EIO))?;
        Ok(match extent.geometry() {
            Some(geometry) if geometry.compressed => free,
            _ => extent.device.len().max(free),
        })
    }
}

fn grow_flat(extent: &Extent, offset: u64, len: u64, mode: Preallocation) -> Result<Place> {
    let end = offset
        .checked_add(len)
        .ok_or_else(|| Error::from_errno(errno::EFBIG))?;
    let old_end = offset.saturating_add(extent.len);
    let there = extent.device.len();
    // What the file has behind the disk must not become part of it.
    zero_bytes(&*extent.device, old_end..end)?;
    if there < end {
        extent.device.resize(end, mode)?;
    }
    extent.device.flush()?;
    Ok(Place::Flat { offset })
}
