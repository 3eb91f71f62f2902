//! Volumes in memory: written data is read again, slots change as asked, and no crash and no failed write loses the
//! key.

use std::sync::Arc;

use crate::encryption::{CipherAlg, CipherMode, CipherSpec, HashAlg, IvAlg, SECTOR};
use diskimage_core::options::Options;
use diskimage_core::{Device, MemoryDevice, Object, Objects, Secret};
use diskimage_testing::{Fault, FaultyDevice, Journal, RecordingDevice};

use super::amend::{AMEND_OPTIONS, SlotChange};
use super::options::Algorithms;
use super::volume::{Volume, VolumeLocation};
use crate::encryption::encrypted_device::EncryptedDevice;

const SMALL: Algorithms = Algorithms {
    spec: CipherSpec {
        cipher: CipherAlg::Aes128,
        mode: CipherMode::Cbc,
        iv: IvAlg::Plain64,
        iv_hash: None,
    },
    hash: HashAlg::Sha256,
    iter_time: 0,
};

fn at(device: Arc<dyn Device>) -> VolumeLocation {
    VolumeLocation {
        device,
        offset: 0,
        detached: false,
    }
}

/// The bytes of a new volume, unlocked by `old`.
fn new_volume() -> Vec<u8> {
    let memory = Arc::new(MemoryDevice::new(vec![0; 1 << 20]));
    let device: Arc<dyn Device> = Arc::<MemoryDevice>::clone(&memory);
    Volume::create(at(device), &SMALL, b"old").expect("creates");
    memory.contents()
}

fn unlocks(bytes: &[u8], passphrase: &[u8]) -> bool {
    let device: Arc<dyn Device> = Arc::new(MemoryDevice::new(bytes.to_vec()));
    Volume::open(at(device), Some(passphrase), None).is_ok()
}

fn change(device: Arc<dyn Device>, list: &str, force: bool) -> Result<(), String> {
    let mut objects = Objects::new();
    for id in ["old", "new", "other"] {
        let secret = Object::Secret(Secret::new(id.as_bytes().to_vec()));
        objects.add(id, secret).expect("a new identifier");
    }
    let mut options = Options::new(AMEND_OPTIONS);
    options.parse(list).map_err(|error| error.to_string())?;
    let volume = Volume::open(at(device), Some(b"old"), None).map_err(|error| error.chain())?;
    let change = SlotChange {
        options: &options,
        prefix: "",
        objects: &objects,
        force,
    };
    change.apply(&volume).map_err(|error| error.chain())
}

const CHANGES: [(&str, bool); 4] = [
    ("state=active,new-secret=new,iter-time=0", false),
    ("state=active,new-secret=new,keyslot=6,iter-time=0", false),
    // Overwrites the only active slot.
    ("state=active,new-secret=new,keyslot=0,iter-time=0", true),
    ("state=inactive,keyslot=5", true),
];

#[test]
fn a_crash_while_a_slot_changes_never_loses_the_last_key() {
    let before = new_volume();
    for (list, force) in CHANGES {
        let journal: Arc<Journal> = Arc::default();
        change(
            Arc::new(RecordingDevice::new(before.clone(), 0, &journal)),
            list,
            force,
        )
        .expect(list);
        let count = journal.crashes(std::slice::from_ref(&before), 12, 0x5eed, |crash| {
            let file = &crash.files[0];
            assert!(
                unlocks(file, b"old") || unlocks(file, b"new"),
                "{list}: at {} ({})",
                crash.position,
                crash.kept
            );
        });
        assert!(count > 20, "{list}: {count} crashes");
    }
}

#[test]
fn a_failed_request_while_a_slot_changes_never_loses_the_last_key() {
    let before = new_volume();
    for (list, force) in CHANGES {
        for after in 0.. {
            let memory = Arc::new(MemoryDevice::new(before.clone()));
            let faulty = Arc::new(FaultyDevice::new(Arc::<MemoryDevice>::clone(&memory)));
            faulty.arm(Fault::from(after).torn());
            let outcome = change(Arc::<FaultyDevice>::clone(&faulty), list, force);
            let file = memory.contents();
            assert!(
                unlocks(&file, b"old") || unlocks(&file, b"new"),
                "{list}: {after}"
            );
            if faulty.disarm() == 0 {
                assert_eq!(outcome, Ok(()), "{list}");
                break;
            }
        }
    }
}

#[test]
fn slots_are_filled_and_erased() {
    let memory = Arc::new(MemoryDevice::new(new_volume()));
    let go = |list: &str, force| change(Arc::<MemoryDevice>::clone(&memory), list, force);
    assert_eq!(go("state=active,new-secret=new,iter-time=0", false), Ok(()));
    assert!(unlocks(&memory.contents(), b"new"));
    assert_eq!(go("state=inactive,old-secret=new", false), Ok(()));
    assert!(!unlocks(&memory.contents(), b"new"));
    assert_eq!(go("state=inactive,keyslot=0", true), Ok(()));
    assert!(!unlocks(&memory.contents(), b"old"));
}

#[test]
fn changes_are_refused_with_qemu_imgs_messages() {
    let memory = Arc::new(MemoryDevice::new(new_volume()));
    for (list, message) in [
        ("new-secret=new", "Parameter 'state' is missing"),
        ("state=foo", "Parameter 'state' does not accept value 'foo'"),
        ("state=active", "'new-secret' is required to activate a keyslot"),
        ("state=active,new-secret=q", "No secret with id 'q'"),
        (
            "state=active,new-secret=new,keyslot=9",
            "Invalid keyslot 9 specified, must be between 0 and 7",
        ),
        (
            "state=active,new-secret=new,keyslot=-1",
            "Invalid keyslot 4294967295 specified, must be between 0 and 7",
        ),
        (
            "state=active,new-secret=new,keyslot=0",
            "Refusing to overwrite active keyslot 0 - please erase it first",
        ),
        (
            "state=active,new-secret=new,old-secret=old",
            "'old-secret' must not be given when activating keyslots",
        ),
        (
            "state=inactive,new-secret=new",
            "'new-secret' must not be given when erasing keyslots",
        ),
        (
            "state=inactive,iter-time=4,keyslot=1",
            "'iter-time' must not be given when erasing keyslots",
        ),
        (
            "state=inactive,keyslot=7",
            "Given keyslot 7 is already erased (inactive) ",
        ),
        (
            "state=inactive,old-secret=other",
            "No keyslots match given (old) password for erase operation",
        ),
        (
            "state=inactive,old-secret=other,keyslot=0",
            "Given keyslot 0 doesn't contain the given old password for erase operation",
        ),
        (
            "state=inactive,old-secret=old",
            "All the active keyslots match the (old) password that was given and erasing them will erase all the data \
             in the image irreversibly - refusing operation",
        ),
        (
            "state=inactive,keyslot=0",
            "Attempt to erase the only active keyslot 0 which will erase all the data in the image irreversibly - \
             refusing operation",
        ),
    ] {
        let device: Arc<dyn Device> = Arc::<MemoryDevice>::clone(&memory);
        assert_eq!(change(device, list, false), Err(message.to_owned()), "{list}");
    }
}

#[test]
fn a_view_reads_back_writes_at_any_offset() {
    let device: Arc<dyn Device> = Arc::new(MemoryDevice::new(new_volume()));
    let volume = Volume::open(at(Arc::clone(&device)), Some(b"old"), None).expect("unlocks");
    let cipher = Arc::clone(volume.cipher().expect("unlocked"));
    let view = EncryptedDevice::new(Arc::clone(&device), volume.payload_offset(), 0, cipher);
    let mut model = vec![0; 64 * SECTOR];
    view.write_at(&model, 0).expect("writes");
    for (offset, len, byte) in [
        (3, 5, 1),
        (500, 30, 2),
        (512, 1024, 3),
        (700, 9000, 4),
        (1024, 1, 5),
    ] {
        let bytes = vec![byte; len];
        view.write_at(&bytes, offset as u64).expect("writes");
        model[offset..offset + len].copy_from_slice(&bytes);
    }
    for (offset, len) in [(0, model.len()), (1, 1), (511, 2), (512, 512), (600, 8000)] {
        let mut bytes = vec![0; len];
        view.read_at(&mut bytes, offset as u64).expect("reads");
        assert!(bytes == model[offset..offset + len], "{len} bytes at {offset}");
    }
    let mut raw = vec![0; SECTOR];
    device.read_at(&mut raw, volume.payload_offset()).expect("reads");
    assert_ne!(raw, model[..SECTOR]);
}
