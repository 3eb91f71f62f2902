//! An ext4 image filled with files of this machine, similar to the disk of a virtual machine.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Context, Error, Result};

/// The directory of the files: every machine has it, and it has programs, libraries, text and compressed files.
const SOURCE: &str = "/usr";

/// A fixed identity, so that two images of the same files differ as little as possible.
const UUID: &str = "6d6f6e64-6179-4a75-8c79-000000000001";

/// Creates an image of `size` bytes. Files take 70 % of it; the rest is holes.
pub(crate) fn make(image: &Path, size: u64) -> Result<()> {
    let staging = image.with_extension("files");
    let outcome = fill(&staging, size).and_then(|inodes| format(image, size, &staging, inodes));
    // A directory that cannot be removed is harmless; the outcome is reported.
    let _ = fs::remove_dir_all(&staging);
    outcome
}

/// Copies files in the order of their names until they take 70 % of `size`, and returns the number of inodes they need.
fn fill(staging: &Path, size: u64) -> Result<u64> {
    let mut selection = Selection {
        budget: size / 10 * 7,
        inodes: 16,
        staging: staging.to_owned(),
    };
    selection.copy_directory(Path::new(SOURCE), Path::new("usr"))?;
    if selection.budget > size / 2 {
        return Err(Error::new(format!(
            "{SOURCE} holds too little to fill {size} bytes"
        )));
    }
    Ok(selection.inodes)
}

fn format(image: &Path, size: u64, staging: &Path, inodes: u64) -> Result<()> {
    // mke2fs does not truncate a file: the rest of an older one would stay in it.
    let file = fs::File::create(image).with_context(|| image.display().to_string())?;
    file.set_len(size).with_context(|| image.display().to_string())?;
    let output = Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-U", UUID, "-E"])
        .arg(format!("hash_seed={UUID},lazy_itable_init=1"))
        .args(["-N", &(inodes + inodes / 8).to_string(), "-d"])
        .arg(staging)
        .arg(image)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::new(
                "mke2fs is not installed; it makes the input image (package e2fsprogs; it may be in /usr/sbin)",
            ),
            _ => Error::new(format!("mke2fs: {error}")),
        })?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::new(format!(
        "mke2fs: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    )))
}

#[derive(Debug)]
struct Selection {
    /// The number of bytes left, counted in blocks of the file system.
    budget: u64,
    inodes: u64,
    staging: PathBuf,
}

impl Selection {
    fn copy_directory(&mut self, from: &Path, relative: &Path) -> Result<()> {
        let mut entries = fs::read_dir(from)
            .and_then(Iterator::collect::<io::Result<Vec<_>>>)
            .with_context(|| from.display().to_string())?;
        entries.sort_by_key(fs::DirEntry::file_name);
        let target = self.staging.join(relative);
        fs::create_dir_all(&target).with_context(|| target.display().to_string())?;
        self.take(4096);

        for entry in entries {
            let kind = entry
                .file_type()
                .with_context(|| entry.path().display().to_string())?;
            if kind.is_dir() {
                // Unreadable directories are left out: any files will do.
                if fs::read_dir(entry.path()).is_ok() {
                    self.copy_directory(&entry.path(), &relative.join(entry.file_name()))?;
                }
            } else if kind.is_file() {
                self.copy_file(&entry, &target)?;
            }
            if self.budget == 0 {
                break;
            }
        }
        Ok(())
    }

    fn copy_file(&mut self, entry: &fs::DirEntry, target: &Path) -> Result<()> {
        let path = entry.path();
        let len = entry
            .metadata()
            .with_context(|| path.display().to_string())?
            .len();
        // Leaves out a file that is too long for the room left: smaller ones after it fill the image.
        if len.next_multiple_of(4096) > self.budget || fs::File::open(&path).is_err() {
            return Ok(());
        }
        let copy = target.join(entry.file_name());
        fs::copy(&path, &copy).with_context(|| path.display().to_string())?;
        self.take(len.next_multiple_of(4096));
        Ok(())
    }

    fn take(&mut self, bytes: u64) {
        self.budget = self.budget.saturating_sub(bytes);
        self.inodes += 1;
    }
}
