//! A file in memory that stores only the pages that were written, and whose copies share pages.
//!
//! ```text
//!   initial bytes   [ shared by all copies        ]
//!   pages                 [ page 1 ]      [ page 3 ]          those written since; a copy shares them until it writes
//!   length          ├────────────────────────────────────┤    beyond the initial bytes, missing pages are zero
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskimage_core::{
    ByteRange, Device, Error, ErrorKind, Extent, Limits, Preallocation, Result, StatusDetail, ZeroMode,
};

const PAGE: usize = 4096;

type Page = Arc<[u8; PAGE]>;

/// The largest length of a file, as of ext4 with blocks of 4 KiB.
const MAX_LEN: u64 = 16 << 40;

/// A file in memory. It is cheap to copy, and it may be as long as a file system permits.
#[derive(Debug)]
pub struct PagedFile {
    initial: Arc<[u8]>,
    state: Mutex<FileState>,
    limits: Limits,
    max_len: u64,
    max_pages: usize,
}

#[derive(Clone, Debug)]
struct FileState {
    len: u64,
    /// How many of the initial bytes are still a part of the file: the shortest length that it has had.
    initial_len: usize,
    pages: BTreeMap<u64, Page>,
}

impl Default for PagedFile {
    fn default() -> Self {
        Self::new(Arc::default())
    }
}

impl PagedFile {
    /// A file with these bytes.
    pub fn new(initial: Arc<[u8]>) -> Self {
        let state = FileState {
            len: initial.len() as u64,
            initial_len: initial.len(),
            pages: BTreeMap::new(),
        };
        Self {
            initial,
            state: Mutex::new(state),
            limits: Limits::default(),
            max_len: MAX_LEN,
            max_pages: usize::MAX,
        }
    }

    /// The same file with another largest length, and with an upper bound for the bytes of pages. Both count as a full
    /// disk.
    #[must_use]
    pub fn with_limits(self, max_len: u64, max_bytes: usize) -> Self {
        Self {
            max_len,
            max_pages: max_bytes / PAGE,
            ..self
        }
    }

    /// A copy, whose changes do not show in this file.
    pub fn copy(&self) -> Arc<Self> {
        Arc::new(Self {
            initial: Arc::clone(&self.initial),
            state: Mutex::new(self.lock().clone()),
            limits: self.limits.clone(),
            ..*self
        })
    }

    /// All bytes of a small file.
    pub fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; index(self.len())];
        self.read_at(&mut bytes, 0).expect("inside");
        bytes
    }

    /// The number of `width` bytes at `at`, 0 beyond the end.
    pub fn number(&self, at: u64, width: usize, big_endian: bool) -> u64 {
        let mut bytes = [0; 8];
        (self as &dyn Device)
            .read_padded(&mut bytes[..width], at)
            .expect("memory");
        if big_endian {
            bytes[..width].reverse();
        }
        u64::from_le_bytes(bytes)
    }

    /// Writes a number of `width` bytes at `at`.
    pub fn set_number(&self, at: u64, width: usize, big_endian: bool, value: u64) {
        let mut bytes = value.to_le_bytes();
        if big_endian {
            bytes[..width].reverse();
        }
        self.write_at(&bytes[..width], at).expect("memory");
    }

    fn lock(&self) -> MutexGuard<'_, FileState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn require_room(&self, range: ByteRange) -> Result<()> {
        if range.end() > self.max_len {
            return Err(full());
        }
        Ok(())
    }

    /// The initial bytes of a page, padded with zeroes.
    fn initial_page(&self, state: &FileState, page: u64) -> [u8; PAGE] {
        let mut bytes = [0; PAGE];
        let start = usize::try_from(page).ok().and_then(|page| page.checked_mul(PAGE));
        if let Some(rest) = start.and_then(|start| self.initial[..state.initial_len].get(start..)) {
            let len = rest.len().min(PAGE);
            bytes[..len].copy_from_slice(&rest[..len]);
        }
        bytes
    }

    /// Calls `change` with the part of each page in `range`, and with the offset of that part in `range`.
    fn change(
        &self,
        state: &mut FileState,
        range: ByteRange,
        mut change: impl FnMut(&mut [u8], usize),
    ) -> Result<()> {
        for part in parts(range) {
            if !state.pages.contains_key(&part.page) {
                if state.pages.len() >= self.max_pages {
                    return Err(full());
                }
                let initial = Arc::new(self.initial_page(state, part.page));
                state.pages.insert(part.page, initial);
            }
            if let Some(page) = state.pages.get_mut(&part.page) {
                change(&mut Arc::make_mut(page)[part.inside], part.of_range.start);
            }
        }
        Ok(())
    }
}

fn full() -> Error {
    Error::new(ErrorKind::NoSpace, "No space left on device")
}

fn index(value: u64) -> usize {
    usize::try_from(value).expect("small")
}

/// The part of a range in one page.
struct Part {
    page: u64,
    /// The bytes of the page.
    inside: std::ops::Range<usize>,
    /// The same bytes as a part of the range.
    of_range: std::ops::Range<usize>,
}

fn parts(range: ByteRange) -> impl Iterator<Item = Part> {
    range.units(PAGE as u64).map(move |page| {
        let start = page * PAGE as u64;
        let part = ByteRange::at(start, PAGE as u64).intersect(range);
        Part {
            page,
            inside: index(part.start() - start)..index(part.end() - start),
            of_range: index(part.start() - range.start())..index(part.end() - range.start()),
        }
    })
}

impl Device for PagedFile {
    fn len(&self) -> u64 {
        self.lock().len
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let state = self.lock();
        if offset
            .checked_add(buf.len() as u64)
            .is_none_or(|end| end > state.len)
        {
            return Err(Error::corrupt(format!("Read beyond the end at {offset:#x}")));
        }
        for part in parts(ByteRange::at(offset, buf.len() as u64)) {
            match state.pages.get(&part.page) {
                Some(page) => buf[part.of_range].copy_from_slice(&page[part.inside]),
                None => {
                    buf[part.of_range].copy_from_slice(&self.initial_page(&state, part.page)[part.inside]);
                }
            }
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let range = ByteRange::at(offset, buf.len() as u64);
        self.require_room(range)?;
        let mut state = self.lock();
        self.change(&mut state, range, |bytes, at| {
            bytes.copy_from_slice(&buf[at..at + bytes.len()]);
        })?;
        state.len = state.len.max(range.end());
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange, _mode: ZeroMode) -> Result<()> {
        self.require_room(range)?;
        let mut state = self.lock();
        // Beyond the initial bytes a missing page is zero.
        let initial = ByteRange::new(0, state.initial_len as u64).align_out(PAGE as u64);
        let whole = range.align_in(PAGE as u64);
        let start = whole.start().max(initial.end()).min(whole.end());
        let removed = ByteRange::new(start, whole.end());
        if removed.is_empty() {
            self.change(&mut state, range, |bytes, _| bytes.fill(0))?;
        } else {
            let pages = removed.units(PAGE as u64);
            let mut rest = state.pages.split_off(&pages.start);
            state.pages.append(&mut rest.split_off(&pages.end));
            for edge in [
                ByteRange::new(range.start(), removed.start()),
                ByteRange::new(removed.end(), range.end()),
            ] {
                self.change(&mut state, edge, |bytes, _| bytes.fill(0))?;
            }
        }
        state.len = state.len.max(range.end());
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
        self.require_room(ByteRange::new(0, len))?;
        let mut state = self.lock();
        if len < state.len {
            state.initial_len = state.initial_len.min(usize::try_from(len).unwrap_or(usize::MAX));
            state.pages.split_off(&len.div_ceil(PAGE as u64));
            let inside = index(len % PAGE as u64);
            if let Some(page) = state.pages.get_mut(&(len / PAGE as u64)) {
                Arc::make_mut(page)[inside..].fill(0);
            }
        }
        state.len = len;
        Ok(())
    }

    fn name(&self) -> String {
        "pages".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(file: &PagedFile) -> u32 {
        file.contents().iter().map(|byte| u32::from(*byte)).sum()
    }

    #[test]
    fn copies_change_independently() {
        for initial in [0, 6000] {
            let file = PagedFile::new(vec![3; initial].into());
            file.write_at(&[1; 10_000], 100).expect("memory");
            file.write_zeroes(ByteRange::new(0, 100), ZeroMode::Unmap)
                .expect("memory");
            let copy = file.copy();
            copy.write_zeroes(ByteRange::new(50, 5000), ZeroMode::Unmap)
                .expect("memory");
            copy.resize(6000, Preallocation::Off).expect("memory");
            copy.resize(9000, Preallocation::Off).expect("memory");
            assert_eq!(file.len(), 10_100);
            assert_eq!(sum(&file), 10_000);
            assert_eq!(copy.len(), 9000);
            assert_eq!(sum(&copy), 1000);
        }
    }

    #[test]
    fn initial_bytes_do_not_reappear() {
        let file = PagedFile::new(vec![3; 20_000].into());
        file.resize(5000, Preallocation::Off).expect("memory");
        file.resize(20_000, Preallocation::Off).expect("memory");
        assert_eq!(sum(&file), 15_000);
        file.write_zeroes(ByteRange::new(1000, 30_000), ZeroMode::Unmap)
            .expect("memory");
        assert_eq!(file.len(), 30_000);
        assert_eq!(sum(&file), 3000);
    }

    #[test]
    fn limits_are_a_full_disk() {
        let file = PagedFile::default().with_limits(1 << 20, 2 * PAGE);
        file.write_at(&[1; 2 * PAGE], 0).expect("has room");
        assert!(file.write_at(&[1], 2 * PAGE as u64).is_err());
        assert!(file.resize((1 << 20) + 1, Preallocation::Off).is_err());
    }
}
