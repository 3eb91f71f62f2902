//! Finding and mending what is inconsistent.
//!
//! ```text
//!   snapshots    read the snapshot table, cut what is too long
//!   references   walk everything the header leads to and count each cluster's uses
//!   compare      counted against stored; in place, what is stored is made what was counted
//!   rebuild      where that is not enough: new refcount structures from what was counted, then both again
//!   copied       COPIED flags of the active tables against the refcounts
//!   snapshots    write the snapshot table anew if it was mended
//! ```
//!
//! What is found is told in the original's words, in its order. Memory is sized by what the file really refers to inside
//! its length (`counts`), never by a number from the image alone; work is bounded by the length of the file, however
//! often tables refer to the same tables (`references`).

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
use std::ops::Range;

use diskimage_core::errno;
use diskimage_core::{CheckReport, Device, Error, Note, Progress, Repair, Result};

use self::protected::Protected;
use self::snapshots::SnapshotTable;
use self::stored::Stored;
use super::header::feature::Incompatible;
use super::header::{Geometry, Header};
use super::refcount::counts::Counts;
use super::refcount::{Refcounts, References};
use super::{Qcow2, State, read_header};
use crate::layer_kit::metadata_cache::MetadataCache;

impl Qcow2 {
    /// Checks the image and mends what `repair` allows.
    ///
    /// # Errors
    /// What ends the check: failures of the file, a snapshot table that cannot be used, refcounts that would have to be
    /// rebuilt when only leaks may be mended, a memory budget that is used up.
    pub(super) fn run_check(&self, repair: Repair, progress: &Progress<'_>) -> Result<CheckReport> {
        if repair != Repair::No && !self.may_write() {
            return Err(Error::read_only());
        }
        let mut state = self.lock();
        self.write_back(&mut state)?;
        let outcome = Check::new(self, repair, progress)
            .and_then(|mut check| check.run(&mut state).map(|()| check.report));
        if repair != Repair::No {
            // Tables were written past the cached pages.
            let forgotten = self.forget_tables(&mut state);
            return outcome.and_then(|report| forgotten.map(|()| report));
        }
        outcome
    }

    /// Mends an image that was not closed. Damage that cannot be mended keeps it from being opened only if it kept the
    /// check from looking everywhere.
    ///
    /// # Errors
    /// As [`Qcow2::run_check`].
    pub(super) fn mend_dirty(&self, progress: &Progress<'_>) -> Result<()> {
        let report = self.run_check(Repair::All, progress)?;
        if report.check_errors > 0 {
            return Err(Error::from_errno(errno::EIO));
        }
        Ok(())
    }

    /// Starts over with what the file says.
    fn forget_tables(&self, state: &mut State) -> Result<()> {
        let header = read_header(&self.file, true)?;
        state.metadata.cache = MetadataCache::new(self.file.clone(), self.data.clone());
        state.metadata.refcounts = Refcounts::new(&header, self.file.len());
        self.guard_metadata(state)
    }

    /// How many references lead to each cluster of the file, as a check counts them.
    ///
    /// # Errors
    /// As [`Qcow2::run_check`].
    pub(super) fn count_references(&self) -> Result<References> {
        let progress = Progress::none();
        let mut check = Check::new(self, Repair::No, &progress)?;
        // A cluster that is used twice is, whatever the image can store.
        check.most = u64::MAX;
        check.read_snapshot_table()?;
        check.count_references()?;
        if check.dangling.len() >= MAX_DANGLING {
            return Err(Error::corrupt("Too many references beyond the end of the file"));
        }
        Ok(References {
            tables: check.again,
            counts: check.counts,
            dangling: check.dangling,
        })
    }
}

/// A check under way.
struct Check<'a> {
    image: &'a Qcow2,
    file: &'a dyn Device,
    /// As it stands in the file: an earlier repair may have moved tables.
    header: Header,
    geometry: Geometry,
    file_len: u64,
    /// Clusters that are compared: those of the file, and the one that a table at its end reaches into.
    clusters: u64,
    repair: Repair,
    progress: &'a Progress<'a>,
    report: CheckReport,
    snapshots: SnapshotTable,
    counts: Counts,
    /// Whether all references were counted.
    counted: bool,
    /// The largest count.
    most: u64,
    /// Clusters behind the end of the file that something refers to.
    dangling: BTreeSet<u64>,
    stored: Stored,
    /// L2 tables that are referred to more than once, by cluster, and how often beyond the first time.
    again: HashMap<u64, u64>,
    /// Clusters whose stored counts cannot be had.
    unreadable: Vec<Range<u64>>,
    /// Where tables must not be mended.
    protected: Protected,
    /// All references, counted before the first entry of an L2 table was mended.
    references: Option<References>,
    /// The refcount structures are beyond mending in place.
    rebuild: bool,
    /// The image has been said to be corrupt.
    marked: bool,
    said: u64,
    /// A table to walk.
    buf: Vec<u8>,
}

/// Lines told at most; the rest is only counted. Our own limit: the original prints all.
const MAX_NOTES: u64 = 1 << 20;
/// Clusters behind the end of the file that are remembered; an image with references to more is not written to.
const MAX_DANGLING: usize = 1 << 16;

impl<'a> Check<'a> {
    fn new(image: &'a Qcow2, repair: Repair, progress: &'a Progress<'a>) -> Result<Self> {
        let header = read_header(&image.file, true)?;
        let geometry = header.geometry;
        let file = &*image.file;
        Ok(Self {
            stored: Stored::read(file, &header, &image.budget)?,
            counts: Counts::new(geometry.max_refcount(), image.budget.clone()),
            counted: false,
            most: geometry.max_refcount(),
            dangling: BTreeSet::new(),
            image,
            file,
            file_len: file.len(),
            clusters: 0,
            header,
            geometry,
            repair,
            progress,
            report: CheckReport::default(),
            snapshots: SnapshotTable::default(),
            again: HashMap::new(),
            unreadable: Vec::new(),
            protected: Protected::default(),
            references: None,
            rebuild: false,
            marked: false,
            said: 0,
            buf: Vec::new(),
        })
    }

    fn run(&mut self, state: &mut State) -> Result<()> {
        self.read_snapshot_table()?;
        self.count_references()?;
        let walked = self.report;
        self.compare(Repair::No, self.repair == Repair::No)?;
        let found = self.report;
        if self.repair != Repair::No {
            match self.rebuild {
                true if self.repair == Repair::Leaks => {
                    self.say("ERROR need to rebuild refcount structures");
                    return Err(Error::from_errno(errno::EIO));
                }
                true => self.start_over(&found)?,
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
        self.clear_corrupt_and_dirty()
    }

    /// Builds new refcount structures and checks again, now with them.
    fn start_over(&mut self, found: &CheckReport) -> Result<()> {
        self.rebuild_refcounts()?;
        let fixed = (self.report.corruptions_fixed, self.report.leaks_fixed);
        self.header = read_header(&self.image.file, true)?;
        self.stored = Stored::read(self.file, &self.header, &self.image.budget)?;
        self.unreadable.clear();
        self.rebuild = false;
        self.report = CheckReport::default();
        self.count_references()?;
        // What remains are the old structures, which nothing refers to any more.
        self.compare(self.repair, true)?;
        self.file.flush()?;
        self.report.corruptions_fixed = fixed.0 + found.corruptions.saturating_sub(self.report.corruptions);
        self.report.leaks_fixed = fixed.1 + found.leaks.saturating_sub(self.report.leaks);
        Ok(())
    }

    /// Takes the marks of damage off an image that has none left.
    fn clear_corrupt_and_dirty(&mut self) -> Result<()> {
        if self.header.version < 3 || self.report.corruptions > 0 || self.report.check_errors > 0 {
            return Ok(());
        }
        for bit in [Incompatible::CORRUPT, Incompatible::DIRTY] {
            self.image.corruption.set_incompatible(bit, false)?;
        }
        Ok(())
    }

    /// Says, once, that the image cannot be trusted, and marks it so if it may be changed.
    fn mark_corrupt(&mut self, what: &str) -> Result<()> {
        if std::mem::replace(&mut self.marked, true) {
            return Ok(());
        }
        if self.repair == Repair::No {
            self.say(format!(
                "qcow2: Image is corrupt: {what}; further non-fatal corruption events will be suppressed"
            ));
            return Ok(());
        }
        self.say(format!(
            "qcow2: Marking image as corrupt: {what}; further corruption events will be suppressed"
        ));
        self.image
            .corruption
            .set_incompatible(Incompatible::CORRUPT, true)
    }

    fn say(&mut self, text: impl Into<String>) {
        self.tell(&Note::Line(text.into()));
    }

    fn tell(&mut self, note: &Note) {
        self.said += 1;
        if self.said <= MAX_NOTES {
            self.progress.note(note);
        } else if self.said == MAX_NOTES + 1 {
            let text = "Too many errors; further ones are only counted".to_owned();
            self.progress.note(&Note::Line(text));
        }
    }

    /// An inconsistency that stays.
    fn corruption(&mut self, text: impl Into<String>) {
        self.report.corruptions += 1;
        self.say(text);
    }

    /// An inconsistency that is mended if `fix`: `what` with the word for that in front.
    fn corruption_or_fix(&mut self, fix: bool, what: &str) {
        if fix {
            self.report.corruptions_fixed += 1;
            self.say(format!("Repairing {what}"));
        } else {
            self.corruption(format!("ERROR {what}"));
        }
    }
}
