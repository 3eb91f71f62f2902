//! What is done about damage that is met while an image is in use.
//!
//! An image that may be written is marked as corrupt in its header, durably, and nothing more is written to it: tables
//! that were changed in memory stay there, as if the program had ended at that moment, so that what the image held is
//! still readable. In one that is only read, damage is told once: one damaged table can fail any number of requests.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use diskimage_core::errno;
use diskimage_core::{Device, Error, Result};

use crate::layer_kit::metadata_guard::DamageReport;
use crate::qcow2::header::feature::Incompatible;
use crate::qcow2::header::{Header, field};

/// The marks that an open image has in its header, and what was told of damage.
#[derive(Debug)]
pub(in crate::qcow2) struct Corruption {
    file: Arc<dyn Device>,
    /// The incompatible features as they stand in the file; version 2 has none.
    incompatible: Option<Mutex<u64>>,
    /// Damage ends all writing, because the image may be written at all.
    marks: bool,
    told: AtomicBool,
    /// What was told when the image was marked. Each request that fails from then on tells it: which of those that are
    /// under way at that moment is the one that the caller hears of is not known here.
    marked: OnceLock<String>,
}

impl Corruption {
    /// For an image that damage is marked in if `marks`.
    pub(in crate::qcow2) fn new(header: &Header, file: &Arc<dyn Device>, marks: bool) -> Self {
        let incompatible = (header.version >= 3).then(|| Mutex::new(header.features.incompatible.0));
        Self {
            file: Arc::clone(file),
            incompatible,
            marks,
            told: AtomicBool::new(false),
            marked: OnceLock::new(),
        }
    }

    /// Sets or clears bits of the incompatible features in the file.
    ///
    /// # Errors
    /// A failure to write.
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
}

impl DamageReport for Corruption {
    fn met(&self, what: &str) -> Error {
        let error = Error::from_errno(errno::EIO);
        if self.marks {
            let notice = self.marked.get_or_init(|| {
                // What is told is the damage; a mark that cannot be written changes nothing about it.
                let _ = self.set_incompatible(Incompatible::CORRUPT, true);
                format!(
                    "qcow2: Marking image as corrupt: {what}; further corruption events will be suppressed"
                )
            });
            return error.notice(notice.clone());
        }
        if self.told.swap(true, Ordering::Relaxed) {
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
