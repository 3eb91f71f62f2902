//! Images on devices, and the gates that they are opened with.

use std::sync::{Arc, Mutex, PoisonError};

use diskimage_core::options::Options;
use diskimage_core::{
    CreateRequest, Device, Format, Gate, Image, NewFiles, NodeOptions, OpenContext, OpenRequest, Reference,
    Result,
};

/// A gate that opens the same device by every name.
#[derive(Clone, Debug)]
pub struct OneFile(pub Arc<dyn Device>);

impl Gate for OneFile {
    fn open(&self, _: &Reference<'_>) -> Result<Arc<dyn Device>> {
        Ok(Arc::clone(&self.0))
    }
}

/// A gate that records the names of the files, and opens them by a function.
pub struct RecordingGate<F> {
    open: F,
    names: Mutex<Vec<String>>,
}

impl<F> RecordingGate<F>
where
    F: Fn(&Reference<'_>) -> Result<Arc<dyn Device>> + Send + Sync,
{
    /// A gate that opens files with `open`.
    pub fn new(open: F) -> Self {
        Self {
            open,
            names: Mutex::default(),
        }
    }

    /// The names of the files so far, also of those that `open` has refused.
    pub fn names(&self) -> Vec<String> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl<F> Gate for RecordingGate<F>
where
    F: Fn(&Reference<'_>) -> Result<Arc<dyn Device>> + Send + Sync,
{
    fn open(&self, reference: &Reference<'_>) -> Result<Arc<dyn Device>> {
        let name = reference.options.text("filename").unwrap_or_default();
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.push(name.to_owned());
        drop(names);
        (self.open)(reference)
    }
}

/// Creates an image of `format` on `file`. `options` must be valid.
///
/// # Errors
/// The format refuses the options or the size, or a write fails.
pub fn create_image(format: &dyn Format, file: &Arc<dyn Device>, options: &str, size: u64) -> Result<()> {
    let mut parsed = Options::new(format.create_options());
    parsed.parse(options).expect("valid options");
    let objects = Arc::default();
    let plan = format.plan_create(CreateRequest {
        name: "test",
        size,
        options: &parsed,
        objects: &objects,
    })?;
    NewFiles::only(Arc::clone(file), |files| plan.write(files))
}

/// Opens the image of `format` on `file`, with `backing` as its backing image.
///
/// # Errors
/// The image is corrupt or not supported.
pub fn open_image(
    format: &dyn Format,
    file: Arc<dyn Device>,
    write: bool,
    backing: Option<Arc<Image>>,
) -> Result<Image> {
    let layer = format.open(OpenRequest {
        write,
        ..OpenRequest::new(file, "test", &mut NodeOptions::new(), &OpenContext::default())
    })?;
    Ok(Image::new(layer, backing, "test", write))
}

/// All bytes of a small disk.
pub fn contents(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(image.len()).expect("small")];
    image.read_at(&mut bytes, 0).expect("readable");
    bytes
}
