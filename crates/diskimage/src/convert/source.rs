//! The concatenation of the source images.
//!
//! ```text
//!   image 0 ─────────▶│pad│ image 1 ──────▶│pad│ ...       each image is padded with zeroes to whole sectors
//!   0                     start            end
//! ```

use std::sync::Arc;

use diskimage_core::{
    ByteRange, Device, EncodedForm, Error, Extent, Image, Result, ResultExt, StatusDetail, align_up, to_index,
};

use super::runs::CopyKind;
use super::{Conversion, OnLost, SECTOR};
use crate::file_holes::{SparseFiles, devices_of_chain};
use crate::steps::Origin;

/// The source images, each padded to whole sectors.
pub(super) struct Sources<'a> {
    parts: Vec<SourceImage<'a>>,
    len: u64,
    /// The number of images from the top of each chain whose data is copied; `None` for all.
    layers: Option<u32>,
    /// Zeroes are copied as data.
    dense: bool,
    /// With [`Conversion::salvage`], the unit in which data is taken: a sector, or a cluster that is compressed.
    salvage: Option<u64>,
    on_lost: Option<OnLost<'a>>,
}

struct SourceImage<'a> {
    image: &'a Arc<Image>,
    start: u64,
    end: u64,
    /// The files of all images of the chain.
    files: Vec<Arc<dyn Device>>,
    sparse: SparseFiles,
}

impl SourceImage<'_> {
    /// Whether bytes of `device` may be copied without the image. A device behind a filter may not: the filter must see
    /// the reads.
    fn is_direct(&self, device: &Arc<dyn Device>) -> bool {
        self.files.iter().any(|file| Arc::ptr_eq(file, device))
    }
}

/// The status of a run of the concatenated sources.
pub(super) struct SourceStatus {
    pub(super) len: u64,
    pub(super) kind: CopyKind,
    /// The device and the host offset of the bytes, if a file has them unencoded.
    pub(super) host: Option<(Arc<dyn Device>, u64)>,
    pub(super) origin: Origin,
}

impl<'a> Sources<'a> {
    pub(super) fn new(conversion: &Conversion<'a>) -> Self {
        let mut len = 0_u64;
        let parts = conversion
            .sources
            .iter()
            .map(|image| {
                let start = len;
                let files = devices_of_chain(image);
                len = len.saturating_add(align_up(image.len(), SECTOR));
                SourceImage {
                    image,
                    start,
                    end: len,
                    sparse: SparseFiles::among(&files),
                    files,
                }
            })
            .collect();
        Self {
            parts,
            len,
            layers: conversion.backing_len.map(|_| conversion.layers),
            dense: conversion.sparse == 0,
            salvage: conversion.salvage.then(|| match conversion.compress {
                true => conversion.target.layer().granularity().max(SECTOR),
                false => SECTOR,
            }),
            on_lost: conversion.on_lost,
        }
    }

    /// The length of the concatenation.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    fn part(&self, offset: u64) -> Result<&SourceImage<'a>> {
        let index = self.parts.partition_point(|part| part.end <= offset);
        self.parts
            .get(index)
            .ok_or_else(|| Error::invalid("Offset beyond the end of the source"))
    }

    /// The status of the run at the start of `range`, which is not empty and within the sources.
    pub(super) fn status(&self, range: ByteRange) -> Result<SourceStatus> {
        let part = self.part(range.start())?;
        let inside = range.intersect(ByteRange::new(part.start, part.end));
        let at = range.start() - part.start;
        let within = ByteRange::at(at, inside.len()).intersect(ByteRange::new(0, part.image.len()));
        if within.is_empty() {
            return Ok(SourceStatus {
                len: inside.len(),
                kind: if self.dense {
                    CopyKind::Data
                } else {
                    CopyKind::Zero
                },
                host: None,
                origin: Origin::default(),
            });
        }
        let mut outcome = part.image.status(within, StatusDetail::Zeroes);
        let mut asked = within;
        while let Err(error) = &outcome
            && self.salvage.is_some()
            && asked.len() > SECTOR
            // An error with a note is corruption in the tables of the first byte: a shorter range fails as well.
            && error.preceding_note().is_none()
        {
            // A shorter range finds the status of the bytes before the damage.
            asked = asked.first(align_up(asked.len() / 4, SECTOR));
            outcome = part.image.status(asked, StatusDetail::Zeroes);
        }
        match outcome {
            Ok(extent) => {
                let mut status = self.classify(extent, range.start(), inside.len(), part);
                if status.kind == CopyKind::Data {
                    status.len = self.whole_units(range.start(), status.len, inside.len());
                }
                Ok(status)
            }
            Err(error) => {
                let error = error.context(format!(
                    "error while reading block status at offset {}",
                    range.start()
                ));
                if self.salvage.is_none() {
                    return Err(error);
                }
                self.report_lost_sector(&error);
                // The sector may be readable although its status is not.
                Ok(SourceStatus {
                    len: self.whole_units(range.start(), within.len().min(SECTOR), inside.len()),
                    kind: CopyKind::Data,
                    host: None,
                    // As in qemu-img, each is a run and a step of its own.
                    origin: Origin::default().within(range.start()),
                })
            }
        }
    }

    /// The length of `len` bytes of data at `start`, `most` at most, in whole units of a conversion that salvages. As in
    /// qemu-img, the status of the rest of a unit is not queried, and a status that cannot be read is reported once for
    /// each unit.
    fn whole_units(&self, start: u64, len: u64, most: u64) -> u64 {
        let Some(unit) = self.salvage else { return len };
        (align_up(start + len, unit) - start).min(most)
    }

    /// Queries the status of everything and reports each sector whose status is unreadable, as qemu-img does before it
    /// begins to copy.
    pub(super) fn report_unreadable_status(&self) -> Result<()> {
        let mut rest = ByteRange::new(0, self.len);
        while !rest.is_empty() {
            rest = rest.skip(self.status(rest)?.len);
        }
        Ok(())
    }

    fn classify(&self, extent: Extent, at: u64, most: u64, part: &SourceImage<'_>) -> SourceStatus {
        let kind = if self.layers.is_some_and(|layers| extent.depth >= layers) {
            CopyKind::InBacking
        } else if extent.kind.is_zero() && !self.dense {
            CopyKind::Zero
        } else {
            CopyKind::Data
        };
        SourceStatus {
            len: extent.len.min(most),
            kind,
            origin: Origin::of(&extent, at),
            host: extent
                .host
                .filter(|(device, _)| !extent.kind.is_zero() && part.is_direct(device)),
        }
    }

    /// Whether the data of `range`, a run whose host is this, is a hole of its file.
    pub(super) fn is_hole(&self, range: ByteRange, host: Option<&(Arc<dyn Device>, u64)>) -> bool {
        self.part(range.start())
            .is_ok_and(|part| part.sparse.is_hole(host, range.len()))
    }

    /// Fills `buf` with the bytes at `offset`.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            let part = self.part(at)?;
            let len = to_index(part.end - at)?.min(rest.len());
            let (head, tail) = rest.split_at_mut(len);
            self.read_part(part, head, at)?;
            at += len as u64;
            rest = tail;
        }
        Ok(())
    }

    /// Reads `range` and its encoded form, if a source stores it so: see [`Image::read_encoded`].
    pub(super) fn read_encoded(
        &self,
        range: ByteRange,
        form: EncodedForm,
        buf: &mut [u8],
        bytes: &mut Vec<u8>,
    ) -> Result<bool> {
        let part = self.part(range.start())?;
        let within = ByteRange::at(range.start() - part.start, range.len());
        part.image.read_encoded(within, form, buf, bytes)
    }

    fn report_lost_sector(&self, error: &Error) {
        if let Some(on_lost) = self.on_lost {
            on_lost(error);
        }
    }

    fn read_part(&self, part: &SourceImage<'_>, buf: &mut [u8], offset: u64) -> Result<()> {
        let image: &dyn Device = &**part.image;
        let Err(error) = image.read_padded(buf, offset - part.start) else {
            return Ok(());
        };
        if self.salvage.is_none() {
            return Err(error).context(|| format!("error while reading at byte {offset}"));
        }
        // The first sector that cannot be read has failed already: that error may have a note, which is not repeated.
        let mut first = Some(error);
        let mut at = offset;
        for sector in buf.chunks_mut(SECTOR_BYTES) {
            if let Err(error) = image.read_padded(sector, at - part.start) {
                let error = first.take().unwrap_or(error);
                sector.fill(0);
                self.report_lost_sector(&error.context(format!("error while reading offset {at}")));
            }
            at += sector.len() as u64;
        }
        Ok(())
    }
}

/// [`SECTOR`] as a length in memory.
const SECTOR_BYTES: usize = 512;
