//! `compress`: compresses the data that is written to the image below.

use std::sync::{Arc, Mutex, PoisonError};

use diskimage_core::{
    ByteRange, Device, Encoder, Error, FilterDevice, Filtered, Image, Limits, Node, Result, StatusDetail,
    align_down, align_up, saturating_u32, to_index,
};

use super::{Filter, FilterChild, FilterRequest, ParseName, file_child, missing};

#[derive(Debug)]
pub(crate) struct Compress;

impl Filter for Compress {
    fn name(&self) -> &'static str {
        "compress"
    }

    fn children(&self, _options: &mut diskimage_core::NodeOptions, _: ParseName) -> Result<Vec<FilterChild>> {
        Ok(file_child())
    }

    fn open(&self, request: FilterRequest<'_>) -> Result<Arc<dyn Device>> {
        let node = request.node(self.name(), |_| false);
        let below = request
            .children
            .into_iter()
            .next()
            .ok_or_else(|| missing("file"))?;
        let encodes = match &below.image {
            Some(image) => image.layer().encoder(None)?.is_some(),
            None => false,
        };
        let Some(image) = below.image.filter(|_| encodes) else {
            return Err(Error::unsupported(format!(
                "Compression is not supported for underlying format: {}",
                below.device.node().driver
            )));
        };
        let unit = image.layer().granularity();
        Ok(Arc::new(Filtered(Compressing {
            limits: Limits {
                alignment: saturating_u32(unit),
                ..image.limits().clone()
            },
            device: below.device,
            image,
            unit,
            node,
            partial_write: Mutex::new(()),
        })))
    }
}

#[derive(Debug)]
struct Compressing {
    device: Arc<dyn Device>,
    /// The same device as an image.
    image: Arc<Image>,
    /// The unit of compression: the cluster size.
    unit: u64,
    limits: Limits,
    node: Node,
    /// Held while a partly written cluster is read, modified and compressed.
    partial_write: Mutex<()>,
}

impl Compressing {
    /// Writes a part of one cluster, compressed if the cluster is not allocated yet.
    fn write_in_cluster(&self, encoder: &mut dyn Encoder, buf: &[u8], offset: u64) -> Result<()> {
        let start = align_down(offset, self.unit);
        let cluster = ByteRange::new(start, align_up(offset + 1, self.unit).min(self.image.len()));
        let whole = ByteRange::at(offset, buf.len() as u64) == cluster;
        let _alone = (!whole).then(|| self.partial_write.lock().unwrap_or_else(PoisonError::into_inner));
        let extent = self.image.status(cluster, StatusDetail::Allocation)?;
        if extent.depth == 0 && !extent.kind.is_zero() {
            // The cluster is allocated: a second, compressed copy would take more space.
            return self.image.write_at(buf, offset);
        }
        // The last cluster is compressed whole, beyond the end of the disk.
        let mut bytes = vec![0; to_index(self.unit)?];
        let len = to_index(cluster.len())?;
        if !whole {
            self.image.read_at(&mut bytes[..len], start)?;
        }
        let skip = to_index(offset - start)?;
        bytes[skip..skip + buf.len()].copy_from_slice(buf);
        let mut encoded = Vec::new();
        if encoder.encode(&bytes, &mut encoded)? {
            self.image.write_encoded(start, &encoded)
        } else {
            self.image.write_at(&bytes[..len], start)
        }
    }
}

impl FilterDevice for Compressing {
    fn below(&self) -> &Arc<dyn Device> {
        &self.device
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let Some(mut encoder) = self.image.layer().encoder(None)? else {
            return self.image.write_at(buf, offset);
        };
        let (mut rest, mut at) = (buf, offset);
        while !rest.is_empty() {
            let room = self.unit - at % self.unit;
            let len = to_index(room.min(rest.len() as u64))?;
            let (head, tail) = rest.split_at(len);
            self.write_in_cluster(&mut *encoder, head, at)?;
            at += len as u64;
            rest = tail;
        }
        Ok(())
    }

    fn node(&self) -> Node {
        self.node.clone()
    }
}
