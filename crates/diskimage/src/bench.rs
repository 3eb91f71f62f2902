//! Sends requests of one size to an image and measures how long they take.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use diskimage_core::{AlignedBuf, Device, Error, Image, Result, to_index};

use crate::workers;

/// The requests that are sent to an image to measure it.
#[derive(Clone, Copy, Debug)]
pub struct Bench {
    /// What the requests do.
    pub requests: Requests,
    /// The number of requests.
    pub count: u64,
    /// How many requests are in flight at once, as far as threads and memory allow.
    pub depth: u64,
    /// The length of each request in bytes.
    pub size: u64,
    /// The guest offset of the first request.
    pub offset: u64,
    /// The distance from one request's offset to the next one's, modulo the length of the disk.
    pub step: u64,
}

/// What the requests do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Requests {
    /// They read.
    Read,
    /// They write.
    Write {
        /// The byte that fills the buffers.
        pattern: u8,
        /// A flush is sent whenever the number of requests left is a multiple of this; 0 for no flushes.
        flush_interval: u64,
        /// Whether a flush is a barrier: it waits for the requests before it, and those after it wait for it.
        drain: bool,
    },
}

/// The largest number of threads. A limit of this program: more threads take memory and no request gets faster.
const MAX_THREADS: u64 = 256;

/// The memory for all buffers together in bytes, except that one buffer is always allocated. A limit of this program.
const MAX_BUFFERS: u64 = 1 << 30;

impl Bench {
    /// Sends the requests, and returns how long they took.
    ///
    /// # Errors
    /// The error of the first request that failed, and `ENOMEM` if a buffer cannot be allocated.
    pub fn run(&self, image: &Image) -> Result<Duration> {
        let threads = self
            .depth
            .min(self.count)
            .min(MAX_THREADS)
            .min((MAX_BUFFERS / self.size.max(1)).max(1));
        let size = usize::try_from(self.size).map_err(|_| Error::invalid("Buffer too large"))?;
        let pattern = match self.requests {
            Requests::Read => AlignedBuf::default(),
            Requests::Write { pattern, .. } => {
                let mut buf = AlignedBuf::new(size)?;
                buf.fill(pattern);
                buf
            }
        };
        // All threads write the same bytes; each reads into its own buffer.
        let buffer = || match self.requests {
            Requests::Read => AlignedBuf::new(size),
            Requests::Write { .. } => Ok(AlignedBuf::default()),
        };
        let queue = Queue {
            bench: self,
            image,
            pattern,
            state: Mutex::new(QueueState {
                offset: self.offset,
                ..QueueState::default()
            }),
            drained: Condvar::new(),
        };
        let start = Instant::now();
        if threads > 0 {
            workers::run(to_index(threads)?, buffer, |buf| queue.work(buf))?;
        }
        let state = queue.state.into_inner();
        if let Some(failure) = state.unwrap_or_else(PoisonError::into_inner).failure {
            return Err(failure);
        }
        if let Requests::Write { .. } = self.requests {
            image.flush()?;
        }
        Ok(start.elapsed())
    }

    /// The flush that follows when `issued` requests have been sent, if one does.
    fn flushes_after(&self, issued: u64) -> Option<Flush> {
        match self.requests {
            Requests::Write {
                flush_interval,
                drain,
                ..
            } if flush_interval > 0
                && issued >= self.depth
                && (self.count - issued).is_multiple_of(flush_interval) =>
            {
                Some(Flush { drain })
            }
            _ => None,
        }
    }
}

struct Flush {
    drain: bool,
}

/// What the threads share.
struct Queue<'a> {
    bench: &'a Bench,
    image: &'a Image,
    /// The bytes of every write.
    pattern: AlignedBuf,
    state: Mutex<QueueState>,
    /// Signalled when the last request in flight is done, and when a flush is done.
    drained: Condvar,
}

#[derive(Default)]
struct QueueState {
    issued: u64,
    /// The guest offset of the next request.
    offset: u64,
    in_flight: u64,
    /// A flush with `drain` is in flight: no request is sent until it is done.
    flushing: bool,
    failure: Option<Error>,
}

impl Queue<'_> {
    fn work(&self, mut buf: AlignedBuf) {
        while let Some((offset, flush)) = self.claim() {
            let outcome = match self.bench.requests {
                Requests::Read => self.image.read_at(&mut buf, offset),
                Requests::Write { .. } => self.image.write_at(&self.pattern, offset),
            };
            self.done(outcome);
            if let Some(flush) = flush {
                self.flush(&flush);
            }
        }
    }

    /// The guest offset of the next request, and the flush that follows it. `None` ends the thread.
    fn claim(&self) -> Option<(u64, Option<Flush>)> {
        let mut state = self.lock();
        while state.flushing && state.failure.is_none() {
            state = self.drained.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.issued >= self.bench.count || state.failure.is_some() {
            return None;
        }
        let offset = state.offset;
        state.issued += 1;
        state.in_flight += 1;
        let next = u128::from(offset) + u128::from(self.bench.step);
        state.offset = match u128::from(self.image.len()) {
            0 => offset,
            // The remainder is less than the length, which has 64 bits.
            len => u64::try_from(next % len).unwrap_or(offset),
        };
        let flush = self.bench.flushes_after(state.issued);
        state.flushing = flush.as_ref().is_some_and(|flush| flush.drain);
        Some((offset, flush))
    }

    fn done(&self, outcome: Result<()>) {
        let mut state = self.lock();
        state.in_flight -= 1;
        if let Err(error) = outcome {
            state.failure.get_or_insert(error);
        }
        if state.in_flight == 0 || state.failure.is_some() {
            self.drained.notify_all();
        }
    }

    fn flush(&self, flush: &Flush) {
        if flush.drain {
            let mut state = self.lock();
            while state.in_flight > 0 {
                state = self.drained.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        let outcome = self.image.flush();
        let mut state = self.lock();
        if let Err(error) = outcome {
            state.failure.get_or_insert(error);
        }
        if flush.drain {
            state.flushing = false;
        }
        drop(state);
        self.drained.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{contents, raw};

    fn bench(requests: Requests) -> Bench {
        Bench {
            requests,
            count: 10,
            depth: 3,
            size: 16,
            offset: 0,
            step: 16,
        }
    }

    fn writing(flush_interval: u64, drain: bool) -> Requests {
        Requests::Write {
            pattern: 7,
            flush_interval,
            drain,
        }
    }

    #[test]
    fn offsets_wrap_at_the_end_of_the_disk() {
        let image = raw(vec![0; 1024]);
        let bench = Bench {
            count: 3,
            size: 8,
            offset: 600,
            step: 600,
            ..bench(writing(0, true))
        };
        bench.run(&image).expect("writes");
        let written: Vec<_> = (0..1024).filter(|at| contents(&image)[*at] == 7).collect();
        let expected: Vec<_> = (176..184).chain(600..608).chain(776..784).collect();
        assert_eq!(written, expected);
    }

    #[test]
    fn a_request_beyond_the_end_of_the_disk_fails() {
        let reading = Bench {
            size: 500,
            step: 500,
            ..bench(Requests::Read)
        };
        let run = |len| reading.run(&raw(vec![0; len]));
        let message = |len| run(len).map(drop).map_err(|error| error.chain());
        assert_eq!(message(1024), Err("Input/output error".to_owned()));
        assert_eq!(message(0), Err("Input/output error".to_owned()));
        assert!(run(5120).is_ok());
    }

    #[test]
    fn flushes_come_when_the_number_left_is_a_multiple_of_the_interval() {
        let flushes = |count, depth, interval| -> Vec<u64> {
            let bench = Bench {
                count,
                depth,
                ..bench(writing(interval, true))
            };
            (1..=count)
                .filter(|at| bench.flushes_after(*at).is_some())
                .collect()
        };
        assert_eq!(flushes(7, 2, 2), [3, 5, 7]);
        assert_eq!(flushes(7, 2, 3), [4, 7]);
        assert_eq!(flushes(8, 2, 2), [2, 4, 6, 8]);
        assert_eq!(flushes(8, 3, 4), [4, 8]);
        assert!(flushes(8, 3, 0).is_empty());
    }

    #[test]
    fn flushing_with_and_without_drain_ends() {
        for drain in [true, false] {
            let image = raw(vec![0; 1536]);
            let bench = Bench {
                count: 96,
                ..bench(writing(3, drain))
            };
            bench.run(&image).expect("writes");
            assert!(contents(&image).iter().all(|byte| *byte == 7));
        }
    }
}
