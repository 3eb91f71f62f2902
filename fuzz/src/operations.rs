//! Operations on a new image, against an array of bytes that has the same contents.

use std::sync::Arc;

use diskimage_core::{
    ByteRange, Device, Format, Image, NewSnapshot, Preallocation, Progress, Repair, ZeroMode, align_down,
};
use diskimage_formats::{Parallels, Qcow2Format, QcowFormat, QedFormat, Raw, Vdi, Vhdx, Vmdk, Vpc};
use diskimage_testing::{contents, create_image, open_image};

use crate::file_of;

/// The forms of images: small units, so that few operations meet many of them.
const FORMS: &[(&dyn Format, &str)] = &[
    (&Qcow2Format, "cluster_size=512"),
    (&Qcow2Format, "cluster_size=512,refcount_bits=1"),
    (&Qcow2Format, "cluster_size=1k,lazy_refcounts=on"),
    (&Qcow2Format, "cluster_size=512,compat=0.10"),
    (&Qcow2Format, "cluster_size=16k,extended_l2=on"),
    (&Qcow2Format, "cluster_size=4k,preallocation=metadata"),
    (&QedFormat, "cluster_size=4k,table_size=1"),
    (&QcowFormat, ""),
    (&Vdi, ""),
    (&Vdi, "static=on"),
    (&Vpc, "force_size=on"),
    (&Vpc, "force_size=on,subformat=fixed"),
    (&Vhdx, "block_size=1M"),
    (&Vmdk, ""),
    (&Parallels, ""),
    (&Raw, ""),
];

/// The length of a new disk in bytes.
const LEN: u64 = 3 << 20;

/// The longest disk.
const MAX_LEN: u64 = 5 << 20;

/// The most operations on one image.
const MOST: usize = 200;

/// The bytes of the input for one operation.
const STEP: usize = 6;

/// An image and what it must contain.
struct Pair {
    format: &'static dyn Format,
    file: Arc<dyn Device>,
    image: Option<Image>,
    bytes: Vec<u8>,
    /// The contents of the snapshots, oldest first.
    snapshots: Vec<Vec<u8>>,
}

/// Runs the operations that `input` describes on the form that its first byte selects.
///
/// # Panics
/// The image has other contents than it must have, or its check finds damage.
pub fn run(input: &[u8]) {
    let Some((form, steps)) = input.split_first() else {
        return;
    };
    let (format, options) = FORMS[usize::from(*form) % FORMS.len()];
    let file: Arc<dyn Device> = Arc::new(file_of(Arc::default()));
    create_image(format, &file, options, LEN).expect("is created");
    let mut pair = Pair {
        format,
        file,
        image: None,
        bytes: vec![0; usize::try_from(LEN).expect("small")],
        snapshots: Vec::new(),
    };
    for step in steps.chunks_exact(STEP).take(MOST) {
        pair.step(step.try_into().expect("has the length"));
    }
    pair.compare();
    pair.reopen();
    pair.compare();
    pair.check();
}

impl Pair {
    fn image(&mut self) -> &Image {
        self.image.get_or_insert_with(|| {
            let file = Arc::clone(&self.file);
            open_image(self.format, file, true, None).expect("opens")
        })
    }

    fn step(&mut self, [kind, at, fine, len, length, fill]: [u8; STEP]) {
        let end = self.bytes.len() as u64;
        let offset = (u64::from(at) << 14 | u64::from(fine) << 6) % end;
        let len = match length % 4 {
            0 => u64::from(len),
            1 => u64::from(len) << 9,
            2 => u64::from(len) << 12,
            _ => 512,
        };
        let range = ByteRange::at(offset, len).intersect(ByteRange::new(0, end));
        match kind % 16 {
            0..=5 => self.write(range, fill),
            6 => self.zero(range, ZeroMode::Unmap),
            7 => self.zero(range, ZeroMode::KeepAllocated),
            8 => self.discard(range),
            9 => self.image().flush().expect("flushes"),
            10 => self.reopen(),
            11 => self.resize(align_down(u64::from(at) << 15 | u64::from(fine) << 9, 512)),
            12 => self.encode(offset, fill),
            13 => self.snapshot(fill),
            14 => self.compare_part(range),
            _ => self.check(),
        }
    }

    fn part(&mut self, range: ByteRange) -> &mut [u8] {
        let start = usize::try_from(range.start()).expect("small");
        let end = usize::try_from(range.end()).expect("small");
        &mut self.bytes[start..end]
    }

    fn write(&mut self, range: ByteRange, fill: u8) {
        if range.is_empty() {
            return;
        }
        for (index, byte) in self.part(range).iter_mut().enumerate() {
            *byte = fill.wrapping_add(u8::try_from(index % 251).expect("fits"));
        }
        let data = self.part(range).to_vec();
        self.image().write_at(&data, range.start()).expect("writes");
    }

    fn zero(&mut self, range: ByteRange, mode: ZeroMode) {
        if range.is_empty() {
            return;
        }
        self.image().write_zeroes(range, mode).expect("writes zeroes");
        self.part(range).fill(0);
    }

    /// A discarded byte is as before, or zero.
    fn discard(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        self.image().discard(range).expect("discards");
        let mut seen = self.part(range).to_vec();
        self.image().read_at(&mut seen, range.start()).expect("readable");
        let before = self.part(range);
        assert!(
            seen.iter()
                .zip(&*before)
                .all(|(seen, before)| *seen == 0 || seen == before),
            "a discard leaves other bytes"
        );
        before.copy_from_slice(&seen);
    }

    fn resize(&mut self, len: u64) {
        let len = len.clamp(512, MAX_LEN);
        if self.image().resize(len, Preallocation::Off).is_ok() {
            self.bytes.resize(usize::try_from(len).expect("small"), 0);
        }
    }

    fn encode(&mut self, offset: u64, fill: u8) {
        let image = self.image();
        let unit = image.layer().granularity();
        let Ok(Some(mut encoder)) = image.layer().encoder(None) else {
            return;
        };
        let range = ByteRange::at(align_down(offset, unit), unit);
        if range.end() > image.len() {
            return;
        }
        let cluster = vec![fill; usize::try_from(unit).expect("small")];
        let mut encoded = Vec::new();
        if encoder.encode(&cluster, &mut encoded).expect("encodes") {
            let written = image.write_encoded(range.start(), &encoded);
            if written.is_ok() {
                self.part(range).copy_from_slice(&cluster);
            }
        }
    }

    fn snapshot(&mut self, what: u8) {
        let count = self.snapshots.len();
        let Some(snapshots) = self.image().layer().snapshots() else {
            return;
        };
        match what % 3 {
            0 if count < 4 => {
                let new = NewSnapshot {
                    name: "s",
                    date_sec: 0,
                    date_nsec: 0,
                };
                // One reference more may be too many for the width of the refcounts.
                if snapshots.create(&new).is_ok() {
                    self.snapshots.push(self.bytes.clone());
                }
            }
            1 if count > 0 => {
                let index = usize::from(what / 3) % count;
                if snapshots.apply(index).is_ok() {
                    self.bytes = self.snapshots[index].clone();
                }
            }
            2 if count > 0 => {
                let index = usize::from(what / 3) % count;
                if snapshots.delete(index).is_ok() {
                    self.snapshots.remove(index);
                }
            }
            _ => {}
        }
        // The length may have changed.
        self.reopen();
    }

    fn reopen(&mut self) {
        if let Some(image) = self.image.take() {
            Arc::new(image).close().expect("is closed");
        }
    }

    fn compare_part(&mut self, range: ByteRange) {
        let mut seen = self.part(range).to_vec();
        seen.fill(0xee);
        self.image().read_at(&mut seen, range.start()).expect("readable");
        assert!(self.part(range) == seen, "other bytes in {range:?}");
    }

    fn compare(&mut self) {
        let seen = contents(self.image());
        assert!(self.bytes == seen, "other bytes");
    }

    fn check(&mut self) {
        self.image().flush().expect("flushes");
        if let Ok(found) = self.image().layer().check(Repair::No, &Progress::none()) {
            assert_eq!((found.corruptions, found.check_errors), (0, 0), "{found:?}");
        }
    }
}
