//! The directory of the credentials files.

use std::io::Read;
use std::path::{Path, PathBuf};

use diskimage_core::{Error, Result, ResultExt, TlsCreds, name, to_index};
use zeroize::Zeroizing;

/// The directory of the credentials files. Paths are joined as in `qemu-img`, since messages contain them.
#[derive(Clone, Copy)]
pub(super) struct Directory<'a>(&'a str);

impl<'a> Directory<'a> {
    /// The directory that `creds` name.
    ///
    /// # Errors
    /// They name none.
    pub(super) fn of(creds: &'a TlsCreds) -> Result<Self> {
        creds
            .dir
            .as_deref()
            .map(Self)
            .ok_or_else(|| Error::invalid("Missing 'dir' property value"))
    }

    /// The path of a file in it.
    pub(super) fn file(self, name: &str) -> PathBuf {
        name::to_path(&format!("{}/{name}", self.0))
    }
}

/// Checks that a file exists.
///
/// # Errors
/// The message of `qemu-img` for a file that cannot be found.
pub(super) fn accessible(path: &Path) -> Result<()> {
    path.metadata()
        .map(|_| ())
        .context(|| format!("Unable to access credentials {}", name::of_path(path)))
}

/// Reads a credentials file.
///
/// # Errors
/// The messages of `qemu-img` for a file that cannot be read, and a file beyond the limit.
pub(super) fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>> {
    // As GLib shows names.
    let shown = name::lossy(&name::of_path(path));
    let file = name::open(path).context(|| format!("Failed to open file \u{201c}{shown}\u{201d}"))?;
    let failed = || format!("Error reading file \u{201c}{shown}\u{201d}");
    let len = file.metadata().context(failed)?.len().min(MAX_FILE);
    // Allocated in full, because a growing vector frees memory without wiping it.
    let mut bytes = Zeroizing::new(Vec::with_capacity(to_index(len)? + 1));
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).context(failed)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Error::invalid(format!("Larger than {MAX_FILE} bytes")).context(failed()));
    }
    Ok(bytes)
}

/// The limit of the length of a credentials file.
const MAX_FILE: u64 = 4 << 20;
