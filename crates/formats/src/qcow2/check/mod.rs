//! Finds and repairs inconsistent metadata.
//!
//! ```text
//!   snapshots    reads the snapshot table and cuts it where it is too long
//!   references   walks all tables from the header on and counts the references to each cluster
//!   compare      compares the counts with the stored refcounts; a repair overwrites wrong refcounts in place
//!   rebuild      if that is not enough: builds new refcount structures from the counts, then counts and compares again
//!   copied       compares the COPIED flags of the active tables with the refcounts
//!   snapshots    writes a new snapshot table if entries were repaired
//!   bitmaps      writes a new bitmap directory if bitmaps were dropped
//! ```
//!
//! Messages and their order are those of qemu-img. Memory follows the clusters inside the file that are referred to
//! (`counts`), never a number in the image. Time is bounded by the length of the file, however often tables refer to
//! the same tables (`references`).

mod bitmaps;
mod compare;
mod copied;
mod entries;
mod protected;
mod rebuild;
mod references;
mod snapshots;
mod stored;

#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};

use diskimage_core::errno;
use diskimage_core::{ByteRange, CheckReport, Device, Error, Note, Progress, Repair, Result};

use self::bitmaps::DroppedBitmaps;
use self::protected::Protected;
use self::snapshots::CheckedSnapshots;
use self::stored::StoredRefcounts;
use super::files::read_header;
use super::header::feature::Incompatible;
use super::header::{Geometry, Header};
use super::refcount::counts::ClusterCounts;
use super::refcount::{Refcounts, References};
use super::{ImageState, Qcow2};
use crate::layer_kit::metadata_cache::MetadataCache;
use crate::layer_kit::offset::{ClusterIndex, ClusterRange};
use crate::layer_kit::table_scan;

impl Qcow2 {
    /// Checks the image and repairs as far as `repair` allows.
    ///
    /// # Errors
    /// Errors that end the check: failed reads and writes, a snapshot table that cannot be used, refcounts that must be
    /// rebuilt although only leaks may be repaired, an exhausted memory budget.
    pub(super) fn check_impl(&self, repair: Repair, progress: &Progress<'_>) -> Result<CheckReport> {
        if repair != Repair::No && !self.may_write() {
            return Err(Error::read_only());
        }
        let mut state = self.lock();
        self.write_back(&mut state)?;
        let outcome = Check::new(self, repair, progress)
            .and_then(|mut check| check.run(&mut state).map(|()| check.report));
        if repair != Repair::No {
            // Tables were written without the metadata cache, whose pages are now out of date.
            let forgotten = self.forget_tables(&mut state);
            return outcome.and_then(|report| forgotten.map(|()| report));
        }
        outcome
    }

    /// Repairs an image that was not closed. Damage that cannot be repaired is an error only if it kept the check from
    /// reading all metadata.
    ///
    /// # Errors
    /// As [`Qcow2::check_impl`].
    pub(super) fn repair_dirty(&self, progress: &Progress<'_>) -> Result<()> {
        let report = self.check_impl(Repair::All, progress)?;
        if report.check_errors > 0 {
            return Err(Error::from_errno(errno::EIO));
        }
        Ok(())
    }

    /// Drops the metadata cache and reads the metadata from the file again.
    fn forget_tables(&self, state: &mut ImageState) -> Result<()> {
        let header = read_header(&self.file, true)?;
        state.metadata.cache =
            MetadataCache::new(self.file.clone(), self.data.clone()).with_budget(&self.budget);
        state.metadata.refcounts = Refcounts::new(&header, self.file.len());
        self.guard_metadata(state)
    }

    /// Counts the references to each cluster of the file, as a check does.
    ///
    /// # Errors
    /// As [`Qcow2::check_impl`].
    pub(super) fn count_references(&self) -> Result<References> {
        let progress = Progress::none();
        let mut check = Check::new(self, Repair::No, &progress)?;
        // The counts are for the allocator: they must exceed the image's refcount width.
        check.max_count = u64::MAX;
        check.read_snapshot_table()?;
        check.count_references()?;
        if check.dangling.len() >= MAX_DANGLING {
            return Err(Error::corrupt("Too many references beyond the end of the file"));
        }
        Ok(References {
            tables: check.repeated_l2,
            counts: check.counts,
            dangling: check.dangling,
        })
    }
}

/// The state of a running check.
struct Check<'a> {
    image: &'a Qcow2,
    file: &'a dyn Device,
    /// The header as it is in the file: an earlier repair may have moved tables.
    header: Header,
    geometry: Geometry,
    file_len: u64,
    /// The end of the clusters that are compared: those of the file, and the incomplete one at its end.
    end: ClusterIndex,
    repair: Repair,
    progress: &'a Progress<'a>,
    report: CheckReport,
    snapshots: CheckedSnapshots,
    dropped: DroppedBitmaps,
    counts: ClusterCounts,
    /// Whether all references were counted.
    counted: bool,
    /// The count at which counting saturates.
    max_count: u64,
    /// Clusters beyond the end of the file that are referred to.
    dangling: BTreeSet<ClusterIndex>,
    stored: StoredRefcounts,
    /// L2 tables that are referred to more than once, by cluster, and the number of references after the first.
    repeated_l2: HashMap<ClusterIndex, u64>,
    /// Clusters whose stored refcounts cannot be read.
    unreadable: Vec<ClusterRange>,
    /// Ranges in which entries of tables must not be repaired.
    protected: Protected,
    /// All references, counted before the first entry of an L2 table was repaired.
    references: Option<References>,
    /// The refcount structures cannot be repaired in place.
    rebuild: bool,
    /// The image has been reported as corrupt.
    marked: bool,
    /// The number of reported lines.
    reported: u64,
    /// The buffer for an L2 table.
    buf: Vec<u8>,
    /// Whether the file is worth asking for its holes.
    is_sparse: bool,
}

/// The most lines that are reported; further errors are only counted. The limit is ours: qemu-img prints all lines.
const MAX_NOTES: u64 = 1 << 20;
/// The most clusters beyond the end of the file that are recorded. An image with references to more is not written to.
const MAX_DANGLING: usize = 1 << 16;

impl<'a> Check<'a> {
    fn new(image: &'a Qcow2, repair: Repair, progress: &'a Progress<'a>) -> Result<Self> {
        let header = read_header(&image.file, true)?;
        let geometry = header.geometry;
        let file = &*image.file;
        Ok(Self {
            stored: StoredRefcounts::read(file, &header, &image.budget)?,
            counts: ClusterCounts::new(geometry.max_refcount(), image.budget.clone()),
            counted: false,
            max_count: geometry.max_refcount(),
            dangling: BTreeSet::new(),
            image,
            file,
            is_sparse: table_scan::is_sparse(file),
            file_len: file.len(),
            end: ClusterIndex::new(0),
            header,
            geometry,
            repair,
            progress,
            report: CheckReport::default(),
            snapshots: CheckedSnapshots::default(),
            dropped: DroppedBitmaps::default(),
            repeated_l2: HashMap::new(),
            unreadable: Vec::new(),
            protected: Protected::default(),
            references: None,
            rebuild: false,
            marked: false,
            reported: 0,
            buf: Vec::new(),
        })
    }

    fn run(&mut self, state: &mut ImageState) -> Result<()> {
        self.read_snapshot_table()?;
        self.count_references()?;
        self.require_counted_bitmaps()?;
        let walked = self.report;
        self.compare(Repair::No, self.repair == Repair::No)?;
        let found = self.report;
        if self.repair != Repair::No {
            match self.rebuild {
                true if self.repair == Repair::Leaks => {
                    self.report_line("ERROR need to rebuild refcount structures");
                    return Err(Error::from_errno(errno::EIO));
                }
                true => self.rebuild_and_recheck(&found)?,
                false => {
                    self.report = walked;
                    self.compare(self.repair, true)?;
                    self.file.flush()?;
                }
            }
        }
        self.check_copied()?;
        if self.repair == Repair::No {
            return Ok(());
        }
        self.file.flush()?;
        self.image.forget_tables(state)?;
        self.write_snapshot_table(state)?;
        self.write_bitmaps(state)?;
        self.clear_corrupt_and_dirty()
    }

    /// Builds new refcount structures and checks the image again with them.
    fn rebuild_and_recheck(&mut self, found: &CheckReport) -> Result<()> {
        self.rebuild_refcounts()?;
        let fixed = (self.report.corruptions_fixed, self.report.leaks_fixed);
        self.header = read_header(&self.image.file, true)?;
        self.stored = StoredRefcounts::read(self.file, &self.header, &self.image.budget)?;
        self.unreadable.clear();
        self.rebuild = false;
        self.report = CheckReport::default();
        self.count_references()?;
        // This frees the old structures, to which nothing refers any more.
        self.compare(self.repair, true)?;
        self.file.flush()?;
        self.report.corruptions_fixed = fixed.0 + found.corruptions.saturating_sub(self.report.corruptions);
        self.report.leaks_fixed = fixed.1 + found.leaks.saturating_sub(self.report.leaks);
        Ok(())
    }

    /// Clears the corrupt and dirty bits of an image without remaining damage.
    fn clear_corrupt_and_dirty(&mut self) -> Result<()> {
        if self.header.version < 3 || self.report.corruptions > 0 || self.report.check_errors > 0 {
            return Ok(());
        }
        for bit in [Incompatible::CORRUPT, Incompatible::DIRTY] {
            self.image.corruption.set_incompatible(bit, false)?;
        }
        Ok(())
    }

    /// Reports the image as corrupt, once, and sets its corrupt bit if it may be written.
    fn mark_corrupt(&mut self, what: &str) -> Result<()> {
        if std::mem::replace(&mut self.marked, true) {
            return Ok(());
        }
        if self.repair == Repair::No {
            self.report_line(format!(
                "qcow2: Image is corrupt: {what}; further non-fatal corruption events will be suppressed"
            ));
            return Ok(());
        }
        self.report_line(format!(
            "qcow2: Marking image as corrupt: {what}; further corruption events will be suppressed"
        ));
        self.image
            .corruption
            .set_incompatible(Incompatible::CORRUPT, true)
    }

    /// How many bytes at the start of `range` are a hole of the file, where tables have no entries.
    fn hole(&self, range: ByteRange) -> Result<u64> {
        table_scan::hole(self.file, self.is_sparse, range)
    }

    fn report_line(&mut self, text: impl Into<String>) {
        self.report_note(&Note::Line(text.into()));
    }

    fn report_note(&mut self, note: &Note) {
        self.reported += 1;
        if self.reported <= MAX_NOTES {
            self.progress.note(note);
        } else if self.reported == MAX_NOTES + 1 {
            let text = "Too many errors; further ones are only counted".to_owned();
            self.progress.note(&Note::Line(text));
        }
    }

    /// Reports an inconsistency that is not repaired.
    fn corruption(&mut self, text: impl Into<String>) {
        self.report.corruptions += 1;
        self.report_line(text);
    }

    /// Reports the inconsistency `what`, which is repaired if `fix` is set.
    fn corruption_or_fix(&mut self, fix: bool, what: &str) {
        if fix {
            self.report.corruptions_fixed += 1;
            self.report_line(format!("Repairing {what}"));
        } else {
            self.corruption(format!("ERROR {what}"));
        }
    }
}
