//! `preallocate`: extends files in large steps, which the file system can allocate contiguously, and truncates them to
//! the end of the data when they are closed.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskimage_core::options::{OptionDef, OptionKind};
use diskimage_core::{
    ByteRange, Device, Error, FilterDevice, Filtered, Node, NodeOptions, Preallocation, Result, ZeroMode,
    align_up,
};

use super::{Filter, FilterChild, FilterRequest, ParseName, file_child};

#[derive(Debug)]
pub(crate) struct Preallocate;

const OPTIONS: &[OptionDef] = &[
    OptionDef::new(
        "prealloc-align",
        OptionKind::Size,
        "The file ends on multiples of this meanwhile",
    )
    .or("1M"),
    OptionDef::new("prealloc-size", OptionKind::Size, "How much is set aside at once").or("128M"),
];

/// The unit of `prealloc-align`.
const SECTOR: u64 = 512;

impl Filter for Preallocate {
    fn name(&self) -> &'static str {
        "preallocate"
    }

    fn children(&self, _options: &mut NodeOptions, _: ParseName) -> Result<Vec<FilterChild>> {
        Ok(file_child())
    }

    fn open(&self, request: FilterRequest<'_>) -> Result<Arc<dyn Device>> {
        let node = request.node(self.name(), |_| false);
        let options = request.options.take_known(OPTIONS)?;
        let align = options.size("prealloc-align").unwrap_or(0);
        if !align.is_multiple_of(SECTOR) {
            return Err(Error::invalid(format!(
                "prealloc-align parameter of preallocate filter is not aligned to {SECTOR}"
            )));
        }
        let device = Arc::clone(&request.only_child()?.device);
        let len = device.len();
        Ok(Arc::new(Filtered(Growing {
            align: align.max(1),
            step: options.size("prealloc-size").unwrap_or(0),
            ends: Mutex::new(Ends { data: len, file: len }),
            write: request.write,
            device,
            node,
        })))
    }
}

#[derive(Debug)]
struct Growing {
    device: Arc<dyn Device>,
    align: u64,
    step: u64,
    ends: Mutex<Ends>,
    write: bool,
    node: Node,
}

#[derive(Clone, Copy, Debug)]
struct Ends {
    /// The end of the written data: the length that the filter reports.
    data: u64,
    /// The end of the file.
    file: u64,
}

impl Growing {
    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Extends the file for a write that ends at `end`, and the data to `end`.
    fn grow_for_write(&self, end: u64) {
        let mut ends = self.ends();
        ends.data = ends.data.max(end);
        if end > ends.file {
            let wanted = align_up(end.saturating_add(self.step), self.align);
            let fresh = ByteRange::new(ends.file, wanted);
            // If preallocation fails, the write itself allocates.
            ends.file = match self.device.resize(wanted, Preallocation::Falloc) {
                Ok(()) => fresh.end(),
                Err(_) => self.device.len().max(end),
            };
        }
    }

    /// Truncates the file to the end of the data.
    fn truncate_to_data(&self, ends: &mut Ends) -> Result<()> {
        if ends.file > ends.data {
            self.device.resize(ends.data, Preallocation::Off)?;
            ends.file = ends.data;
        }
        Ok(())
    }
}

impl FilterDevice for Growing {
    fn below(&self) -> &Arc<dyn Device> {
        &self.device
    }

    fn len(&self) -> u64 {
        self.ends().data
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.grow_for_write(offset.saturating_add(buf.len() as u64));
        self.device.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.grow_for_write(range.end());
        self.device.write_zeroes(range, mode)
    }

    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        let mut ends = self.ends();
        self.truncate_to_data(&mut ends)?;
        self.device.resize(len, preallocation)?;
        *ends = Ends { data: len, file: len };
        Ok(())
    }

    fn node(&self) -> Node {
        self.node.clone()
    }
}

impl Drop for Growing {
    fn drop(&mut self) {
        if self.write {
            let mut ends = *self.ends();
            // After a failure the file is too long, but has all its data.
            let _ = self.truncate_to_data(&mut ends);
        }
    }
}

#[cfg(test)]
mod tests {
    use diskimage_core::MemoryDevice;

    use super::*;

    #[test]
    fn the_file_is_longer_than_its_data_until_it_is_closed() {
        let file = Arc::new(MemoryDevice::new(vec![1; 100]));
        let growing = Filtered(Growing {
            device: Arc::<MemoryDevice>::clone(&file),
            align: 512,
            step: 4096,
            ends: Mutex::new(Ends { data: 100, file: 100 }),
            write: true,
            node: Node::default(),
        });
        growing.write_at(&[2; 50], 50).expect("writes");
        assert_eq!((growing.len(), file.contents().len()), (100, 100));
        growing.write_at(&[3; 50], 100).expect("writes");
        assert_eq!((growing.len(), file.contents().len()), (150, 4608));
        growing
            .write_zeroes(ByteRange::at(150, 10), ZeroMode::Unmap)
            .expect("writes");
        assert_eq!((growing.len(), file.contents().len()), (160, 4608));
        growing.resize(155, Preallocation::Off).expect("shrinks");
        assert_eq!((growing.len(), file.contents().len()), (155, 155));
        growing.write_at(&[4; 5], 155).expect("writes");
        drop(growing);
        let expected = [vec![1; 50], vec![2; 50], vec![3; 50], vec![0; 5], vec![4; 5]].concat();
        assert_eq!(file.contents(), expected);
    }
}
