//! [`BeneathGate`]: images from strangers may refer to plain files beside and beneath themselves only.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use diskimage_core::json::Value;
use diskimage_core::{Device, Error, ErrorKind, Gate, NodeOptions, Reference, Result, ResultExt, Role, name};
use diskimage_formats::format_by_name;
use diskimage_protocols::{Directory, LocalFileDriver, ProtocolRequest, Target, path_in_any_case};

use super::{FileGate, require_all_taken};

/// Opens plain files beneath the directory of the image that refers to them, and refuses everything else: names that lead
/// out of the directory, links, devices, pipes, protocols, and names that contain options (`json:`).
///
/// The directory is that of the name by which the image was opened; links in that name are the user's and are followed. A
/// name in an image may be absolute if it begins with the name of the directory, or with its name without links. The
/// kernel resolves what follows (`openat2`), so that nothing can be exchanged between a check and the opening. The
/// directory of a backing image is found the same way again, beneath that of its overlay.
///
/// ```
/// use std::sync::Arc;
///
/// use diskimage::{BeneathGate, OpenOptions};
///
/// let options = OpenOptions::new()
///     .gate_from(Arc::new(|files| Arc::new(BeneathGate::new(files))))
///     .unambiguous(true);
/// # let _ = options;
/// ```
#[derive(Debug)]
pub struct BeneathGate {
    files: FileGate,
    /// Where the images are that this gate has opened, by name: they may refer to others.
    opened: Mutex<HashMap<String, Place>>,
}

/// A file beneath the directory of an image that the user has named.
#[derive(Clone, Debug)]
struct Place {
    root: Arc<Directory>,
    path: String,
}

impl BeneathGate {
    /// Opens files as `files` says.
    pub fn new(files: FileGate) -> Self {
        Self {
            files,
            opened: Mutex::default(),
        }
    }

    /// Whether `name`, to which the image called `from` refers, is that of a file beneath the directory of that image, or
    /// can become one.
    pub fn is_beneath(from: &str, name: &str) -> bool {
        let gate = Self::new(FileGate::default());
        let found = gate
            .place(from, name)
            .and_then(|place| place.root.require_file(&place.path));
        match found {
            Ok(()) => true,
            Err(error) => error.kind() == ErrorKind::NotFound && !leads_up(name),
        }
    }

    /// The place of the file that the image `from` calls `name`.
    fn place(&self, from: &str, name: &str) -> Result<Place> {
        let image = Target::parse(from).map(|target| target.path);
        let image = image.map_err(|_| denied("the image is not a file in a directory"))?;
        let directory = directory_of(&image);
        let path = path_from(directory, name)
            .ok_or_else(|| denied("it is not beneath the directory of the image"))?;
        let known = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(overlay) = known.get(&image) {
            let between = directory_of(&overlay.path).trim_end_matches('/');
            // The overlay's own directory is the limit, not that of the image above it.
            let root = Arc::new(overlay.root.beneath(between)?);
            return Ok(Place { root, path });
        }
        let root = Directory::open(directory).context(|| "its directory cannot be opened")?;
        Ok(Place {
            root: Arc::new(root),
            path,
        })
    }

    fn open_plain(&self, reference: &Reference<'_>) -> Result<Arc<dyn Device>> {
        let mut options = reference.options.clone();
        let driver = options.take_text("driver");
        if let Some(driver) = driver.filter(|driver| driver != "file" && driver != "host_device") {
            return Err(denied(format!("it needs the driver '{driver}'")));
        }
        let name = options.text("filename").unwrap_or_default().to_owned();
        if reference.role == Role::Data {
            // A data file is a path, even if it begins like the name of a protocol.
            options.set("filename", Target::plain(&name).path);
        }
        let place = self.place(reference.from, &name)?;
        let request = ProtocolRequest {
            options: &mut options,
            write: reference.permissions.write,
            cache: self.files.cache,
            context: reference.context,
        };
        let driver = LocalFileDriver::regular();
        let device = driver.open_beneath(&place.root, &place.path, request)?;
        require_all_taken("file", &options)?;
        device.lock(self.files.locked_for(reference))?;
        if reference.role == Role::Backing {
            let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
            opened.insert(name, place);
        }
        Ok(device)
    }
}

impl Gate for BeneathGate {
    fn admit(&self, from: &str, name: &str, node: &NodeOptions) -> Result<()> {
        let only_a_path = || {
            if name.starts_with("json:") {
                return Err(denied("it contains options"));
            }
            for (option, value) in node.iter() {
                match (option, value) {
                    ("file.filename", _) => {}
                    ("driver", Value::Text(driver)) if format_by_name(driver).is_some() => {}
                    _ => return Err(denied("it is not a path")),
                }
            }
            Ok(())
        };
        only_a_path().map_err(|why| refusal(from, name, why))
    }

    fn open(&self, reference: &Reference<'_>) -> Result<Arc<dyn Device>> {
        self.open_plain(reference).map_err(|error| match error.kind() {
            ErrorKind::Denied => refusal(reference.from, &reference.shown(), error),
            // The error of the kernel, for a file that is missing or that may not be read.
            _ if error.errno().is_some() => error.context(format!("Could not open '{}'", reference.shown())),
            _ => error,
        })
    }

    fn locate(&self, image: &str, name: &str) -> Option<String> {
        if leads_up(name) {
            return None;
        }
        let path = Target::parse(image).ok()?.path;
        let base = if name.starts_with('/') {
            ""
        } else {
            directory_of(&path)
        };
        path_from(directory_of(&path), &format!("{base}{name}"))?;
        let found = path_in_any_case(base, name)?;
        let place = self.place(image, &format!("{base}{found}")).ok()?;
        place.root.require_file(&place.path).is_ok().then_some(found)
    }
}

/// The directory of the file at `path`, with the slash; empty for the current directory.
fn directory_of(path: &str) -> &str {
    path.rfind('/').map_or("", |slash| &path[..=slash])
}

/// The path from `directory` to the file `name`; `None` if the words of the name lead elsewhere. It may still contain
/// `..`, which the kernel sees.
fn path_from(directory: &str, name: &str) -> Option<String> {
    let below = |directory: &str, name: &str| {
        let rest = name.strip_prefix(directory)?;
        (!rest.is_empty() && !rest.starts_with('/')).then(|| rest.to_owned())
    };
    if let Some(path) = below(directory, name) {
        return Some(path);
    }
    let current = std::env::current_dir().ok()?;
    let full = |path: &str| name::of_path(&current.join(name::to_path(path)));
    let name = full(name);
    let real = name::to_path(if directory.is_empty() { "." } else { directory }).canonicalize();
    let real = real.ok().map(|real| with_slash(name::of_path(&real)));
    let given = with_slash(full(directory));
    [Some(given), real]
        .into_iter()
        .flatten()
        .find_map(|directory| below(&directory, &name))
}

fn with_slash(mut path: String) -> String {
    if !path.ends_with('/') {
        path.push('/');
    }
    path
}

fn leads_up(name: &str) -> bool {
    name.split('/').any(|part| part == "..")
}

fn denied(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Denied, why)
}

fn refusal(from: &str, name: &str, why: Error) -> Error {
    why.context(format!("'{from}' may not refer to '{name}'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_relative_to_the_directory_of_the_image() {
        for (directory, name, path) in [
            ("", "base", Some("base")),
            ("", "a/base", Some("a/base")),
            ("d/", "d/base", Some("base")),
            ("d/", "d/../base", Some("../base")),
            ("d/", "base", None),
            ("d/", "d/", None),
            ("/x/", "/x/base", Some("base")),
            ("/x/", "/x//base", None),
            ("/x/", "/xy/base", None),
            ("", "/etc/passwd", None),
            ("", "", None),
        ] {
            assert_eq!(path_from(directory, name).as_deref(), path, "{directory} {name}");
        }
    }

    #[test]
    fn absolute_names_within_the_directory_are_relative_ones() {
        let scratch = tempfile::tempdir().expect("is made");
        let real = scratch.path().canonicalize().expect("exists");
        let link = real.join("link");
        std::os::unix::fs::symlink(&real, &link).expect("is linked");
        let directory = with_slash(name::of_path(&link));
        let inside = name::of_path(&real.join("base"));
        assert_eq!(path_from(&directory, &inside).as_deref(), Some("base"));
    }

    #[test]
    fn what_does_not_exist_is_beneath_if_its_name_does_not_lead_up() {
        let scratch = tempfile::tempdir().expect("is made");
        let image = name::of_path(&scratch.path().join("image"));
        let full = |name: &str| Target::resolve(&image, name);
        for (name, is_beneath) in [
            ("base", true),
            ("a/base", true),
            ("../base", false),
            ("a/../base", false),
            ("/etc/passwd", false),
            ("/nothing", false),
        ] {
            assert_eq!(BeneathGate::is_beneath(&image, &full(name)), is_beneath, "{name}");
        }
    }
}
