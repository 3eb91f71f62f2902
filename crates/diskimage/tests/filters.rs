//! Filters on images in files.

use std::fs;
use std::sync::Arc;

use diskimage::{
    ByteRange, Creation, Device, ExtentKind, Image, NodeOptions, OpenOptions, Result, StatusDetail, open,
    open_node,
};

struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("there is a temporary directory"))
    }

    fn path(&self, name: &str) -> String {
        let path = self.0.path().join(name);
        path.to_str().expect("is text").to_owned()
    }

    /// A qcow2 image of 1 MiB called `top` on a raw file that is filled with `byte`.
    fn overlay(&self, byte: u8) {
        fs::write(self.path("base"), vec![byte; 1 << 20]).expect("is written");
        Creation::new(self.path("top"), "qcow2")
            .size(1 << 20)
            .backing_file("base")
            .backing_format("raw")
            .prepare()
            .and_then(|prepared| prepared.create())
            .expect("is made");
    }

    fn filtered(&self, driver: &str, write: bool) -> Result<Arc<Image>> {
        let mut node = NodeOptions::from_list("file.driver=qcow2").expect("options");
        node.set("driver", driver);
        node.set("file.file.filename", self.path("top"));
        open_node(node, &OpenOptions::new().write(write))
    }

    fn plain(&self) -> Arc<Image> {
        open(&self.path("top"), &OpenOptions::new()).expect("opens")
    }
}

fn read(image: &Image, range: ByteRange) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(range.len()).expect("small")];
    image.read_at(&mut bytes, range.start()).expect("reads");
    bytes
}

/// The depth in the chain of the image that has each cluster of 64 KiB.
fn depths(image: &Image) -> Vec<u32> {
    (0..16)
        .map(|cluster| {
            let range = ByteRange::at(cluster << 16, 1 << 16);
            image
                .status(range, StatusDetail::Allocation)
                .expect("readable")
                .depth
        })
        .collect()
}

#[test]
fn copy_on_read_copies_what_is_read_to_the_overlay() {
    let scratch = Scratch::new();
    scratch.overlay(5);
    assert!(scratch.filtered("copy-on-read", false).is_err());
    let image = scratch.filtered("copy-on-read", true).expect("opens");
    image.write_at(&[9; 100], (5 << 16) + 7).expect("writes");
    let range = ByteRange::new((3 << 16) + 100, (4 << 16) + 1);
    assert!(read(&image, range).iter().all(|byte| *byte == 5));
    image.flush().expect("flushes");
    drop(image);
    let image = scratch.plain();
    let mut expected = vec![1; 16];
    expected[3..=5].fill(0);
    assert_eq!(depths(&image), expected);
    let mut bytes = vec![5; 1 << 20];
    bytes[(5 << 16) + 7..][..100].fill(9);
    assert!(read(&image, ByteRange::new(0, 1 << 20)) == bytes);
}

#[test]
fn threads_can_write_parts_of_one_cluster_through_compress() {
    let scratch = Scratch::new();
    scratch.overlay(5);
    let image = scratch.filtered("compress", true).expect("opens");
    std::thread::scope(|scope| {
        for part in 0..8_u8 {
            let image = &image;
            scope.spawn(move || {
                let at = u64::from(part) << 13;
                image.write_at(&[part; 1 << 13], at).expect("writes");
            });
        }
    });
    image.write_at(&[7; 1 << 17], 1 << 17).expect("writes");
    image.flush().expect("flushes");
    drop(image);
    let image = scratch.plain();
    let mut expected: Vec<u8> = (0..8).flat_map(|part| [part; 1 << 13]).collect();
    expected.resize(1 << 17, 5);
    expected.resize(1 << 18, 7);
    expected.resize(1 << 20, 5);
    assert!(read(&image, ByteRange::new(0, 1 << 20)) == expected);
    let status = image.status(ByteRange::at(1 << 17, 1 << 16), StatusDetail::Allocation);
    assert_eq!(status.expect("readable").kind, ExtentKind::Compressed);
}
