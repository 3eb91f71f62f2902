//! Tests of files as devices.

use super::*;
use crate::new_file::{FileCreation, NewFile};

/// A new file in a temporary directory, opened for writing if `write`.
pub(crate) fn scratch(write: bool) -> (tempfile::TempDir, File) {
    let dir = tempfile::tempdir().expect("there is a temporary directory");
    let target = target(&dir);
    let creation = FileCreation::default();
    File::create(&target, Permissions::WRITE, &creation, CacheMode::UNSAFE)
        .and_then(NewFile::publish)
        .expect("is made");
    let file = File::open(&target, write, CacheMode::UNSAFE).expect("opens");
    (dir, file)
}

pub(crate) fn target(dir: &tempfile::TempDir) -> Target {
    Target::plain(dir.path().join("a").to_str().expect("is text"))
}

fn message(result: Result<impl Sized>) -> String {
    result.map(drop).expect_err("fails").chain()
}

#[test]
fn reads_return_written_bytes_and_fail_beyond_the_end() {
    let (_dir, file) = scratch(true);
    file.write_at(b"abc", 5).expect("grows");
    assert_eq!(file.len(), 8);
    let mut buf = [1; 8];
    file.read_at(&mut buf, 0).expect("reads");
    assert_eq!(&buf, b"\0\0\0\0\0abc");
    assert_eq!(
        file.read_at(&mut buf, 1).map_err(|e| e.kind()),
        Err(ErrorKind::Corrupt)
    );
    assert_eq!(
        file.write_at(b"x", u64::MAX - 2).map_err(|e| e.errno()),
        Err(Some(libc::EFBIG))
    );
}

#[test]
fn unsupported_types_of_files_are_refused() {
    let dir = tempfile::tempdir().expect("there is a temporary directory");
    let path = dir.path().to_str().expect("is text");
    let open = |name: &str| {
        File::open(
            &Target::parse(name).expect("is a path"),
            false,
            CacheMode::default(),
        )
    };
    assert_eq!(
        message(open(path)),
        format!("'file' driver requires '{path}' to be a regular file")
    );
    assert_eq!(
        message(open(&format!("host_device:{path}"))),
        format!("'host_device' driver requires '{path}' to be either a character or block device")
    );
    assert_eq!(
        message(open(&format!("{path}/x"))),
        format!("Could not open '{path}/x': No such file or directory")
    );
    let pipe = format!("{path}/pipe");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &*pipe, rustix::fs::FileType::Fifo, mode, 0).expect("is made");
    assert_eq!(
        message(open(&pipe)),
        format!("'file' driver requires '{pipe}' to be a regular file")
    );
    let null = open("/dev/null").expect("opens");
    assert_eq!((null.len(), null.protocol()), (0, ProtocolKind::HostDevice));
}

#[test]
fn writers_and_readers_of_metadata_exclude_each_other() {
    let (dir, first) = scratch(true);
    let second = File::open(&target(&dir), true, CacheMode::UNSAFE).expect("opens");
    let name = first.name();
    let hint = format!("Is another process using the image [{name}]?");
    let lock = |file: &File, permissions| {
        file.lock(permissions).map_err(|e| {
            (
                e.kind(),
                e.chain(),
                e.hint_lines().first().map(String::as_str).map(str::to_owned),
            )
        })
    };
    let refused = |words: &str| Err((ErrorKind::Locked, words.to_owned(), Some(hint.clone())));

    assert_eq!(lock(&first, Permissions::READ), Ok(()));
    assert_eq!(lock(&second, Permissions::READ), Ok(()));
    assert_eq!(
        lock(&second, Permissions::WRITE),
        refused("Failed to get \"write\" lock")
    );
    assert_eq!(lock(&second, Permissions::READ_SHARED), Ok(()));
    assert_eq!(
        lock(&first, Permissions::WRITE),
        Ok(()),
        "a reader that shares everything is in nobody's way"
    );
    assert_eq!(
        lock(&second, Permissions::READ),
        refused("Failed to get shared \"write\" lock")
    );
    assert_eq!(lock(&second, Permissions::FORCE_SHARE), Ok(()));
    drop(first);
    assert_eq!(lock(&second, Permissions::WRITE), Ok(()));
}

#[test]
fn preallocation_allocates_storage() {
    let (_dir, file) = scratch(true);
    file.resize(1 << 20, Preallocation::Falloc).expect("grows");
    assert!(file.allocated_bytes() >= Some(1 << 20));
    file.resize(2 << 20, Preallocation::Full).expect("grows");
    assert!(file.allocated_bytes() >= Some(2 << 20));
    assert_eq!(
        message(file.resize(3 << 20, Preallocation::Metadata)),
        "Unsupported preallocation mode: metadata"
    );
    assert_eq!(
        message(file.resize(u64::MAX, Preallocation::Off)),
        "Could not resize file: Invalid argument"
    );
    assert_eq!(file.len(), 2 << 20);
}

#[test]
fn zeroes_beyond_the_end_extend_the_file() {
    for mode in [ZeroMode::Unmap, ZeroMode::KeepAllocated] {
        let (_dir, file) = scratch(true);
        file.write_at(&[7; 5000], 0).expect("writes");
        file.write_zeroes(ByteRange::new(3000, 9000), mode)
            .expect("zeroes");
        assert_eq!(file.len(), 9000);
        let mut buf = vec![1; 9000];
        file.read_at(&mut buf, 0).expect("reads");
        assert!(buf[..3000].iter().all(|b| *b == 7) && diskimage_core::is_zero(&buf[3000..]));
    }
}

#[test]
fn direct_requests_of_any_alignment_work() {
    let (dir, plain) = scratch(true);
    let direct = match File::open(&target(&dir), true, CacheMode::NONE) {
        Ok(file) => file,
        Err(error) => {
            eprintln!("skipped: {}", error.chain());
            return;
        }
    };
    let mut model = Vec::new();
    // Offsets and lengths at, before and after block boundaries, which extend the file.
    for (step, (offset, len)) in [
        (0, 1000),
        (1000, 24),
        (511, 2),
        (4096, 4096),
        (8191, 70_000),
        (100, 3_000_000),
    ]
    .into_iter()
    .enumerate()
    {
        let bytes: Vec<u8> = (0..len)
            .map(|i| u8::try_from((i * 7 + step) % 251).unwrap_or(0))
            .collect();
        model.resize(model.len().max(offset + len), 0);
        model[offset..offset + len].copy_from_slice(&bytes);
        direct.write_at(&bytes, offset as u64).expect("writes");
        assert_eq!(direct.len(), model.len() as u64, "after step {step}");
        for device in [&direct, &plain] {
            let mut back = vec![0; model.len() - 1];
            device.read_at(&mut back, 1).expect("reads");
            assert!(back == model[1..], "after step {step}");
        }
    }
    let mut buf = [0; 10];
    assert!(direct.read_at(&mut buf, model.len() as u64 - 5).is_err());
}

#[test]
fn copies_inside_the_kernel_are_complete() {
    let ((_d1, from), (_d2, to)) = (scratch(true), scratch(true));
    from.write_at(&[9; 100_000], 0).expect("writes");
    if !from
        .copy_to(ByteRange::new(1000, 90_000), &to, 500)
        .expect("copies")
    {
        eprintln!("skipped: the file system does not copy");
        return;
    }
    assert_eq!(to.len(), 89_500);
    let mut buf = [0; 2];
    to.read_at(&mut buf, 499).expect("reads");
    assert_eq!(buf, [0, 9]);
}

#[test]
fn storage_that_is_allocated_ahead_is_that_of_the_write_alone() {
    let (_dir, file) = scratch(true);
    file.resize(8 << 20, Preallocation::Off).expect("grows");
    let data = vec![7; (1 << 20) + 100];
    file.write_at(&data, 4 << 20).expect("writes into a hole");
    file.write_at(&data, (8 << 20) - 50)
        .expect("writes beyond the end");
    // As long as what was written, whatever was allocated; and nothing else has storage.
    assert_eq!(file.file.metadata().expect("stat").len(), (9 << 20) + 50);
    file.flush().expect("flushes");
    let allocated = file.allocated_bytes().expect("is known");
    assert!(allocated >= 2 * data.len() as u64 - 4096, "{allocated} bytes");
    assert!(allocated <= (2 << 20) + (64 << 10), "{allocated} bytes");
    let mut read = vec![0; data.len()];
    file.read_at(&mut read, 4 << 20).expect("reads");
    assert_eq!(read, data);
}
