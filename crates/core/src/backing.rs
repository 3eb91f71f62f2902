//! The reference to a backing image.

use crate::Name;

/// The backing image as named in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The filename, which may be relative to the directory of the image.
    pub name: Name,
    /// The format, if the image names it.
    pub format: Option<String>,
}
