//! `copy-on-read`: copies data that is read from a backing image into the top image.

use std::sync::{Arc, Mutex, PoisonError};

use diskimage_core::options::{OptionDef, OptionKind};
use diskimage_core::{
    ByteRange, Device, Error, Extent, FilterDevice, Filtered, Image, Node, NodeOptions, Result, StatusDetail,
    ZeroMode, is_zero, to_index,
};

use super::{Filter, FilterChild, FilterRequest, ParseName, file_child, missing, read_only};

#[derive(Debug)]
pub(crate) struct CopyOnRead;

const OPTIONS: &[OptionDef] = &[OptionDef::new(
    "bottom",
    OptionKind::Text,
    "The lowest image to copy from",
)];

impl Filter for CopyOnRead {
    fn name(&self) -> &'static str {
        "copy-on-read"
    }

    fn children(&self, _options: &mut NodeOptions, _: ParseName) -> Result<Vec<FilterChild>> {
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
            // A file without a format has no backing image.
            None => Arc::new(Filtered(PassThrough {
                device: below.device,
                node,
            })),
        })
    }
}

/// The depth below `top` of the image whose node has this name.
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
    /// The same device as an image.
    image: Arc<Image>,
    /// Data from deeper images is not copied.
    max_depth: u32,
    /// Held from the lookup of the allocation to the end of the copy, so that no copy overwrites newer data.
    copying: Mutex<()>,
    node: Node,
}

/// The most that is copied at once.
const CHUNK: u64 = 1 << 20;

impl Copying {
    /// Copies the parts of `range` that come from backing images, in whole units of the image.
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
        // A reader that uses the host offset would bypass the filter.
        Ok(Extent {
            host: None,
            ..self.image.status(range, detail)?
        })
    }

    fn node(&self) -> Node {
        self.node.clone()
    }
}

/// The filter on a child without backing images, which changes nothing.
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
