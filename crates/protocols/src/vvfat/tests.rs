//! Tests that read the disk back as a FAT file system.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use diskimage_core::{
    Budget, ClosedGate, Device, ErrorKind, Gate, NodeOptions, Note, OpenContext, Reference, Result,
};
use diskimage_testing::RecordingGate;
use proptest::collection::vec;
use proptest::prelude::*;
use tempfile::TempDir;

use super::VVFAT;
use crate::cache::CacheMode;
use crate::file::File;
use crate::name::Target;
use crate::protocol::{Protocol, ProtocolRequest};

/// Opens a file by its path.
fn open_file(reference: &Reference<'_>) -> Result<Arc<dyn Device>> {
    let path = reference.options.text("filename").expect("is named");
    let file = File::open(&Target::plain(path), false, CacheMode::default())?;
    Ok(Arc::new(file))
}

fn file_gate() -> Arc<dyn Gate> {
    Arc::new(RecordingGate::new(open_file))
}

/// Opens a directory with these other options.
fn open_with(
    dir: &Path,
    given: &[(&str, &str)],
    gate: &Arc<dyn Gate>,
    budget: u64,
) -> Result<Arc<dyn Device>> {
    let mut options = NodeOptions::new();
    options.set("dir", dir.to_str().expect("is UTF-8"));
    for (name, value) in given {
        options.set(name, *value);
    }
    VVFAT.open(ProtocolRequest {
        options: &mut options,
        write: false,
        cache: CacheMode::default(),
        context: &OpenContext {
            budget: Budget::new(budget),
            ..OpenContext::new(Arc::clone(gate))
        },
    })
}

fn open(dir: &Path, given: &[(&str, &str)]) -> Result<Arc<dyn Device>> {
    open_with(dir, given, &file_gate(), 16 << 20)
}

fn refusal(dir: &Path, given: &[(&str, &str)]) -> (String, Option<Note>) {
    let error = open(dir, given).expect_err("is refused");
    (error.chain(), error.preceding_note().cloned())
}

/// A FAT file system, parsed from its boot sector alone.
struct Volume {
    device: Arc<dyn Device>,
    start: u64,
    fats: u64,
    fat_len: u64,
    root: u64,
    root_len: u64,
    bits: u64,
}

impl Volume {
    /// `bits` is the width of FAT entries, `start` the offset of the partition.
    fn new(device: Arc<dyn Device>, start: u64, bits: u64) -> Self {
        let mut boot = [0; 512];
        device.read_at(&mut boot, start).expect("reads");
        let word = |at: usize| u64::from(u16::from_le_bytes([boot[at], boot[at + 1]]));
        assert_eq!((word(0x0b), boot[0x0d], boot[0x10]), (512, 16, 2));
        let fats = start + word(0x0e) * 512;
        let fat_len = word(0x16) * 512;
        Self {
            device,
            start,
            fats,
            fat_len,
            root: fats + 2 * fat_len,
            root_len: word(0x11) * 32,
            bits,
        }
    }

    fn bytes(&self, offset: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(len).expect("is small")];
        self.device.read_at(&mut bytes, offset).expect("reads");
        bytes
    }

    fn next(&self, fat: &[u8], cluster: u64) -> Option<u64> {
        let bit = usize::try_from(cluster * self.bits).expect("is small");
        let bytes = |count: usize| {
            (0..count).fold(0_u64, |value, at| {
                value | (u64::from(fat[bit / 8 + at]) << (8 * at))
            })
        };
        let (value, end) = match self.bits {
            12 => ((bytes(2) >> (bit % 8)) & 0xfff, 0xff8),
            16 => (bytes(2), 0xfff8),
            _ => (bytes(4), 0x0fff_fff8),
        };
        assert_ne!(value, 0, "a chain leads to a free cluster");
        (value < end).then_some(value)
    }

    /// The contents of a chain of clusters; `len` is the known length.
    fn chain(&self, fat: &[u8], first: u64, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut cluster = Some(first).filter(|first| *first != 0);
        while let Some(at) = cluster {
            bytes.extend(self.bytes(self.root + self.root_len + at * 8192 - 2 * 8192, 8192));
            assert!(bytes.len() < 1 << 24, "a chain has no end");
            cluster = self.next(fat, at);
            // As in qemu-img, the FAT ends the chain at cluster 1 on FAT32.
            if at == 1 && bytes.len() < len {
                cluster = Some(2);
            }
        }
        bytes
    }

    /// The contents of files, by long name; `None` for directories.
    fn files(&self) -> BTreeMap<String, Option<Vec<u8>>> {
        let fat = self.bytes(self.fats, self.fat_len);
        assert_eq!(fat, self.bytes(self.fats + self.fat_len, self.fat_len));
        let mut found = BTreeMap::new();
        let root = self.bytes(self.root, self.root_len);
        self.list(&fat, &root, "", &mut found);
        found
    }

    fn list(&self, fat: &[u8], entries: &[u8], above: &str, found: &mut BTreeMap<String, Option<Vec<u8>>>) {
        let mut long: Vec<u16> = Vec::new();
        let mut shorts = Vec::new();
        for entry in entries.chunks(32) {
            let word = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
            match (entry[0], entry[11]) {
                (0, _) => break,
                (_, 0x0f) => {
                    let places = [1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30];
                    let part = places.into_iter().map(word).take_while(|unit| *unit != 0);
                    long.splice(0..0, part.collect::<Vec<_>>());
                    continue;
                }
                (_, 0x28) => assert_eq!(above, ""),
                (b'.', _) => assert_ne!(above, ""),
                (_, kind) => {
                    assert!(
                        !shorts.contains(&entry[..11].to_vec()),
                        "a short name is there twice"
                    );
                    shorts.push(entry[..11].to_vec());
                    let name = format!("{above}/{}", String::from_utf16(&long).expect("is text"));
                    let first = u64::from(word(26)) | (u64::from(word(20)) << 16);
                    let len = usize::from(word(28)) | (usize::from(word(30)) << 16);
                    let mut bytes = self.chain(fat, first, len);
                    if kind == 0x10 {
                        self.list(fat, &bytes, &name, found);
                        found.insert(name, None);
                    } else {
                        assert!(bytes.split_off(len).iter().all(|byte| *byte == 0));
                        found.insert(name, Some(bytes));
                    }
                }
            }
            long.clear();
        }
    }
}

/// The contents of a directory of the host, in the same form.
fn on_host(dir: &Path, above: &str, found: &mut BTreeMap<String, Option<Vec<u8>>>) {
    for entry in fs::read_dir(dir).expect("reads") {
        let entry = entry.expect("reads");
        let name = format!("{above}/{}", entry.file_name().to_str().expect("is text"));
        if entry.path().is_dir() {
            on_host(&entry.path(), &name, found);
            found.insert(name, None);
        } else {
            found.insert(name, Some(fs::read(entry.path()).expect("reads")));
        }
    }
}

fn check(dir: &Path, floppy: bool, bits: u64) {
    let mut expected = BTreeMap::new();
    on_host(dir, "", &mut expected);
    let device = open(
        dir,
        &[
            ("floppy", if floppy { "on" } else { "off" }),
            ("fat-type", &bits.to_string()),
        ],
    )
    .expect("opens");
    let volume = Volume::new(device, if floppy { 0 } else { 63 * 512 }, bits);
    assert_eq!(volume.files(), expected);
    let beyond = volume.device.len() - 512;
    assert!(volume.start < beyond);
    let mut last = [1; 512];
    volume.device.read_at(&mut last, beyond).expect("reads");
    assert_eq!(last, [0; 512]);
}

/// One entry to create: the index of its parent directory, its name, and its length; a directory has none.
type Step = (prop::sample::Index, String, Option<usize>);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let len = prop_oneof![
        Just(None),
        Just(Some(0)),
        (1..100_usize).prop_map(Some),
        Just(Some(8192)),
        (8000..30_000_usize).prop_map(Some),
    ];
    vec(
        (any::<prop::sample::Index>(), "[a-cA-C.+ é日~1]{1,30}", len),
        0..40,
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_file_is_found_with_its_contents(steps in steps(), floppy: bool, type_of in 0..3_usize) {
        let root = TempDir::new().expect("makes a directory");
        let mut dirs = vec![root.path().to_owned()];
        for (number, (at, name, len)) in steps.into_iter().enumerate() {
            let path = at.get(&dirs).join(&name);
            if path.exists() || name == "." || name == ".." {
                continue;
            }
            match len {
                None => {
                    fs::create_dir(&path).expect("makes a directory");
                    dirs.push(path);
                }
                Some(len) => {
                    let byte = u8::try_from(number + 1).expect("few steps");
                    fs::write(&path, vec![byte; len]).expect("writes");
                }
            }
        }
        check(root.path(), floppy, [12, 16, 32][type_of]);
    }
}

#[test]
fn large_directories_have_several_clusters() {
    let root = TempDir::new().expect("makes a directory");
    fs::create_dir(root.path().join("sub")).expect("makes a directory");
    for number in 0..600 {
        fs::write(root.path().join(format!("sub/a file called {number}")), [7; 3]).expect("writes");
    }
    check(root.path(), false, 16);
}

#[test]
fn directories_that_do_not_fit_are_refused() {
    let root = TempDir::new().expect("makes a directory");
    let file = root.path().join("a");
    let set_len = |len| {
        fs::File::create(&file)
            .and_then(|file| file.set_len(len))
            .expect("sets the length")
    };
    let floppy = [("floppy", "on")];
    set_len(357 * 8192);
    open(root.path(), &floppy).expect("fits");
    set_len(357 * 8192 + 1);
    assert_eq!(
        refusal(root.path(), &floppy).0,
        "Directory does not fit in FAT12 (capacity 2.88 MB)"
    );
    set_len(1 << 31);
    let unreadable = format!("Could not read directory {}", root.path().display());
    assert_eq!(
        refusal(root.path(), &floppy),
        (
            unreadable.clone(),
            Some(Note::Line(format!("File {} is larger than 2GB", file.display())))
        )
    );
    fs::remove_file(&file).expect("removes");
    for number in 0..255 {
        fs::write(root.path().join(number.to_string()), "").expect("writes");
    }
    open(root.path(), &[]).expect("fits");
    fs::write(root.path().join("255"), "").expect("writes");
    assert_eq!(
        refusal(root.path(), &[]),
        (
            unreadable,
            Some(Note::Line("Too many entries in root directory".to_owned()))
        )
    );
}

#[test]
fn links_are_followed_and_pipes_are_empty() {
    use std::os::unix::fs::symlink;
    let root = TempDir::new().expect("makes a directory");
    fs::write(root.path().join("a"), "bytes").expect("writes");
    symlink("a", root.path().join("link")).expect("links");
    symlink("nowhere", root.path().join("broken")).expect("links");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        root.path().join("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .expect("makes a pipe");
    let volume = Volume::new(open(root.path(), &[]).expect("opens"), 63 * 512, 16);
    let bytes = Some(b"bytes".to_vec());
    assert_eq!(
        volume.files(),
        BTreeMap::from([
            ("/a".to_owned(), bytes.clone()),
            ("/link".to_owned(), bytes),
            ("/pipe".to_owned(), Some(Vec::new())),
        ])
    );
}

/// Cyclic symbolic links end at the limit of the system; the capacity of the disk bounds the number of entries.
#[test]
fn cyclic_links_end() {
    use std::os::unix::fs::symlink;
    let root = TempDir::new().expect("makes a directory");
    symlink(".", root.path().join("once")).expect("links");
    open(root.path(), &[]).expect("ends with too many links");
    symlink(".", root.path().join("twice")).expect("links");
    let error = open_with(root.path(), &[("floppy", "on")], &file_gate(), 16 << 20)
        .expect_err("would be more than there is room for");
    assert_eq!(error.kind(), ErrorKind::NoSpace);
}

#[test]
fn memory_is_reserved_from_the_budget() {
    let root = TempDir::new().expect("makes a directory");
    fs::write(root.path().join("a"), "").expect("writes");
    let gate = file_gate();
    open_with(root.path(), &[], &gate, 1 << 20).expect("is enough");
    let error = open_with(root.path(), &[], &gate, 1 << 10).expect_err("is too little");
    assert_eq!(error.kind(), ErrorKind::Limit);
}

#[test]
fn files_are_opened_through_the_gate_when_they_are_read() {
    let root = TempDir::new().expect("makes a directory");
    fs::write(root.path().join("a"), "bytes").expect("writes");
    let gate = Arc::new(RecordingGate::new(open_file));
    let device = open_with(root.path(), &[], &(Arc::clone(&gate) as Arc<dyn Gate>), 16 << 20).expect("opens");
    assert!(gate.names().is_empty());
    Volume::new(device, 63 * 512, 16).files();
    assert_eq!(gate.names(), [root.path().join("a").to_str().expect("is text")]);
    let closed: Arc<dyn Gate> = Arc::new(ClosedGate);
    let device = open_with(root.path(), &[], &closed, 16 << 20).expect("opens");
    let first_data = device.len() - (1 << 20);
    device
        .read_at(&mut [0; 16], first_data)
        .expect("there is no file");
    let error = device.read_at(&mut [0; 8192], 0x4b000).expect_err("is refused");
    assert_eq!(error.kind(), ErrorKind::Denied);
}

/// `qemu-img` returns the old contents of its buffer instead.
#[test]
fn a_file_that_became_shorter_is_an_error() {
    let root = TempDir::new().expect("makes a directory");
    let file = root.path().join("a");
    fs::write(&file, [1; 9000]).expect("writes");
    let device = open(root.path(), &[]).expect("opens");
    fs::write(&file, [1; 10]).expect("writes");
    assert!(device.read_at(&mut [0; 512], 0x4b000).is_err());
}

#[test]
fn filenames_are_parsed_as_in_qemu_img() {
    let parsed = |name: &str| {
        let options = VVFAT.parse(name).expect("is a name");
        let shown = ["dir", "fat-type", "floppy", "rw"].map(|option| {
            let mut options = options.clone();
            options.take_text(option).unwrap_or_default()
        });
        shown.join(" ")
    };
    assert_eq!(parsed("fat:d"), "d 0 off off");
    assert_eq!(parsed("fat:12:floppy:rw:d"), "d 12 on on");
    assert_eq!(parsed("fat:12:16:d"), "d 16 off off");
    assert_eq!(parsed("fat:13:d"), "d 0 off off");
    assert_eq!(parsed("fat:x:y:d"), "y:d 0 off off");
    assert_eq!(parsed("fat:16:a/b:d"), "d 16 off off");
    assert_eq!(parsed("fat:floppy"), "floppy 0 off off");
    assert_eq!(parsed("fat:"), " 0 off off");
}
