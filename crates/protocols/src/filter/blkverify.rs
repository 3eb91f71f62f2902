//! `blkverify`: compares all reads of an image with those of a raw copy. Writes go to both.

use std::sync::Arc;

use diskimage_core::{
    ByteRange, Device, Error, ErrorKind, FilterDevice, Filtered, Node, NodeOptions, Preallocation, Result,
    ZeroMode,
};

use super::{ChildKind, Filter, FilterChild, FilterRequest, ParseName, child, missing, name_child};

#[derive(Debug)]
pub(crate) struct Blkverify;

impl Filter for Blkverify {
    fn name(&self) -> &'static str {
        "blkverify"
    }

    fn prefixes(&self) -> &'static [&'static str] {
        &["blkverify"]
    }

    /// `blkverify:RAW:IMAGE`.
    fn parse(&self, name: &str) -> Result<NodeOptions> {
        let words = name.split_once(':').and_then(|(_, rest)| rest.split_once(':'));
        let (raw, image) =
            words.ok_or_else(|| Error::invalid("blkverify requires raw copy and original image path"))?;
        let mut options = NodeOptions::new();
        options.set("x-raw", raw);
        options.set("x-image", image);
        Ok(options)
    }

    fn children(&self, options: &mut NodeOptions, parse_name: ParseName) -> Result<Vec<FilterChild>> {
        name_child(options, "x-raw", "raw", parse_name)?;
        let by_name = name_child(options, "x-image", "test", parse_name)?;
        let kind = if by_name {
            ChildKind::ImageFile
        } else {
            ChildKind::Image
        };
        Ok(vec![child("raw", ChildKind::Bytes), child("test", kind)])
    }

    fn open(&self, request: FilterRequest<'_>) -> Result<Arc<dyn Device>> {
        let [raw, test] = &request.children[..] else {
            return Err(missing("test"));
        };
        let (raw_name, test_name) = (raw.device.node().name, test.device.node().name);
        let node = Node {
            name: raw_name
                .zip(test_name)
                .map(|(raw, test)| format!("blkverify:{raw}:{test}")),
            ..request.node(self.name(), |_| false)
        };
        Ok(Arc::new(Filtered(Verifying {
            raw: Arc::clone(&raw.device),
            test: Arc::clone(&test.device),
            node,
        })))
    }
}

#[derive(Debug)]
struct Verifying {
    raw: Arc<dyn Device>,
    test: Arc<dyn Device>,
    node: Node,
}

impl FilterDevice for Verifying {
    fn below(&self) -> &Arc<dyn Device> {
        &self.raw
    }

    fn len(&self) -> u64 {
        self.test.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.test.read_at(buf, offset)?;
        let mut copy = vec![0; buf.len()];
        (&*self.raw as &dyn Device).read_padded(&mut copy, offset)?;
        match buf.iter().zip(&copy).position(|(one, other)| one != other) {
            None => Ok(()),
            Some(at) => Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "blkverify: read offset={offset} bytes={} contents mismatch at offset {}",
                    buf.len(),
                    offset + at as u64
                ),
            )),
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.test.write_at(buf, offset)?;
        self.raw.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.test.write_zeroes(range, mode)?;
        self.raw.write_zeroes(range, mode)
    }

    /// Ignored: each image decides what a discarded range reads as, so the two could differ afterwards.
    fn discard(&self, _range: ByteRange) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.test.flush()?;
        self.raw.flush()
    }

    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        self.raw.resize(len, preallocation)?;
        self.test.resize(len, preallocation)
    }

    fn allocated_bytes(&self) -> Option<u64> {
        None
    }

    fn node(&self) -> Node {
        self.node.clone()
    }
}

#[cfg(test)]
mod tests {
    use diskimage_core::MemoryDevice;

    use super::*;

    #[test]
    fn writes_go_to_both_and_reads_are_compared() {
        let raw = Arc::new(MemoryDevice::new(vec![0; 8]));
        let test = Arc::new(MemoryDevice::new(vec![0; 8]));
        let device = Filtered(Verifying {
            raw: Arc::<MemoryDevice>::clone(&raw),
            test: Arc::<MemoryDevice>::clone(&test),
            node: Node::default(),
        });
        device.write_at(b"abc", 2).expect("writes");
        let mut buf = [0; 8];
        device.read_at(&mut buf, 0).expect("they agree");
        assert_eq!((buf, raw.contents()), (*b"\0\0abc\0\0\0", test.contents()));
        raw.write_at(b"x", 3).expect("writes");
        let error = device.read_at(&mut buf[..4], 1).map_err(|error| error.chain());
        let message = "blkverify: read offset=1 bytes=4 contents mismatch at offset 3";
        assert_eq!(error, Err(message.to_owned()));
    }
}
