//! Names that a file has on another machine: of extents and backing images, in images that were made elsewhere.
//!
//! An image that was copied names its other files as its old machine did. Mostly they were copied along, into the same
//! directory, so the own name of the file is looked for there last.
//!
//! ```text
//!   VMDK: any system, one name, which is tried first as it is        names_beside
//!     ..\base.vmdk              ─► ../base.vmdk, base.vmdk
//!     C:\vm\base.vmdk           ─► base.vmdk
//!     /vmfs/store/base.vmdk     ─► base.vmdk
//!
//!   VHD, VHDX: Windows, several paths, some of them as URLs          parent_paths
//!     ..\base\disk.vhd         relative   ─► ../base/disk.vhd
//!     C:\base\disk.vhd         absolute   ─► no path of this system
//!     file:///base/disk.vhd    absolute   ─► /base/disk.vhd
//!     all of them                         ─► disk.vhd
//! ```

/// The names to try in the directory of an image after `name` itself, which the image contains: the same relative path
/// with slashes, then the file name without directories.
pub(crate) fn names_beside(name: &str) -> Vec<String> {
    let mut names = Vec::new();
    let is_relative = !name.starts_with(['/', '\\']) && drive_of(name).is_none();
    if is_relative && name.contains('\\') {
        names.push(name.replace('\\', "/"));
    }
    let own = own_name(name);
    if own != name && !is_no_file_name(own) && !names.iter().any(|other| other == own) {
        names.push(own.to_owned());
    }
    names
}

/// A file name of any system without its directories.
pub(crate) fn own_name(name: &str) -> &str {
    let after_drive = drive_of(name).map_or(name, |drive| &name[drive.len()..]);
    after_drive.rsplit(['/', '\\']).next().unwrap_or(after_drive)
}

/// The drive of a Windows path, with its colon.
fn drive_of(name: &str) -> Option<&str> {
    let mut chars = name.chars();
    let is_drive = chars.next()?.is_ascii_alphabetic() && chars.next()? == ':';
    is_drive.then(|| &name[..2])
}

/// Whether the last part of a path is that of a directory, or is none.
fn is_no_file_name(own: &str) -> bool {
    matches!(own, "" | "." | "..")
}

/// The paths that the parent of a differencing disk may have, each once and in the order in which they are tried, for the
/// paths that the image has stored. Names never have a protocol: what looks like one is a path.
pub(crate) fn parent_paths(relative: &[String], absolute: &[String]) -> Vec<String> {
    let from_here = relative.iter().filter_map(|path| relative_path(path));
    let all = || relative.iter().chain(absolute);
    let from_root = all().filter_map(|path| absolute_path(path));
    let beside = all().filter_map(|path| last_part(path));
    let mut paths: Vec<String> = Vec::new();
    for path in from_here.chain(from_root).chain(beside) {
        if !paths.contains(&path) {
            paths.push(path);
        }
    }
    paths
}

/// The stored path with slashes, without the prefix of a URL.
fn with_slashes(path: &str) -> String {
    let path = path.replace('\\', "/");
    let url = ["file://localhost/", "file:///"];
    match url.iter().find_map(|prefix| path.strip_prefix(prefix)) {
        Some(rest) => format!("/{}", rest.replace("%20", " ")),
        None => path,
    }
}

/// The path relative to the directory of the image; `None` for one that is absolute in Windows or here.
fn relative_path(path: &str) -> Option<String> {
    let path = with_slashes(path);
    let mut parts = path
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .peekable();
    let is_absolute = path.starts_with('/') || path.as_bytes().get(1) == Some(&b':');
    if is_absolute || parts.peek().is_none() || is_no_file(&path) {
        return None;
    }
    Some(without_protocol(parts.collect::<Vec<_>>().join("/")))
}

/// The path if it is absolute here.
fn absolute_path(path: &str) -> Option<String> {
    let path = with_slashes(path);
    // Two slashes begin the name of a server, a volume or a device.
    (path.starts_with('/') && !path.starts_with("//") && !is_no_file(&path)).then_some(path)
}

/// The file's name in the directory of the image.
fn last_part(path: &str) -> Option<String> {
    let path = with_slashes(path);
    let last = path.rsplit(['/', ':']).next().filter(|_| !is_no_file(&path))?;
    Some(last.to_owned())
}

/// Whether `path` ends like that of a directory, or is none.
fn is_no_file(path: &str) -> bool {
    let last = path.rsplit(['/', ':']).next().unwrap_or_default();
    is_no_file_name(last) || path.contains('\0')
}

/// A relative path that is not taken for a protocol and its argument.
fn without_protocol(path: String) -> String {
    match path.split('/').next() {
        Some(first) if first.contains(':') => format!("./{path}"),
        _ => path,
    }
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

    fn candidates(relative: &[&str], absolute: &[&str]) -> Vec<String> {
        let owned = |paths: &[&str]| paths.iter().map(|path| (*path).to_owned()).collect::<Vec<_>>();
        parent_paths(&owned(relative), &owned(absolute))
    }

    #[test]
    fn paths_of_windows_become_paths_of_this_system() {
        for (relative, absolute, expected) in [
            (&[".\\a.vhd"][..], &["C:\\x\\b.vhd"][..], &["a.vhd", "b.vhd"][..]),
            (
                &["..\\x\\a.vhd"],
                &["\\\\?\\d:\\x\\a.vhd"],
                &["../x/a.vhd", "a.vhd"],
            ),
            (&[], &["\\\\server\\share\\a b.vhd"], &["a b.vhd"]),
            (&[], &["C:a.vhd"], &["a.vhd"]),
            (&["/x/a.vhd"], &[], &["/x/a.vhd", "a.vhd"]),
            (
                &[],
                &["file:///x/a%20b.vhd", "file://localhost/y/c.vhd"],
                &["/x/a b.vhd", "/y/c.vhd", "a b.vhd", "c.vhd"],
            ),
            (&["nbd:\\x"], &[], &["./nbd:/x", "x"]),
            (&["json:{}"], &[], &["./json:{}", "{}"]),
            (&["", ".", "..\\", "x\\..", "a\0b"], &["C:\\", "/"], &[]),
            (&[".\\.\\sub\\\\a.vhd"], &[], &["sub/a.vhd", "a.vhd"]),
        ] {
            assert_eq!(
                candidates(relative, absolute),
                expected,
                "{relative:?} {absolute:?}"
            );
        }
    }
}
