//! Images with AES encryption, whose key is the passphrase.

use std::sync::Arc;

use crate::encryption::{CipherAlg, CipherMode, CipherSpec, IvAlg, SECTOR, SectorCipher};
use diskimage_core::options::Options;
use diskimage_core::{
    AmendRequest, ByteRange, ClosedGate, Device, Format, Image, MemoryDevice, NewSnapshot, OpenContext,
    OpenRequest, Progress, Result, RunKind, StatusDetail, ZeroMode,
};
use proptest::prelude::*;

use super::{create, open, secrets, with_key};
use crate::Qcow2Format;
use crate::testing::contents;

const AES: &str = "cluster_size=4096,encrypt.format=aes,encrypt.key-secret=s";

fn open_with(file: &Arc<MemoryDevice>, passphrase: &str) -> Image {
    let device: Arc<dyn Device> = Arc::<MemoryDevice>::clone(file);
    let layer = Qcow2Format.open(OpenRequest::new(
        device,
        "test",
        &mut with_key(),
        &OpenContext::default().with_objects(secrets(passphrase)),
    ));
    Image::new(layer.expect("opens"), None, "test", false)
}

fn host_of(image: &Image, guest: u64) -> u64 {
    match image.layer().map(ByteRange::at(guest, 1)).expect("maps").kind {
        RunKind::Data { offset, .. } => offset,
        other => panic!("no data: {other:?}"),
    }
}

#[test]
fn sector_numbers_follow_guest_offsets() {
    let file = create(AES, 1 << 20, &ClosedGate);
    let image = open(&file, true, &ClosedGate, None).expect("opens");
    // The cluster with the higher guest offset has the lower host offset.
    for guest in [0x80000, 0x1000] {
        image.write_at(&[0x5a; 4096], guest).expect("writes");
    }
    image.flush().expect("flushes");
    let spec = CipherSpec {
        cipher: CipherAlg::Aes128,
        mode: CipherMode::Cbc,
        iv: IvAlg::Plain64,
        iv_hash: None,
    };
    let cipher = SectorCipher::new(spec, b"secret\0\0\0\0\0\0\0\0\0\0").expect("a key of 16 bytes");
    for guest in [0x80000, 0x1000 + 3 * SECTOR as u64] {
        let mut sector = [0; SECTOR];
        file.read_at(&mut sector, host_of(&image, guest)).expect("reads");
        assert_ne!(sector, [0x5a; SECTOR]);
        cipher.decrypt(guest / SECTOR as u64, &mut sector);
        assert_eq!(sector, [0x5a; SECTOR], "at {guest:#x}");
    }
}

#[test]
fn only_the_first_sixteen_bytes_of_a_passphrase_are_used() {
    let file = create(AES, 1 << 16, &ClosedGate);
    let image = open(&file, true, &ClosedGate, None).expect("opens");
    image.write_at(&[7; 1000], 100).expect("writes");
    image.flush().expect("flushes");
    let plain = contents(&image);
    assert!(contents(&open_with(&file, "secret")) == plain);
    assert!(contents(&open_with(&file, "secret2")) != plain);
    let read = |passphrase| contents(&open_with(&file, passphrase));
    assert!(read("0123456789abcdef") == read("0123456789abcdefg"));
    assert!(read("0123456789abcdef") != read("0123456789abcde"));
}

#[test]
fn the_file_holds_no_plain_text() {
    let file = create(AES, 1 << 16, &ClosedGate);
    let image = open(&file, true, &ClosedGate, None).expect("opens");
    image.write_at(&[7; 8192], 0).expect("writes");
    image
        .write_zeroes(ByteRange::new(0, 4096), ZeroMode::KeepAllocated)
        .expect("zeroes");
    for guest in [0, 4096] {
        let extent = image
            .status(ByteRange::at(guest, 4096), StatusDetail::Zeroes)
            .expect("maps");
        assert!(extent.host.is_none(), "{extent:?}");
    }
}

#[test]
fn zero_clusters_still_read_as_zero_in_version_2() {
    for form in [
        AES,
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=0",
    ] {
        let below = create("", 1 << 20, &ClosedGate);
        let below = Arc::new(open(&below, true, &ClosedGate, None).expect("opens"));
        below.write_at(&[9; 1 << 20], 0).expect("writes");
        let file = create(&format!("{form},backing_file=below"), 1 << 20, &ClosedGate);
        let image = open(&file, true, &ClosedGate, Some(Arc::clone(&below))).expect("opens");
        image.write_at(&[7; 200_000], 0).expect("writes");
        for (start, mode) in [(0, ZeroMode::KeepAllocated), (0x80000, ZeroMode::Unmap)] {
            image
                .write_zeroes(ByteRange::at(start, 0x10000), mode)
                .expect("zeroes");
        }
        let before = contents(&image);
        let mut options = Options::new(Qcow2Format.properties().amend_options.expect("has some"));
        options.parse("compat=0.10").expect("valid options");
        let amended = image.amend(&AmendRequest::new(
            &options,
            &secrets("secret"),
            &Progress::none(),
        ));
        amended.expect("amends");
        drop(image);
        let image = open(&file, false, &ClosedGate, Some(below)).expect("opens");
        assert!(contents(&image) == before, "{form}");
    }
}

/// An image with data in several clusters, one of which a snapshot shares.
fn with_data() -> Vec<u8> {
    let file = create(AES, 1 << 18, &ClosedGate);
    let image = open(&file, true, &ClosedGate, None).expect("opens");
    image.write_at(&[1; 20_000], 3000).expect("writes");
    let snapshots = image.layer().snapshots().expect("has snapshots");
    snapshots
        .create(&NewSnapshot {
            name: "x",
            date_sec: 0,
            date_nsec: 0,
        })
        .expect("creates a snapshot");
    image.write_at(&[2; 5000], 10_000).expect("writes");
    image.flush().expect("flushes");
    file.contents()
}

fn use_all(file: &Arc<MemoryDevice>) -> Result<()> {
    let image = open(file, true, &ClosedGate, None)?;
    let mut bytes = vec![0; usize::try_from(image.len().min(1 << 18)).unwrap_or(0)];
    let read = image.read_at(&mut bytes, 0);
    image.write_at(&bytes[..bytes.len() / 2], 0)?;
    image.flush()?;
    read
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damage_is_an_error_at_worst(
        pokes in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>()), 1..6),
    ) {
        let bytes = with_data();
        let file = Arc::new(MemoryDevice::new(bytes.clone()));
        for (position, value) in pokes {
            // Table entries and header fields are aligned numbers.
            let at = position.index(bytes.len() / 8) * 8;
            file.write_at(&value.to_be_bytes(), at as u64).expect("pokes");
        }
        let _ = use_all(&file);
    }
}
