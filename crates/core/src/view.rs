//! Read-only devices whose bytes are computed on each read.

use std::fmt::Debug;

use crate::{
    ByteRange, Device, Error, Extent, Info, Limits, Node, Preallocation, Result, StatusDetail, ZeroMode,
};

/// The source of the bytes of a [`ReadOnlyView`].
pub trait View: Debug + Send + Sync {
    /// As [`Device::len`].
    fn len(&self) -> u64;

    /// As [`Device::is_empty`].
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// As [`Device::limits`].
    fn limits(&self) -> &Limits;

    /// Fills `buf` with the bytes from `offset` on. The range lies inside the view.
    ///
    /// # Errors
    /// Errors of reading or decoding the data that the bytes are computed from.
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// As [`Device::allocated_bytes`].
    fn allocated_bytes(&self) -> Option<u64> {
        None
    }

    /// As [`Device::node`].
    fn node(&self) -> Node {
        Node {
            name: Some(String::new()),
            ..Node::default()
        }
    }

    /// As [`Device::info`].
    ///
    /// # Errors
    /// As [`Device::info`].
    fn info(&self) -> Result<Info> {
        Ok(Info::default())
    }
}

/// The [`Device`] of a [`View`]: its status is data everywhere, and writes fail.
#[derive(Debug)]
pub struct ReadOnlyView<V>(pub V);

impl<V: View> Device for ReadOnlyView<V> {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn limits(&self) -> &Limits {
        self.0.limits()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match offset.checked_add(buf.len() as u64) {
            Some(end) if end <= self.0.len() => self.0.read(buf, offset),
            _ => Err(Error::corrupt(format!("Read beyond the end at {offset:#x}"))),
        }
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> Result<()> {
        Err(Error::read_only())
    }

    fn write_zeroes(&self, _range: ByteRange, _mode: ZeroMode) -> Result<()> {
        Err(Error::read_only())
    }

    fn discard(&self, _range: ByteRange) -> Result<()> {
        Err(Error::read_only())
    }

    fn status(&self, range: ByteRange, _detail: StatusDetail) -> Result<Extent> {
        Ok(Extent::data(range.len()))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn resize(&self, _len: u64, _preallocation: Preallocation) -> Result<()> {
        Err(Error::read_only())
    }

    fn is_zero_when_new(&self) -> bool {
        false
    }

    fn is_view(&self) -> bool {
        true
    }

    fn allocated_bytes(&self) -> Option<u64> {
        self.0.allocated_bytes()
    }

    fn name(&self) -> String {
        self.0.node().shown_name()
    }

    fn node(&self) -> Node {
        self.0.node()
    }

    fn info(&self) -> Result<Info> {
        self.0.info()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten bytes, each of which is its own offset.
    #[derive(Debug, Default)]
    struct Ten(Limits);

    impl View for Ten {
        fn len(&self) -> u64 {
            10
        }

        fn limits(&self) -> &Limits {
            &self.0
        }

        fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
            for (byte, at) in buf.iter_mut().zip(offset..) {
                *byte = u8::try_from(at).expect("inside");
            }
            Ok(())
        }
    }

    #[test]
    fn a_view_is_read_inside_and_not_written() {
        let view = ReadOnlyView(Ten::default());
        let mut buf = [0; 3];
        view.read_at(&mut buf, 7).expect("inside");
        assert_eq!(buf, [7, 8, 9]);
        assert!(view.read_at(&mut buf, 8).is_err() && view.read_at(&mut buf, u64::MAX).is_err());
        let whole = ByteRange::new(0, 10);
        for refused in [
            view.write_at(&buf, 0),
            view.write_zeroes(whole, ZeroMode::Unmap),
            view.discard(whole),
            view.resize(20, Preallocation::Off),
        ] {
            assert_eq!(refused.expect_err("read only").chain(), "Image is read-only");
        }
    }
}
