//! Bitmap tables and their clusters of bits.
//!
//! ```text
//!   bitmap table   [offset][   0   ][   1   ]...   one entry for each cluster of bits; 0 all clear, 1 all set
//!                     |
//!   bits           [01100...]                      from the least significant bit of the first byte up
//! ```

use diskimage_core::{ByteRange, Error, Reservation, Result, is_zero, saturating_index, to_index};

use super::directory::{Bitmap, Shape, flag, is_damage};
use crate::layer_kit::metadata_guard::Kind;
use crate::qcow2::{ImageState, Qcow2};

/// The entry for a cluster whose bits are all set.
const ALL_SET: u64 = 1;
/// The bits of an entry that hold an offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

impl Bitmap {
    /// Checks the entry, the table and where its clusters are; `shape` is that for the disk. A bitmap in use may have a
    /// table of another size.
    ///
    /// # Errors
    /// The first damage.
    pub(in crate::qcow2) fn damage(&self, image: &Qcow2, shape: Shape) -> Result<()> {
        self.require_valid()?;
        let range = self.table_range();
        image.file.require(range.start(), range.len())?;
        self.table_damage(image, shape)?;
        match BitmapTable::read(image, self, shape) {
            Ok(table) => table.require_clusters(image),
            // A bitmap in use whose table has another size: it is not used.
            Err(error) if is_damage(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Checks the size of the table, which is in the file, and its entries.
    ///
    /// # Errors
    /// The first damage.
    pub(in crate::qcow2) fn table_damage(&self, image: &Qcow2, shape: Shape) -> Result<()> {
        if self.has(flag::IN_USE) && self.require_shape(shape).is_err() {
            return Ok(());
        }
        BitmapTable::read(image, self, shape).map(drop)
    }
}

/// A bitmap table in memory.
#[derive(Debug)]
pub(super) struct BitmapTable {
    entries: Vec<u64>,
    memory: Reservation,
}

/// The bytes of memory per entry: the entry, its encoded form, and the range of a cluster that it frees.
const ENTRY_COST: u64 = 32;

impl BitmapTable {
    /// Reads the table of `bitmap`, which has the given shape.
    ///
    /// # Errors
    /// A table of another size, and invalid entries.
    pub(super) fn read(image: &Qcow2, bitmap: &Bitmap, shape: Shape) -> Result<Self> {
        bitmap.require_shape(shape)?;
        let count = shape.entries();
        let memory = image.budget.reserve(count * ENTRY_COST)?;
        let mut bytes = vec![0; to_index(count * 8)?];
        image.file.read_whole(&mut bytes, bitmap.raw.table_offset.get())?;
        let (entries, _) = bytes.as_chunks();
        let entries: Vec<u64> = entries.iter().map(|entry| u64::from_be_bytes(*entry)).collect();
        let is_valid = |entry: &u64| match *entry & OFFSET_MASK {
            0 => *entry <= ALL_SET,
            offset => offset == *entry && offset.is_multiple_of(image.header.geometry.cluster_size()),
        };
        if !entries.iter().all(is_valid) {
            return Err(Error::corrupt("Invalid argument").context(format!(
                "Could not read bitmap_table table from image for bitmap '{}'",
                bitmap.name()
            )));
        }
        Ok(Self { entries, memory })
    }

    /// Checks that the clusters to which the table refers are in the file.
    ///
    /// # Errors
    /// One that is not.
    pub(super) fn require_clusters(&self, image: &Qcow2) -> Result<()> {
        let mut clusters = self.clusters(image.header.geometry.cluster_size());
        clusters.try_for_each(|cluster| image.file.require(cluster.start(), cluster.len()))
    }

    /// Calls `visit` with each guest range whose bits are set, in order.
    pub(super) fn visit(
        &self,
        image: &Qcow2,
        shape: Shape,
        visit: &mut dyn FnMut(ByteRange) -> Result<()>,
    ) -> Result<()> {
        let chunk = shape.chunk_bits();
        let mut bytes = vec![0; index(shape.chunk_bits() / 8)];
        for (k, entry) in (0..).zip(&self.entries) {
            let (first, end) = (k * chunk, ((k + 1) * chunk).min(shape.bits()));
            match *entry {
                0 => {}
                ALL_SET => visit(shape.guest(first, end))?,
                offset => {
                    image.file.read_whole(&mut bytes, offset)?;
                    let mut at = 0;
                    while let Some((start, stop)) = next_run(&bytes, at, end - first) {
                        visit(shape.guest(first + start, first + stop))?;
                        at = stop;
                    }
                }
            }
        }
        Ok(())
    }

    /// The clusters to which the table refers.
    pub(super) fn clusters(&self, cluster_size: u64) -> impl Iterator<Item = ByteRange> {
        self.entries
            .iter()
            .filter(|entry| **entry > ALL_SET)
            .map(move |entry| ByteRange::at(*entry, cluster_size))
    }
}

/// A table that is being changed. Stored clusters stay unchanged: changed clusters and the table are written to newly
/// allocated clusters, and the clusters that they replace are collected, to be released once nothing refers to them.
pub(super) struct TableEdit<'a> {
    image: &'a Qcow2,
    state: &'a mut ImageState,
    shape: Shape,
    table: BitmapTable,
    /// The host range of the stored table.
    old: ByteRange,
    loaded: Option<Loaded>,
    changed: bool,
    freed: &'a mut Vec<ByteRange>,
}

/// The cluster of bits that is in memory.
struct Loaded {
    index: usize,
    bytes: Vec<u8>,
    changed: bool,
}

impl<'a> TableEdit<'a> {
    /// Starts a change of `table`, which was read with `shape`.
    pub(super) fn new(
        image: &'a Qcow2,
        state: &'a mut ImageState,
        bitmap: &Bitmap,
        (table, shape): (BitmapTable, Shape),
        freed: &'a mut Vec<ByteRange>,
    ) -> Self {
        Self {
            image,
            state,
            shape,
            table,
            old: bitmap.table_range(),
            loaded: None,
            changed: false,
            freed,
        }
    }

    /// Resizes the bitmap for a disk of another size. New bits are clear.
    pub(super) fn resize(&mut self, shape: Shape) -> Result<()> {
        let keep = self.shape.bits().min(shape.bits());
        let entries = index(shape.entries());
        if entries > self.table.entries.len() {
            self.table.memory = self.image.budget.reserve(shape.entries() * ENTRY_COST)?;
        }
        for entry in self.table.entries.drain(entries.min(self.table.entries.len())..) {
            if entry > ALL_SET {
                self.freed.push(ByteRange::at(entry, self.shape.chunk_bits() / 8));
            }
            self.changed = true;
        }
        if self.table.entries.len() < entries {
            self.table.entries.resize(entries, 0);
            self.changed = true;
        }
        let (last, inside) = (index(keep / shape.chunk_bits()), keep % shape.chunk_bits());
        if inside > 0 && self.entry(last) != 0 {
            // Padding bits beyond the old end may have any value: they must not become part of the bitmap.
            let loaded = self.load(last)?;
            loaded.changed |= clear_from(&mut loaded.bytes, inside);
        }
        self.shape = shape;
        Ok(())
    }

    /// Sets the bits of all granules that `range` touches.
    pub(super) fn mark(&mut self, range: ByteRange) -> Result<()> {
        let chunk = self.shape.chunk_bits();
        let (mut at, end) = self.shape.touched(range.start(), range.end());
        while at < end {
            let k = at / chunk;
            let stop = end.min((k + 1) * chunk);
            if self.entry(index(k)) == ALL_SET && self.loaded.as_ref().is_none_or(|l| l.index != index(k)) {
                at = stop;
                continue;
            }
            if stop - at == chunk {
                self.loaded.take_if(|loaded| loaded.index == index(k));
                self.replace(index(k), ALL_SET);
            } else {
                let loaded = self.load(index(k))?;
                loaded.changed |= set(&mut loaded.bytes, at - k * chunk, stop - k * chunk);
            }
            at = stop;
        }
        Ok(())
    }

    /// Clears all bits.
    pub(super) fn clear(&mut self) {
        self.loaded = None;
        for k in 0..self.table.entries.len() {
            if self.table.entries[k] != 0 {
                self.replace(k, 0);
            }
        }
    }

    /// Stores the table in newly allocated clusters if anything changed. Returns its host offset and its number of
    /// entries.
    pub(super) fn finish(mut self) -> Result<Option<(u64, u32)>> {
        self.store_loaded()?;
        if !self.changed {
            return Ok(None);
        }
        let mut bytes = Vec::with_capacity(self.table.entries.len() * 8);
        for entry in &self.table.entries {
            bytes.extend_from_slice(&entry.to_be_bytes());
        }
        let offset = self.image.store_new(self.state, &bytes, None)?;
        if !self.old.is_empty() {
            self.freed.push(self.old);
        }
        let count = u32::try_from(self.table.entries.len()).map_err(|_| Bitmap::too_large())?;
        Ok(Some((offset, count)))
    }

    fn entry(&self, index: usize) -> u64 {
        self.table.entries.get(index).copied().unwrap_or(0)
    }

    /// Loads the cluster of entry `index`, after it has stored the cluster that was loaded before.
    fn load(&mut self, index: usize) -> Result<&mut Loaded> {
        if self.loaded.as_ref().is_none_or(|loaded| loaded.index != index) {
            self.store_loaded()?;
            let len = self::index(self.shape.chunk_bits() / 8);
            let (bytes, changed) = match self.entry(index) {
                0 => (vec![0; len], false),
                // The entry stands for a cluster of set bits without storage; the caller is about to clear some.
                ALL_SET => (vec![0xff; len], true),
                offset => {
                    let mut bytes = vec![0; len];
                    self.image.file.read_whole(&mut bytes, offset)?;
                    (bytes, false)
                }
            };
            self.loaded = Some(Loaded {
                index,
                bytes,
                changed,
            });
        }
        self.loaded
            .as_mut()
            .ok_or_else(|| Error::corrupt("No cluster of bits"))
    }

    /// Stores the loaded cluster if it changed, and unloads it.
    fn store_loaded(&mut self) -> Result<()> {
        let Some(loaded) = self.loaded.take().filter(|loaded| loaded.changed) else {
            return Ok(());
        };
        let entry = if is_zero(&loaded.bytes) {
            0
        } else {
            self.image.store_new(self.state, &loaded.bytes, None)?
        };
        self.replace(loaded.index, entry);
        Ok(())
    }

    fn replace(&mut self, index: usize, entry: u64) {
        if let Some(old) = self.table.entries.get_mut(index) {
            let old = std::mem::replace(old, entry);
            if old > ALL_SET {
                self.freed.push(ByteRange::at(old, self.shape.chunk_bits() / 8));
            }
            self.changed = true;
        }
    }
}

impl Qcow2 {
    /// Writes `bytes` to newly allocated clusters, which are guarded as metadata of the kind `kind`. Returns their host
    /// offset; 0 for no bytes.
    pub(super) fn store_new(&self, state: &mut ImageState, bytes: &[u8], kind: Option<Kind>) -> Result<u64> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let clusters = (bytes.len() as u64).div_ceil(self.header.geometry.cluster_size());
        let offset = self.allocate(state, clusters, kind)?.get();
        self.file.write_at(bytes, offset)?;
        Ok(offset)
    }
}

/// An index of a bitmap table or of its bits. `BitmapTable::read` has reserved memory for the table, so the number
/// fits; one that does not would saturate, and every slice is accessed with `get` or has its length from here.
fn index(value: u64) -> usize {
    saturating_index(value)
}

/// Sets the bits from `first` up to `end`. Returns whether any of them was clear.
fn set(bytes: &mut [u8], first: u64, end: u64) -> bool {
    change(bytes, first, end, |byte, mask| byte | mask)
}

/// Clears the bits from `first` on. Returns whether any of them was set.
fn clear_from(bytes: &mut [u8], first: u64) -> bool {
    let end = bytes.len() as u64 * 8;
    change(bytes, first, end, |byte, mask| byte & !mask)
}

fn change(bytes: &mut [u8], first: u64, end: u64, new: impl Fn(u8, u8) -> u8) -> bool {
    let mut changed = false;
    let mut at = first;
    while at < end {
        let stop = end.min((at / 8 + 1) * 8);
        let mask = (u8::MAX >> (8 - (stop - at))) << (at % 8);
        if let Some(byte) = bytes.get_mut(index(at / 8)) {
            let value = new(*byte, mask);
            changed |= value != *byte;
            *byte = value;
        }
        at = stop;
    }
    changed
}

/// The first run of set bits at or after `at`, among the first `len` bits.
fn next_run(bytes: &[u8], at: u64, len: u64) -> Option<(u64, u64)> {
    let find = |from: u64, wanted: bool| {
        let mut bit = from;
        while bit < len {
            let byte = bytes.get(index(bit / 8)).copied().unwrap_or(0);
            if bit.is_multiple_of(8) && byte == if wanted { 0 } else { u8::MAX } {
                bit += 8;
                continue;
            }
            if ((byte >> (bit % 8)) & 1 == 1) == wanted {
                return Some(bit);
            }
            bit += 1;
        }
        None
    };
    let start = find(at, true)?;
    Some((start, find(start, false).unwrap_or(len)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_set_and_cleared_from_the_least_significant_up() {
        let mut bytes = [0; 4];
        assert!(set(&mut bytes, 3, 18));
        assert_eq!(bytes, [0xf8, 0xff, 0x03, 0]);
        assert!(!set(&mut bytes, 4, 17));
        assert_eq!(next_run(&bytes, 0, 32), Some((3, 18)));
        assert_eq!(next_run(&bytes, 5, 10), Some((5, 10)));
        assert_eq!(next_run(&bytes, 18, 32), None);
        assert!(clear_from(&mut bytes, 9));
        assert_eq!(bytes, [0xf8, 0x01, 0, 0]);
        assert!(!clear_from(&mut bytes, 9));
    }
}
