//! Failing requests and full disks: the conversion ends with the error, and the sources are unchanged.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use diskimage_core::{Device, Image, MemoryDevice, Progress, Repair, Result};
use diskimage_testing::{Fault, FaultyDevice, Requests};

use super::{DISK, KIB, pattern, threads};
use crate::Conversion;
use crate::testing::{contents, create, faulty, image, open};

/// A way to create and write a target.
#[derive(Clone, Copy, Debug)]
struct Way {
    format: &'static str,
    options: &'static str,
    compress: bool,
    out_of_order: bool,
}

const WAYS: [Way; 6] = [
    way("raw", ""),
    way("qcow2", "cluster_size=64k"),
    way("qcow2", "cluster_size=64k,extended_l2=on"),
    Way {
        out_of_order: true,
        ..way("qcow2", "cluster_size=16k")
    },
    Way {
        compress: true,
        ..way("qcow2", "cluster_size=64k")
    },
    Way {
        compress: true,
        ..way("qcow2", "cluster_size=16k,compression_type=zstd")
    },
];

const fn way(format: &'static str, options: &'static str) -> Way {
    Way {
        format,
        options,
        compress: false,
        out_of_order: false,
    }
}

/// An overlay on a backing image, and the files of both.
struct Source {
    image: Arc<Image>,
    files: [Arc<MemoryDevice>; 2],
    before: [Vec<u8>; 2],
    top: Arc<FaultyDevice>,
}

impl Source {
    fn new() -> Self {
        let (base, base_file) = image("qcow2", "cluster_size=4k", DISK);
        base.write_at(&pattern(3 << 20, 5), 512 * KIB).expect("memory");
        base.flush().expect("memory");
        let (top, top_file) = faulty(Vec::new());
        let device: Arc<dyn Device> = Arc::<FaultyDevice>::clone(&top);
        create(&device, "qcow2", "cluster_size=64k", DISK);
        let image = open(&device, "qcow2", Some(base));
        for at in (0..DISK).step_by(600 << 10) {
            image
                .write_at(&pattern(100 << 10, 6), at + 100 * KIB)
                .expect("memory");
        }
        image.flush().expect("memory");
        let files = [base_file, top_file];
        Self {
            before: [files[0].contents(), files[1].contents()],
            image,
            files,
            top,
        }
    }

    fn is_untouched(&self) -> bool {
        let both = self.files.iter().zip(&self.before);
        both.into_iter().all(|(file, before)| file.contents() == *before)
    }
}

/// Converts, and panics if that does not end.
fn convert(source: &Source, target: &Arc<Image>, way: Way, count: u32) -> Result<()> {
    let (sender, receiver) = mpsc::channel();
    let (sources, target) = ([Arc::clone(&source.image)], Arc::clone(target));
    std::thread::spawn(move || {
        let mut conversion = Conversion::new(&sources, &target);
        conversion.compress = way.compress;
        conversion.out_of_order = way.out_of_order;
        conversion.parallel = threads(count);
        let result = conversion.run().and_then(|_| target.flush());
        sender.send(result)
    });
    let result = receiver.recv_timeout(Duration::from_secs(120));
    result.expect("the threads end")
}

/// Converts to a target with a fault that `arm` sets, with one thread and with several. Returns whether the fault
/// occurred.
fn fails(source: &Source, way: Way, errno: i32, arm: impl Fn(&FaultyDevice)) -> bool {
    let mut any = false;
    for count in [1, 4] {
        let (device, file) = faulty(Vec::new());
        let below: Arc<dyn Device> = Arc::<FaultyDevice>::clone(&device);
        create(&below, way.format, way.options, DISK);
        let target = open(&below, way.format, None);
        arm(&device);
        let result = convert(source, &target, way, count);
        let failed = device.disarm();
        match result {
            Ok(()) => {
                assert_eq!(failed, 0, "{way:?}: a failure is not reported");
                assert!(contents(&target) == contents(&source.image), "{way:?}");
            }
            Err(error) => {
                assert!(failed > 0, "{way:?}: {error:?} without a fault");
                assert_eq!(error.errno(), Some(errno), "{way:?}: {error:?}");
                any = true;
            }
        }
        assert!(source.is_untouched(), "{way:?}");
        if way.format == "qcow2" {
            drop(target);
            let left: Arc<dyn Device> = Arc::new(MemoryDevice::new(file.contents()));
            let found = open(&left, "qcow2", None)
                .layer()
                .check(Repair::No, &Progress::none())
                .expect("can be checked");
            assert_eq!(found.corruptions, 0, "{way:?}");
            assert_eq!(found.check_errors, 0, "{way:?}");
        }
    }
    any
}

#[test]
fn a_target_that_fails_at_any_write_ends_the_conversion() {
    let source = Source::new();
    for way in WAYS {
        let kinds: [fn(u64) -> Fault; 2] = [Fault::from, |n| Fault::once(n).torn()];
        for kind in kinds {
            let arm = |n| move |device: &FaultyDevice| device.arm(kind(n).counting(Requests::Writes));
            let count = (0..).take_while(|n| fails(&source, way, EIO, arm(*n))).count();
            assert!(count > 3, "{way:?}: {count} writes");
        }
    }
}

#[test]
fn a_source_that_fails_at_any_request_ends_the_conversion() {
    for way in WAYS {
        let mut met = 0;
        for n in 0.. {
            let source = Source::new();
            source.top.arm(Fault::from(n));
            let (target, _) = image(way.format, way.options, DISK);
            let result = convert(&source, &target, way, 4);
            let failed = source.top.disarm();
            assert!(source.is_untouched());
            match result {
                Ok(()) if failed == 0 => break,
                Ok(()) => panic!("{way:?}: a failure is not reported"),
                Err(error) => assert_eq!(error.errno(), Some(EIO), "{way:?}: {error:?}"),
            }
            met += 1;
        }
        assert!(met > 3, "{way:?}: {met} requests");
    }
}

#[test]
fn a_full_disk_ends_the_conversion() {
    let source = Source::new();
    for way in WAYS {
        let step = 177_000;
        let limits = (0..).map(|i| 330_000 + i * step);
        let full = |bytes| move |device: &FaultyDevice| device.limit_len(bytes);
        let count = limits
            .take_while(|bytes| fails(&source, way, ENOSPC, full(*bytes)))
            .count();
        assert!(count > 3, "{way:?}: {count} sizes");
    }
}

/// `Input/output error`.
const EIO: i32 = 5;
/// `No space left on device`.
const ENOSPC: i32 = 28;
