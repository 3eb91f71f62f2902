//! A file in memory that stores only the pages that were written.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskimage_core::{
    ByteRange, Device, Error, ErrorKind, Extent, ExtentKind, Limits, Preallocation, Result, StatusDetail, ZeroMode,
};

const PAGE: usize = 4096;
/// The limit of the file protocol.
const MAX_LEN: u64 = i64::MAX as u64;
/// The limit of written pages: a target that writes forever hits it.
const MAX_PAGES: usize = (192 << 20) / PAGE;

/// The initial bytes of a file, and the pages that were written since.
#[derive(Debug)]
pub struct Pages {
    bytes: Arc<[u8]>,
    state: Mutex<State>,
    limits: Limits,
}

#[derive(Clone, Debug)]
struct State {
    len: u64,
    written: BTreeMap<u64, Box<[u8; PAGE]>>,
    /// How many of the initial bytes are still valid: a shrink of the file drops the rest.
    initial: usize,
}

impl Pages {
    /// A file of `bytes`.
    pub fn new(bytes: Arc<[u8]>) -> Self {
        let state = State {
            len: bytes.len() as u64,
            written: BTreeMap::new(),
            initial: bytes.len(),
        };
        Self {
            bytes,
            state: Mutex::new(state),
            limits: Limits::default(),
        }
    }

    /// All its bytes.
    pub fn contents(&self) -> Vec<u8> {
        let mut all = vec![0; usize::try_from(self.len()).expect("small")];
        self.read_at(&mut all, 0).expect("inside");
        all
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The initial contents of a page, with zeroes after their end.
    fn initial(&self, state: &State, page: u64) -> Box<[u8; PAGE]> {
        let mut bytes = Box::new([0; PAGE]);
        let start = usize::try_from(page).ok().and_then(|page| page.checked_mul(PAGE));
        if let Some(there) = start.and_then(|start| self.bytes[..state.initial].get(start..)) {
            let len = there.len().min(PAGE);
            bytes[..len].copy_from_slice(&there[..len]);
        }
        bytes
    }

    /// Calls `change` with the part of each page that `range` covers, and the offset of that part in `range`.
    fn change(&self, range: ByteRange, mut change: impl FnMut(&mut [u8], usize)) -> Result<()> {
        let full = || Error::new(ErrorKind::NoSpace, "No space left on device");
        if range.end() > MAX_LEN {
            return Err(full());
        }
        let mut state = self.lock();
        let mut rest = range;
        while !rest.is_empty() {
            let (page, inside, len) = page_part(rest);
            if !state.written.contains_key(&page) {
                if state.written.len() == MAX_PAGES {
                    return Err(full());
                }
                let initial = self.initial(&state, page);
                state.written.insert(page, initial);
            }
            let bytes = state.written.get_mut(&page).expect("it was put there");
            let at = usize::try_from(rest.start() - range.start()).expect("a buffer's");
            change(&mut bytes[inside..inside + len], at);
            rest = rest.skip(len as u64);
        }
        state.len = state.len.max(range.end());
        Ok(())
    }
}

impl Clone for Pages {
    fn clone(&self) -> Self {
        Self {
            bytes: Arc::clone(&self.bytes),
            state: Mutex::new(self.lock().clone()),
            limits: self.limits.clone(),
        }
    }
}

/// The page in which `range` begins, the offset in the page, and the length of the part in this page.
fn page_part(range: ByteRange) -> (u64, usize, usize) {
    let inside = usize::try_from(range.start() % PAGE as u64).expect("small");
    let len = usize::try_from(range.len()).unwrap_or(PAGE).min(PAGE - inside);
    (range.start() / PAGE as u64, inside, len)
}

impl Device for Pages {
    fn len(&self) -> u64 {
        self.lock().len
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let state = self.lock();
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > state.len) {
            return Err(Error::corrupt(format!("Read beyond the end at {offset:#x}")));
        }
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let (page, inside, len) = page_part(ByteRange::at(at, (buf.len() - done) as u64));
            let target = &mut buf[done..done + len];
            match state.written.get(&page) {
                Some(bytes) => target.copy_from_slice(&bytes[inside..inside + len]),
                None => target.copy_from_slice(&self.initial(&state, page)[inside..inside + len]),
            }
            done += len;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let range = ByteRange::at(offset, buf.len() as u64);
        self.change(range, |bytes, at| bytes.copy_from_slice(&buf[at..at + bytes.len()]))
    }

    fn write_zeroes(&self, range: ByteRange, _mode: ZeroMode) -> Result<()> {
        // Beyond the initial bytes, a page that is not stored is zero.
        let whole = range.align_in(PAGE as u64);
        let initial = ByteRange::new(0, self.bytes.len() as u64).align_out(PAGE as u64);
        let dropped = ByteRange::new(whole.start().max(initial.end()).min(whole.end()), whole.end());
        if dropped.is_empty() || range.end() > MAX_LEN {
            return self.change(range, |bytes, _| bytes.fill(0));
        }
        let pages = dropped.units(PAGE as u64);
        self.lock().written.retain(|page, _| !pages.contains(page));
        for rest in [ByteRange::new(range.start(), dropped.start()), ByteRange::new(dropped.end(), range.end())] {
            self.change(rest, |bytes, _| bytes.fill(0))?;
        }
        Ok(())
    }

    fn discard(&self, _range: ByteRange) -> Result<()> {
        Ok(())
    }

    fn status(&self, range: ByteRange, _want: StatusDetail) -> Result<Extent> {
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
        if len > MAX_LEN {
            return Err(Error::new(ErrorKind::NoSpace, "No space left on device"));
        }
        let mut state = self.lock();
        if len < state.len {
            state.initial = state.initial.min(usize::try_from(len).unwrap_or(usize::MAX));
            state.written.split_off(&len.div_ceil(PAGE as u64));
            let (page, inside, _) = page_part(ByteRange::at(len, 1));
            if let Some(bytes) = state.written.get_mut(&page) {
                bytes[inside..].fill(0);
            }
        }
        state.len = len;
        Ok(())
    }

    fn name(&self) -> String {
        "fuzz".to_owned()
    }
}
