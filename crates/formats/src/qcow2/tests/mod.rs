//! Model tests: random operations on an image in memory, compared with a vector of bytes.

use std::sync::Arc;

use diskimage_core::options::Options;
use diskimage_core::{
    ByteRange, ClosedGate, CreateRequest, Device, Format, Gate, Image, MemoryDevice, NewFiles, NodeOptions,
    Object, Objects, OpenContext, OpenRequest, Origin, Permissions, Preallocation, ResizeRequest, Result,
    Secret, StatusDetail, ZeroMode,
};
use proptest::prelude::*;

use super::Qcow2Format;
use crate::testing::{OneFile, contents};

mod crash;
mod damage;
mod encrypted;
mod fault;
mod full;
mod repair;
mod scenario;
mod scenarios;
mod zeroes;

/// The node options for encrypted images. Other images ignore them.
pub(super) fn with_key() -> NodeOptions {
    let mut node = NodeOptions::new();
    node.set("encrypt.key-secret", "s");
    node
}

pub(super) fn secrets(passphrase: &str) -> Arc<Objects> {
    let mut objects = Objects::new();
    let secret = Secret::new(passphrase.as_bytes().to_vec());
    objects
        .add("s", Object::Secret(secret))
        .expect("a new identifier");
    Arc::new(objects)
}

fn options(text: &str) -> Options {
    let mut options = Options::new(<dyn Format>::create_options(&Qcow2Format));
    options.parse(text).expect("valid options");
    options
}

/// Opens other files through `gate`, and knows the secret of encrypted images.
fn context(gate: &(impl Gate + Clone + 'static)) -> OpenContext {
    OpenContext::new(Arc::new(gate.clone())).with_objects(secrets("secret"))
}

pub(super) fn create(
    options_text: &str,
    size: u64,
    gate: &(impl Gate + Clone + 'static),
) -> Arc<MemoryDevice> {
    let file = Arc::new(MemoryDevice::default());
    create_in(Arc::<MemoryDevice>::clone(&file), options_text, size, gate).expect("created");
    file
}

pub(super) fn create_in(
    file: Arc<dyn Device>,
    options_text: &str,
    size: u64,
    gate: &(impl Gate + Clone + 'static),
) -> Result<()> {
    let options = options(options_text);
    let context = context(gate);
    let plan = Qcow2Format.plan_create(CreateRequest {
        name: "test",
        size,
        options: &options,
        objects: &context.objects,
    });
    plan.expect("valid options").write(NewFiles {
        file,
        make_part: &mut |part| context.open_data(part, "test", Origin::STATED, Permissions::WRITE),
        backing: None,
    })
}

pub(super) fn open(
    file: &Arc<MemoryDevice>,
    write: bool,
    gate: &(impl Gate + Clone + 'static),
    backing: Option<Arc<Image>>,
) -> Result<Image> {
    let device: Arc<dyn Device> = Arc::<MemoryDevice>::clone(file);
    let layer = Qcow2Format.open(OpenRequest {
        write,
        ..OpenRequest::new(device, "test", &mut with_key(), &context(gate))
    })?;
    Ok(Image::new(layer, backing, "test", write))
}

#[derive(Clone, Debug)]
pub(super) enum Op {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Resize(u64),
    Reopen,
}

pub(super) const SIZE: u64 = 200_704;

pub(super) fn op() -> impl Strategy<Value = Op> {
    let range = (0..SIZE, 1..40_000u64);
    prop_oneof![
        5 => (range.clone(), 1..=255u8).prop_map(|((at, len), byte)| Op::Write(at, len, byte)),
        2 => (range.clone(), any::<bool>()).prop_map(|((at, len), unmap)| Op::Zero(at, len, unmap)),
        1 => range.prop_map(|(at, len)| Op::Discard(at, len)),
        1 => (1..SIZE / 512).prop_map(|sectors| Op::Resize(sectors * 512)),
        1 => Just(Op::Reopen),
    ]
}

fn check_model(options_text: &str, with_backing: bool, ops: &[Op]) {
    let gate = OneFile(Arc::new(MemoryDevice::default()));
    let backing = with_backing.then(|| {
        let file = create("cluster_size=4096", SIZE / 2, &ClosedGate);
        let image = open(&file, true, &ClosedGate, None).expect("opens");
        image.write_at(&vec![0x77; 30_000], 10_000).expect("writes");
        Arc::new(image)
    });
    let mut text = options_text.to_owned();
    if with_backing {
        text.push_str(",backing_file=below,backing_fmt=qcow2");
    }
    let file = create(&text, SIZE, &gate);
    let mut model = vec![0u8; usize::try_from(SIZE).expect("small")];
    if with_backing {
        model[10_000..40_000].fill(0x77);
    }
    let mut image = open(&file, true, &gate, backing.clone()).expect("opens");
    for op in ops {
        let len = image.len();
        let clip = |at: u64, n: u64| ByteRange::at(at.min(len - 1), n).intersect(ByteRange::new(0, len));
        let at = |range: ByteRange| {
            usize::try_from(range.start()).expect("small")..usize::try_from(range.end()).expect("small")
        };
        match *op {
            Op::Write(start, n, byte) => {
                let range = clip(start, n);
                image
                    .write_at(&vec![byte; at(range).len()], range.start())
                    .expect("writes");
                model[at(range)].fill(byte);
            }
            Op::Zero(start, n, unmap) => {
                let range = clip(start, n);
                let mode = if unmap {
                    ZeroMode::Unmap
                } else {
                    ZeroMode::KeepAllocated
                };
                image.write_zeroes(range, mode).expect("zeroes");
                model[at(range)].fill(0);
            }
            Op::Discard(start, n) => {
                let range = clip(start, n);
                image.discard(range).expect("discards");
                // A discarded range may read as anything: zeroes make it known again.
                image.write_zeroes(range, ZeroMode::Unmap).expect("zeroes");
                model[at(range)].fill(0);
            }
            Op::Resize(size) => {
                image
                    .resize_with(&ResizeRequest::new(size, Preallocation::Off))
                    .expect("resizes");
                model.resize(usize::try_from(size).expect("small"), 0);
            }
            Op::Reopen => {
                image.flush().expect("flushes");
                drop(image);
                image = open(&file, true, &gate, backing.clone()).expect("opens");
            }
        }
        assert!(contents(&image) == model, "after {op:?}");
    }
    image.flush().expect("flushes");
    let again = open(&file, false, &gate, backing).expect("opens");
    assert!(contents(&again) == model, "after reopening");
    let mut rest = ByteRange::new(0, again.len());
    while !rest.is_empty() {
        let extent = again.status(rest, StatusDetail::Zeroes).expect("maps");
        if extent.kind.is_zero() {
            let start = usize::try_from(rest.start()).expect("small");
            let end = start + usize::try_from(extent.len).expect("small");
            assert!(
                model[start..end].iter().all(|byte| *byte == 0),
                "{extent:?} is not zero"
            );
        }
        rest = rest.skip(extent.len);
    }
}

pub(super) const FORMS: [&str; 13] = [
    "cluster_size=512",
    "cluster_size=512,compat=0.10",
    "cluster_size=4096,refcount_bits=1",
    "cluster_size=4096,refcount_bits=64,lazy_refcounts=off",
    "cluster_size=16384,extended_l2=on",
    "cluster_size=65536",
    "cluster_size=4096,data_file=data",
    "cluster_size=4096,data_file=data,data_file_raw=on",
    "cluster_size=512,encrypt.format=aes,encrypt.key-secret=s",
    "cluster_size=4096,compat=0.10,encryption=on,encrypt.key-secret=s",
    "cluster_size=16384,extended_l2=on,encrypt.format=aes,encrypt.key-secret=s",
    "cluster_size=4096,data_file=data,encrypt.format=aes,encrypt.key-secret=s",
    "cluster_size=4096,encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=0",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_operations_match_a_plain_vector(
        form in 0..FORMS.len(),
        with_backing in any::<bool>(),
        ops in prop::collection::vec(op(), 1..25),
    ) {
        // A raw data file excludes a backing image, and version 2 cannot hide a backing image with zeroes.
        let with_backing = with_backing && !FORMS[form].contains("raw") && !FORMS[form].contains("0.10");
        check_model(FORMS[form], with_backing, &ops);
    }
}

#[test]
fn an_encrypted_disk_that_shrank_grows_with_zeroes() {
    let form = "cluster_size=4096,data_file=data,encrypt.format=aes,encrypt.key-secret=s";
    check_model(form, true, &[Op::Resize(8704), Op::Resize(9216)]);
}

#[test]
fn writes_from_many_threads_do_not_lose_each_other() {
    let file = create("cluster_size=65536", 8 << 20, &ClosedGate);
    let image = open(&file, true, &ClosedGate, None).expect("opens");
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            let image = &image;
            scope.spawn(move || {
                for i in 0..512u64 {
                    let offset = (i * 4 + u64::from(thread)) * 4096;
                    image.write_at(&[thread + 1; 4096], offset).expect("writes");
                }
            });
        }
    });
    for (i, block) in contents(&image).chunks(4096).enumerate() {
        assert!(
            block.iter().all(|byte| usize::from(*byte) == i % 4 + 1),
            "block {i}"
        );
    }
}

#[test]
fn preallocated_clusters_read_as_zero_and_are_data() {
    for mode in ["metadata", "falloc", "full"] {
        let file = create(&format!("preallocation={mode}"), 1 << 20, &ClosedGate);
        let image = open(&file, false, &ClosedGate, None).expect("opens");
        let extent = image
            .status(ByteRange::new(0, 1 << 20), StatusDetail::Allocation)
            .expect("maps");
        assert_eq!(extent.host.map(|(_, offset)| offset), Some(0x50000), "{mode}");
        assert!(contents(&image).iter().all(|byte| *byte == 0));
    }
}

#[test]
fn an_entry_beyond_the_end_of_the_file_is_an_error_when_read() {
    let file = create("", 1 << 20, &ClosedGate);
    let image = open(&file, true, &ClosedGate, None).expect("opens");
    image.write_at(&[1; 512], 0).expect("writes");
    image.flush().expect("flushes");
    file.write_at(&0x8000_0000_7fff_0000_u64.to_be_bytes(), 0x40000)
        .expect("pokes the L2 table");
    let damaged = open(&file, false, &ClosedGate, None).expect("opens");
    assert!(damaged.read_at(&mut [0; 512], 0).is_err());
}
