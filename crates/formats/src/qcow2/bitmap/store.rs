//! Keeping the bitmaps true while the disk changes.

use std::collections::BTreeSet;

use diskimage_core::{ByteRange, Error, Result};
use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use super::directory::{Bitmap, Directory, flag};
use super::table::{BitmapTable, TableEdit};
use super::written::{MAX_RANGES, Written};
use crate::layer_kit::metadata_guard::{Kind, Kinds};
use crate::qcow2::header::extension::{BitmapsExtension, kind};
use crate::qcow2::header::feature::Autoclear;
use crate::qcow2::header::rewrite::{FirstCluster, is_replaced_at_once};
use crate::qcow2::header::{Header, field};
use crate::qcow2::{Qcow2, State};

/// What is known of the bitmaps while the image is open.
#[derive(Debug)]
pub(in crate::qcow2) struct Tracker {
    /// Where they are; nothing if there are none that can be relied on.
    extension: Option<BitmapsExtension>,
    /// Whether there is a bitmap that records writes.
    records: bool,
    /// Whether all that record writes have been marked as in use.
    recording: bool,
    /// The bitmaps, by their place in the directory, that this program has marked as in use.
    held: BTreeSet<usize>,
    /// What was written since they were stored.
    written: Written,
}

impl Tracker {
    pub(in crate::qcow2) fn new(header: &Header) -> Self {
        Self {
            extension: header.bitmaps(),
            records: false,
            recording: false,
            held: BTreeSet::new(),
            written: Written::default(),
        }
    }

    /// Whether the mark of bitmap `index` as in use is this program's own.
    pub(super) fn holds(&self, index: usize) -> bool {
        self.held.contains(&index)
    }

    pub(super) fn extension(&self) -> Option<BitmapsExtension> {
        self.extension
    }
}

fn is_recording(bitmap: &Bitmap) -> bool {
    bitmap.has(flag::AUTO) && !bitmap.has(flag::IN_USE)
}

impl Qcow2 {
    /// Looks at the bitmaps of an image that is opened to be written.
    ///
    /// # Errors
    /// A directory that does not hold together, and tables of the wrong size: bitmaps that cannot be kept true.
    pub(in crate::qcow2) fn begin_tracking(&self) -> Result<()> {
        let mut state = self.lock();
        let directory = self.directory(&state)?;
        let mut room = self.file.len();
        for bitmap in &directory.bitmaps {
            // Tables that share their bytes would take more time and space than the file accounts for.
            room = room
                .checked_sub(bitmap.table_range().len())
                .ok_or_else(|| Error::corrupt("Bitmap tables overlap"))?;
            if !bitmap.has(flag::IN_USE) {
                bitmap.require_shape(bitmap.shape(self.header.geometry, state.size))?;
            }
        }
        state.bitmaps.records = directory.bitmaps.iter().any(is_recording);
        Ok(())
    }

    /// Notes that `range` is about to be written.
    ///
    /// # Errors
    /// A failure to mark the bitmaps as in use, or to store what was collected.
    pub(in crate::qcow2) fn note_write(&self, state: &mut State, range: ByteRange) -> Result<()> {
        // What lies behind the end of the disk is none of their business.
        let range = range.intersect(ByteRange::new(0, state.size));
        if !state.bitmaps.records || range.is_empty() {
            return Ok(());
        }
        if !state.bitmaps.recording {
            let mut directory = self.directory(state)?;
            self.hold(state, &mut directory, is_recording)?;
            state.bitmaps.recording = true;
        }
        state.bitmaps.written.add(range);
        if state.bitmaps.written.len() > MAX_RANGES {
            let len = state.size;
            self.store_tracked(state, len, After::Hold)?;
        }
        Ok(())
    }

    /// Stores what was written, and says that the bitmaps can be relied on again.
    ///
    /// # Errors
    /// A failure to read or write; the bitmaps stay marked as in use.
    pub(in crate::qcow2) fn store_bitmaps(&self, state: &mut State) -> Result<()> {
        let len = state.size;
        self.store_tracked(state, len, After::Release)
    }

    /// Checks that the bitmaps can follow when the disk gets the size of `len` bytes.
    ///
    /// # Errors
    /// Bitmaps that are inconsistent, damaged or would become too large.
    pub(in crate::qcow2) fn bitmaps_can_follow(&self, state: &State, len: u64) -> Result<()> {
        let directory = self.directory(state)?;
        for (index, bitmap) in directory.bitmaps.iter().enumerate() {
            if bitmap.has(flag::IN_USE) && !state.bitmaps.held.contains(&index) {
                return Err(bitmap.inconsistent());
            }
            if !bitmap.shape(self.header.geometry, len).fits() {
                return Err(Bitmap::too_large().context(format!(
                    "Bitmap '{}' doesn't satisfy the constraints",
                    bitmap.name()
                )));
            }
            BitmapTable::read(self, bitmap, bitmap.shape(self.header.geometry, state.size))?;
        }
        Ok(())
    }

    /// Marks all bitmaps as in use before the disk gets another size: a table of the wrong size would keep the image
    /// from being opened.
    ///
    /// # Errors
    /// A failure to read or write.
    pub(in crate::qcow2) fn begin_resize(&self, state: &mut State) -> Result<()> {
        let mut directory = self.directory(state)?;
        self.hold(state, &mut directory, |bitmap| !bitmap.has(flag::IN_USE))
    }

    /// Stores the bitmaps for the present size after the disk had `old_len` bytes.
    ///
    /// # Errors
    /// As [`Qcow2::store_bitmaps`].
    pub(in crate::qcow2) fn finish_resize(&self, state: &mut State, old_len: u64) -> Result<()> {
        self.store_tracked(state, old_len, After::Release)
    }

    /// Marks the bitmaps that `which` picks as in use, durably. Each has its flags in one word of the directory.
    fn hold(
        &self,
        state: &mut State,
        directory: &mut Directory,
        which: impl Fn(&Bitmap) -> bool,
    ) -> Result<()> {
        let Some(extension) = state.bitmaps.extension else {
            return Ok(());
        };
        let mut changed = false;
        for (index, (place, bitmap)) in directory.with_flag_places().enumerate() {
            if which(bitmap) {
                bitmap.set(flag::IN_USE, true);
                self.write_flags(state, extension, place, bitmap)?;
                state.bitmaps.held.insert(index);
                changed = true;
            }
        }
        if changed { self.file.flush() } else { Ok(()) }
    }

    fn write_flags(
        &self,
        state: &State,
        extension: BitmapsExtension,
        place: u64,
        bitmap: &Bitmap,
    ) -> Result<()> {
        let offset = extension.directory_offset.get() + place;
        let range = ByteRange::at(offset, 4);
        state
            .metadata
            .cache
            .admit(range, Kinds::of(&[Kind::BitmapDirectory]))?;
        self.file.write_at(bitmap.raw.flags.as_bytes(), offset)
    }

    fn store_tracked(&self, state: &mut State, old_len: u64, after: After) -> Result<()> {
        if state.bitmaps.held.is_empty() {
            return Ok(());
        }
        let written = std::mem::take(&mut state.bitmaps.written);
        let stored = self.store_held(state, &written, old_len, after);
        match &stored {
            Ok(()) if after == After::Release => {
                state.bitmaps.held.clear();
                state.bitmaps.recording = false;
            }
            Ok(()) => {}
            // What was written is not forgotten. How far it got nobody knows: before more is written, those that the
            // file does not have marked as in use are marked again.
            Err(_) => {
                state.bitmaps.written = written;
                state.bitmaps.recording = false;
            }
        }
        stored
    }

    fn store_held(&self, state: &mut State, written: &Written, old_len: u64, after: After) -> Result<()> {
        // What the bits speak of comes first.
        self.write_back(state)?;
        state.metadata.cache.sync()?;
        let mut directory = self.directory(state)?;
        let (mut gone, mut moved) = (Vec::new(), false);
        let held = state.bitmaps.held.clone();
        for index in held.iter().copied() {
            let Some(bitmap) = directory.bitmaps.get_mut(index) else {
                return Err(Error::corrupt("Bitmap directory has changed"));
            };
            let shape = bitmap.shape(self.header.geometry, state.size);
            let records = bitmap.has(flag::AUTO);
            let before = bitmap.raw;
            self.edit_bits(state, bitmap, old_len, &mut gone, |edit| {
                if old_len != shape.len() {
                    edit.resize(shape)?;
                }
                let mut ranges = written.iter().filter(|_| records);
                ranges.try_for_each(|range| edit.mark(range))
            })?;
            moved |= bitmap.raw.table_offset != before.table_offset;
            bitmap.set(flag::IN_USE, after == After::Hold);
        }
        if moved {
            self.replace_directory(state, &directory, gone)
        } else if let Some(extension) = state.bitmaps.extension.filter(|_| after == After::Release) {
            for (index, (place, bitmap)) in directory.with_flag_places().enumerate() {
                if held.contains(&index) {
                    self.write_flags(state, extension, place, bitmap)?;
                }
            }
            self.file.flush()
        } else {
            Ok(())
        }
    }

    /// Changes the bits of `bitmap`, which has the shape for a disk of `len` bytes. What it no longer needs is added to
    /// `gone`, to be given up once the directory says where its table is now.
    pub(super) fn edit_bits(
        &self,
        state: &mut State,
        bitmap: &mut Bitmap,
        len: u64,
        gone: &mut Vec<ByteRange>,
        change: impl FnOnce(&mut TableEdit<'_>) -> Result<()>,
    ) -> Result<()> {
        let shape = bitmap.shape(self.header.geometry, len);
        let table = BitmapTable::read(self, bitmap, shape)?;
        let mut edit = TableEdit::new(self, state, bitmap, (table, shape), gone);
        change(&mut edit)?;
        if let Some((offset, entries)) = edit.finish()? {
            bitmap.raw.table_offset = U64::new(offset);
            bitmap.raw.table_size = U32::new(entries);
        }
        Ok(())
    }

    /// Puts `directory` in the place of the one that the image has, and gives up that one and `gone`.
    pub(super) fn replace_directory(
        &self,
        state: &mut State,
        directory: &Directory,
        mut gone: Vec<ByteRange>,
    ) -> Result<()> {
        let bytes = directory.to_bytes()?;
        let offset = self.store_new(state, &bytes, Some(Kind::BitmapDirectory))?;
        state.metadata.cache.write_back()?;
        state.metadata.cache.sync()?;
        let count = u32::try_from(directory.bitmaps.len()).unwrap_or(u32::MAX);
        let new = (count > 0).then_some(BitmapsExtension {
            nb_bitmaps: U32::new(count),
            reserved: U32::ZERO,
            directory_size: U64::new(bytes.len() as u64),
            directory_offset: U64::new(offset),
        });
        let old = state.bitmaps.extension;
        self.write_extension(state, new)?;
        state.bitmaps.records = directory.bitmaps.iter().enumerate().any(|(index, bitmap)| {
            bitmap.has(flag::AUTO) && (!bitmap.has(flag::IN_USE) || state.bitmaps.held.contains(&index))
        });
        if let Some(old) = old {
            gone.push(ByteRange::at(
                old.directory_offset.get(),
                old.directory_size.get(),
            ));
        }
        state.freed.append(&mut gone);
        self.write_back(state)
    }

    /// Changes the header's extension, and goes by it from then on. Where that cannot be done at once, because the
    /// extension stands across sectors and there is no room for a detour, readers are told meanwhile that there are no
    /// bitmaps to rely on.
    fn write_extension(&self, state: &mut State, new: Option<BitmapsExtension>) -> Result<()> {
        let with_new = |old: &[u8], features: u64| {
            let mut cluster = FirstCluster::read(old)?;
            cluster.set_extension(kind::BITMAPS, new.as_ref().map(IntoBytes::as_bytes));
            cluster.set_autoclear(features);
            cluster.to_bytes()
        };
        let others = self.header.features.autoclear.0 & Autoclear::KNOWN & !Autoclear::BITMAPS;
        let all = others | new.map_or(0, |_| Autoclear::BITMAPS);
        let mut old = self.first_cluster()?;
        let detached = !is_replaced_at_once(&old, &with_new(&old, all)?)?;
        if detached {
            self.write_autoclear(others)?;
            old = self.first_cluster()?;
        }
        let features = if detached { others } else { all };
        let outcome = self.write_first_cluster(&old, &with_new(&old, features)?);
        match &outcome {
            Ok(()) => state.bitmaps.extension = new,
            // Go by the one that a reader finds. Where none is to be relied on, the old one is still there.
            Err(_) if detached => {}
            Err(_) => {
                let found = self.first_cluster().and_then(|now| Header::parse(&now, true));
                if let Ok(header) = found {
                    state.bitmaps.extension = header.bitmaps();
                }
            }
        }
        outcome?;
        if features == all {
            Ok(())
        } else {
            self.write_autoclear(all)
        }
    }

    fn write_autoclear(&self, features: u64) -> Result<()> {
        self.file.write_at(&features.to_be_bytes(), field::AUTOCLEAR)?;
        self.file.flush()
    }
}

/// What the bitmaps are marked as after they have been stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    /// In use: more will be written.
    Hold,
    /// Complete.
    Release,
}
