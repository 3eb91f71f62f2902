//! Images from strangers: what they try to reach under `--untrusted` and `--deny-references`, and that honest ones work.
#![cfg(target_os = "linux")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

use diskimage_testing::{VhdImage, VhdParent, VhdxImage};
use tempfile::TempDir;

/// A directory `here` with the images, and `out` beside it with what they must not reach.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().expect("is made"));
        for directory in ["here", "here/below", "out"] {
            fs::create_dir(place.0.path().join(directory)).expect("is made");
        }
        for raw in ["here/base.raw", "here/below/deep.raw", "out/secret.raw"] {
            fs::write(place.0.path().join(raw), vec![0x5a; 1 << 20]).expect("is written");
        }
        place
    }

    fn run_with(&self, args: &[&str], variable: Option<&str>) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qemu-img"));
        command.args(args).current_dir(self.0.path().join("here"));
        command.env_remove("QEMU_IMG_UNTRUSTED");
        command.envs(variable.map(|value| ("QEMU_IMG_UNTRUSTED", value)));
        command.output().expect("runs")
    }

    fn good(&self, args: &[&str]) -> String {
        let output = self.run_with(args, None);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && told.is_empty(), "{args:?}: {told}");
        String::from_utf8(output.stdout).expect("is text")
    }

    /// The same with the words of `line`.
    fn line(&self, line: &str) -> String {
        self.good(&line.split_whitespace().collect::<Vec<_>>())
    }

    /// Runs a command that fails with one line, and returns it.
    fn bad(&self, args: &[&str]) -> String {
        let output = self.run_with(args, None);
        let told = String::from_utf8(output.stderr).expect("is text");
        assert_eq!(output.status.code(), Some(1), "{args:?}: {told}");
        assert_eq!(told.lines().count(), 1, "{args:?}: {told}");
        told
    }

    fn overlay(&self, name: &str, backing: &str, format: &str) {
        let args = [
            "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format, name, "1M",
        ];
        self.good(&args);
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.0.path().join("here").join(name), bytes).expect("is written");
    }

    fn here(&self) -> String {
        self.0.path().join("here").display().to_string()
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.here()).expect("is a directory");
        let names = entries.map(|entry| entry.expect("is listed").file_name());
        let mut names: Vec<_> = names.map(|name| name.to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

const OUTSIDE: &str = "it is not beneath the directory of the image";

#[test]
fn backing_files_elsewhere_are_refused() {
    let place = Place::new();
    let here = place.0.path().join("here");
    symlink("base.raw", here.join("link")).expect("is linked");
    symlink("../out", here.join("way")).expect("is linked");
    let fifo = Command::new("mkfifo").arg(here.join("pipe")).status();
    assert!(fifo.expect("runs").success());
    let absolute = place.0.path().join("out/secret.raw").display().to_string();
    let cases = [
        ("../out/secret.raw", OUTSIDE),
        ("below/../../out/secret.raw", OUTSIDE),
        (absolute.as_str(), OUTSIDE),
        ("/etc/passwd", OUTSIDE),
        ("/dev/zero", OUTSIDE),
        ("/proc/self/fd/0", OUTSIDE),
        ("link", "it is a symbolic link, not a plain file"),
        ("way/secret.raw", "a symbolic link is on the way"),
        ("pipe", "it is a pipe, not a plain file"),
        ("below", "it is a directory, not a plain file"),
        (
            "json:{\"driver\":\"file\",\"filename\":\"base.raw\"}",
            "it contains options",
        ),
        (
            "json:{\"driver\":\"null-co\",\"size\":4096}",
            "it contains options",
        ),
        ("nbd://localhost/x", "it is not a path"),
        ("nbd:unix:/x", "it is not a path"),
        ("file:base.raw", "it is not a path"),
        ("fat:/etc", "it is not a path"),
        ("blkdebug::base.raw", "it is not a path"),
        ("null-co://", "it is not a path"),
    ];
    for (backing, why) in cases {
        place.overlay("top", backing, "raw");
        let told = place.bad(&["convert", "--untrusted", "top", "copy"]);
        let refused = format!("'top' may not refer to '{backing}': {why}\n");
        assert!(told.ends_with(&refused), "{backing}: {told}");
        let told = place.bad(&["convert", "--deny-references", "top", "copy"]);
        let refused = format!("'top' refers to '{backing}', and references are not allowed\n");
        assert!(told.ends_with(&refused), "{backing}: {told}");
    }
    place.overlay("top", "base.raw", "host_device");
    let told = place.bad(&["map", "--untrusted", "top"]);
    assert!(
        told.contains("'top' may not refer to 'base.raw': it is not a path"),
        "{told}"
    );
    assert!(!place.files().contains(&"copy".to_owned()));
}

#[test]
fn a_block_device_beneath_the_directory_is_refused() {
    let place = Place::new();
    let node = place.0.path().join("here/device");
    let made = Command::new("mknod").arg(&node).args(["b", "7", "0"]).output();
    if !made.is_ok_and(|made| made.status.success()) {
        eprintln!("skipped: no right to make a block device");
        return;
    }
    place.overlay("top", "device", "raw");
    let told = place.bad(&["convert", "--untrusted", "top", "copy"]);
    assert!(told.contains("it is a block device, not a plain file"), "{told}");
    let told = place.bad(&["convert", "top", "copy"]);
    let advice = "is opened only if the format of 'top' is specified (-f)";
    assert!(told.contains(advice), "{told}");
}

#[test]
fn every_image_of_a_chain_is_bound_to_its_own_directory() {
    let place = Place::new();
    place.overlay("middle", "../out/secret.raw", "raw");
    place.overlay("top", "middle", "qcow2");
    let told = place.bad(&["info", "--untrusted", "--backing-chain", "top"]);
    assert!(
        told.contains("'middle' may not refer to '../out/secret.raw'"),
        "{told}"
    );
    let told = place.bad(&["convert", "--untrusted", "top", "copy"]);
    assert!(
        told.contains("'middle' may not refer to '../out/secret.raw'"),
        "{told}"
    );
    // Beneath the directory of the first image, but not beneath that of the second.
    place.overlay("below/middle", "../base.raw", "raw");
    place.overlay("top", "below/middle", "qcow2");
    let told = place.bad(&["convert", "--untrusted", "top", "copy"]);
    assert!(
        told.contains("'below/middle' may not refer to 'below/../base.raw'"),
        "{told}"
    );
}

#[test]
fn data_files_extents_and_parents_elsewhere_are_refused() {
    let place = Place::new();
    place.line("create -q -f qcow2 -o data_file=../out/data data 1M");
    for (name, extent) in [("vmdk", "../out/secret.raw"), ("vmdk-abs", "/dev/zero")] {
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 2048 FLAT \
             \"{extent}\" 0\n"
        );
        place.write(name, text.as_bytes());
    }
    let parent = |path: &str| VhdParent {
        unique_id: [1; 16],
        locators: vec![(*b"W2ru", path.to_owned())],
        ..VhdParent::default()
    };
    let vhd = |parent| VhdImage {
        parent,
        ..VhdImage::default()
    };
    place.write("../out/base.vhd", &vhd(None).build());
    place.write("vhd", &vhd(Some(parent("..\\out\\base.vhd"))).build());
    let relative = "..\\out\\base.vhdx".to_owned();
    let vhdx = VhdxImage {
        parent: Some(vec![
            (
                "parent_linkage".to_owned(),
                format!("{{{}}}", "11111111-1111-1111-1111-111111111111"),
            ),
            ("relative_path".to_owned(), relative),
        ]),
        ..VhdxImage::default()
    };
    place.write("vhdx", &vhdx.build());
    let cases = [
        ("data", "../out/data"),
        ("vmdk", "../out/secret.raw"),
        ("vmdk-abs", "/dev/zero"),
        ("vhd", "../out/base.vhd"),
        ("vhdx", "../out/base.vhdx"),
    ];
    for (image, name) in cases {
        let told = place.bad(&["convert", "--untrusted", image, "copy"]);
        assert!(
            told.contains(&format!("'{image}' may not refer to '{name}'")),
            "{told}"
        );
        let told = place.bad(&["convert", "--deny-references", image, "copy"]);
        assert!(told.contains(&format!("'{image}' refers to '{name}'")), "{told}");
    }
}

#[test]
fn an_ambiguous_format_has_to_be_stated() {
    let place = Place::new();
    place.line("create -q -f qcow2 image 1M");
    let mut both = fs::read(place.0.path().join("here/image")).expect("is read");
    both[0x40..0x44].copy_from_slice(&0xbeda_107f_u32.to_le_bytes());
    place.write("both", &both);
    let told = place.bad(&["convert", "--untrusted", "both", "copy"]);
    assert!(
        told.contains("The format of 'both' is ambiguous, it can be vdi or qcow2"),
        "{told}"
    );
    // A guest can end its raw disk like this.
    place.line("create -q -f vpc -o subformat=fixed,force_size=on disk.vhd 1M");
    let fixed = fs::read(place.0.path().join("here/disk.vhd")).expect("is read");
    let footer = &fixed[fixed.len() - 512..];
    let told = place.bad(&["convert", "--untrusted", "disk.vhd", "copy"]);
    assert!(told.contains("it can be raw or vpc"), "{told}");
    place.line("info --untrusted -f vpc disk.vhd");
    let image = fs::read(place.0.path().join("here/image")).expect("is read");
    let mut both = image.clone();
    both.resize(fixed.len() - 512, 0);
    both.extend_from_slice(footer);
    place.write("both", &both);
    let told = place.bad(&["convert", "--untrusted", "both", "copy"]);
    assert!(told.contains("it can be vpc or qcow2"), "{told}");
    place.line("info --untrusted -f qcow2 both");
    // qcow stores no format of its backing file.
    place.line("create -q -f qcow -b both -F qcow2 top");
    let told = place.bad(&["convert", "--untrusted", "top", "copy"]);
    assert!(told.contains("The format of 'both' is ambiguous"), "{told}");
    place.line("convert --untrusted base.raw copy");
}

#[test]
fn honest_images_work() {
    let place = Place::new();
    let u = "--untrusted";
    place.line("create -q -f qcow2 -b base.raw -F raw middle");
    place.line("create -q -f qcow2 -b middle -F qcow2 top");
    place.line("convert -O vmdk -o subformat=twoGbMaxExtentSparse base.raw disk.vmdk");
    place.line("convert -O vmdk -o subformat=monolithicFlat base.raw flat.vmdk");
    place.line("create -q -f qcow2 -o data_file=data.raw data.qcow2 1M");
    let absolute = format!("{}/base.raw", place.here());
    place.overlay("absolute", &absolute, "raw");
    for image in [
        "top",
        "disk.vmdk",
        "flat.vmdk",
        "data.qcow2",
        "absolute",
        "base.raw",
    ] {
        for command in [
            "info",
            "info --backing-chain",
            "map",
            "measure -O qcow2",
            "bench -c 1",
        ] {
            place.line(&format!("{command} {u} {image}"));
        }
        for format in ["raw", "qcow2", "vmdk", "vhdx", "vdi", "vpc", "qed", "parallels"] {
            place.line(&format!("convert {u} -O {format} {image} copy"));
            place.line(&format!("compare {u} -F {format} {image} copy"));
        }
        place.line(&format!("dd {u} if={image} of=copy bs=64k count=3"));
        place.line(&format!("convert {u} -c -O qcow2 {image} below/copy"));
    }
    for (options, format) in [
        ("subformat=twoGbMaxExtentFlat", "vmdk"),
        ("subformat=streamOptimized", "vmdk"),
        ("data_file=new-data", "qcow2"),
        ("preallocation=full", "raw"),
    ] {
        place.line(&format!(
            "convert {u} -O {format} -o {options} top copy-{format}-{}",
            options.len()
        ));
        // The files of a new image are no references.
        place.line(&format!(
            "convert --deny-references -O {format} -o {options} base.raw deny-{}",
            options.len()
        ));
    }
    place.line(&format!("check {u} top"));
    place.line(&format!("check {u} -r all middle"));
    place.line(&format!("bench {u} -f qcow2 -w -c 4 top"));
    place.line(&format!("snapshot {u} -c one top"));
    assert!(place.line(&format!("snapshot {u} -l top")).contains("one"));
    place.line(&format!("snapshot {u} -d one top"));
    place.line(&format!("resize {u} -q top 2M"));
    place.line(&format!("resize {u} -q disk.vmdk 3G"));
    place.line(&format!("bitmap {u} --add top dirty"));
    place.line(&format!("amend {u} -o lazy_refcounts=on top"));
    place.line(&format!("commit {u} -q top"));
    place.line(&format!("rebase {u} -b base.raw -F raw top"));
    place.line(&format!("rebase {u} -u -b middle -F qcow2 top"));
    place.line(&format!("create {u} -q -f qcow2 -b top -F qcow2 new"));
    place.line(&format!("compare {u} top new"));
    // What the user names may lie anywhere.
    place.line(&format!(
        "create {u} -q -f qcow2 -b ../out/secret.raw -F raw elsewhere"
    ));
    place.line(&format!("rebase {u} -b ../out/secret.raw -F raw top"));
    place.line(&format!(
        "convert {u} -O qcow2 -B ../out/secret.raw -F raw base.raw elsewhere"
    ));
    place.line(&format!("convert {u} ../out/secret.raw ../out/copy"));
    place.line("convert --deny-references -O qcow2 -B ../out/secret.raw -F raw base.raw elsewhere");
    symlink("../out/secret.raw", place.0.path().join("here/own-link")).expect("is linked");
    place.line(&format!("convert {u} own-link copy"));
    symlink("../out/made", place.0.path().join("here/link-to-be")).expect("is linked");
    place.line(&format!("convert {u} base.raw link-to-be"));
    place.line(&format!("compare {u} base.raw ../out/made"));
    let left: Vec<_> = place
        .files()
        .into_iter()
        .filter(|name| name.starts_with(".qemu"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn files_beside_the_image_that_it_names_as_another_machine_does_are_found() {
    let place = Place::new();
    let parent = VhdParent {
        unique_id: [1; 16],
        locators: vec![(*b"W2ru", ".\\Base.VHD".to_owned())],
        ..VhdParent::default()
    };
    let base = VhdImage {
        unique_id: [1; 16],
        ..VhdImage::default()
    };
    let child = VhdImage {
        unique_id: [2; 16],
        parent: Some(parent),
        ..VhdImage::default()
    };
    place.write("base.vhd", &base.build());
    place.write("child.vhd", &child.build());
    let text = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 2048 FLAT \
                \"C:\\vm\\BASE.raw\" 0\n";
    place.write("disk.vmdk", text.as_bytes());
    for image in ["child.vhd", "disk.vmdk"] {
        place.line(&format!("info --untrusted --backing-chain {image}"));
        place.line(&format!("convert --untrusted {image} copy"));
        place.line(&format!("compare --untrusted {image} copy"));
    }
}

#[test]
fn info_tells_what_an_image_names_without_opening_it() {
    let place = Place::new();
    place.overlay("top", "../out/secret.raw", "raw");
    let told = place.line("info --deny-references top");
    assert!(told.contains("backing file: ../out/secret.raw"), "{told}");
    assert!(!told.contains("References:"), "{told}");
    let told = place.line("info --references top");
    assert!(
        told.contains("References:\n    backing: ../out/secret.raw (elsewhere)\n"),
        "{told}"
    );
    let told = place.line("info --untrusted --output=json top");
    let member = "    \"references\": [\n        {\n            \"beneath\": false,\n            \"name\": \
                  \"../out/secret.raw\",\n            \"role\": \"backing\"\n        }\n    ],\n";
    assert!(told.contains(member), "{told}");
    assert!(!place.line("info --output=json top").contains("references"));
    place.overlay("top", "nbd://localhost/x", "raw");
    let told = place.line("info --references top");
    assert!(
        told.contains("    backing: nbd://localhost/x (elsewhere)\n"),
        "{told}"
    );
    place.line("create -q -f qcow2 -o data_file=data.raw data 1M");
    let told = place.line("info --references data");
    assert!(
        told.contains("    data-file: data.raw (beneath the image's directory)\n"),
        "{told}"
    );
    place.line("convert -O vmdk -o subformat=monolithicFlat base.raw flat.vmdk");
    let told = place.line("info --references flat.vmdk");
    assert!(told.contains("    extent: flat-flat.vmdk (beneath"), "{told}");
    let parent = VhdParent {
        locators: vec![
            (*b"W2ru", ".\\base.vhd".to_owned()),
            (*b"W2ku", "C:\\x\\base.vhd".to_owned()),
        ],
        ..VhdParent::default()
    };
    let vhd = VhdImage {
        parent: Some(parent),
        ..VhdImage::default()
    };
    place.write("vhd", &vhd.build());
    let told = place.line("info --references vhd");
    assert!(
        told.contains("    parent: .\\base.vhd (beneath the image's directory)\n"),
        "{told}"
    );
    assert!(
        told.contains("    parent: C:\\x\\base.vhd (elsewhere)\n"),
        "{told}"
    );
}

#[test]
fn the_environment_can_ask_for_it() {
    let place = Place::new();
    place.overlay("top", "../out/secret.raw", "raw");
    let run = |variable| {
        place
            .run_with(&["convert", "top", "copy"], variable)
            .status
            .code()
    };
    assert_eq!(run(None), Some(0));
    assert_eq!(run(Some("")), Some(0));
    assert_eq!(run(Some("0")), Some(0));
    assert_eq!(run(Some("1")), Some(1));
}

#[test]
fn no_guess_opens_a_server_and_no_image_a_character_device() {
    let place = Place::new();
    place.overlay("top", "nbd:unix:/nowhere", "raw");
    let told = place.bad(&["convert", "top", "copy"]);
    let advice = "which is opened only if the format of 'top' is specified (-f)";
    assert!(
        told.contains("'top' refers to the server") && told.contains(advice),
        "{told}"
    );
    let told = place.bad(&["convert", "-f", "qcow2", "top", "copy"]);
    assert!(told.contains("Failed to connect"), "{told}");
    place.overlay("top", "/dev/zero", "raw");
    let told = place.bad(&["convert", "-f", "qcow2", "top", "copy"]);
    assert!(
        told.contains("a character device, which is never opened: '/dev/zero'"),
        "{told}"
    );
    assert!(Path::new("/dev/zero").exists());
}

#[test]
fn programs_are_not_started() {
    let place = Place::new();
    let creds = "tls-creds-anon,id=t,endpoint=client";
    let told = place.bad(&["info", "--untrusted", "--object", creds, "base.raw"]);
    assert!(told.contains("--untrusted starts no programs"), "{told}");
}
