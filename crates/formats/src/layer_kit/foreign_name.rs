//! Names that a file has on another machine: of extents and backing images, in images that were made elsewhere.
//!
//! An image that was copied names its other files as its old machine did: `C:\vm\base.vmdk`, `..\base.vmdk`,
//! `/vmfs/volumes/store/base.vmdk`. Mostly they were copied along, into the same directory.

/// The names to try in the directory of an image after `name` itself, which the image contains: the same relative path
/// with slashes, then the file name without directories.
pub fn names_beside(name: &str) -> Vec<String> {
    let mut names = Vec::new();
    let is_relative = !name.starts_with(['/', '\\']) && drive_of(name).is_none();
    if is_relative && name.contains('\\') {
        names.push(name.replace('\\', "/"));
    }
    let own = own_name(name);
    if own != name && !matches!(own, "" | "." | "..") && !names.iter().any(|other| other == own) {
        names.push(own.to_owned());
    }
    names
}

/// A file name of any system without its directories.
pub fn own_name(name: &str) -> &str {
    let after_drive = drive_of(name).map_or(name, |drive| &name[drive.len()..]);
    after_drive.rsplit(['/', '\\']).next().unwrap_or(after_drive)
}

/// The drive of a Windows path, with its colon.
fn drive_of(name: &str) -> Option<&str> {
    let mut chars = name.chars();
    let is_drive = chars.next()?.is_ascii_alphabetic() && chars.next()? == ':';
    is_drive.then(|| &name[..2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_other_machines_lead_to_the_directory_of_the_image() {
        for (name, expected) in [
            ("base.vmdk", &[][..]),
            ("sub/base.vmdk", &["base.vmdk"]),
            ("/vmfs/volumes/store/base.vmdk", &["base.vmdk"]),
            (r"C:\vm\base.vmdk", &["base.vmdk"]),
            ("c:/vm/base.vmdk", &["base.vmdk"]),
            ("C:base.vmdk", &["base.vmdk"]),
            (r"..\base.vmdk", &["../base.vmdk", "base.vmdk"]),
            (r"sub\base.vmdk", &["sub/base.vmdk", "base.vmdk"]),
            (r".\base.vmdk", &["./base.vmdk", "base.vmdk"]),
            (r"\\server\share\base.vmdk", &["base.vmdk"]),
            (r"\\.\PhysicalDrive0", &["PhysicalDrive0"]),
            ("dir/", &[]),
            ("..", &[]),
            ("", &[]),
        ] {
            assert_eq!(names_beside(name), expected, "{name}");
        }
    }
}
