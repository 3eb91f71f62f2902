//! A device in memory, for tests and for small computed images.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{
    ByteRange, Device, Error, ErrorKind, Extent, Limits, Preallocation, Result, StatusDetail, ZeroMode,
};

/// A device whose bytes are in memory. A write beyond its end makes it longer.
#[derive(Debug, Default)]
pub struct MemoryDevice {
    bytes: Mutex<Vec<u8>>,
    limits: Limits,
}

impl MemoryDevice {
    /// A device with these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes: Mutex::new(bytes),
            limits: Limits::default(),
        }
    }

    /// A copy of its present bytes.
    pub fn contents(&self) -> Vec<u8> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The limit of the length, larger than any test or computed image.
const MAX_LEN: u64 = 192 << 20;

fn index(offset: u64) -> Result<usize> {
    usize::try_from(offset)
        .ok()
        .filter(|_| offset <= MAX_LEN)
        .ok_or_else(|| Error::new(ErrorKind::NoSpace, "No space left on device"))
}

impl Device for MemoryDevice {
    fn len(&self) -> u64 {
        self.lock().len() as u64
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let bytes = self.lock();
        let source = usize::try_from(offset)
            .ok()
            .and_then(|start| bytes.get(start..)?.get(..buf.len()));
        let source = source.ok_or_else(|| Error::corrupt(format!("Read beyond the end at {offset:#x}")))?;
        buf.copy_from_slice(source);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let (start, end) = (index(offset)?, index(offset.saturating_add(buf.len() as u64))?);
        let mut bytes = self.lock();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[start..end].copy_from_slice(buf);
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange, _mode: ZeroMode) -> Result<()> {
        let (start, end) = (index(range.start())?, index(range.end())?);
        let mut bytes = self.lock();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[start..end].fill(0);
        Ok(())
    }

    fn discard(&self, _range: ByteRange) -> Result<()> {
        Ok(())
    }

    fn status(&self, range: ByteRange, _detail: StatusDetail) -> Result<Extent> {
        Ok(Extent::data(range.len()))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn resize(&self, len: u64, _preallocation: Preallocation) -> Result<()> {
        let len = index(len)?;
        self.lock().resize(len, 0);
        Ok(())
    }

    fn name(&self) -> String {
        "memory".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_and_refuses_to_read_past_its_end() {
        let device = MemoryDevice::default();
        device.write_at(b"abc", 2).expect("grows");
        assert_eq!(device.contents(), b"\0\0abc");
        let mut buf = [0; 4];
        assert!(device.read_at(&mut buf, 2).is_err());
        (&device as &dyn Device).read_padded(&mut buf, 3).expect("pads");
        assert_eq!(&buf, b"bc\0\0");
        assert!(device.write_at(b"x", u64::MAX - 3).is_err());
    }
}
