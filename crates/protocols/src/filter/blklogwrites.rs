//! `blklogwrites`: logs all writes to a second device, in the format of the kernel's `dm-log-writes`, whose tools can
//! replay it.
//!
//! ```text
//!   super   magic, version, entries, sector size                  one sector
//!   entry   sector, sectors, flags, length of data                one sector, then the data
//!   entry   ...
//! ```
//!
//! All numbers are little-endian. Source: `Documentation/admin-guide/device-mapper/log-writes.rst` of Linux.

use std::sync::{Arc, Mutex, PoisonError};

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{
    ByteRange, Device, Error, FilterDevice, Filtered, Limits, Node, NodeOptions, Result, ZeroMode,
    saturating_u32, to_index, write_zero_chunks,
};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{ChildKind, Filter, FilterChild, FilterRequest, ParseName, child, missing};

#[derive(Debug)]
pub(crate) struct BlkLogWrites;

const OPTIONS: &[OptionDef] = &[
    OptionDef::new("log-append", OptionKind::Flag, "Whether an existing log goes on").or("off"),
    OptionDef::new("log-sector-size", OptionKind::Size, "The unit of the log"),
    OptionDef::new(
        "log-super-update-interval",
        OptionKind::Number,
        "After so many requests the number of entries is written",
    )
    .or("4096"),
];

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;

const FLUSH: u64 = 1 << 0;
const DISCARD: u64 = 1 << 2;

#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
struct Super {
    magic: U64,
    version: U64,
    entries: U64,
    sector_size: U32,
}

#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
struct Entry {
    sector: U64,
    sectors: U64,
    flags: U64,
    data_len: U64,
}

/// The default sector size of a new log.
const SECTOR: u64 = 512;
/// Sector sizes are smaller than this.
const MAX_SECTOR: u64 = 1 << 23;

impl Filter for BlkLogWrites {
    fn name(&self) -> &'static str {
        "blklogwrites"
    }

    fn children(&self, _options: &mut NodeOptions, _: ParseName) -> Result<Vec<FilterChild>> {
        Ok(vec![
            child("file", ChildKind::Bytes),
            child("log", ChildKind::Bytes),
        ])
    }

    fn open(&self, request: FilterRequest<'_>) -> Result<Arc<dyn Device>> {
        let node = request.node(self.name(), |_| false);
        let options = request.options.take_known(OPTIONS)?;
        let [file, log] = &request.children[..] else {
            return Err(missing("log"));
        };
        let log = Log::open(Arc::clone(&log.device), &options)?;
        let limits = Limits {
            alignment: saturating_u32(log.sector),
            ..file.device.limits().clone()
        };
        Ok(Arc::new(Filtered(Logging {
            file: Arc::clone(&file.device),
            log: Mutex::new(log),
            limits,
            node,
        })))
    }
}

#[derive(Debug)]
struct Log {
    device: Arc<dyn Device>,
    sector: u64,
    entries: u64,
    /// The sector of the next entry.
    next: u64,
    /// The superblock is updated after this many entries.
    interval: u64,
}

impl Log {
    fn open(device: Arc<dyn Device>, options: &Options) -> Result<Self> {
        let interval = options.number("log-super-update-interval").unwrap_or(0);
        let given = options.size("log-sector-size");
        let mut log = Self {
            device,
            sector: given.unwrap_or(SECTOR),
            entries: 0,
            next: 1,
            interval,
        };
        if options.flag("log-append") == Some(true) {
            if given.is_some() {
                return Err(Error::invalid(
                    "log-append and log-sector-size are mutually exclusive",
                ));
            }
            log.resume()?;
        } else if !(log.sector.is_power_of_two()
            && log.sector >= size_of::<Super>() as u64
            && log.sector < MAX_SECTOR)
        {
            return Err(Error::invalid(format!("Invalid log sector size {}", log.sector)));
        }
        if interval == 0 {
            return Err(Error::invalid(format!(
                "Invalid log superblock update interval {interval}"
            )));
        }
        Ok(log)
    }

    /// Finds the end of an existing log, to append to it. An empty device becomes a new log.
    fn resume(&mut self) -> Result<()> {
        let mut start = Super::new_zeroed();
        let device = &*self.device;
        device
            .read_padded(start.as_mut_bytes(), 0)
            .map_err(|error| error.context("Could not read log superblock"))?;
        if start.entries.get() == 0 && start.magic.get() == 0 && device.is_empty() {
            return Ok(());
        }
        if start.magic.get() != MAGIC {
            return Err(Error::invalid("Invalid log superblock magic"));
        }
        if start.version.get() != VERSION {
            return Err(Error::unsupported(format!(
                "Unsupported log version {}",
                start.version.get()
            )));
        }
        let sector = u64::from(start.sector_size.get());
        if !(sector.is_power_of_two() && sector >= size_of::<Super>() as u64 && sector < MAX_SECTOR) {
            return Err(Error::invalid(format!("Invalid log sector size {sector}")));
        }
        (self.sector, self.entries) = (sector, start.entries.get());
        for _ in 0..self.entries {
            let mut entry = Entry::new_zeroed();
            let at = self.next.checked_mul(sector).filter(|at| *at < device.len());
            let at = at.ok_or_else(|| Error::corrupt("Log ends before its last entry"))?;
            device
                .read_padded(entry.as_mut_bytes(), at)
                .map_err(|error| error.context("Failed to read log entry"))?;
            let data = if entry.flags.get() & DISCARD == 0 {
                entry.sectors.get()
            } else {
                0
            };
            self.next = self
                .next
                .checked_add(1 + data)
                .ok_or_else(|| Error::corrupt("Log entry too long"))?;
        }
        Ok(())
    }

    /// Appends the entry of a request for `range`, with its data.
    fn append(&mut self, range: ByteRange, flags: u64, data: Data<'_>) -> Result<()> {
        let start = self.next * self.sector;
        let sectors = range.len().div_ceil(self.sector);
        let stored = match data {
            Data::None => 0,
            _ => sectors,
        };
        let entry = Entry {
            sector: U64::new(range.start() / self.sector),
            sectors: U64::new(sectors),
            flags: U64::new(flags),
            // Only used by marks, which are never written here.
            data_len: U64::ZERO,
        };
        let mut head = vec![0; to_index(self.sector)?];
        head[..size_of::<Entry>()].copy_from_slice(entry.as_bytes());
        self.device.write_at(&head, start)?;
        let body = ByteRange::at(start + self.sector, stored * self.sector);
        match data {
            Data::None => {}
            Data::Bytes(bytes) => {
                self.device.write_at(bytes, body.start())?;
                let rest = body.skip(bytes.len() as u64);
                if !rest.is_empty() {
                    self.device.write_zeroes(rest, ZeroMode::Unmap)?;
                }
            }
            Data::Zeroes => self.device.write_zeroes(body, ZeroMode::Unmap)?,
        }
        self.next += 1 + stored;
        self.entries += 1;
        if flags & FLUSH != 0 || self.entries.is_multiple_of(self.interval) {
            self.write_super()?;
        }
        Ok(())
    }

    fn write_super(&self) -> Result<()> {
        let start = Super {
            magic: U64::new(MAGIC),
            version: U64::new(VERSION),
            entries: U64::new(self.entries),
            sector_size: U32::new(saturating_u32(self.sector)),
        };
        let mut sector = vec![0; to_index(self.sector)?];
        sector[..size_of::<Super>()].copy_from_slice(start.as_bytes());
        self.device.write_at(&sector, 0)?;
        self.device.flush()
    }
}

/// The data of an entry.
#[derive(Clone, Copy)]
enum Data<'a> {
    None,
    Bytes(&'a [u8]),
    Zeroes,
}

#[derive(Debug)]
struct Logging {
    file: Arc<dyn Device>,
    log: Mutex<Log>,
    limits: Limits,
    node: Node,
}

impl Logging {
    /// Executes `task` and logs it. The lock makes the order of the log that of the tasks.
    fn logged(
        &self,
        range: ByteRange,
        flags: u64,
        data: Data<'_>,
        task: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        task()?;
        log.append(range, flags, data)
    }

    /// The whole sectors around `range`, and whether they equal it.
    fn whole_sectors(&self, range: ByteRange) -> (ByteRange, bool) {
        let sector = u64::from(self.limits.alignment.max(1));
        let whole = range.align_out(sector);
        (whole, whole == range)
    }
}

impl FilterDevice for Logging {
    fn below(&self) -> &Arc<dyn Device> {
        &self.file
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let (whole, aligned) = self.whole_sectors(ByteRange::at(offset, buf.len() as u64));
        if aligned {
            return self.logged(whole, 0, Data::Bytes(buf), || self.file.write_at(buf, offset));
        }
        // The log has whole sectors only: the bytes around the write are logged with it.
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = vec![0; to_index(whole.len())?];
        (&*self.file as &dyn Device).read_padded(&mut bytes, whole.start())?;
        let skip = to_index(offset - whole.start())?;
        bytes[skip..skip + buf.len()].copy_from_slice(buf);
        self.file.write_at(buf, offset)?;
        log.append(whole, 0, Data::Bytes(&bytes))
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let (whole, aligned) = self.whole_sectors(range);
        if aligned {
            return self.logged(whole, 0, Data::Zeroes, || self.file.write_zeroes(range, mode));
        }
        if mode == ZeroMode::FastOnly {
            return Err(Error::unsupported("Not whole sectors"));
        }
        write_zero_chunks(range, |zeroes, offset| self.write_at(zeroes, offset))
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        let whole = range.align_in(u64::from(self.limits.alignment.max(1)));
        if whole.is_empty() {
            return Ok(());
        }
        self.logged(whole, DISCARD, Data::None, || self.file.discard(whole))
    }

    fn flush(&self) -> Result<()> {
        self.logged(ByteRange::at(0, 0), FLUSH, Data::None, || self.file.flush())
    }

    fn node(&self) -> Node {
        self.node.clone()
    }
}

#[cfg(test)]
mod tests {
    use diskimage_core::MemoryDevice;

    use super::*;

    fn log_of(device: &Arc<MemoryDevice>, list: &str) -> Log {
        let mut node = NodeOptions::from_list(list).expect("options");
        let options = node.take_known(OPTIONS).expect("right kinds");
        Log::open(Arc::<MemoryDevice>::clone(device), &options).expect("opens")
    }

    /// Replays a log on `bytes`. Returns the result and the number of flushes.
    fn replay(log: &[u8], mut bytes: Vec<u8>) -> (Vec<u8>, u64) {
        let (start, _) = Super::read_from_prefix(log).expect("long enough");
        let sector = usize::try_from(start.sector_size.get()).expect("small");
        let (mut at, mut flushes) = (sector, 0);
        for _ in 0..start.entries.get() {
            let (entry, _) = Entry::read_from_prefix(&log[at..]).expect("long enough");
            at += sector;
            flushes += entry.flags.get() & FLUSH;
            let to = usize::try_from(entry.sector.get()).expect("small") * sector;
            let len = usize::try_from(entry.sectors.get()).expect("small") * sector;
            if entry.flags.get() & DISCARD == 0 {
                bytes[to..to + len].copy_from_slice(&log[at..at + len]);
                at += len;
            }
        }
        (bytes, flushes)
    }

    #[test]
    fn a_replayed_log_gives_the_contents_of_the_file() {
        let before: Vec<u8> = (0..16384_u32).map(|at| at.to_le_bytes()[0]).collect();
        for list in ["", "log-sector-size=4096"] {
            let file = Arc::new(MemoryDevice::new(before.clone()));
            let log = Arc::new(MemoryDevice::default());
            for append in [list, "log-append=on"] {
                let open = log_of(&log, append);
                let limits = Limits {
                    alignment: u32::try_from(open.sector).expect("small"),
                    ..Limits::default()
                };
                let device = Filtered(Logging {
                    file: Arc::<MemoryDevice>::clone(&file),
                    log: Mutex::new(open),
                    limits,
                    node: Node::default(),
                });
                device.write_at(&[1; 4096], 4096).expect("writes");
                device.write_at(&[2; 700], 4000).expect("writes");
                device
                    .write_zeroes(ByteRange::at(8192, 4096), ZeroMode::Unmap)
                    .expect("zeroes");
                device
                    .write_zeroes(ByteRange::at(100, 50), ZeroMode::KeepAllocated)
                    .expect("zeroes");
                device.discard(ByteRange::at(0, 4096)).expect("discards");
                device.flush().expect("flushes");
            }
            assert_eq!(
                replay(&log.contents(), before.clone()),
                (file.contents(), 2),
                "{list}"
            );
        }
    }

    #[test]
    fn an_invalid_log_is_not_appended_to() {
        let appended = |bytes: Vec<u8>| {
            let mut node = NodeOptions::from_list("log-append=on").expect("options");
            let options = node.take_known(OPTIONS).expect("right kinds");
            Log::open(Arc::new(MemoryDevice::new(bytes)), &options).map_err(|error| error.chain())
        };
        assert!(appended(Vec::new()).is_ok());
        assert_eq!(
            appended(vec![0; 512]).map(drop),
            Err("Invalid log superblock magic".to_owned())
        );
        let mut endless = vec![0; 512];
        let start = Super {
            magic: U64::new(MAGIC),
            version: U64::new(VERSION),
            entries: U64::new(u64::MAX),
            sector_size: U32::new(512),
        };
        endless[..size_of::<Super>()].copy_from_slice(start.as_bytes());
        assert_eq!(
            appended(endless).map(drop),
            Err("Log ends before its last entry".to_owned())
        );
    }
}
