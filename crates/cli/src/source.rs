//! Opening the images that the words name.

use std::sync::{Arc, Mutex, PoisonError};

use diskimage::{Image, OpenOptions, open};

use crate::out::Console;
use crate::words::{ImageName, Source, Stop, text};

/// Opens an image. What the user ought to know of it is printed at once.
///
/// # Errors
/// An image that cannot be opened, and names that are not available yet.
pub(crate) fn open_source(
    source: &Source,
    options: OpenOptions,
    console: &Console,
) -> Result<Arc<Image>, Stop> {
    let name = plain_name(&source.name)?;
    let options = match &source.format {
        Some(format) => options.format(format),
        None => options,
    };
    let warnings = Arc::new(Mutex::new(String::new()));
    let collected = Arc::clone(&warnings);
    let outcome = open(
        &name,
        &options.on_warning(Arc::new(move |warning: &str| {
            let mut text = collected.lock().unwrap_or_else(PoisonError::into_inner);
            text.push_str(warning);
            text.push('\n');
        })),
    );
    console.print_error(&warnings.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(outcome?)
}

/// The file that a name stands for.
///
/// # Errors
/// Specifications of another kind, and names that are not text.
pub(crate) fn plain_name(name: &ImageName) -> Result<String, Stop> {
    match name {
        ImageName::File(name) => text(name.clone()),
        ImageName::Options(_) => Err(Stop::wrong(
            "Image specifications (--image-opts) are not available in this build",
        )),
    }
}
