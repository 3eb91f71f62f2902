//! VMDK images as other programs make them: what `qemu-img` refuses or misreads.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output};

/// Bytes of a sector.
const SECTOR: usize = 512;

fn run(dir: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qemu-img"))
        .args(words)
        .current_dir(dir)
        .output()
        .expect("it runs")
}

/// Runs a command that must succeed, and returns its standard output and its standard error.
fn succeed(dir: &Path, words: &[&str]) -> (String, String) {
    let output = run(dir, words);
    assert!(output.status.success(), "{words:?}: {output:?}");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (text(output.stdout), text(output.stderr))
}

/// Runs a command that must fail, and returns its standard error.
fn fail(dir: &Path, words: &[&str]) -> String {
    let output = run(dir, words);
    assert_eq!(output.status.code(), Some(1), "{words:?}: {output:?}");
    String::from_utf8(output.stderr).expect("text")
}

fn sectors(byte: u8, count: usize) -> Vec<u8> {
    vec![byte; count * SECTOR]
}

/// A directory with `a.bin`, whose sectors have their number as bytes, and `disk.vmdk`, a descriptor.
fn image(create_type: &str, extents: &[&str], further: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let bytes: Vec<u8> = (0..8).flat_map(|nth| sectors(nth, 1)).collect();
    fs::write(dir.path().join("a.bin"), bytes).expect("writes");
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\ncreateType=\"{create_type}\"\n{further}\n{}\n",
        extents.join("\n")
    );
    fs::write(dir.path().join("disk.vmdk"), text).expect("writes");
    dir
}

#[test]
fn extents_keep_their_place_in_all_commands() {
    let extents = [
        "RDONLY 2 ZERO",
        "RDONLY 4 FLAT \"a.bin\" 1",
        "RW 2 FLAT \"a.bin\" 6",
        "RW 4 ZERO",
    ];
    let dir = image("monolithicFlat", &extents, "");
    let dir = dir.path();
    let mut expected = sectors(0, 2);
    for nth in [1, 2, 3, 4, 6, 7] {
        expected.extend(sectors(nth, 1));
    }
    expected.extend(sectors(0, 4));
    fs::write(dir.join("expected"), &expected).expect("writes");

    succeed(dir, &["convert", "-O", "raw", "disk.vmdk", "out"]);
    assert!(fs::read(dir.join("out")).expect("is there") == expected);
    succeed(dir, &["compare", "-F", "raw", "disk.vmdk", "expected"]);
    succeed(dir, &["check", "disk.vmdk"]);
    let (map, _) = succeed(dir, &["map", "--output=json", "disk.vmdk"]);
    assert!(
        map.starts_with(
            "[{ \"start\": 0, \"length\": 1024, \"depth\": 0, \"present\": true, \"zero\": true, \"data\": false"
        ),
        "{map}"
    );
    let (info, _) = succeed(dir, &["info", "disk.vmdk"]);
    assert!(info.contains("virtual size: 6 KiB (6144 bytes)"), "{info}");
    assert!(
        info.contains("format: ZERO\n") && info.contains("access: RDONLY\n"),
        "{info}"
    );
    succeed(dir, &["info", "--output=json", "disk.vmdk"]);
    let (measure, _) = succeed(dir, &["measure", "-O", "raw", "disk.vmdk"]);
    assert_eq!(measure, "required size: 6144\nfully allocated size: 6144\n");

    // The same contents are written where they can be.
    let refused = fail(
        dir,
        &[
            "convert",
            "-n",
            "-f",
            "raw",
            "-O",
            "vmdk",
            "expected",
            "disk.vmdk",
        ],
    );
    assert!(
        refused.contains("The extent at 0x0 is RDONLY, and cannot be written"),
        "{refused}"
    );
    let refused = fail(dir, &["resize", "disk.vmdk", "1M"]);
    assert_eq!(
        refused,
        "qemu-img: The extent at 0x1000 is ZERO, and cannot be written\n"
    );
    succeed(
        dir,
        &[
            "bench",
            "-q",
            "-w",
            "-c",
            "1",
            "-s",
            "512",
            "-o",
            "3072",
            "--pattern=9",
            "disk.vmdk",
        ],
    );
    let refused = fail(
        dir,
        &["bench", "-w", "-c", "1", "-s", "512", "-o", "1024", "disk.vmdk"],
    );
    assert!(refused.contains("RDONLY"), "{refused}");
    let bytes = fs::read(dir.join("a.bin")).expect("is there");
    assert_eq!(bytes[6 * SECTOR..7 * SECTOR], [9; SECTOR]);
    assert_eq!(bytes[SECTOR..2 * SECTOR], [1; SECTOR]);
}

#[test]
fn an_extent_without_access_is_an_error_where_it_is_read() {
    let extents = [
        "RW 2 FLAT \"a.bin\" 0",
        "NOACCESS 4 FLAT \"\\\\.\\PhysicalDrive0\" 2",
        "RW 2 FLAT \"a.bin\" 6",
    ];
    let dir = image("partitionedDevice", &extents, "");
    let dir = dir.path();
    let (info, _) = succeed(dir, &["info", "disk.vmdk"]);
    assert!(info.contains("virtual size: 4 KiB (4096 bytes)"), "{info}");
    assert!(info.contains("access: NOACCESS\n"), "{info}");
    succeed(dir, &["check", "disk.vmdk"]);
    let why = "The extent from 0x400 to 0xc00 is NOACCESS: its data is not part of the image";
    for words in [
        &["map", "disk.vmdk"][..],
        &["convert", "-O", "raw", "disk.vmdk", "out"],
        &["measure", "-O", "qcow2", "-o", "cluster_size=512", "disk.vmdk"],
        &["compare", "-F", "raw", "disk.vmdk", "a.bin"],
    ] {
        let output = run(dir, words);
        assert!(!output.status.success(), "{words:?}: {output:?}");
        assert!(
            String::from_utf8_lossy(&output.stderr).contains(why),
            "{words:?}: {output:?}"
        );
    }
}

#[test]
fn loose_descriptors_are_recognised_with_a_warning() {
    let dir = image("monolithicFlat", &["RW 8 FLAT \"a.bin\" 0"], "");
    let dir = dir.path();
    let plain = fs::read_to_string(dir.join("disk.vmdk")).expect("text");
    let (_, stderr) = succeed(dir, &["info", "disk.vmdk"]);
    assert_eq!(stderr, "", "qemu-img says vmdk as well");
    for text in [
        format!("\u{feff}{plain}"),
        plain.replace("version=1", "version = 1"),
        plain.replace("version=1", "VERSION=1"),
        format!("\n\n{plain}").replace('\n', "\r\n"),
    ] {
        fs::write(dir.join("loose.vmdk"), &text).expect("writes");
        let (info, stderr) = succeed(dir, &["info", "loose.vmdk"]);
        assert!(
            info.contains("file format: vmdk\nvirtual size: 4 KiB"),
            "{text:?}: {info}"
        );
        assert_eq!(
            stderr,
            "qemu-img: warning: 'loose.vmdk' is taken for an image of the format vmdk, although it does not begin \
             exactly like one. Specify the format vmdk to avoid this warning, or raw if the file is the disk itself.\n"
        );
        let (info, stderr) = succeed(dir, &["info", "-f", "vmdk", "loose.vmdk"]);
        assert!(
            info.contains("file format: vmdk") && stderr.is_empty(),
            "{text:?}: {stderr}"
        );
        let (info, stderr) = succeed(dir, &["info", "-f", "raw", "loose.vmdk"]);
        assert!(
            info.contains("file format: raw") && stderr.is_empty(),
            "{text:?}: {stderr}"
        );
        succeed(dir, &["convert", "-q", "-O", "raw", "loose.vmdk", "out"]);
        assert!(
            fs::read(dir.join("out")).expect("is there") == fs::read(dir.join("a.bin")).expect("is there")
        );
    }
}

#[test]
fn parents_are_found_beside_the_image() {
    let parent = |name: &str| format!("parentFileNameHint=\"{name}\"\nparentCID=12345678");
    for (hint, file) in [
        ("base.vmdk", "base.vmdk"),
        (r"C:\vm\base.vmdk", "base.vmdk"),
        (r"..\base.vmdk", "base.vmdk"),
        ("/vmfs/volumes/store/vm/base.vmdk", "base.vmdk"),
        ("Base.VMDK", "base.vmdk"),
        (r"D:\VM\BASE.vmdk", "base.vmdk"),
    ] {
        let dir = image("monolithicFlat", &["RW 8 FLAT \"a.bin\" 0"], "");
        let dir = dir.path();
        fs::rename(dir.join("disk.vmdk"), dir.join(file)).expect("renames");
        // A sparse image without grains.
        succeed(
            dir,
            &[
                "create",
                "-q",
                "-f",
                "vmdk",
                "-o",
                "subformat=twoGbMaxExtentSparse",
                "top.vmdk",
                "4k",
            ],
        );
        let text = fs::read_to_string(dir.join("top.vmdk")).expect("text");
        let text = text.replace("parentCID=ffffffff", &parent(hint));
        fs::write(dir.join("top.vmdk"), text).expect("writes");
        let (_, stderr) = succeed(dir, &["convert", "-O", "raw", "top.vmdk", "out"]);
        assert_eq!(stderr, "", "{hint}");
        assert!(
            fs::read(dir.join("out")).expect("is there") == fs::read(dir.join("a.bin")).expect("is there"),
            "{hint}"
        );
        let (info, _) = succeed(dir, &["info", "--backing-chain", "top.vmdk"]);
        assert!(info.contains(&format!("image: {file}\n")), "{hint}: {info}");
        let (info, _) = succeed(dir, &["info", "top.vmdk"]);
        let actual = if hint == file {
            String::new()
        } else {
            format!(" (actual path: {file})")
        };
        assert!(
            info.contains(&format!("backing file: {hint}{actual}\n")),
            "{hint}: {info}"
        );
        succeed(dir, &["map", "--output=json", "top.vmdk"]);
        // The parent is changed: both identities are named.
        let base = fs::read_to_string(dir.join(file)).expect("text");
        fs::write(dir.join(file), base.replace("CID=12345678", "CID=0000beef")).expect("writes");
        for words in [
            &["convert", "-O", "raw", "top.vmdk", "out"][..],
            &["dd", "-O", "raw", "if=top.vmdk", "of=out"],
            &["bench", "-w", "-c", "1", "-s", "512", "top.vmdk"],
        ] {
            let stderr = fail(dir, words);
            assert!(
                stderr.contains("0x0000beef") && stderr.contains("0x12345678"),
                "{hint}: {words:?}: {stderr}"
            );
        }
        fs::remove_file(dir.join(file)).expect("removes");
        let stderr = fail(dir, &["convert", "-O", "raw", "top.vmdk", "out"]);
        assert!(stderr.contains("Could not open"), "{hint}: {stderr}");
    }
}

/// A loop device, which is detached when it is dropped.
struct LoopDevice(String);

impl LoopDevice {
    /// The device of `file`; `None` where loop devices cannot be made, which is said.
    fn of(file: &Path) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["-f", "--show"])
            .arg(file)
            .output()
            .ok();
        let output = output.filter(|output| output.status.success());
        if output.is_none() {
            let _ = writeln!(std::io::stderr(), "skipped: loop devices need root and losetup");
        }
        Some(Self(String::from_utf8(output?.stdout).ok()?.trim().to_owned()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).output();
    }
}

#[test]
fn a_block_device_holds_an_image() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    fs::write(dir.join("device"), vec![0x5a; 8 << 20]).expect("writes");
    let mut source = vec![0; 3 << 20];
    source[70_000..900_000].fill(7);
    source[2 << 20..].fill(8);
    fs::write(dir.join("source"), &source).expect("writes");
    let Some(device) = LoopDevice::of(&dir.join("device")) else {
        return;
    };
    let device = &*device.0;
    for subformat in ["monolithicSparse", "streamOptimized"] {
        let options = format!("subformat={subformat}");
        succeed(dir, &["create", "-q", "-f", "vmdk", "-o", &options, device, "3M"]);
        succeed(
            dir,
            &["convert", "-n", "-f", "raw", "-O", "vmdk", "source", device],
        );
        succeed(dir, &["compare", "-f", "raw", "-F", "vmdk", "source", device]);
        succeed(
            dir,
            &[
                "convert", "-f", "raw", "-O", "vmdk", "-o", &options, "source", device,
            ],
        );
        let (_, stderr) = succeed(dir, &["compare", "-f", "raw", "-F", "vmdk", "source", device]);
        assert_eq!(stderr, "", "{subformat}");
        succeed(dir, &["check", "-f", "vmdk", device]);
        succeed(dir, &["resize", "-f", "vmdk", device, "40M"]);
        succeed(dir, &["compare", "-f", "raw", "-F", "vmdk", "source", device]);
    }
    let stderr = fail(
        dir,
        &["convert", "-f", "raw", "-O", "vmdk", "-S", "0", "device", device],
    );
    assert!(stderr.contains("No space left on device"), "{stderr}");
}
