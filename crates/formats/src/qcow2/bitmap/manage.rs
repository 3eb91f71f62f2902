//! Adding, removing, changing and reading bitmaps.

use diskimage_core::{BitmapInfo, Bitmaps, ByteRange, Error, NewBitmap, Result};

use super::directory::{Bitmap, Directory, flag, is_damage, limit};
use super::table::BitmapTable;
use crate::qcow2::{ImageState, Qcow2};

/// The bounds of the default granularity, which is the cluster size. The bounds are qemu-img's.
const DEFAULT_GRANULARITY: (u64, u64) = (4096, 65536);

impl Bitmaps for Qcow2 {
    fn list(&self) -> Result<Vec<BitmapInfo>> {
        let state = self.lock();
        let directory = self.read_directory(state.bitmaps.extension())?;
        directory.require_whole()?;
        let info = |(index, bitmap): (usize, &Bitmap)| BitmapInfo {
            name: bitmap.name().into_owned(),
            granularity: 1_u64.checked_shl(bitmap.raw.granularity_bits.into()).unwrap_or(0),
            enabled: bitmap.has(flag::AUTO),
            inconsistent: bitmap.require_valid().is_err()
                || bitmap.has(flag::IN_USE) && !state.bitmaps.holds(index),
        };
        Ok(directory.bitmaps.iter().enumerate().map(info).collect())
    }

    fn bytes(&self, cluster_size: u64) -> Result<u64> {
        self.bytes_impl(cluster_size)
    }

    fn add(&self, bitmap: &NewBitmap<'_>) -> Result<()> {
        let default = || {
            let (least, most) = DEFAULT_GRANULARITY;
            self.header.geometry.cluster_size().clamp(least, most)
        };
        let bits = granularity_bits(bitmap.granularity.unwrap_or_else(default))?;
        let flags = if bitmap.enabled { flag::AUTO } else { 0 };
        let mut new = Bitmap::new(bitmap.name, bits, flags)?;
        self.change(|state, directory, freed| {
            if directory.find(bitmap.name).is_ok() {
                return Err(Error::invalid(format!("Bitmap already exists: {}", bitmap.name)));
            }
            let shape = new.shape(self.header.geometry, state.size);
            if !shape.fits() {
                return Err(Bitmap::too_large());
            }
            self.edit_bits(state, &mut new, 0, freed, |edit| edit.resize(shape))?;
            directory.bitmaps.push(new);
            Ok(())
        })
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.change_entries(|state, directory, freed| {
            directory.require_whole()?;
            let bitmap = directory.bitmaps.remove(directory.find(name)?);
            let shape = bitmap.shape(self.header.geometry, state.size);
            // The table of an inconsistent bitmap may be damaged. Clusters that it refers to are then leaked, not
            // freed.
            let table = bitmap.damage(self, shape);
            match table.and_then(|()| BitmapTable::read(self, &bitmap, shape)) {
                Ok(table) => {
                    freed.extend(table.clusters(self.header.geometry.cluster_size()));
                    freed.push(bitmap.table_range());
                }
                Err(error) if is_damage(&error) => {}
                Err(error) => return Err(error),
            }
            Ok(())
        })?;
        self.begin_tracking()
    }

    fn clear(&self, name: &str) -> Result<()> {
        self.change(|state, directory, freed| {
            let index = directory.find_consistent(name)?;
            let len = state.size;
            self.edit_bits(state, &mut directory.bitmaps[index], len, freed, |edit| {
                edit.clear();
                Ok(())
            })
        })
    }

    fn set_enabled(&self, name: &str, enabled: bool) -> Result<()> {
        self.change(|_, directory, _| {
            let index = directory.find_consistent(name)?;
            directory.bitmaps[index].set(flag::AUTO, enabled);
            Ok(())
        })
    }

    fn mark(&self, name: &str, ranges: &[ByteRange]) -> Result<()> {
        self.change(|state, directory, freed| {
            let index = directory.find_consistent(name)?;
            let len = state.size;
            self.edit_bits(state, &mut directory.bitmaps[index], len, freed, |edit| {
                ranges.iter().try_for_each(|range| edit.mark(*range))
            })
        })
    }

    fn marked(&self, name: &str, visit: &mut dyn FnMut(ByteRange) -> Result<()>) -> Result<()> {
        let mut state = self.lock();
        self.store_bitmaps(&mut state)?;
        let directory = self.directory(&state)?;
        let bitmap = &directory.bitmaps[directory.find_consistent(name)?];
        let shape = bitmap.shape(self.header.geometry, state.size);
        let table = BitmapTable::read(self, bitmap, shape)?;
        // `visit` may use this image.
        drop(state);
        table.visit(self, shape, visit)
    }
}

impl Qcow2 {
    /// Changes a directory without damage and stores it.
    fn change(
        &self,
        change: impl FnOnce(&mut ImageState, &mut Directory, &mut Vec<ByteRange>) -> Result<()>,
    ) -> Result<()> {
        self.change_entries(|state, directory, freed| {
            directory.require_valid()?;
            state.bitmaps.require_undamaged()?;
            change(state, directory, freed)
        })
    }

    /// Changes the entries that can be read and stores them.
    fn change_entries(
        &self,
        change: impl FnOnce(&mut ImageState, &mut Directory, &mut Vec<ByteRange>) -> Result<()>,
    ) -> Result<()> {
        if !self.may_write() {
            return Err(Error::read_only());
        }
        let mut state = self.lock();
        self.store_bitmaps(&mut state)?;
        let mut directory = self.read_directory(state.bitmaps.extension())?;
        let mut freed = Vec::new();
        change(&mut state, &mut directory, &mut freed)?;
        self.replace_directory(&mut state, &directory, freed)
    }
}

fn granularity_bits(granularity: u64) -> Result<u8> {
    u8::try_from(granularity.trailing_zeros())
        .ok()
        .filter(|bits| granularity.is_power_of_two() && limit::GRANULARITY_BITS.contains(bits))
        .ok_or_else(|| Error::invalid("Granularity must be power of 2 and at least 512"))
}
