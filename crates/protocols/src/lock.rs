//! Locks that keep two processes from changing one image: shared byte locks of the open file description.
//!
//! ```text
//!   byte 100+n   locked by each opener that uses permission n
//!   byte 200+n   locked by each opener that does not share permission n
//!   n            0 consistent read   1 write   2 write unchanged   3 resize
//! ```
//!
//! All locks are shared, so taking them never conflicts. An opener first takes its locks, then tests whether another
//! open file description has locked a conflicting byte. Two that start at the same time can both fail, but never both
//! succeed.

use std::fs;

use diskimage_core::{Error, ErrorKind, Permissions, Result};

use crate::sys;

/// The permissions that a file is locked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct HeldLocks {
    used: u8,
    unshared: u8,
}

impl From<Permissions> for HeldLocks {
    fn from(permissions: Permissions) -> Self {
        let bit = |set: bool, n: u8| u8::from(set) << n;
        Self {
            used: bit(permissions.read, READ)
                | bit(permissions.write, WRITE)
                | bit(permissions.resize, RESIZE),
            unshared: bit(!permissions.share_write, WRITE) | bit(!permissions.share_resize, RESIZE),
        }
    }
}

impl HeldLocks {
    /// Changes the locks on `file` from `self` to `wanted`. After a failure the locks are those of `self`.
    pub(crate) fn change_to(self, wanted: Self, file: &fs::File, name: &str) -> Result<()> {
        let mut new = wanted.bytes().filter(|byte| !self.bytes().any(|b| b == *byte));
        let mut taken = Vec::new();
        let outcome = new
            .try_for_each(|byte| take(file, byte).map(|()| taken.push(byte)))
            .and_then(|()| wanted.look_for_conflicts(file, name));
        let released: Vec<i64> = match outcome {
            Ok(()) => self
                .bytes()
                .filter(|byte| !wanted.bytes().any(|b| b == *byte))
                .collect(),
            Err(_) => taken,
        };
        for byte in released {
            // A lock that cannot be released is released when the file is closed.
            let _ = sys::unlock(file, byte);
        }
        outcome
    }

    fn bytes(self) -> impl Iterator<Item = i64> {
        permissions(self.used)
            .map(|n| USED + i64::from(n))
            .chain(permissions(self.unshared).map(|n| UNSHARED + i64::from(n)))
    }

    fn look_for_conflicts(self, file: &fs::File, name: &str) -> Result<()> {
        let conflict = |base: i64, n: u8, shared: &str| match sys::is_locked(file, base + i64::from(n)) {
            Ok(true) => Err(Error::new(
                ErrorKind::Locked,
                format!("Failed to get {shared}\"{}\" lock", NAMES[usize::from(n)]),
            )
            .hint(format!("Is another process using the image [{name}]?"))),
            // Systems without these locks cannot detect conflicts; qemu-img goes on as well.
            Ok(false) | Err(_) => Ok(()),
        };
        permissions(self.used).try_for_each(|n| conflict(UNSHARED, n, ""))?;
        permissions(self.unshared).try_for_each(|n| conflict(USED, n, "shared "))
    }
}

const USED: i64 = 100;
const UNSHARED: i64 = 200;
const READ: u8 = 0;
const WRITE: u8 = 1;
const RESIZE: u8 = 3;
const NAMES: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];

fn permissions(mask: u8) -> impl Iterator<Item = u8> {
    (0..4).filter(move |n| mask & (1 << n) != 0)
}

fn take(file: &fs::File, byte: i64) -> Result<()> {
    match sys::lock_shared(file, byte) {
        // The kernel does not support these locks: no process on this machine has one.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        Err(_) => Err(Error::new(
            ErrorKind::Locked,
            format!("Failed to lock byte {byte}"),
        )),
        Ok(()) => Ok(()),
    }
}
