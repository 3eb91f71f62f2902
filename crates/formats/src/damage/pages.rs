//! A file in memory that is copied without copying its bytes, and that may be as long as a file system allows.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use diskimage_core::{
    ByteRange, Device, Error, ErrorKind, Extent, ExtentKind, Limits, Preallocation, Result, StatusDetail,
    ZeroMode,
};

const PAGE_BYTES: usize = 4096;
const PAGE: u64 = PAGE_BYTES as u64;

type Page = Arc<[u8; PAGE_BYTES]>;

/// Pages that were written; all others are zero.
#[derive(Debug, Default)]
pub(super) struct Pages {
    state: Mutex<State>,
    limits: Limits,
}

#[derive(Clone, Debug, Default)]
struct State {
    len: u64,
    pages: BTreeMap<u64, Page>,
}

/// What ext4 allows.
const MAX_LEN: u64 = 16 << 40;

impl Pages {
    /// A copy, which changes by itself.
    pub(super) fn copy(&self) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(self.lock().clone()),
            limits: Limits::default(),
        })
    }

    /// The number of `width` bytes at `at`, 0 beyond the end.
    pub(super) fn number(&self, at: u64, width: usize, big_endian: bool) -> u64 {
        let mut bytes = [0; 8];
        (self as &dyn Device)
            .read_padded(&mut bytes[..width], at)
            .expect("memory");
        if big_endian {
            bytes[..width].reverse();
        }
        u64::from_le_bytes(bytes)
    }

    pub(super) fn set_number(&self, at: u64, width: usize, big_endian: bool, value: u64) {
        let mut bytes = value.to_le_bytes();
        if big_endian {
            bytes[..width].reverse();
        }
        self.write_at(&bytes[..width], at).expect("memory");
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic")
    }
}

fn checked(offset: u64, len: u64) -> Result<ByteRange> {
    match offset.checked_add(len) {
        Some(end) if end <= MAX_LEN => Ok(ByteRange::new(offset, end)),
        _ => Err(Error::new(ErrorKind::NoSpace, "File too large")),
    }
}

/// The parts of `range` in one page each: the page, where in it, and where in the range.
fn parts(range: ByteRange) -> impl Iterator<Item = (u64, std::ops::Range<usize>, std::ops::Range<usize>)> {
    let index = |value: u64| usize::try_from(value).expect("small");
    range.units(PAGE).map(move |page| {
        let part = ByteRange::at(page * PAGE, PAGE).intersect(range);
        let inside = index(part.start() - page * PAGE)..index(part.end() - page * PAGE);
        let of_range = index(part.start() - range.start())..index(part.end() - range.start());
        (page, inside, of_range)
    })
}

impl Device for Pages {
    fn len(&self) -> u64 {
        self.lock().len
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = checked(offset, buf.len() as u64)?;
        let state = self.lock();
        if range.end() > state.len {
            return Err(Error::corrupt(format!("Read beyond the end at {offset:#x}")));
        }
        for (page, inside, of_range) in parts(range) {
            match state.pages.get(&page) {
                Some(bytes) => buf[of_range].copy_from_slice(&bytes[inside]),
                None => buf[of_range].fill(0),
            }
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let range = checked(offset, buf.len() as u64)?;
        let mut state = self.lock();
        for (page, inside, of_range) in parts(range) {
            let bytes = &buf[of_range];
            if bytes.len() as u64 == PAGE && bytes.iter().all(|byte| *byte == 0) {
                state.pages.remove(&page);
                continue;
            }
            let page = state.pages.entry(page);
            let page = page.or_insert_with(|| Arc::new([0; PAGE_BYTES]));
            Arc::make_mut(page)[inside].copy_from_slice(bytes);
        }
        state.len = state.len.max(range.end());
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange, _mode: ZeroMode) -> Result<()> {
        checked(range.start(), range.len())?;
        let mut state = self.lock();
        let whole = range.align_in(PAGE);
        if !whole.is_empty() {
            let (first, end) = (whole.start() / PAGE, whole.end() / PAGE);
            let kept = state.pages.split_off(&first);
            state
                .pages
                .extend(kept.into_iter().skip_while(|(page, _)| *page < end));
        }
        for (page, bytes) in state
            .pages
            .range_mut(range.start() / PAGE..range.end().div_ceil(PAGE))
        {
            let part = ByteRange::at(page * PAGE, PAGE).intersect(range);
            for (page, inside, _) in parts(part) {
                debug_assert!(page * PAGE <= part.start());
                Arc::make_mut(bytes)[inside].fill(0);
            }
        }
        state.len = state.len.max(range.end());
        Ok(())
    }

    fn discard(&self, _range: ByteRange) -> Result<()> {
        Ok(())
    }

    fn status(&self, range: ByteRange, _detail: StatusDetail) -> Result<Extent> {
        Ok(Extent {
            len: range.len(),
            kind: ExtentKind::Data,
            depth: 0,
            host: None,
        })
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn resize(&self, len: u64, _preallocation: Preallocation) -> Result<()> {
        checked(0, len)?;
        let old = self.len();
        if len < old {
            self.write_zeroes(ByteRange::new(len, old), ZeroMode::Unmap)?;
        }
        self.lock().len = len;
        Ok(())
    }
}

#[test]
fn copies_change_by_themselves() {
    let file = Pages::default();
    file.write_at(&[1; 10_000], 100).expect("memory");
    let copy = file.copy();
    copy.write_zeroes(ByteRange::new(50, 5000), ZeroMode::Unmap)
        .expect("memory");
    copy.resize(6000, Preallocation::Off).expect("memory");
    copy.resize(9000, Preallocation::Off).expect("memory");
    let sum = |file: &Pages| {
        let mut bytes = vec![0; usize::try_from(file.len()).expect("small")];
        file.read_at(&mut bytes, 0).expect("inside");
        bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>()
    };
    assert_eq!((file.len(), sum(&file)), (10_100, 10_000));
    assert_eq!((copy.len(), sum(&copy)), (9000, 1000));
}
