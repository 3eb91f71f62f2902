//! Exercises an image of arbitrary bytes: all operations that read, then some that write. None may panic, hang, or
//! allocate memory in proportion to a number in the image.

pub mod operations;

use std::sync::Arc;

use diskimage_core::{
    Budget, ByteRange, Device, Error, ErrorKind, Format, Gate, Image, Layer, MemoryDevice, NodeOptions,
    Objects, OpenContext, OpenRequest, Preallocation, Progress, Reference, Repair, Result, StatusDetail,
    ZeroMode,
};
use diskimage_formats::Qcow2Format;
use diskimage_testing::{RecordingGate, contents, create_image, open_image};

pub use diskimage_testing::PagedFile;

/// The largest length of a file, as in the file protocol.
const MAX_LEN: u64 = i64::MAX as u64;

/// The number of bytes that a target may write, so that one that writes endlessly fails.
const MAX_WRITTEN: usize = 192 << 20;

/// A file with these bytes, within the limits of all targets.
pub fn file_of(bytes: Arc<[u8]>) -> PagedFile {
    PagedFile::new(bytes).with_limits(MAX_LEN, MAX_WRITTEN)
}

/// Modifies `len` bytes of `file` from `at` on.
pub fn change(file: &PagedFile, at: u64, len: usize, how: impl FnOnce(&mut [u8])) {
    let mut bytes = vec![0; len];
    file.read_at(&mut bytes, at).expect("inside");
    how(&mut bytes);
    file.write_at(&bytes, at).expect("has room");
}

/// Modifies `parts` of `file`, each an offset and a length, by the bytes of `input`, one part after the other.
pub fn change_parts(file: &PagedFile, parts: &[(u64, usize)], input: &[u8]) {
    let mut input = input.iter();
    for &(at, len) in parts {
        change(file, at, len, |bytes| {
            for (byte, different) in bytes.iter_mut().zip(input.by_ref().take(len)) {
                *byte ^= different;
            }
        });
    }
}

/// The limit of extents to read, which bounds the work for a disk of exabytes.
const EXTENTS: usize = 200;

/// The largest cluster that is compressed.
const MAX_ENCODED: u64 = 64 << 10;

/// Opens `bytes` as an image of `format` and exercises it.
pub fn exercise(format: &dyn Format, bytes: &[u8]) {
    exercise_file(format, &file_of(bytes.into()));
}

/// Opens copies of `file` as an image of `format` and exercises it.
pub fn exercise_file(format: &dyn Format, file: &PagedFile) {
    exercise_through(format, file, &NodeOptions::new(), &OpenContext::default());
}

/// Opens `bytes` as an image of `format` that refers to a file with the bytes `part`, and exercises it.
pub fn exercise_in_parts(format: &dyn Format, bytes: &[u8], part: &[u8]) {
    let part = file_of(part.into());
    let gate = RecordingGate::new(move |_| Ok(part.copy()));
    let context = OpenContext::new(Arc::new(gate));
    exercise_through(format, &file_of(bytes.into()), &NodeOptions::new(), &context);
}

/// Opens copies of `file` as a differencing image of `format`, whose parent exists under any name, and exercises it.
pub fn exercise_on_any_parent(format: &dyn Format, file: &PagedFile) {
    let context = OpenContext::new(Arc::new(AnyParent));
    exercise_through(format, file, &NodeOptions::new(), &context);
}

/// Finds a file under every name. The layers do not open their parents.
struct AnyParent;

impl Gate for AnyParent {
    fn open(&self, _: &Reference<'_>) -> Result<Arc<dyn Device>> {
        Err(Error::new(ErrorKind::Denied, "Parents are not opened"))
    }

    fn locate(&self, _image: &str, name: &str) -> Option<String> {
        Some(name.to_owned())
    }
}

/// Opens `bytes` as an image of `format`, with options, and exercises it.
pub fn exercise_with(format: &dyn Format, bytes: &[u8], options: &NodeOptions, objects: &Arc<Objects>) {
    let context = OpenContext::default().with_objects(Arc::clone(objects));
    exercise_through(format, &file_of(bytes.into()), options, &context);
}

fn exercise_through(format: &dyn Format, file: &PagedFile, options: &NodeOptions, context: &OpenContext) {
    let open_for = |write: bool, for_check: bool, no_data: bool| {
        let file: Arc<dyn Device> = file.copy();
        let context = OpenContext {
            budget: Budget::new(64 << 20),
            ..context.clone()
        };
        format.open(OpenRequest {
            write,
            for_check,
            no_data,
            ..OpenRequest::new(file, "fuzz", &mut options.clone(), &context)
        })
    };
    let open = |write, for_check| open_for(write, for_check, false);
    if let Ok(layer) = open_for(false, false, true) {
        let _ = layer.info();
    }
    if let Ok(layer) = open(false, false) {
        read(&layer);
    }
    if let Ok(layer) = open(true, false) {
        write(layer);
    }
    for repair in [Repair::No, Repair::Leaks, Repair::All] {
        if let Ok(layer) = open(repair != Repair::No, true) {
            let _ = layer.check(repair, &Progress::none());
        }
    }
}

fn read(layer: &Arc<dyn Layer>) {
    let _ = layer.info();
    let _ = layer.bitmap_bytes(65536);
    for index in 0..3 {
        let _ = layer
            .snapshots()
            .map(|snapshots| snapshots.open(Some(&index.to_string()), None));
    }
    let image = Image::new(Arc::clone(layer), None, "fuzz", false);
    let mut rest = ByteRange::new(0, image.len());
    let mut buf = vec![0; 4096];
    for _ in 0..EXTENTS {
        if rest.is_empty() {
            break;
        }
        let len = usize::try_from(rest.len()).map_or(buf.len(), |len| len.min(buf.len()));
        let _ = image.read_at(&mut buf[..len], rest.start());
        match image.status(rest, StatusDetail::Zeroes) {
            Ok(extent) => rest = rest.skip(extent.len),
            Err(_) => rest = rest.skip(image.layer().granularity()),
        }
    }
}

fn write(layer: Arc<dyn Layer>) {
    let image = Image::new(layer, None, "fuzz", true);
    let len = image.len();
    for offset in [0, len / 3, len.saturating_sub(700)] {
        let room = usize::try_from(len - offset).unwrap_or(usize::MAX).min(600);
        let _ = image.write_at(&vec![0xa5; room], offset);
    }
    let unit = image.layer().granularity();
    let range = ByteRange::at(0, unit * 4).intersect(ByteRange::new(0, len));
    if !range.is_empty() {
        let _ = image.write_zeroes(range, ZeroMode::FastOnly);
        let _ = image.discard(range);
    }
    let _ = image.flush();
    let more = (len / 512).saturating_mul(512).saturating_add(1 << 20);
    if image.resize(more, Preallocation::Off).is_ok() {
        let _ = image.resize(512, Preallocation::Off);
    }
    let _ = image.flush();
    if unit <= MAX_ENCODED
        && let Ok(Some(mut encoder)) = image.layer().encoder(None)
    {
        let mut encoded = Vec::new();
        let cluster = vec![0x5a; usize::try_from(unit).unwrap_or(0)];
        if let Ok(true) = encoder.encode(&cluster, &mut encoded) {
            let _ = image.write_encoded(0, &encoded);
        }
    }
    let _ = image.layer().make_empty();
    let _ = image.flush();
}

/// Compresses `bytes`, filled up with zeroes to a cluster of 2^`cluster_bits` bytes, into a qcow2 image and reads it back.
///
/// # Panics
/// Other bytes are read.
pub fn encode_cluster(cluster_bits: u32, bytes: &[u8]) {
    let len = 1_usize << cluster_bits;
    let mut cluster = bytes.to_vec();
    cluster.resize(len, 0);
    let file: Arc<dyn Device> = Arc::new(MemoryDevice::default());
    let options = format!("cluster_size={len}");
    create_image(&Qcow2Format, &file, &options, len as u64).expect("is created");
    let image = open_image(&Qcow2Format, file, true, None).expect("opens");
    let mut encoder = image.layer().encoder(None).expect("encodes").expect("compresses");
    let mut encoded = Vec::new();
    if encoder.encode(&cluster, &mut encoded).expect("encodes") {
        assert!(encoded.len() < len, "a longer form");
        image.write_encoded(0, &encoded).expect("is written");
        assert!(contents(&image) == cluster, "other bytes are read");
    }
}
