//! The place of a name: what two names have in common that stand for the same file, whether it exists or not.

use std::path::PathBuf;

use diskimage_core::name;

/// The directory of `path`, without symbolic links, and its last component; `None` if that directory does not exist. The
/// last component may be a symbolic link.
pub fn place_of_path(path: &str) -> Option<PathBuf> {
    let path = name::to_path(path);
    let directory = match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory.canonicalize(),
        _ => name::to_path(".").canonicalize(),
    };
    Some(directory.ok()?.join(path.file_name()?))
}
