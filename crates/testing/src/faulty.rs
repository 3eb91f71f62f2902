//! A device that injects errors.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskimage_core::{
    ByteRange, Device, Error, Extent, Limits, Preallocation, Result, StatusDetail, ZeroMode, align_down,
    to_index,
};

/// Which requests are counted and can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Requests {
    /// All requests.
    Any,
    /// Requests that change the device: writes, zeroes and changes of length.
    Writes,
}

/// A fault to inject.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Which requests are counted.
    pub requests: Requests,
    /// How many of these succeed before the fault.
    pub after: u64,
    /// Whether all later ones fail as well.
    pub persistent: bool,
    /// Whether a failed write has written about half of its sectors.
    pub torn: bool,
    /// The number of the error.
    pub errno: i32,
}

impl Fault {
    /// Every request from the n-th on fails.
    pub fn from(after: u64) -> Self {
        Self {
            requests: Requests::Any,
            after,
            persistent: true,
            torn: false,
            errno: EIO,
        }
    }

    /// Only the n-th request fails.
    pub fn once(after: u64) -> Self {
        Self {
            persistent: false,
            ..Self::from(after)
        }
    }

    /// The same fault, where a failed write has written about half of its sectors.
    #[must_use]
    pub fn torn(self) -> Self {
        Self { torn: true, ..self }
    }

    /// The same fault as of a full disk: `No space left on device`.
    #[must_use]
    pub fn full(self) -> Self {
        Self {
            errno: ENOSPC,
            ..self
        }
    }

    /// The same fault, counting only `requests`.
    #[must_use]
    pub fn counting(self, requests: Requests) -> Self {
        Self { requests, ..self }
    }
}

/// A device that passes requests on and fails those that it is set up to fail: with `Input/output error`, or with `No
/// space left on device` beyond a limit.
#[derive(Debug)]
pub struct FaultyDevice {
    below: Arc<dyn Device>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    fault: Option<Fault>,
    seen: u64,
    failed: u64,
    limit: Option<u64>,
}

/// The unit that a disk writes atomically.
const SECTOR: u64 = 512;
/// `Input/output error`.
const EIO: i32 = 5;
/// `No space left on device`.
const ENOSPC: i32 = 28;

impl FaultyDevice {
    /// A device that injects no errors yet.
    pub fn new(below: Arc<dyn Device>) -> Self {
        Self {
            below,
            state: Mutex::default(),
        }
    }

    /// Injects `fault` from now on.
    pub fn arm(&self, fault: Fault) {
        *self.lock() = State {
            fault: Some(fault),
            ..State::default()
        };
    }

    /// Fails writes beyond the first `bytes` from now on.
    pub fn limit_len(&self, bytes: u64) {
        *self.lock() = State {
            limit: Some(bytes),
            ..State::default()
        };
    }

    /// Stops injecting errors. Returns the number of requests that have failed.
    pub fn disarm(&self) -> u64 {
        std::mem::take(&mut *self.lock()).failed
    }

    /// The number of requests since [`FaultyDevice::arm`] that the fault counts.
    pub fn seen(&self) -> u64 {
        self.lock().seen
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a request. Returns the fault to inject, if any.
    fn count(&self, change: bool) -> Option<Fault> {
        let mut state = self.lock();
        let fault = state
            .fault
            .filter(|fault| change || fault.requests == Requests::Any)?;
        let number = state.seen;
        state.seen += 1;
        let hit = number == fault.after || (fault.persistent && number > fault.after);
        state.failed += u64::from(hit);
        hit.then_some(fault)
    }

    fn pass(&self, change: bool) -> Result<()> {
        match self.count(change) {
            Some(fault) => Err(Error::from_errno(fault.errno)),
            None => Ok(()),
        }
    }

    /// Fails a write that ends beyond the limit.
    fn fit(&self, end: u64) -> Result<()> {
        let mut state = self.lock();
        let full = state.limit.is_some_and(|limit| end > limit);
        state.failed += u64::from(full);
        if full {
            return Err(Error::from_errno(ENOSPC));
        }
        Ok(())
    }
}

impl Device for FaultyDevice {
    fn len(&self) -> u64 {
        self.below.len()
    }
    fn name(&self) -> String {
        self.below.name()
    }
    fn limits(&self) -> &Limits {
        self.below.limits()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.pass(false)?;
        self.below.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        if let Some(fault) = self.count(true) {
            let half = align_down(offset + buf.len() as u64 / 2, SECTOR).saturating_sub(offset);
            if fault.torn && half > 0 {
                self.below.write_at(&buf[..to_index(half)?], offset)?;
            }
            return Err(Error::from_errno(fault.errno));
        }
        if let Err(error) = self.fit(offset + buf.len() as u64) {
            let limit = self.lock().limit.unwrap_or(0);
            let room = to_index(limit.saturating_sub(offset))?;
            self.below.write_at(&buf[..room.min(buf.len())], offset)?;
            return Err(error);
        }
        self.below.write_at(buf, offset)
    }
    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.pass(true)?;
        self.fit(range.end())?;
        self.below.write_zeroes(range, mode)
    }
    fn discard(&self, range: ByteRange) -> Result<()> {
        self.pass(false)?;
        self.below.discard(range)
    }
    fn status(&self, range: ByteRange, detail: StatusDetail) -> Result<Extent> {
        self.pass(false)?;
        self.below.status(range, detail)
    }
    fn flush(&self) -> Result<()> {
        self.pass(false)?;
        self.below.flush()
    }
    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        self.pass(true)?;
        if preallocation != Preallocation::Off {
            self.fit(len)?;
        }
        self.below.resize(len, preallocation)
    }
}

#[cfg(test)]
mod tests {
    use diskimage_core::MemoryDevice;

    use super::*;

    fn device() -> (Arc<MemoryDevice>, FaultyDevice) {
        let memory = Arc::new(MemoryDevice::default());
        let below: Arc<dyn Device> = Arc::<MemoryDevice>::clone(&memory);
        (memory, FaultyDevice::new(below))
    }

    #[test]
    fn the_chosen_request_fails_or_all_from_it_on() {
        for (fault, outcomes) in [
            (Fault::once(1), [true, false, true]),
            (Fault::from(1), [true, false, false]),
        ] {
            let (_, device) = device();
            device.arm(fault);
            let got = [device.flush(), device.write_at(b"a", 0), device.flush()].map(|result| result.is_ok());
            assert_eq!(got, outcomes);
            assert_eq!(device.disarm(), outcomes.iter().filter(|ok| !**ok).count() as u64);
            assert!(device.flush().is_ok());
        }
    }

    #[test]
    fn torn_writes_and_full_disks_write_a_part() {
        let (memory, device) = device();
        device.arm(Fault::once(0).torn().counting(Requests::Writes));
        device.flush().expect("not counted");
        assert!(device.write_at(&[1; 1024], 0).is_err());
        assert_eq!(memory.contents(), [1; 512]);
        device.limit_len(514);
        let error = device.write_at(b"xyz", 512).expect_err("too long");
        assert_eq!(error.errno(), Some(ENOSPC));
        assert_eq!(&memory.contents()[512..], b"xy");
    }
}
