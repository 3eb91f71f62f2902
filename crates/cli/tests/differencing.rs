//! Differencing VHD and VHDX images, made by hand, through the commands: chains of three, parents under all kinds of names.
#![cfg(target_os = "linux")]

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::process::{Command, Output};

use diskimage_testing::{
    FULLY_PRESENT, PARTIALLY_PRESENT, SparseBlock, VhdImage, VhdParent, VhdxImage, guid, overlay,
};

fn run(dir: &Path, args: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qemu-img"))
        .args(args.split_whitespace())
        .current_dir(dir)
        .output()
        .expect("runs")
}

/// Runs a command that succeeds and prints nothing to stderr, and returns what it prints.
fn good(dir: &Path, args: &str) -> String {
    let output = run(dir, args);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && told.is_empty(), "{args}: {told}");
    String::from_utf8(output.stdout).expect("is text")
}

/// Runs a command that fails, and returns its message.
fn bad(dir: &Path, args: &str) -> String {
    let output = run(dir, args);
    assert_eq!(output.status.code(), Some(1), "{args}");
    String::from_utf8(output.stderr).expect("is text")
}

fn block(index: u64, written: &[(Range<u64>, u8)]) -> SparseBlock {
    SparseBlock {
        index,
        written: written.to_vec(),
        stale: 0x55,
    }
}

const SIZE: usize = 8 << 20;
const VHD_BLOCK: u64 = 2 << 20;
const VHDX_BLOCK: u64 = 1 << 20;

fn vhd(id: u8, parent: Option<(u8, &str)>, blocks: Vec<SparseBlock>) -> VhdImage {
    VhdImage {
        unique_id: [id; 16],
        parent: parent.map(|(id, path)| VhdParent {
            unique_id: [id; 16],
            locators: vec![(*b"W2ru", path.to_owned())],
            ..VhdParent::default()
        }),
        blocks,
        ..VhdImage::default()
    }
}

/// A chain of three VHD images in `dir`, `base.vhd`, `middle.vhd` and `top.vhd`, and the contents of the three disks.
fn vhd_chain(dir: &Path) -> [Vec<u8>; 3] {
    let images = [
        (
            "base.vhd",
            vhd(
                1,
                None,
                vec![block(0, &[(0..4096, 0x11)]), block(2, &[(10..20, 0x12)])],
            ),
        ),
        (
            "middle.vhd",
            vhd(
                2,
                Some((1, ".\\base.vhd")),
                vec![block(0, &[(5..9, 0x21)]), block(1, &[(0..1, 0x22)])],
            ),
        ),
        (
            "top.vhd",
            vhd(
                3,
                Some((2, ".\\middle.vhd")),
                vec![block(2, &[(15..16, 0x31)]), block(0, &[(8..10, 0x32)])],
            ),
        ),
    ];
    let mut model = vec![0; SIZE];
    images.map(|(name, image)| {
        fs::write(dir.join(name), image.build()).expect("writes");
        overlay(&mut model, &image.blocks, VHD_BLOCK, 512);
        model.clone()
    })
}

fn linkage(byte: u8) -> String {
    let hex = format!("{byte:02x}");
    let group = |count: usize| hex.repeat(count);
    format!(
        "{{{}-{}-{}-{}-{}}}",
        group(4),
        group(2),
        group(2),
        group(2),
        group(6)
    )
}

fn vhdx(id: u8, sector: u32, parent: Option<(u8, &str)>, blocks: Vec<(u64, SparseBlock)>) -> VhdxImage {
    VhdxImage {
        sector,
        data_write: guid(&linkage(id)),
        parent: parent.map(|(id, path)| {
            vec![
                ("parent_linkage".to_owned(), linkage(id)),
                ("relative_path".to_owned(), path.to_owned()),
            ]
        }),
        blocks,
        ..VhdxImage::default()
    }
}

fn vhdx_chain(dir: &Path, sector: u32) -> [Vec<u8>; 3] {
    let whole = [(0..VHDX_BLOCK / u64::from(sector), 0x11)];
    let images = [
        (
            "base.vhdx",
            vhdx(
                1,
                sector,
                None,
                vec![
                    (FULLY_PRESENT, block(0, &whole)),
                    (FULLY_PRESENT, block(2, &whole)),
                ],
            ),
        ),
        (
            "middle.vhdx",
            vhdx(
                2,
                sector,
                Some((1, ".\\base.vhdx")),
                vec![
                    (PARTIALLY_PRESENT, block(0, &[(5..9, 0x21)])),
                    (PARTIALLY_PRESENT, block(1, &[(0..1, 0x22)])),
                ],
            ),
        ),
        (
            "top.vhdx",
            vhdx(
                3,
                sector,
                Some((2, "middle.vhdx")),
                vec![
                    (PARTIALLY_PRESENT, block(2, &[(15..16, 0x31)])),
                    (PARTIALLY_PRESENT, block(0, &[(8..10, 0x32)])),
                ],
            ),
        ),
    ];
    let mut model = vec![0; SIZE];
    images.map(|(name, image)| {
        fs::write(dir.join(name), image.build()).expect("writes");
        let blocks: Vec<_> = image.blocks.iter().map(|(_, block)| block.clone()).collect();
        overlay(&mut model, &blocks, VHDX_BLOCK, sector.into());
        model.clone()
    })
}

/// The commands that read, on a chain whose disks have the contents `disks`.
fn reads(dir: &Path, format: &str, extension: &str, disks: &[Vec<u8>; 3]) {
    for (name, disk) in ["base", "middle", "top"].iter().zip(disks) {
        let image = format!("{name}.{extension}");
        good(dir, &format!("convert -O raw {image} out.raw"));
        let flat = fs::read(dir.join("out.raw")).expect("reads");
        assert!(flat == *disk, "{image}: convert");
        for target in ["qcow2", "vpc -o force_size=on", "vhdx"] {
            good(dir, &format!("convert -O {target} {image} out.img"));
            let target = target.split_whitespace().next().expect("a format");
            let compared = good(dir, &format!("compare -f {target} -F raw out.img out.raw"));
            assert_eq!(compared, "Images are identical.\n", "{image} to {target}");
        }
        let compared = good(dir, &format!("compare {image} out.raw -F raw"));
        assert_eq!(compared, "Images are identical.\n", "{image}");
        good(dir, &format!("dd if={image} of=dd.raw bs=64k"));
        assert!(
            fs::read(dir.join("dd.raw")).expect("reads") == *disk,
            "{image}: dd"
        );
        let measured = good(dir, &format!("measure -O raw {image}"));
        assert!(measured.starts_with("required size: 8388608\n"), "{measured}");
        if format == "vhdx" {
            good(dir, &format!("check {image}"));
        }
    }
    let info = good(dir, &format!("info --backing-chain top.{extension}"));
    for line in [
        format!("image: top.{extension}\nfile format: {format}\n"),
        format!("backing file: middle.{extension}\nbacking file format: {format}\n"),
        format!("image: base.{extension}\nfile format: {format}\n"),
    ] {
        assert!(info.contains(&line), "{info}");
    }
    let json = good(dir, &format!("info --output=json top.{extension}"));
    assert!(
        json.contains(&format!("\"backing-filename\": \"middle.{extension}\"")),
        "{json}"
    );
    let map = good(dir, &format!("map --output=json top.{extension}"));
    for depth in 0..3 {
        assert!(map.contains(&format!("\"depth\": {depth}, ")), "{map}");
    }
    let from_map = pieces(dir, &map);
    assert!(from_map == disks[2], "the map leads to the data");
}

/// The disk as a JSON map with its offsets in files says it is: bytes come from the file of the depth.
fn pieces(dir: &Path, map: &str) -> Vec<u8> {
    let mut disk = Vec::new();
    let extension = if dir.join("top.vhd").exists() {
        "vhd"
    } else {
        "vhdx"
    };
    let files = ["top", "middle", "base"]
        .map(|name| fs::read(dir.join(format!("{name}.{extension}"))).expect("reads"));
    for line in map.lines() {
        let field = |name: &str| {
            let rest = line.split(&format!("\"{name}\": ")).nth(1)?;
            let end = rest.find([',', '}']).expect("ends");
            Some(rest[..end].trim().to_owned())
        };
        let number = |name: &str| field(name).map(|text| text.parse::<usize>().expect("a number"));
        let len = number("length").expect("has one");
        match (field("zero").as_deref(), number("offset")) {
            (Some("false"), Some(offset)) => {
                let file = &files[number("depth").expect("has one")];
                disk.extend_from_slice(&file[offset..offset + len]);
            }
            _ => disk.resize(disk.len() + len, 0),
        }
    }
    disk
}

#[test]
fn chains_of_three_vhd_images_read_as_one_disk() {
    let dir = tempfile::tempdir().expect("there is one");
    let disks = vhd_chain(dir.path());
    reads(dir.path(), "vpc", "vhd", &disks);
}

#[test]
fn chains_of_three_vhdx_images_read_as_one_disk() {
    for sector in [512, 4096] {
        let dir = tempfile::tempdir().expect("there is one");
        let disks = vhdx_chain(dir.path(), sector);
        reads(dir.path(), "vhdx", "vhdx", &disks);
    }
}

#[test]
fn a_commit_writes_the_sectors_of_a_vhd_into_its_parent() {
    let dir = tempfile::tempdir().expect("there is one");
    let dir = dir.path();
    let [_, _, top] = vhd_chain(dir);
    good(dir, "commit top.vhd");
    good(dir, "convert -O raw middle.vhd out.raw");
    assert!(fs::read(dir.join("out.raw")).expect("reads") == top);
    good(dir, "convert -O raw top.vhd out.raw");
    assert!(fs::read(dir.join("out.raw")).expect("reads") == top);
    let disks = vhdx_chain(dir, 512);
    let told = bad(dir, "commit top.vhdx");
    assert!(
        told.ends_with(
            "Differencing VHDX images are opened for reading only\n\
             Convert the image, which includes the data of its parents, or write to an overlay: qemu-img create -f qcow2 \
             -F vhdx -b IMAGE OVERLAY\n"
        ),
        "{told}"
    );
    good(dir, "convert -O raw top.vhdx out.raw");
    assert!(fs::read(dir.join("out.raw")).expect("reads") == disks[2]);
}

#[test]
fn parents_are_found_under_the_names_that_windows_gave_them() {
    let dir = tempfile::tempdir().expect("there is one");
    let dir = dir.path();
    fs::create_dir_all(dir.join("sub/Deep")).expect("makes");
    let here = dir.to_str().expect("is text");
    let parent = vhd(1, None, vec![block(0, &[(0..4096, 0x11)])]);
    for (stored, code, path) in [
        ("sub/base.vhd", b"W2ru", ".\\base.vhd".to_owned()),
        ("base.vhd", b"W2ru", "..\\base.vhd".to_owned()),
        ("sub/Deep/base.vhd", b"W2ru", "deep\\BASE.VHD".to_owned()),
        ("sub/base.vhd", b"W2ru", "gone\\base.vhd".to_owned()),
        ("sub/Base.VHD", b"W2ku", "C:\\vm\\disks\\base.vhd".to_owned()),
        ("sub/base.vhd", b"W2ku", "\\\\?\\d:\\vm\\base.vhd".to_owned()),
        ("sub/base.vhd", b"W2ku", "\\\\server\\share\\base.vhd".to_owned()),
        ("base.vhd", b"W2ku", format!("{here}/base.vhd")),
        ("base.vhd", b"MacX", format!("file://localhost{here}/base.vhd")),
        ("sub/a:b.vhd", b"W2ru", ".\\a:b.vhd".to_owned()),
    ] {
        let mut child = vhd(2, Some((1, "")), vec![block(1, &[(0..1, 0x22)])]);
        child.parent.as_mut().expect("has one").locators = vec![(*code, path.clone())];
        let mut model = vec![0; SIZE];
        overlay(&mut model, &parent.blocks, VHD_BLOCK, 512);
        overlay(&mut model, &child.blocks, VHD_BLOCK, 512);
        fs::write(dir.join(stored), parent.build()).expect("writes");
        fs::write(dir.join("sub/child.vhd"), child.build()).expect("writes");
        for name in ["sub/child.vhd".to_owned(), format!("{here}/sub/child.vhd")] {
            good(dir, &format!("convert -O raw {name} out.raw"));
            assert!(fs::read(dir.join("out.raw")).expect("reads") == model, "{path}");
            good(dir, &format!("info --backing-chain {name}"));
        }
        fs::remove_file(dir.join(stored)).expect("removes");
        let told = bad(dir, "convert -O raw sub/child.vhd out.raw");
        assert!(
            told.contains(&format!("'{path}'")) && told.contains("No such file or directory"),
            "{told}"
        );
        let told = bad(dir, "info --backing-chain sub/child.vhd");
        assert!(told.contains(&format!("'{path}'")), "{told}");
        good(dir, "info sub/child.vhd");
    }
}

#[test]
fn a_wrong_parent_and_a_loop_are_refused() {
    let dir = tempfile::tempdir().expect("there is one");
    let dir = dir.path();
    fs::write(dir.join("base.vhd"), vhd(9, None, Vec::new()).build()).expect("writes");
    fs::write(
        dir.join("top.vhd"),
        vhd(2, Some((1, "base.vhd")), Vec::new()).build(),
    )
    .expect("writes");
    for args in [
        "convert -O raw top.vhd out.raw",
        "info --backing-chain top.vhd",
        "map top.vhd",
    ] {
        let told = bad(dir, args);
        for id in [
            "09090909-0909-0909-0909-090909090909",
            "01010101-0101-0101-0101-010101010101",
        ] {
            assert!(told.contains(id), "{args}: {told}");
        }
    }
    fs::write(
        dir.join("one.vhd"),
        vhd(1, Some((2, "two.vhd")), Vec::new()).build(),
    )
    .expect("writes");
    fs::write(
        dir.join("two.vhd"),
        vhd(2, Some((1, "one.vhd")), Vec::new()).build(),
    )
    .expect("writes");
    assert!(bad(dir, "convert -O raw one.vhd out.raw").contains("infinite loop"));
    assert!(bad(dir, "info --backing-chain one.vhd").contains("infinite loop"));
    let told = bad(dir, "resize -f vpc one.vhd 10M");
    assert!(told.contains("one.vhd") || told.contains("parent"), "{told}");
    assert_eq!(
        bad(dir, "create -f vpc -b base.vhd -F vpc new.vhd"),
        "qemu-img: new.vhd: Backing file not supported for file format 'vpc'\n"
    );
}
