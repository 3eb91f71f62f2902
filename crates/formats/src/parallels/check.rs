//! Looking after the header and the table, in the order and the words of the original.

use diskimage_core::{
    ByteRange, CheckReport, Device, Note, Preallocation, Progress, Repair, Result, align_up, to_index,
};

use super::header::SECTOR;
use super::{NO_CLUSTER, ParallelsLayer, State, is_aligned};
use crate::layer_kit::cluster_set::ClusterSet;

/// Bytes that are copied at once.
const PIECE: u64 = 1 << 20;

impl ParallelsLayer {
    /// Whether there is nothing that would keep the image from being written to. Finds out where it ends.
    pub(super) fn is_sound(&self) -> Result<bool> {
        let state = &mut *self.lock();
        let file_len = align_up(self.file.len(), SECTOR);
        let mut seen = ClusterSet::new(&self.budget);
        let mut is_sound = !state.unclean && state.has_data_off;
        let mut next = 0;
        while let Some(batch) = state.batch(&mut next)? {
            for (_, offset) in batch {
                let end = offset.saturating_add(self.cluster);
                is_sound &= offset >= state.first_place
                    && end <= file_len
                    && seen.take((offset - state.first_place) / self.cluster, 1)? == 0;
                state.is_aligned &= is_aligned(offset, state.first_place, self.cluster);
                if end <= file_len {
                    state.data_end = state.data_end.max(end);
                }
            }
        }
        Ok(is_sound)
    }

    /// Looks at everything and mends what `repair` allows.
    pub(super) fn check_table(&self, repair: Repair, progress: &Progress<'_>) -> Result<CheckReport> {
        let state = &mut *self.claims.wait_idle(|| self.lock());
        let file_len = self.file.len();
        let mut check = Check {
            layer: self,
            mends: repair == Repair::All,
            file_len,
            progress,
            report: CheckReport {
                image_end_offset: state.header.data_start(file_len),
                total_clusters: state.header.entries.into(),
                ..CheckReport::default()
            },
        };
        if state.unclean && repair != Repair::No {
            state.begin(&*self.file)?;
        }
        check.header(state)?;
        let has_outside = check.outside(state)?;
        state.publish(&*self.file)?;
        // What lies half outside may have its other half in what would be cut off.
        let cuts = repair == Repair::All || (repair == Repair::Leaks && !has_outside);
        check.tail(state, cuts)?;
        check.duplicates(state)?;
        state.publish(&*self.file)?;
        check.statistics(state)?;
        if repair != Repair::No {
            state.data_end = check.report.image_end_offset;
            if !cuts {
                state.data_end = state.data_end.max(file_len);
            }
        }
        Ok(check.report)
    }
}

/// A check under way.
struct Check<'a> {
    layer: &'a ParallelsLayer,
    mends: bool,
    /// The file's length at the start.
    file_len: u64,
    progress: &'a Progress<'a>,
    report: CheckReport,
}

impl Check<'_> {
    fn tell(&self, mended: bool, text: &str) {
        let word = if mended { "Repairing" } else { "ERROR" };
        self.progress.note(&Note::Line(format!("{word} {text}")));
    }

    fn corruption(&mut self, mended: bool, text: &str) {
        self.tell(mended, text);
        if mended {
            self.report.corruptions_fixed += 1;
        } else {
            self.report.corruptions += 1;
        }
    }

    fn header(&mut self, state: &mut State) -> Result<()> {
        if state.unclean {
            self.corruption(self.mends, "image was not closed correctly");
            state.unclean = !self.mends;
        }
        if !state.has_data_off {
            self.corruption(self.mends, "data_off field has incorrect value");
            if self.mends {
                state.begin(&*self.layer.file)?;
                state.header.mend_data_off();
                self.layer.file.write_at(&state.header.to_bytes(), 0)?;
                state.has_data_off = true;
            }
        }
        Ok(())
    }

    /// Entries that lead to where no cluster can be. Whether any of them stays.
    fn outside(&mut self, state: &mut State) -> Result<bool> {
        let cluster = self.layer.cluster;
        let (mut next, mut stays) = (0, false);
        while let Some(batch) = state.batch(&mut next)? {
            for (index, offset) in batch {
                let end = offset.saturating_add(cluster);
                // A file counts in whole sectors.
                if end > align_up(self.file_len, SECTOR) {
                    // A table that is longer than the disk needs may be guest data there.
                    let mends = self.mends && index < self.layer.size.div_ceil(cluster);
                    self.corruption(mends, &format!("cluster {index} is outside image"));
                    if mends {
                        state.begin(&*self.layer.file)?;
                        state.table.set(index, NO_CLUSTER)?;
                    }
                    stays |= !mends;
                    continue;
                }
                let guest = ByteRange::at(index.saturating_mul(cluster), cluster);
                let needed = guest.intersect(ByteRange::new(0, self.layer.size)).len();
                if offset.saturating_add(needed) > self.file_len {
                    self.corruption(
                        false,
                        &format!("cluster {index} reaches beyond the end of the file"),
                    );
                }
                if offset < state.first_place {
                    // It may be the start of the data that is wrong: nothing is given up for it.
                    self.corruption(false, &format!("cluster {index} lies before the data area"));
                }
                state.is_aligned &= is_aligned(offset, state.first_place, cluster);
                self.report.image_end_offset = self.report.image_end_offset.max(end);
            }
        }
        Ok(stays)
    }

    /// What is behind the last cluster.
    fn tail(&mut self, state: &mut State, cuts: bool) -> Result<()> {
        let (file, end) = (&*self.layer.file, self.report.image_end_offset);
        let leaked = file.len().saturating_sub(end);
        if leaked == 0 {
            return Ok(());
        }
        let clusters = leaked.div_ceil(self.layer.cluster);
        self.tell(cuts, &format!("space leaked at the end of the image {leaked}"));
        if cuts {
            state.begin(file)?;
            file.resize(end, Preallocation::Off)?;
            self.report.leaks_fixed += clusters;
        } else {
            self.report.leaks += clusters;
        }
        Ok(())
    }

    /// Clusters of the disk that share one in the file: all but the first get a copy.
    fn duplicates(&mut self, state: &mut State) -> Result<()> {
        let (cluster, budget) = (self.layer.cluster, self.layer.budget.clone());
        let mut seen = ClusterSet::new(&budget);
        let mut next = 0;
        while let Some(batch) = state.batch(&mut next)? {
            for (index, offset) in batch {
                let is_outside = offset.saturating_add(cluster) > align_up(self.file_len, SECTOR);
                if is_outside || offset < state.first_place {
                    continue;
                }
                if seen.take((offset - state.first_place) / cluster, 1)? == 0 {
                    continue;
                }
                self.corruption(self.mends, &format!("duplicate offset in BAT entry {index}"));
                if self.mends {
                    state.begin(&*self.layer.file)?;
                    let copy = self.layer.take_place(state, index)?;
                    copy_bytes(&*self.layer.file, ByteRange::at(offset, cluster), copy)?;
                    self.layer.set_offset(state, index, copy)?;
                    state.data_end = state.data_end.max(copy + cluster);
                    self.report.image_end_offset = self.report.image_end_offset.max(copy + cluster);
                }
            }
        }
        Ok(())
    }

    fn statistics(&mut self, state: &mut State) -> Result<()> {
        let (mut next, mut before) = (0, None);
        while let Some(batch) = state.batch(&mut next)? {
            for (index, offset) in batch {
                self.report.allocated_clusters += 1;
                // Only neighbours on the disk can be expected to be neighbours in the file.
                if let Some((last, end)) = before
                    && last + 1 == index
                    && end != offset
                {
                    self.report.fragmented_clusters += 1;
                }
                before = Some((index, offset.saturating_add(self.layer.cluster)));
            }
        }
        Ok(())
    }
}

/// Copies `from` to `to`; what the file does not have is zero.
fn copy_bytes(file: &dyn Device, from: ByteRange, to: u64) -> Result<()> {
    let mut buffer = vec![0; to_index(from.len().min(PIECE))?];
    let mut rest = from;
    while !rest.is_empty() {
        let piece = rest.first(PIECE);
        let bytes = &mut buffer[..to_index(piece.len())?];
        file.read_padded(bytes, piece.start())?;
        file.write_at(bytes, to + (piece.start() - from.start()))?;
        rest = rest.skip(piece.len());
    }
    Ok(())
}
