//! Handles damage that a request finds while an image is open.
//!
//! If the image is open for writing, its corrupt bit is set durably and nothing more is written to it. Dirty pages stay
//! in memory, as if the program had ended at that moment, so all data that was readable stays readable. If the image is
//! open read-only, damage is reported once, because one damaged table can fail any number of requests.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use diskimage_core::errno;
use diskimage_core::{Device, Error, Result, Unfinished};

use crate::layer_kit::metadata_guard::DamageReport;
use crate::qcow2::header::feature::Incompatible;
use crate::qcow2::header::{Header, field};

/// The incompatible feature bits of an open image, and the damage that was reported.
#[derive(Debug)]
pub(in crate::qcow2) struct Corruption {
    file: Arc<dyn Device>,
    /// The incompatible features in the file; `None` for version 2.
    incompatible: Option<Mutex<u64>>,
    /// Whether the dirty bit is the mark of an image whose contents are not complete.
    unfinished: AtomicBool,
    /// Whether damage sets the corrupt bit and ends all writing.
    marks: bool,
    reported: AtomicBool,
    /// The notice from when the corrupt bit was set. Every later failed request has it, too: which request in flight
    /// reports first to the user is not known here.
    marked: OnceLock<String>,
}

impl Corruption {
    /// `marks` says whether damage sets the corrupt bit.
    pub(in crate::qcow2) fn new(header: &Header, file: &Arc<dyn Device>, marks: bool) -> Self {
        let incompatible = (header.version >= 3).then(|| Mutex::new(header.features.incompatible.0));
        Self {
            file: Arc::clone(file),
            incompatible,
            unfinished: AtomicBool::new(false),
            marks,
            reported: AtomicBool::new(false),
            marked: OnceLock::new(),
        }
    }

    /// Sets or clears bits of the incompatible features in the file.
    ///
    /// # Errors
    /// A failed write.
    pub(in crate::qcow2) fn set_incompatible(&self, bits: u64, on: bool) -> Result<()> {
        let Some(features) = &self.incompatible else {
            return Ok(());
        };
        let mut present = features.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = if on { *present | bits } else { *present & !bits };
        if wanted != *present {
            self.file.write_at(&wanted.to_be_bytes(), field::INCOMPATIBLE)?;
            self.file.flush()?;
            *present = wanted;
        }
        Ok(())
    }

    /// Clears the dirty bit after a flush, unless the contents are not complete.
    pub(in crate::qcow2) fn clear_dirty(&self) -> Result<()> {
        match self.unfinished.load(Ordering::Acquire) {
            true => Ok(()),
            false => self.set_incompatible(Incompatible::DIRTY, false),
        }
    }
}

impl Unfinished for Corruption {
    fn mark(&self, unfinished: bool) -> Result<()> {
        self.unfinished.store(unfinished, Ordering::Release);
        self.set_incompatible(Incompatible::DIRTY, unfinished)
    }
}

impl DamageReport for Corruption {
    fn met(&self, what: &str) -> Error {
        let error = Error::from_errno(errno::EIO);
        if self.marks {
            let notice = self.marked.get_or_init(|| {
                // The damage is reported even if the corrupt bit cannot be written.
                let _ = self.set_incompatible(Incompatible::CORRUPT, true);
                format!(
                    "qcow2: Marking image as corrupt: {what}; further corruption events will be suppressed"
                )
            });
            return error.notice(notice.clone());
        }
        if self.reported.swap(true, Ordering::Relaxed) {
            return error;
        }
        error.notice(format!(
            "qcow2: Image is corrupt: {what}; further non-fatal corruption events will be suppressed"
        ))
    }

    fn require_unmarked(&self) -> Result<()> {
        match self.marked.get() {
            None => Ok(()),
            Some(notice) => Err(Error::from_errno(errno::EIO).notice(notice.clone())),
        }
    }
}
