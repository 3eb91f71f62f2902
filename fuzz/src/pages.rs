//! A file in memory of which only the pages that were written take any.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskimage_core::{
    ByteRange, Device, Error, ErrorKind, Extent, ExtentKind, Limits, Preallocation, Result, StatusDetail, ZeroMode,
};

const PAGE: usize = 4096;
/// As in the file protocol.
const MAX_LEN: u64 = i64::MAX as u64;
/// How much may be written, so that a target that writes for ever is found by its memory.
const MAX_PAGES: usize = (192 << 20) / PAGE;

/// The bytes of a file, and the pages that differ from them by now.
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
    /// Where the original bytes end to count, after the file was shorter than they are.
    original: usize,
}

impl Pages {
    /// A file of `bytes`.
    pub fn new(bytes: Arc<[u8]>) -> Self {
        let state = State {
            len: bytes.len() as u64,
            written: BTreeMap::new(),
            original: bytes.len(),
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

    /// The original contents of a page, with zeroes after their end.
    fn original(&self, state: &State, page: u64) -> Box<[u8; PAGE]> {
        let mut bytes = Box::new([0; PAGE]);
        let start = usize::try_from(page).ok().and_then(|page| page.checked_mul(PAGE));
        if let Some(there) = start.and_then(|start| self.bytes[..state.original].get(start..)) {
            let len = there.len().min(PAGE);
            bytes[..len].copy_from_slice(&there[..len]);
        }
        bytes
    }

    /// Calls `change` with each page of `range`, the part of it that is meant, and where that begins in `range`.
    fn change(&self, range: ByteRange, mut change: impl FnMut(&mut [u8], usize)) -> Result<()> {
        let full = || Error::new(ErrorKind::NoSpace, "No space left on device");
        if range.end() > MAX_LEN {
            return Err(full());
        }
        let mut state = self.lock();
        let mut rest = range;
        while !rest.is_empty() {
            let (page, inside, len) = piece(rest);
            if !state.written.contains_key(&page) {
                if state.written.len() == MAX_PAGES {
                    return Err(full());
                }
                let original = self.original(&state, page);
                state.written.insert(page, original);
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

/// The page in which `range` begins, where in it, and for how long.
fn piece(range: ByteRange) -> (u64, usize, usize) {
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
            let (page, inside, len) = piece(ByteRange::at(at, (buf.len() - done) as u64));
            let target = &mut buf[done..done + len];
            match state.written.get(&page) {
                Some(bytes) => target.copy_from_slice(&bytes[inside..inside + len]),
                None => target.copy_from_slice(&self.original(&state, page)[inside..inside + len]),
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
        // Beyond the original bytes, a page that is not there is zero.
        let whole = range.align_in(PAGE as u64);
        let original = ByteRange::new(0, self.bytes.len() as u64).align_out(PAGE as u64);
        let forgotten = ByteRange::new(whole.start().max(original.end()).min(whole.end()), whole.end());
        if forgotten.is_empty() || range.end() > MAX_LEN {
            return self.change(range, |bytes, _| bytes.fill(0));
        }
        let pages = forgotten.units(PAGE as u64);
        self.lock().written.retain(|page, _| !pages.contains(page));
        for rest in [ByteRange::new(range.start(), forgotten.start()), ByteRange::new(forgotten.end(), range.end())] {
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
            state.original = state.original.min(usize::try_from(len).unwrap_or(usize::MAX));
            state.written.split_off(&len.div_ceil(PAGE as u64));
            let (page, inside, _) = piece(ByteRange::at(len, 1));
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
