//! Checks the COPIED flags of the active L1 table and its L2 tables: a flag is set if and only if the refcount is one.

use std::collections::HashMap;

use diskimage_core::{Repair, Result, is_zero, to_index};

use super::Check;
use super::entries::EntryKind;
use super::references::MAX_VISITS;
use crate::layer_kit::offset::{ClusterIndex, ClusterRange, HostOffset};
use crate::qcow2::entry::{COMPRESSED, COPIED, OFFSET_MASK, ascending};
use crate::qcow2::refcount::counts::page_runs;

/// Bytes of the L1 table that are read at once.
const CHUNK: usize = 64 << 10;

impl Check<'_> {
    pub(super) fn check_copied(&mut self) -> Result<()> {
        let sound = self.report.corruptions == 0 && self.report.check_errors == 0 && self.report.leaks == 0;
        let fix = match self.repair {
            Repair::No => false,
            // Without remaining errors the refcounts are right, so the flags can be set to match them.
            Repair::Leaks => sound,
            Repair::All => true,
        };
        let fix_l1 = fix && self.protected.may_change_l1();
        let entries = u64::from(self.header.l1_size);
        let mut seen = HashMap::new();
        let mut chunk = vec![0; CHUNK];
        let mut done = 0;
        while done < entries {
            let len = to_index(((entries - done) * 8).min(CHUNK as u64))?;
            let offset = self.header.l1_table_offset + done * 8;
            self.file.read_padded(&mut chunk[..len], offset)?;
            let mut changed = false;
            if !is_zero(&chunk[..len]) {
                for (slot, bytes) in chunk[..len].as_chunks_mut::<8>().0.iter_mut().enumerate() {
                    let entry = u64::from_be_bytes(*bytes);
                    let right = self.check_l1_entry(entry, done + slot as u64, fix_l1)?;
                    changed |= right != entry;
                    *bytes = right.to_be_bytes();
                    self.check_l2(entry & OFFSET_MASK, fix, &mut seen)?;
                }
            }
            if changed {
                self.file.write_at(&chunk[..len], offset)?;
            }
            done += len as u64 / 8;
        }
        Ok(())
    }

    /// Returns the repaired L1 entry; the entry itself if it is right or must not be repaired.
    fn check_l1_entry(&mut self, entry: u64, index: u64, fix: bool) -> Result<u64> {
        let l2 = entry & OFFSET_MASK;
        if l2 == 0 {
            return Ok(entry);
        }
        let Some(count) = self.refcount(HostOffset::new(l2).cluster(self.geometry.cluster_bits))? else {
            return Ok(entry);
        };
        if (count == 1) == (entry & COPIED != 0) {
            return Ok(entry);
        }
        let what = format!("OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={count}");
        self.corruption_or_fix(fix, &what);
        Ok(if fix { entry ^ COPIED } else { entry })
    }

    fn check_l2(&mut self, offset: u64, fix: bool, seen: &mut HashMap<ClusterIndex, u64>) -> Result<()> {
        if offset == 0 || !offset.is_multiple_of(self.geometry.cluster_size()) {
            return Ok(());
        }
        let cluster = HostOffset::new(offset).cluster(self.geometry.cluster_bits);
        if self.repeated_l2.contains_key(&cluster) {
            let visits = seen.entry(cluster).or_insert(0);
            *visits += 1;
            if *visits > MAX_VISITS {
                return Ok(());
            }
        }
        let Some(mut table) = self.take_l2(offset)? else {
            return Ok(());
        };
        let fix = fix && self.may_repair_l2(offset)?;
        let changed = self.check_entries(&mut table, fix);
        if let Ok(true) = changed {
            self.file.write_at(&table, offset)?;
        }
        self.buf = table;
        changed.map(|_| ())
    }

    fn check_entries(&mut self, table: &mut [u8], fix: bool) -> Result<bool> {
        let step = to_index(self.geometry.l2_entry_size() / 8)?;
        let data_file = self.has_data_file();
        let bits = self.geometry.cluster_bits;
        let mut changed = false;
        let (numbers, _) = table.as_chunks_mut::<8>();
        let mut index = 0;
        while index * step < numbers.len() {
            let right = self.count_right(&numbers[index * step..])?;
            if right > 0 {
                index += right;
                continue;
            }
            let Some(entry) = numbers.get_mut(index * step..(index + 1) * step) else {
                break;
            };
            index += 1;
            let standard = u64::from_be_bytes(entry[0]);
            if standard == 0 || standard & COMPRESSED != 0 {
                continue;
            }
            let bitmap = entry.get(1).map_or(0, |bytes| u64::from_be_bytes(*bytes));
            if self.kind(standard, bitmap) == EntryKind::None {
                continue;
            }
            // Clusters of an external data file are never shared.
            let count = if data_file {
                Some(1)
            } else {
                self.refcount(HostOffset::new(standard & OFFSET_MASK).cluster(bits))?
            };
            let Some(count) = count else { continue };
            if (count == 1) == (standard & COPIED != 0) {
                continue;
            }
            let what = format!("OFLAG_COPIED data cluster: l2_entry={standard:x} refcount={count}");
            self.corruption_or_fix(fix, &what);
            if fix {
                entry[0] = (standard ^ COPIED).to_be_bytes();
                changed = true;
            }
        }
        Ok(changed)
    }

    /// The number of entries at the start of `numbers` that need no closer look: zeroes, or entries for
    /// contiguous clusters with the right flags.
    fn count_right(&self, numbers: &[[u8; 8]]) -> Result<usize> {
        let first = numbers.first().map_or(0, |number| u64::from_be_bytes(*number));
        if self.geometry.extended_l2 || self.has_data_file() {
            return Ok(0);
        }
        if first == 0 {
            return Ok(numbers.iter().take_while(|number| **number == [0; 8]).count());
        }
        let size = self.geometry.cluster_size();
        let flags = first & !OFFSET_MASK;
        if flags & !COPIED != 0 || !first.is_multiple_of(size) {
            return Ok(0);
        }
        let start = HostOffset::new(first & OFFSET_MASK).cluster(self.geometry.cluster_bits);
        let clusters = ClusterRange::at(start, ascending(numbers, size) as u64);
        let known = ClusterRange::new(start, clusters.end.min(self.end));
        if !self.unreadable.is_empty() {
            return Ok(0);
        }
        let mut right = 0;
        for part in page_runs(known) {
            match self.counts.bytes(part) {
                Some(counts) if are_ones(counts, flags == COPIED) => right += part.len(),
                _ => break,
            }
        }
        to_index(right)
    }
}

/// Whether each count is 1, or none is. No early end, so that the compiler compares many at once.
fn are_ones(counts: &[u8], ones: bool) -> bool {
    counts
        .iter()
        .fold(true, |right, count| right & ((*count == 1) == ones))
}
