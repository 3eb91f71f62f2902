//! Zeroes and discards must neither reveal old data nor lose other data.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use diskimage_core::{ByteRange, ClosedGate, Device, Image, MemoryDevice, Progress, Repair, ZeroDetection};

use super::scenario::{Step, snapshots};
use super::{create, open};
use crate::testing::{OneFile, contents};

const SIZE: u64 = 32 * 4096;

/// A backing image that is full of data.
fn backing() -> Arc<Image> {
    let file = create("cluster_size=4096", SIZE, &ClosedGate);
    let image = open(&file, true, &ClosedGate, None).expect("opens");
    image
        .write_at(&vec![0x77; usize::try_from(SIZE).expect("small")], 0)
        .expect("writes");
    Arc::new(image)
}

#[test]
fn detected_and_unmapped_zeroes_hide_the_backing_image() {
    for form in [
        "cluster_size=4096",
        "cluster_size=4096,compat=0.10",
        "cluster_size=16384,extended_l2=on",
        "cluster_size=4096,data_file=data",
        "cluster_size=4096,lazy_refcounts=on",
    ] {
        for snapshot in [false, true] {
            let gate = OneFile(Arc::new(MemoryDevice::default()));
            let options = format!("{form},backing_file=below,backing_fmt=qcow2");
            let file = create(&options, SIZE, &gate);
            let image = open(&file, true, &gate, Some(backing())).expect("opens");
            let image = image.with_zero_detection(ZeroDetection::Unmap);
            let mut model = vec![0x77; usize::try_from(SIZE).expect("small")];
            let mut write = |at: usize, len: usize, value: u8| {
                model[at..at + len].fill(value);
                image.write_at(&vec![value; len], at as u64).expect("writes");
            };
            write(8192, 20_000, 1);
            if !form.contains("data_file") {
                Step::Compressed(16384 * 4, 3).apply(&image).expect("writes");
                let cluster = usize::try_from(image.layer().granularity()).expect("small");
                model[16384 * 4..16384 * 4 + cluster].fill(3);
                if snapshot {
                    image.flush().expect("flushes");
                    Step::Take("s").apply(&image).expect("creates a snapshot");
                }
            }
            let mut write = |at: usize, len: usize| {
                model[at..at + len].fill(0);
                image.write_at(&vec![0; len], at as u64).expect("writes");
            };
            // Over data, over data of the backing image, over a compressed cluster, and over parts of clusters.
            for (at, len) in [
                (8192, 4096),
                (16384, 16384),
                (40_960, 8192),
                (16384 * 4, 16384),
                (100, 700),
                (61_000, 5000),
            ] {
                write(at, len);
            }
            assert!(contents(&image) == model, "{form} {snapshot}");
            image.flush().expect("flushes");
            drop(image);
            let again = open(&file, false, &gate, Some(backing())).expect("opens");
            assert!(contents(&again) == model, "{form} {snapshot} reopened");
        }
    }
}

#[test]
fn a_discard_waits_for_a_write_that_copies_the_cluster() {
    for form in ["cluster_size=4096", "cluster_size=16384,extended_l2=on"] {
        let file = create(form, SIZE, &ClosedGate);
        let image = open(&file, true, &ClosedGate, None).expect("opens");
        image.write_at(&[1; 16384], 0).expect("writes");
        image.flush().expect("flushes");
        // From here on a write must copy the cluster.
        Step::Take("s").apply(&image).expect("creates a snapshot");
        let discarded = AtomicBool::new(false);
        thread::scope(|scope| {
            let write = image.begin_write(ByteRange::at(512, 512)).expect("plans");
            let discard = scope.spawn(|| {
                image.discard(ByteRange::at(0, 16384)).expect("discards");
                discarded.store(true, Ordering::SeqCst);
            });
            thread::sleep(Duration::from_millis(50));
            assert!(
                !discarded.load(Ordering::SeqCst),
                "{form}: in the middle of the write"
            );
            write.finish(&[2; 512]).expect("writes");
            discard.join().expect("ends");
        });
        let disk = contents(&image);
        assert!(
            disk[..16384].iter().all(|byte| *byte == 0),
            "{form}: the discard came last"
        );
        image.write_at(&[3; 512], 512).expect("writes");
        image.flush().expect("flushes");
        assert!(contents(&image)[512..1024] == [3; 512], "{form}");
        let report = image
            .layer()
            .check(Repair::No, &Progress::none())
            .expect("can be checked");
        assert_eq!(report.corruptions, 0, "{form}");
        assert_eq!(report.leaks, 0, "{form}");
        let kept = snapshots(&image).open(None, Some("s")).expect("opens");
        let kept = Image::new(kept, None, "snapshot", false);
        assert!(contents(&kept)[..16384].iter().all(|byte| *byte == 1), "{form}");
    }
}
