//! The files that an image names, without opening them.

use diskimage_core::{FileRole, Image, NamedFile, Result};
use diskimage_protocols::Target;

use crate::gate::BeneathGate;
use crate::graph::full_backing_name;

/// A file or URL that an image names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageReference {
    /// What it is for, and its name: of backing files and parents as the image stores it, of others as they are opened.
    pub file: NamedFile,
    /// Whether it is a file beneath the directory of the image, or would be one if it existed.
    pub is_beneath: bool,
}

/// The files and URLs that `image` itself names, without those that its backing image does.
///
/// # Errors
/// The facts of the image cannot be read.
pub fn references(image: &Image) -> Result<Vec<ImageReference>> {
    let (layer, from) = (image.layer(), image.base_name());
    let mut found = Vec::new();
    let parents = layer.backing_search().stored;
    if let Some(backing) = layer.backing().filter(|_| parents.is_empty()) {
        let name = backing.name.text();
        found.push(ImageReference {
            is_beneath: is_beneath(&from, name),
            file: NamedFile::new(FileRole::Backing, name),
        });
    }
    for name in parents {
        found.push(ImageReference {
            // Paths of Windows: those with a drive lead nowhere here.
            is_beneath: is_beneath(&from, &name.replace('\\', "/")),
            file: NamedFile::new(FileRole::Parent, name),
        });
    }
    for file in layer.info()?.other_files {
        found.push(ImageReference {
            is_beneath: BeneathGate::is_beneath(&from, &file.name),
            file,
        });
    }
    Ok(found)
}

/// Whether the backing file name `name` is that of a file beneath the directory of the image `from`. What begins like a
/// protocol is none.
fn is_beneath(from: &str, name: &str) -> bool {
    let name = full_backing_name(from, name);
    let is_path = Target::parse(&name).is_ok_and(|target| target.protocol.is_none());
    is_path && BeneathGate::is_beneath(from, &name)
}
