//! Where the parent of a differencing disk (VHD, VHDX) is looked for. Windows names it by paths:
//!
//! ```text
//!   ..\base\disk.vhd         relative   ─► ../base/disk.vhd
//!   C:\base\disk.vhd         absolute   ─► no path of this system
//!   file:///base/disk.vhd    absolute   ─► /base/disk.vhd
//!   all of them                         ─► disk.vhd, in the directory of the image
//! ```
//!
//! The first one that exists is taken, in this order; case counts only if both spellings exist. Names never have a
//! protocol: what looks like one is a path.

use diskimage_core::{Backing, BackingSearch, Error, Gate, Name, Result, name};

/// What an image says about the place of its parent.
#[derive(Clone, Debug, Default)]
pub(crate) struct Locators {
    /// Paths relative to the directory of the image, as stored.
    pub(crate) relative: Vec<String>,
    /// Absolute paths, as stored.
    pub(crate) absolute: Vec<String>,
}

/// The parent of an image.
#[derive(Clone, Debug)]
pub(crate) struct Parent {
    locators: Locators,
    /// The name of the file that was found, else the first one that was looked for.
    name: String,
    /// The names that were looked for.
    tried: Vec<String>,
}

impl Parent {
    /// Looks for the parent of the image called `image`.
    ///
    /// # Errors
    /// The image names no file.
    pub(crate) fn find(locators: Locators, image: &str, gate: &dyn Gate) -> Result<Self> {
        let tried = locators.candidates();
        let found = tried.iter().find_map(|name| gate.locate(image, name));
        let Some(name) = found.or_else(|| tried.first().cloned()) else {
            return Err(Error::corrupt("The image does not say where its parent is"));
        };
        Ok(Self {
            locators,
            name,
            tried,
        })
    }

    /// The parent as a backing image of `format`.
    pub(crate) fn backing(&self, format: &str) -> Backing {
        Backing {
            name: Name::from_bytes(&name::to_bytes(&self.name)),
            format: Some(format.to_owned()),
        }
    }

    /// Where the parent was looked for.
    pub(crate) fn search(&self) -> BackingSearch {
        let locators = self.locators.relative.iter().chain(&self.locators.absolute);
        let description = format!(
            "The parent is not found: its locators are {}, and it was looked for as {}",
            quoted(locators),
            quoted(&self.tried)
        );
        BackingSearch {
            names: Vec::new(),
            description: Some(description),
        }
    }
}

fn quoted<'a>(names: impl IntoIterator<Item = &'a String>) -> String {
    let names: Vec<_> = names.into_iter().map(|name| format!("'{name}'")).collect();
    names.join(", ")
}

impl Locators {
    /// The names of files to look for, each once.
    fn candidates(&self) -> Vec<String> {
        let relative = self.relative.iter().filter_map(|path| relative_path(path));
        let all = || self.relative.iter().chain(&self.absolute);
        let absolute = all().filter_map(|path| absolute_path(path));
        let beside = all().filter_map(|path| last_part(path));
        let mut candidates: Vec<String> = Vec::new();
        for name in relative.chain(absolute).chain(beside) {
            if !candidates.contains(&name) {
                candidates.push(name);
            }
        }
        candidates
    }
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
    matches!(last, "" | "." | "..") || path.contains('\0')
}

/// A relative path that is not taken for a protocol and its argument.
fn without_protocol(path: String) -> String {
    match path.split('/').next() {
        Some(first) if first.contains(':') => format!("./{path}"),
        _ => path,
    }
}

/// The text of little-endian (or else big-endian) UTF-16, up to the first zero.
pub(crate) fn utf16(bytes: &[u8], big_endian: bool) -> String {
    let units = bytes.as_chunks::<2>().0.iter().map(|unit| match big_endian {
        true => u16::from_be_bytes(*unit),
        false => u16::from_le_bytes(*unit),
    });
    let mut text = String::new();
    for unit in char::decode_utf16(units.take_while(|unit| *unit != 0)) {
        name::push_char(&mut text, unit.unwrap_or(char::REPLACEMENT_CHARACTER));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(relative: &[&str], absolute: &[&str]) -> Vec<String> {
        let owned = |paths: &[&str]| paths.iter().map(|path| (*path).to_owned()).collect();
        let locators = Locators {
            relative: owned(relative),
            absolute: owned(absolute),
        };
        locators.candidates()
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

    #[test]
    fn the_first_file_that_exists_is_taken() {
        struct Only(&'static str);
        impl Gate for Only {
            fn open(
                &self,
                _: &diskimage_core::Reference<'_>,
            ) -> Result<std::sync::Arc<dyn diskimage_core::Device>> {
                Err(Error::unsupported("is not opened"))
            }
            fn locate(&self, image: &str, name: &str) -> Option<String> {
                (image == "d/child.vhd" && name.eq_ignore_ascii_case(self.0)).then(|| self.0.to_owned())
            }
        }
        let locators = Locators {
            relative: vec!["..\\Base.vhd".to_owned()],
            absolute: vec!["C:\\Base.vhd".to_owned()],
        };
        for (exists, taken) in [
            ("../base.VHD", "../base.VHD"),
            ("BASE.vhd", "BASE.vhd"),
            ("x", "../Base.vhd"),
        ] {
            let parent = Parent::find(locators.clone(), "d/child.vhd", &Only(exists)).expect("has locators");
            assert_eq!(parent.backing("vpc").name.text(), taken);
            assert_eq!(
                parent.search().description.as_deref(),
                Some(
                    "The parent is not found: its locators are '..\\Base.vhd', 'C:\\Base.vhd', and it was looked for \
                     as '../Base.vhd', 'Base.vhd'"
                )
            );
        }
        assert!(Parent::find(Locators::default(), "d/child.vhd", &Only("x")).is_err());
    }
}
