//! The check and repair of the header and the table, in the order and with the messages of qemu-img.

use diskimage_core::{
    ByteRange, CheckReport, Device, Note, Preallocation, Progress, Repair, Result, align_up, to_index,
};

use super::bat::{NO_CLUSTER, is_aligned};
use super::header::SECTOR;
use super::{ParallelsLayer, State};
use crate::layer_kit::cluster_set::ClusterSet;

/// The buffer size of a copy.
const CHUNK: u64 = 1 << 20;

impl ParallelsLayer {
    /// Whether the image can be written to without repair. Also sets `data_end` and `is_aligned`.
    pub(super) fn is_sound(&self) -> Result<bool> {
        let state = &mut *self.lock();
        let file_len = align_up(self.file.len(), SECTOR);
        let mut seen = ClusterSet::new(&self.budget);
        let mut is_sound = !state.unclean && state.has_data_off;
        let mut next = 0;
        while let Some(batch) = state.batch(&mut next)? {
            for (_, offset) in batch {
                let end = offset.saturating_add(self.cluster);
                is_sound &= offset >= state.first_slot
                    && end <= file_len
                    && seen.take((offset - state.first_slot) / self.cluster, 1)? == 0;
                state.is_aligned &= is_aligned(offset, state.first_slot, self.cluster);
                if end <= file_len {
                    state.data_end = state.data_end.max(end);
                }
            }
        }
        Ok(is_sound)
    }

    /// Checks everything, and repairs what `repair` allows.
    pub(super) fn check_table(&self, repair: Repair, progress: &Progress<'_>) -> Result<CheckReport> {
        let state = &mut *self.claims.wait_idle(|| self.lock());
        let file_len = self.file.len();
        let mut check = Check {
            layer: self,
            repairs: repair == Repair::All,
            file_len,
            cut_off_end: 0,
            progress,
            report: CheckReport {
                image_end_offset: state.header.data_start(file_len),
                total_clusters: state.header.entries.into(),
                ..CheckReport::default()
            },
        };
        if state.unclean && repair != Repair::No {
            state.mark_in_use(&*self.file)?;
        }
        check.header(state)?;
        let has_outside = check.outside(state)?;
        state.publish(&*self.file)?;
        // A cluster that reaches beyond the end of the file may begin in the tail that would be truncated.
        let truncates = repair == Repair::All || (repair == Repair::Leaks && !has_outside);
        check.tail(state, truncates)?;
        check.duplicates(state)?;
        state.publish(&*self.file)?;
        check.statistics(state)?;
        if repair != Repair::No {
            state.data_end = check.report.image_end_offset;
            if !truncates {
                state.data_end = state.data_end.max(file_len);
            }
        }
        Ok(check.report)
    }
}

/// A check in progress.
struct Check<'a> {
    layer: &'a ParallelsLayer,
    repairs: bool,
    /// The file's length at the start.
    file_len: u64,
    /// The end of what the file has of clusters that reach beyond its end.
    cut_off_end: u64,
    progress: &'a Progress<'a>,
    report: CheckReport,
}

impl Check<'_> {
    /// Prints a finding.
    fn note(&self, is_repaired: bool, text: &str) {
        let prefix = if is_repaired { "Repairing" } else { "ERROR" };
        self.progress.note(&Note::Line(format!("{prefix} {text}")));
    }

    fn corruption(&mut self, is_repaired: bool, text: &str) {
        self.note(is_repaired, text);
        if is_repaired {
            self.report.corruptions_fixed += 1;
        } else {
            self.report.corruptions += 1;
        }
    }

    /// Checks `in_use` and `data_off`.
    fn header(&mut self, state: &mut State) -> Result<()> {
        if state.unclean {
            self.corruption(self.repairs, "image was not closed correctly");
            state.unclean = !self.repairs;
        }
        if !state.has_data_off {
            self.corruption(self.repairs, "data_off field has incorrect value");
            if self.repairs {
                state.mark_in_use(&*self.layer.file)?;
                state.header.set_data_off();
                self.layer.file.write_at(&state.header.to_bytes(), 0)?;
                state.has_data_off = true;
            }
        }
        Ok(())
    }

    /// Checks for clusters outside the data area. Returns whether one beyond the end of the file is not repaired.
    fn outside(&mut self, state: &mut State) -> Result<bool> {
        let cluster = self.layer.cluster;
        let (mut next, mut stays) = (0, false);
        while let Some(batch) = state.batch(&mut next)? {
            for (index, offset) in batch {
                let end = offset.saturating_add(cluster);
                // The length of the file is rounded up to sectors, as in qemu-img.
                if end > align_up(self.file_len, SECTOR) {
                    // Entries beyond those that the disk needs may be guest data.
                    let repairs = self.repairs && index < self.layer.size.div_ceil(cluster);
                    self.corruption(repairs, &format!("cluster {index} is outside image"));
                    if repairs {
                        state.mark_in_use(&*self.layer.file)?;
                        state.table.set(index, NO_CLUSTER)?;
                    }
                    if !repairs && offset < self.file_len {
                        self.cut_off_end = self.file_len;
                    }
                    stays |= !repairs;
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
                if offset < state.first_slot {
                    // Not repaired: `data_off` may be wrong rather than the entry.
                    self.corruption(false, &format!("cluster {index} lies before the data area"));
                }
                state.is_aligned &= is_aligned(offset, state.first_slot, cluster);
                self.report.image_end_offset = self.report.image_end_offset.max(end);
            }
        }
        Ok(stays)
    }

    /// Checks for leaked bytes behind the last cluster.
    fn tail(&mut self, state: &mut State, truncates: bool) -> Result<()> {
        let (file, end) = (&*self.layer.file, self.report.image_end_offset);
        let leaked = file.len().saturating_sub(end.max(self.cut_off_end));
        if leaked == 0 {
            return Ok(());
        }
        let clusters = leaked.div_ceil(self.layer.cluster);
        self.note(
            truncates,
            &format!("space leaked at the end of the image {leaked}"),
        );
        if truncates {
            state.mark_in_use(file)?;
            file.resize(end, Preallocation::Off)?;
            self.report.leaks_fixed += clusters;
        } else {
            self.report.leaks += clusters;
        }
        Ok(())
    }

    /// Checks for clusters of the disk with the same offset: all but the first are repaired with a copy.
    fn duplicates(&mut self, state: &mut State) -> Result<()> {
        let (cluster, budget) = (self.layer.cluster, self.layer.budget.clone());
        let mut seen = ClusterSet::new(&budget);
        let mut next = 0;
        while let Some(batch) = state.batch(&mut next)? {
            for (index, offset) in batch {
                let is_outside = offset.saturating_add(cluster) > align_up(self.file_len, SECTOR);
                if is_outside || offset < state.first_slot {
                    continue;
                }
                if seen.take((offset - state.first_slot) / cluster, 1)? == 0 {
                    continue;
                }
                self.corruption(self.repairs, &format!("duplicate offset in BAT entry {index}"));
                if self.repairs {
                    state.mark_in_use(&*self.layer.file)?;
                    let copy = self.layer.allocate_slot(state, index)?;
                    copy_bytes(&*self.layer.file, ByteRange::at(offset, cluster), copy)?;
                    self.layer.set_offset(state, index, copy)?;
                    state.data_end = state.data_end.max(copy + cluster);
                    self.report.image_end_offset = self.report.image_end_offset.max(copy + cluster);
                }
            }
        }
        Ok(())
    }

    /// Counts allocated and fragmented clusters.
    fn statistics(&mut self, state: &mut State) -> Result<()> {
        let (mut next, mut before) = (0, None);
        while let Some(batch) = state.batch(&mut next)? {
            for (index, offset) in batch {
                self.report.allocated_clusters += 1;
                // A cluster is fragmented if the previous one of the disk is allocated, and not right before it in the
                // file.
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

/// Copies `from` to `to`; bytes beyond the end of the file are zero.
fn copy_bytes(file: &dyn Device, from: ByteRange, to: u64) -> Result<()> {
    let mut buffer = vec![0; to_index(from.len().min(CHUNK))?];
    let mut rest = from;
    while !rest.is_empty() {
        let chunk = rest.first(CHUNK);
        let bytes = &mut buffer[..to_index(chunk.len())?];
        file.read_padded(bytes, chunk.start())?;
        file.write_at(bytes, to + (chunk.start() - from.start()))?;
        rest = rest.skip(chunk.len());
    }
    Ok(())
}
