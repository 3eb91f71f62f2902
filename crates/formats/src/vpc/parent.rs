//! The parent of a differencing disk: the VHD image with the unique ID in the header.

use std::time::UNIX_EPOCH;

use diskimage_core::{
    Backed, Backing, BackingIdentity, BackingSearch, Device, DiskIdentity, Error, Layer, Note, Result,
};

use super::VpcLayer;
use super::footer::EPOCH;
use crate::layer_kit::parent::Parent;
use crate::layer_kit::random::uuid_text;

impl Backed for VpcLayer {
    fn backing(&self) -> Option<Backing> {
        Some(self.parent.as_ref()?.backing("vpc"))
    }

    fn check_backing(&self, backing: &dyn Layer) -> Result<BackingIdentity> {
        let state = self.lock();
        let Some(blocks) = &state.blocks else {
            return Ok(BackingIdentity::Recorded);
        };
        let (id, time_stamp) = blocks.header.parent_identity();
        let Some(found) = backing.capabilities().identity else {
            return Err(Error::invalid(format!(
                "The parent is to be the VHD image with the unique ID {}, and is of format '{}'",
                uuid_text(&id),
                backing.format()
            )));
        };
        if found.id != id {
            return Err(Error::corrupt(format!(
                "The parent has the unique ID {}, but the image was created on the one with {}",
                uuid_text(&found.id),
                uuid_text(&id)
            )));
        }
        Ok(match time_warning(found, &**backing.file(), time_stamp) {
            Some(warning) => BackingIdentity::MayHaveChanged(warning),
            None => BackingIdentity::Recorded,
        })
    }

    fn backing_search(&self) -> BackingSearch {
        self.parent.as_ref().map(Parent::search).unwrap_or_default()
    }
}

/// The warning that the parent in `file` was modified at another time than at `time_stamp`, which the image recorded.
/// Programs record the time of the file or that in the footer, or 0; copies of files lose the former, so it is no error.
fn time_warning(parent: &DiskIdentity, file: &dyn Device, time_stamp: u32) -> Option<Note> {
    let modified = modified(file);
    if time_stamp == 0 || parent.time_stamp == Some(time_stamp) || modified == Some(time_stamp.into()) {
        return None;
    }
    let found = modified.or(parent.time_stamp.map(u64::from))?;
    Some(Note::Warning(format!(
        "The parent '{}' was modified at {found}, but the image was created on it as of {time_stamp} (seconds since \
         2000): what the image reads from it may have changed",
        file.name()
    )))
}

/// When `file` was modified, in seconds since 2000.
fn modified(file: &dyn Device) -> Option<u64> {
    let modified = file.as_file()?.metadata().ok()?.modified().ok()?;
    modified
        .duration_since(UNIX_EPOCH)
        .ok()?
        .as_secs()
        .checked_sub(EPOCH)
}
