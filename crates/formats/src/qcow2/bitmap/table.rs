//! Bitmap tables and the bits that they lead to.
//!
//! ```text
//!   bitmap table   [offset][   0   ][   1   ]...   one entry for each cluster of bits; 0 all clear, 1 all set
//!                     |
//!   bits           [01100...]                      from the least significant bit of the first byte up
//! ```

use diskimage_core::{ByteRange, Error, Reservation, Result, is_zero};

use super::directory::{Bitmap, Shape};
use crate::layer_kit::metadata_guard::Kind;
use crate::qcow2::{Qcow2, State};

/// The entry of a cluster whose bits are all set.
const ALL_SET: u64 = 1;
/// Bits of an entry that hold an offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// A table in memory.
#[derive(Debug)]
pub(super) struct BitmapTable {
    entries: Vec<u64>,
    memory: Reservation,
}

/// What memory an entry takes: itself, its place in the file, and the cluster that it gives up.
const ENTRY_COST: u64 = 32;

impl BitmapTable {
    /// The table of `bitmap`, which has the given shape.
    ///
    /// # Errors
    /// A table of another size, and entries that make no sense.
    pub(super) fn read(image: &Qcow2, bitmap: &Bitmap, shape: Shape) -> Result<Self> {
        bitmap.require_shape(shape)?;
        let count = shape.entries();
        let memory = image.budget.reserve(count * ENTRY_COST)?;
        let mut bytes = vec![0; usize::try_from(count * 8).unwrap_or(0)];
        image.file.read_whole(&mut bytes, bitmap.raw.table_offset.get())?;
        let (words, _) = bytes.as_chunks();
        let entries: Vec<u64> = words.iter().map(|word| u64::from_be_bytes(*word)).collect();
        let is_sound = |entry: &u64| match *entry & OFFSET_MASK {
            0 => *entry <= ALL_SET,
            offset => offset == *entry && offset.is_multiple_of(image.header.geometry.cluster_size()),
        };
        if !entries.iter().all(is_sound) {
            return Err(Error::corrupt("Invalid argument").context(format!(
                "Could not read bitmap_table table from image for bitmap '{}'",
                bitmap.name()
            )));
        }
        Ok(Self { entries, memory })
    }

    /// Hands the parts of the disk whose bits are set to `visit`, in order.
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

    /// The clusters that it refers to.
    pub(super) fn clusters(&self, cluster_size: u64) -> impl Iterator<Item = ByteRange> {
        self.entries
            .iter()
            .filter(|entry| **entry > ALL_SET)
            .map(move |entry| ByteRange::at(*entry, cluster_size))
    }
}

/// A table that is being changed. What the image holds stays as it is: changed clusters and the table go to new places,
/// and what they replace is collected to be given up once nothing refers to it.
pub(super) struct TableEdit<'a> {
    image: &'a Qcow2,
    state: &'a mut State,
    shape: Shape,
    table: BitmapTable,
    /// Where the table is in the image.
    old: ByteRange,
    loaded: Option<Loaded>,
    changed: bool,
    gone: &'a mut Vec<ByteRange>,
}

/// The cluster of bits that is being changed.
struct Loaded {
    index: usize,
    bytes: Vec<u8>,
    changed: bool,
}

impl<'a> TableEdit<'a> {
    /// Begins to change `table`, read with `shape`.
    pub(super) fn new(
        image: &'a Qcow2,
        state: &'a mut State,
        bitmap: &Bitmap,
        (table, shape): (BitmapTable, Shape),
        gone: &'a mut Vec<ByteRange>,
    ) -> Self {
        Self {
            image,
            state,
            shape,
            table,
            old: bitmap.table_range(),
            loaded: None,
            changed: false,
            gone,
        }
    }

    /// Makes it the bitmap of a disk of another size. What is new is clear.
    pub(super) fn resize(&mut self, shape: Shape) -> Result<()> {
        let keep = self.shape.bits().min(shape.bits());
        let entries = index(shape.entries());
        if entries > self.table.entries.len() {
            self.table.memory = self.image.budget.reserve(shape.entries() * ENTRY_COST)?;
        }
        for entry in self.table.entries.drain(entries.min(self.table.entries.len())..) {
            if entry > ALL_SET {
                self.gone.push(ByteRange::at(entry, self.shape.chunk_bits() / 8));
            }
            self.changed = true;
        }
        if self.table.entries.len() < entries {
            self.table.entries.resize(entries, 0);
            self.changed = true;
        }
        let (last, inside) = (index(keep / shape.chunk_bits()), keep % shape.chunk_bits());
        if inside > 0 && self.entry(last) != 0 {
            // Bits behind the last one are no part of the bitmap, whatever they are: they must not appear.
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

    /// Stores the table at a new place if anything changed; where it is now and how many entries it has.
    pub(super) fn finish(mut self) -> Result<Option<(u64, u32)>> {
        self.settle()?;
        if !self.changed {
            return Ok(None);
        }
        let mut bytes = Vec::with_capacity(self.table.entries.len() * 8);
        for entry in &self.table.entries {
            bytes.extend_from_slice(&entry.to_be_bytes());
        }
        let offset = self.image.store_new(self.state, &bytes, None)?;
        if !self.old.is_empty() {
            self.gone.push(self.old);
        }
        let count = u32::try_from(self.table.entries.len()).map_err(|_| Bitmap::too_large())?;
        Ok(Some((offset, count)))
    }

    fn entry(&self, index: usize) -> u64 {
        self.table.entries.get(index).copied().unwrap_or(0)
    }

    /// Loads the cluster of entry `index`, after storing the one before.
    fn load(&mut self, index: usize) -> Result<&mut Loaded> {
        if self.loaded.as_ref().is_none_or(|loaded| loaded.index != index) {
            self.settle()?;
            let len = self::index(self.shape.chunk_bits() / 8);
            let (bytes, changed) = match self.entry(index) {
                0 => (vec![0; len], false),
                // In an image the entry says it all; here the bits are about to differ.
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

    /// Stores the cluster that is loaded, if it changed.
    fn settle(&mut self) -> Result<()> {
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
                self.gone.push(ByteRange::at(old, self.shape.chunk_bits() / 8));
            }
            self.changed = true;
        }
    }
}

impl Qcow2 {
    /// Writes `bytes`, guarded as metadata of the kind `kind`, to clusters of their own, to which nothing refers yet; their
    /// offset, 0 for no bytes.
    pub(super) fn store_new(&self, state: &mut State, bytes: &[u8], kind: Option<Kind>) -> Result<u64> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let clusters = (bytes.len() as u64).div_ceil(self.header.geometry.cluster_size());
        let offset = self.allocate(state, clusters, kind)?;
        self.file.write_at(bytes, offset)?;
        Ok(offset)
    }
}

fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// Sets the bits from `first` up to `end`; whether one of them was clear.
fn set(bytes: &mut [u8], first: u64, end: u64) -> bool {
    change(bytes, first, end, |byte, mask| byte | mask)
}

/// Clears the bits from `first` on; whether one of them was set.
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

/// The first run of set bits at or behind `at` among the first `len`.
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
