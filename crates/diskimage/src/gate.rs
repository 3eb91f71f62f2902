//! The gate of programs that bring none of their own.

use std::sync::Arc;

use diskimage_core::{
    Budget, Device, Error, Gate, LocalTime, Objects, Permissions, Progress, Reference, Result, Role,
};
use diskimage_protocols::{CacheMode, LocalFileDriver, Protocol, ProtocolRequest, Target, protocol_by_name};

use crate::graph::require_all_taken;

/// Opens whatever images refer to: backing files by any protocol, data files only by path, which is all that images can
/// ask for.
#[derive(Clone, Debug, Default)]
pub struct FileGate {
    /// How writes to data files reach the disk.
    pub cache: CacheMode,
    /// Take no locks that others could mind.
    pub force_share: bool,
    /// Let nobody write to data files meanwhile.
    pub exclusive: bool,
    /// What options refer to by name.
    pub objects: Arc<Objects>,
    /// The memory that what is found in directories may claim.
    pub budget: Budget,
    /// What time it is where the user is.
    pub local_time: LocalTime,
}

impl Gate for FileGate {
    fn open(&self, reference: &Reference<'_>) -> Result<Arc<dyn Device>> {
        let mut options = reference.options.clone();
        if reference.role == Role::Data {
            // Never a protocol and its argument, whatever it looks like.
            let path = options.take_text("filename").unwrap_or_default();
            options.set("filename", Target::plain(&path).path);
        }
        let driver = options.take_text("driver");
        let protocol: &dyn Protocol = match driver.as_deref() {
            Some(name) => {
                protocol_by_name(name).ok_or_else(|| Error::invalid(format!("Unknown driver '{name}'")))?
            }
            None => LocalFileDriver::serving(options.text("filename").unwrap_or_default()),
        };
        let gate: Arc<dyn Gate> = Arc::new(self.clone());
        let device = protocol.open(ProtocolRequest {
            options: &mut options,
            write: reference.permissions.write,
            cache: self.cache,
            objects: &self.objects,
            gate: &gate,
            budget: &self.budget,
            local_time: &self.local_time,
            notes: Progress::none(),
        })?;
        require_all_taken(protocol.name(), &options)?;
        device.lock(self.locked_for(reference))?;
        Ok(device)
    }
}

impl FileGate {
    fn locked_for(&self, reference: &Reference<'_>) -> Permissions {
        let mut permissions = reference.permissions;
        if self.force_share {
            permissions.share_write = true;
            permissions.share_resize = true;
        } else if self.exclusive && reference.role == Role::Data && !permissions.write {
            permissions.share_write = false;
        }
        permissions
    }
}
