//! The sources as one disk.

use std::sync::Arc;

use diskimage_core::{ByteRange, Device, Error, Extent, Image, Result, ResultExt, StatusDetail, align_up};

use super::pieces::Kind;
use super::{Conversion, OnLost, SECTOR};

/// Images one after the other, each filling whole sectors.
pub(super) struct Sources<'a> {
    parts: Vec<Part<'a>>,
    len: u64,
    /// Only what so many images from the top have themselves is of interest.
    layers: Option<u32>,
    /// Zeroes are data.
    dense: bool,
    salvage: bool,
    on_lost: Option<OnLost<'a>>,
}

struct Part<'a> {
    image: &'a Arc<Image>,
    start: u64,
    end: u64,
    /// What the images of the chain lie in.
    files: Vec<Arc<dyn Device>>,
}

impl Part<'_> {
    /// Whether bytes there may be copied past the image: where a filter is in between, it has a say.
    fn is_direct(&self, device: &Arc<dyn Device>) -> bool {
        self.files.iter().any(|file| Arc::ptr_eq(file, device))
    }
}

fn files_of(image: &Arc<Image>) -> Vec<Arc<dyn Device>> {
    let chain = std::iter::successors(Some(image), |image| image.backing());
    chain
        .flat_map(|image| {
            let layer = image.layer();
            let parts = layer.parts().into_iter().map(|(_, part)| part);
            [Some(layer.file()), layer.data_file()]
                .into_iter()
                .flatten()
                .cloned()
                .chain(parts)
        })
        .collect()
}

/// What the bytes of a run are.
pub(super) struct Status {
    pub(super) len: u64,
    pub(super) kind: Kind,
    /// Where the bytes lie as they are, if they do.
    pub(super) host: Option<(Arc<dyn Device>, u64)>,
}

impl<'a> Sources<'a> {
    pub(super) fn new(conversion: &Conversion<'a>) -> Self {
        let mut len = 0_u64;
        let parts = conversion
            .sources
            .iter()
            .map(|image| {
                let start = len;
                len = len.saturating_add(align_up(image.len(), SECTOR));
                Part {
                    image,
                    start,
                    end: len,
                    files: files_of(image),
                }
            })
            .collect();
        Self {
            parts,
            len,
            layers: conversion.backing_len.map(|_| conversion.layers),
            dense: conversion.sparse == 0,
            salvage: conversion.salvage,
            on_lost: conversion.on_lost,
        }
    }

    /// The length of all together.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    fn part(&self, offset: u64) -> Result<&Part<'a>> {
        let index = self.parts.partition_point(|part| part.end <= offset);
        self.parts
            .get(index)
            .ok_or_else(|| Error::invalid("Offset beyond the end of the source"))
    }

    /// What the bytes at the start of `range`, which is not empty and inside, are.
    pub(super) fn status(&self, range: ByteRange) -> Result<Status> {
        let part = self.part(range.start())?;
        let inside = range.intersect(ByteRange::new(part.start, part.end));
        let at = range.start() - part.start;
        let there = ByteRange::at(at, inside.len()).intersect(ByteRange::new(0, part.image.len()));
        if there.is_empty() {
            return Ok(Status {
                len: inside.len(),
                kind: if self.dense { Kind::Data } else { Kind::Zero },
                host: None,
            });
        }
        let mut outcome = part.image.status(there, StatusDetail::Zeroes);
        let mut asked = there;
        while let Err(error) = &outcome
            && self.salvage
            && asked.len() > SECTOR
            // What tables say wrong they say of the first byte.
            && error.preceding_note().is_none()
        {
            // What is known of the bytes before the damage is not lost.
            asked = asked.first(align_up(asked.len() / 4, SECTOR));
            outcome = part.image.status(asked, StatusDetail::Zeroes);
        }
        match outcome {
            Ok(extent) => Ok(self.judge(extent, inside.len(), part)),
            Err(error) => {
                let error = error.context(format!(
                    "error while reading block status at offset {}",
                    range.start()
                ));
                if !self.salvage {
                    return Err(error);
                }
                self.report_lost_sector(&error);
                // Reading may still work.
                Ok(Status {
                    len: there.len().min(SECTOR),
                    kind: Kind::Data,
                    host: None,
                })
            }
        }
    }

    /// Tells what of the status of all is lost, as the original does before it begins to copy.
    pub(super) fn report_unreadable_status(&self) -> Result<()> {
        let mut rest = ByteRange::new(0, self.len);
        while !rest.is_empty() {
            rest = rest.skip(self.status(rest)?.len);
        }
        Ok(())
    }

    fn judge(&self, extent: Extent, most: u64, part: &Part<'_>) -> Status {
        let kind = if self.layers.is_some_and(|layers| extent.depth >= layers) {
            Kind::Below
        } else if extent.kind.is_zero() && !self.dense {
            Kind::Zero
        } else {
            Kind::Data
        };
        Status {
            len: extent.len.min(most),
            kind,
            host: extent
                .host
                .filter(|(device, _)| !extent.kind.is_zero() && part.is_direct(device)),
        }
    }

    /// Fills `buf` with the bytes from `offset` on.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            let part = self.part(at)?;
            let len = usize::try_from(part.end - at)
                .unwrap_or(usize::MAX)
                .min(rest.len());
            let (head, tail) = rest.split_at_mut(len);
            self.read_part(part, head, at)?;
            at += len as u64;
            rest = tail;
        }
        Ok(())
    }

    fn report_lost_sector(&self, error: &Error) {
        if let Some(tell) = self.on_lost {
            tell(error);
        }
    }

    fn read_part(&self, part: &Part<'_>, buf: &mut [u8], offset: u64) -> Result<()> {
        let image: &dyn Device = &**part.image;
        let Err(error) = image.read_padded(buf, offset - part.start) else {
            return Ok(());
        };
        if !self.salvage {
            return Err(error).context(|| format!("error while reading at byte {offset}"));
        }
        let mut at = offset;
        for sector in buf.chunks_mut(SECTOR_BYTES) {
            if let Err(error) = image.read_padded(sector, at - part.start) {
                sector.fill(0);
                self.report_lost_sector(&error.context(format!("error while reading offset {at}")));
            }
            at += sector.len() as u64;
        }
        Ok(())
    }
}

/// [`SECTOR`], to count bytes in memory with.
const SECTOR_BYTES: usize = 512;
