//! Keeps the bitmaps up to date while the disk changes.

use std::collections::BTreeSet;

use diskimage_core::{ByteRange, Error, Result, saturating_u32};
use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use super::directory::{Bitmap, Directory, REPAIR, flag, is_damage};
use super::table::{BitmapTable, TableEdit};
use super::written::{MAX_RANGES, Written};
use crate::layer_kit::metadata_guard::{Kind, Kinds};
use crate::qcow2::header::extension::{BitmapsExtension, kind};
use crate::qcow2::header::feature::Autoclear;
use crate::qcow2::header::rewrite::{FirstCluster, is_atomic_rewrite};
use crate::qcow2::header::{Header, field};
use crate::qcow2::{ImageState, Qcow2};

/// The state of the bitmaps while the image is open.
#[derive(Debug)]
pub(in crate::qcow2) struct Tracker {
    /// Locates the directory; `None` if the image has no valid bitmaps.
    extension: Option<BitmapsExtension>,
    /// Whether any bitmap records writes.
    records: bool,
    /// Whether all bitmaps that record writes are marked as in use.
    recording: bool,
    /// The bitmaps that this layer has marked as in use, by their index in the directory.
    held: BTreeSet<usize>,
    /// The ranges written since the bitmaps were stored.
    written: Written,
    /// Why the bitmaps cannot follow writes, if they cannot: writes are refused then.
    damage: Option<Damage>,
}

/// Damage found when the image was opened for writing.
#[derive(Debug)]
struct Damage {
    message: String,
    hints: Vec<String>,
}

impl From<Error> for Damage {
    fn from(error: Error) -> Self {
        Self {
            message: error.chain(),
            hints: error.hint_lines().to_vec(),
        }
    }
}

impl Tracker {
    pub(in crate::qcow2) fn new(header: &Header) -> Self {
        Self {
            extension: header.bitmaps(),
            records: false,
            recording: false,
            held: BTreeSet::new(),
            written: Written::default(),
            damage: None,
        }
    }

    /// Whether this layer has marked bitmap `index` as in use.
    pub(super) fn holds(&self, index: usize) -> bool {
        self.held.contains(&index)
    }

    /// Refuses a write if the bitmaps cannot follow it.
    pub(super) fn require_undamaged(&self) -> Result<()> {
        let Some(damage) = &self.damage else {
            return Ok(());
        };
        let error = Error::corrupt(damage.message.clone());
        Err(damage.hints.iter().fold(error, Error::and_hint))
    }

    pub(super) fn extension(&self) -> Option<BitmapsExtension> {
        self.extension
    }
}

fn is_recording(bitmap: &Bitmap) -> bool {
    bitmap.has(flag::AUTO) && !bitmap.has(flag::IN_USE)
}

impl Qcow2 {
    /// Checks the bitmaps of an image that is opened for writing. A damaged directory and tables of the wrong size cannot
    /// be kept up to date: they make every write fail, but damaged bitmaps can be removed.
    ///
    /// # Errors
    /// Failed reads, and too little memory.
    pub(in crate::qcow2) fn begin_tracking(&self) -> Result<()> {
        let state = &mut *self.lock();
        let directory = self.read_directory(state.bitmaps.extension())?;
        state.bitmaps.damage = match self.require_trackable(state, &directory) {
            Err(error) if is_damage(&error) => Some(error.into()),
            other => other.map(|()| None)?,
        };
        state.bitmaps.records = directory.bitmaps.iter().any(is_recording);
        Ok(())
    }

    fn require_trackable(&self, state: &ImageState, directory: &Directory) -> Result<()> {
        directory.require_valid()?;
        let mut unclaimed = self.file.len();
        for bitmap in &directory.bitmaps {
            // Non-overlapping tables fit in the file. Overlapping ones would take unbounded time and memory.
            unclaimed = unclaimed
                .checked_sub(bitmap.table_range().len())
                .ok_or_else(|| Error::corrupt("Bitmap tables overlap"))?;
            if !bitmap.has(flag::IN_USE) {
                bitmap
                    .damage(self, bitmap.shape(self.header.geometry, state.size))
                    .map_err(|error| error.hint(REPAIR))?;
            }
        }
        Ok(())
    }

    /// Records that `range` is about to be written.
    ///
    /// # Errors
    /// The bitmaps cannot be marked as in use, or the collected ranges cannot be stored.
    pub(in crate::qcow2) fn note_write(&self, state: &mut ImageState, range: ByteRange) -> Result<()> {
        // Bytes beyond the end of the disk have no bits.
        let range = range.intersect(ByteRange::new(0, state.size));
        if range.is_empty() {
            return Ok(());
        }
        state.bitmaps.require_undamaged()?;
        if !state.bitmaps.records {
            return Ok(());
        }
        if !state.bitmaps.recording {
            let mut directory = self.directory(state)?;
            self.mark_in_use(state, &mut directory, is_recording)?;
            state.bitmaps.recording = true;
        }
        state.bitmaps.written.add(range);
        if state.bitmaps.written.len() > MAX_RANGES {
            let len = state.size;
            self.store_tracked(state, len, AfterStore::KeepInUse)?;
        }
        Ok(())
    }

    /// Stores the written ranges and clears the in-use marks.
    ///
    /// # Errors
    /// A failed read or write. The bitmaps stay marked as in use.
    pub(in crate::qcow2) fn store_bitmaps(&self, state: &mut ImageState) -> Result<()> {
        let len = state.size;
        self.store_tracked(state, len, AfterStore::ClearInUse)
    }

    /// Checks that the bitmaps can be resized for a disk of `len` bytes.
    ///
    /// # Errors
    /// Bitmaps that are inconsistent or damaged, or that would become too large.
    pub(in crate::qcow2) fn bitmaps_can_follow(&self, state: &ImageState, len: u64) -> Result<()> {
        let directory = self.directory(state)?;
        for (index, bitmap) in directory.bitmaps.iter().enumerate() {
            if bitmap.has(flag::IN_USE) && !state.bitmaps.held.contains(&index) {
                return Err(bitmap.inconsistent_for_resize());
            }
            if !bitmap.shape(self.header.geometry, len).fits() {
                return Err(Bitmap::too_large().context(format!(
                    "Bitmap '{}' doesn't satisfy the constraints",
                    bitmap.name()
                )));
            }
            BitmapTable::read(self, bitmap, bitmap.shape(self.header.geometry, state.size))
                .map_err(|error| error.hint(REPAIR))?;
        }
        Ok(())
    }

    /// Marks all bitmaps as in use before the disk is resized: an image with a consistent bitmap whose table has the
    /// wrong size cannot be opened.
    ///
    /// # Errors
    /// A failed read or write.
    pub(in crate::qcow2) fn begin_resize(&self, state: &mut ImageState) -> Result<()> {
        let mut directory = self.directory(state)?;
        self.mark_in_use(state, &mut directory, |bitmap| !bitmap.has(flag::IN_USE))
    }

    /// Stores the bitmaps for the present size. The disk had `old_len` bytes before.
    ///
    /// # Errors
    /// As [`Qcow2::store_bitmaps`].
    pub(in crate::qcow2) fn finish_resize(&self, state: &mut ImageState, old_len: u64) -> Result<()> {
        self.store_tracked(state, old_len, AfterStore::ClearInUse)
    }

    /// Marks the bitmaps that `which` selects as in use and flushes. A bitmap's flags are one aligned field, so each
    /// write is atomic.
    fn mark_in_use(
        &self,
        state: &mut ImageState,
        directory: &mut Directory,
        which: impl Fn(&Bitmap) -> bool,
    ) -> Result<()> {
        let Some(extension) = state.bitmaps.extension else {
            return Ok(());
        };
        let mut changed = false;
        for (index, (flags_at, bitmap)) in directory.with_flag_offsets().enumerate() {
            if which(bitmap) {
                bitmap.set(flag::IN_USE, true);
                self.write_flags(state, extension, flags_at, bitmap)?;
                state.bitmaps.held.insert(index);
                changed = true;
            }
        }
        if changed { self.file.flush() } else { Ok(()) }
    }

    fn write_flags(
        &self,
        state: &ImageState,
        extension: BitmapsExtension,
        flags_at: u64,
        bitmap: &Bitmap,
    ) -> Result<()> {
        let offset = extension.directory_offset.get() + flags_at;
        let range = ByteRange::at(offset, 4);
        state
            .metadata
            .cache
            .admit(range, Kinds::of(&[Kind::BitmapDirectory]))?;
        self.file.write_at(bitmap.raw.flags.as_bytes(), offset)
    }

    fn store_tracked(&self, state: &mut ImageState, old_len: u64, after: AfterStore) -> Result<()> {
        if state.bitmaps.held.is_empty() {
            return Ok(());
        }
        let written = std::mem::take(&mut state.bitmaps.written);
        let stored = self.store_held(state, &written, old_len, after);
        match &stored {
            Ok(()) if after == AfterStore::ClearInUse => {
                state.bitmaps.held.clear();
                state.bitmaps.recording = false;
            }
            Ok(()) => {}
            // The ranges are kept. Which flags were written is unknown: before the next write, bitmaps that are not
            // marked as in use in the file are marked again.
            Err(_) => {
                state.bitmaps.written = written;
                state.bitmaps.recording = false;
            }
        }
        stored
    }

    fn store_held(
        &self,
        state: &mut ImageState,
        written: &Written,
        old_len: u64,
        after: AfterStore,
    ) -> Result<()> {
        // Guest data and tables must be durable before the bits that record them.
        self.write_back(state)?;
        state.metadata.cache.sync()?;
        let mut directory = self.directory(state)?;
        let (mut freed, mut moved) = (Vec::new(), false);
        let held = state.bitmaps.held.clone();
        for index in held.iter().copied() {
            let Some(bitmap) = directory.bitmaps.get_mut(index) else {
                return Err(Error::corrupt("Bitmap directory has changed"));
            };
            let shape = bitmap.shape(self.header.geometry, state.size);
            let records = bitmap.has(flag::AUTO);
            let before = bitmap.raw;
            self.edit_bits(state, bitmap, old_len, &mut freed, |edit| {
                if old_len != shape.len() {
                    edit.resize(shape)?;
                }
                let mut ranges = written.iter().filter(|_| records);
                ranges.try_for_each(|range| edit.mark(range))
            })?;
            moved |= bitmap.raw.table_offset != before.table_offset;
            bitmap.set(flag::IN_USE, after == AfterStore::KeepInUse);
        }
        if moved {
            self.replace_directory(state, &directory, freed)
        } else if let Some(extension) = state
            .bitmaps
            .extension
            .filter(|_| after == AfterStore::ClearInUse)
        {
            for (index, (flags_at, bitmap)) in directory.with_flag_offsets().enumerate() {
                if held.contains(&index) {
                    self.write_flags(state, extension, flags_at, bitmap)?;
                }
            }
            self.file.flush()
        } else {
            Ok(())
        }
    }

    /// Changes the bits of `bitmap`, whose shape is that for a disk of `len` bytes. Clusters that it no longer needs
    /// are added to `freed`; they are released once the directory points to the new table.
    pub(super) fn edit_bits(
        &self,
        state: &mut ImageState,
        bitmap: &mut Bitmap,
        len: u64,
        freed: &mut Vec<ByteRange>,
        change: impl FnOnce(&mut TableEdit<'_>) -> Result<()>,
    ) -> Result<()> {
        let shape = bitmap.shape(self.header.geometry, len);
        let table = BitmapTable::read(self, bitmap, shape)?;
        let mut edit = TableEdit::new(self, state, bitmap, (table, shape), freed);
        change(&mut edit)?;
        if let Some((offset, entries)) = edit.finish()? {
            bitmap.raw.table_offset = U64::new(offset);
            bitmap.raw.table_size = U32::new(entries);
        }
        Ok(())
    }

    /// Replaces the image's directory with `directory`, then releases the old one and `freed`.
    pub(in crate::qcow2) fn replace_directory(
        &self,
        state: &mut ImageState,
        directory: &Directory,
        mut freed: Vec<ByteRange>,
    ) -> Result<()> {
        let bytes = directory.to_bytes()?;
        let offset = self.store_new(state, &bytes, Some(Kind::BitmapDirectory))?;
        state.metadata.cache.write_back()?;
        state.metadata.cache.sync()?;
        // `to_bytes` has checked the count against a limit of 16 bits.
        let count = saturating_u32(directory.bitmaps.len());
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
        freed.extend(old.and_then(|old| self.directory_range(&old)));
        state.freed.append(&mut freed);
        self.write_back(state)
    }

    /// Removes the header extension of bitmaps that are out of date, as qemu-img does when it opens an image for writing.
    /// Their clusters are leaked.
    pub(in crate::qcow2) fn forget_stale_bitmaps(&self) -> Result<()> {
        self.write_extension(&mut self.lock(), None)
    }

    /// Writes the header extension and uses it from then on. If the first cluster cannot be rewritten atomically, the
    /// autoclear bit of the bitmaps is off during the rewrite, so that readers ignore them.
    fn write_extension(&self, state: &mut ImageState, new: Option<BitmapsExtension>) -> Result<()> {
        let with_new = |old: &[u8], features: u64| {
            let mut cluster = FirstCluster::read(old)?;
            cluster.set_extension(kind::BITMAPS, new.as_ref().map(IntoBytes::as_bytes));
            cluster.set_autoclear(features);
            cluster.to_bytes()
        };
        let others = self.header.features.autoclear.0 & Autoclear::KNOWN & !Autoclear::BITMAPS;
        let all = others | new.map_or(0, |_| Autoclear::BITMAPS);
        let mut old = self.first_cluster()?;
        let detached = !is_atomic_rewrite(&old, &with_new(&old, all)?)?;
        if detached {
            self.write_autoclear(others)?;
            old = self.first_cluster()?;
        }
        let features = if detached { others } else { all };
        let outcome = self.write_first_cluster(&old, &with_new(&old, features)?);
        match &outcome {
            Ok(()) => state.bitmaps.extension = new,
            // The autoclear bit is off. The next store writes the extension again.
            Err(_) if detached => {}
            // Uses the extension that a reader would find.
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

/// The mark of the bitmaps after a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AfterStore {
    /// They stay in use: more writes follow.
    KeepInUse,
    /// They are consistent.
    ClearInUse,
}
