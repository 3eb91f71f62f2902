//! `copy-on-read`: what is read from an image further down becomes part of the image on top.

use std::sync::{Arc, Mutex, PoisonError};

use diskimage_core::options::{OptionDef, OptionKind};
use diskimage_core::{
    ByteRange, Device, Error, Extent, FilterDevice, Filtered, Image, Node, NodeOptions, Result, StatusDetail,
    ZeroMode, is_zero, to_index,
};

use super::{Filter, FilterChild, FilterRequest, file_child, missing, read_only};

#[derive(Debug)]
pub(super) struct CopyOnRead;

const OPTIONS: &[OptionDef] = &[OptionDef::new(
    "bottom",
    OptionKind::Text,
    "The lowest image to copy from",
)];

impl Filter for CopyOnRead {
    fn name(&self) -> &'static str {
        "copy-on-read"
    }

    fn children(&self, _options: &mut NodeOptions) -> Result<Vec<FilterChild>> {
        Ok(file_child())
    }

    fn open(&self, request: FilterRequest<'_>) -> Result<Arc<dyn Device>> {
        if !request.write {
            return Err(read_only());
        }
        let node = request.node(self.name(), |name| name == "bottom");
        let options = request.options.take_known(OPTIONS)?;
        let below = request
            .children
            .into_iter()
            .next()
            .ok_or_else(|| missing("file"))?;
        let max_depth = match options.text("bottom") {
            None => u32::MAX,
            Some(bottom) => below
                .image
                .as_ref()
                .and_then(|image| depth_of(image, bottom))
                .ok_or_else(|| Error::invalid(format!("Bottom node '{bottom}' not found")))?,
        };
        Ok(match below.image {
            Some(image) => Arc::new(Filtered(Copying {
                device: below.device,
                image,
                max_depth,
                copying: Mutex::new(()),
                node,
            })),
            // A file is the only one that has its bytes.
            None => Arc::new(Filtered(PassThrough {
                device: below.device,
                node,
            })),
        })
    }
}

/// How far below `top` the image is whose node has this name.
fn depth_of(top: &Arc<Image>, node_name: &str) -> Option<u32> {
    let chain = std::iter::successors(Some(top), |image| image.backing());
    let at = chain
        .into_iter()
        .position(|image| image.node().node_name.as_deref() == Some(node_name))?;
    u32::try_from(at).ok()
}

#[derive(Debug)]
struct Copying {
    device: Arc<dyn Device>,
    /// The same.
    image: Arc<Image>,
    /// What comes from further down is not copied.
    max_depth: u32,
    /// Held from the look at who has the bytes to the end of the copy: nothing newer may be copied over.
    copying: Mutex<()>,
    node: Node,
}

/// So much is copied at once.
const CHUNK: u64 = 1 << 20;

impl Copying {
    /// Copies what of `range` comes from below, in whole units of the image.
    fn copy(&self, range: ByteRange) -> Result<()> {
        let unit = self.image.layer().granularity();
        let all = range
            .align_out(unit)
            .intersect(ByteRange::new(0, self.image.len()));
        let mut rest = all;
        while !rest.is_empty() {
            let extent = self.image.status(rest, StatusDetail::Allocation)?;
            let part = rest.first(extent.len.min(CHUNK.max(unit)));
            if (1..=self.max_depth).contains(&extent.depth) {
                self.copy_part(part)?;
            }
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    fn copy_part(&self, part: ByteRange) -> Result<()> {
        let mut bytes = vec![0; to_index(part.len())?];
        self.image.read_at(&mut bytes, part.start())?;
        if is_zero(&bytes) {
            self.image.write_zeroes(part, ZeroMode::Unmap)
        } else {
            self.image.write_at(&bytes, part.start())
        }
    }
}

impl FilterDevice for Copying {
    fn below(&self) -> &Arc<dyn Device> {
        &self.device
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = ByteRange::at(offset, buf.len() as u64);
        if !range.is_empty() {
            let _alone = self.copying.lock().unwrap_or_else(PoisonError::into_inner);
            self.copy(range)?;
        }
        self.image.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let _alone = self.copying.lock().unwrap_or_else(PoisonError::into_inner);
        self.image.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let _alone = self.copying.lock().unwrap_or_else(PoisonError::into_inner);
        self.image.write_zeroes(range, mode)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        let _alone = self.copying.lock().unwrap_or_else(PoisonError::into_inner);
        self.image.discard(range)
    }

    fn status(&self, range: ByteRange, detail: StatusDetail) -> Result<Extent> {
        // Whoever reads from where the bytes lie would read past the filter.
        Ok(Extent {
            host: None,
            ..self.image.status(range, detail)?
        })
    }

    fn node(&self) -> Node {
        self.node.clone()
    }
}

/// The filter on what has no images below.
#[derive(Debug)]
struct PassThrough {
    device: Arc<dyn Device>,
    node: Node,
}

impl FilterDevice for PassThrough {
    fn below(&self) -> &Arc<dyn Device> {
        &self.device
    }

    fn node(&self) -> Node {
        self.node.clone()
    }
}
