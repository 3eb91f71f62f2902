//! The gate of programs that bring none of their own.

use std::sync::Arc;

use diskimage_core::{Device, Gate, Permissions, Reference, Result, Role};
use diskimage_protocols::{CacheMode, File, Target};

/// Opens what images refer to as files: backing files by path or with `file:` or `host_device:` in front, data files
/// only by path.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileGate {
    /// How writes to data files reach the disk.
    pub cache: CacheMode,
    /// Take no locks that others could mind.
    pub force_share: bool,
    /// Let nobody write to data files meanwhile.
    pub exclusive: bool,
}

impl Gate for FileGate {
    fn open(&self, reference: &Reference<'_>) -> Result<Arc<dyn Device>> {
        let target = match reference.role {
            Role::Backing => Target::parse(&Target::resolve(reference.from, reference.name))?,
            // As there: a data file's name is relative to the current directory, not to the image's.
            Role::Data => Target::plain(reference.name),
        };
        let file = File::open(&target, reference.permissions.write, self.cache)?;
        file.lock(self.locked_for(reference))?;
        Ok(Arc::new(file))
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
