//! Commands that are refused without creating or changing a file: those that would overwrite a file that is still
//! needed, and those that would open another file than the named one.
#![cfg(target_os = "linux")]

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

/// Runs `qemu-img` with words that are separated by blanks.
fn qemu_img(dir: &Path, words: &[u8]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qemu-img"))
        .args(words.split(|byte| *byte == b' ').map(OsStr::from_bytes))
        .current_dir(dir)
        .output()
        .expect("it runs")
}

fn succeed(dir: &Path, words: &str) -> String {
    let output = qemu_img(dir, words.as_bytes());
    assert!(output.status.success(), "{words}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// All files of a directory with their contents.
fn files(dir: &Path) -> BTreeMap<OsString, Vec<u8>> {
    let entries = fs::read_dir(dir).expect("readable");
    let names = entries.map(|entry| entry.expect("readable").file_name());
    names
        .map(|name| (name.clone(), fs::read(dir.join(&name)).expect("readable")))
        .collect()
}

/// Runs a command that must fail with this status and without changing a file, and returns its standard error.
fn refused(dir: &Path, words: impl AsRef<[u8]>, status: i32) -> String {
    let words = words.as_ref();
    let shown = String::from_utf8_lossy(words);
    let before = files(dir);
    let output = qemu_img(dir, words);
    assert_eq!(output.status.code(), Some(status), "{shown}: {output:?}");
    assert!(files(dir) == before, "{shown}: files have changed");
    String::from_utf8_lossy(&output.stderr).trim_end().to_owned()
}

/// A directory with raw images, a chain of qcow2 images (`c` on `b` on `a`), and links to some of them.
fn images() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path();
    fs::write(path.join("raw"), vec![7; 1 << 20]).expect("written");
    for words in [
        "create -q -f qcow2 a 1M",
        "create -q -f qcow2 -b a -F qcow2 b",
        "create -q -f qcow2 -b b -F qcow2 c",
        "create -q -f qcow2 -b raw -F raw top",
        "create -q -f qcow2 -o data_file=data split 1M",
        "create -q -f vmdk -o subformat=monolithicFlat v.vmdk 1M",
    ] {
        succeed(path, words);
    }
    for name in ["raw", "c"] {
        fs::hard_link(path.join(name), path.join(format!("hard-{name}"))).expect("made");
        symlink(name, path.join(format!("soft-{name}"))).expect("made");
    }
    dir
}

#[test]
fn a_file_that_is_read_is_not_overwritten() {
    let dir = images();
    let path = dir.path();
    for words in [
        "dd -f raw if=raw of=raw",
        "dd -f raw if=raw of=hard-raw",
        "dd -f raw if=raw of=soft-raw",
        "dd -f raw if=raw of=./raw",
        "dd -f raw if=soft-raw of=file:hard-raw",
        "dd -U if=c of=c",
        "dd -U if=c of=a -O qcow2",
        "convert -U -f raw -O raw raw raw",
        "convert -U -f raw -O qcow2 raw hard-raw",
        "convert -U -O qcow2 c soft-c",
        "convert -U -O qcow2 c b",
        "convert -U -O raw top raw",
        "convert -U -O raw split data",
        "convert -U -O raw v.vmdk v-flat.vmdk",
        "convert -U -O vmdk -o subformat=monolithicFlat v-flat.vmdk v.vmdk",
        "convert -U -O qcow2 -o data_file=raw -f raw raw new",
        "convert -U -O raw raw c a",
        "convert -U --image-opts -O raw driver=raw,file.filename=raw hard-raw",
        "convert -U --image-opts -O raw driver=throttle,throttle-group=g,file.driver=qcow2,file.file.filename=c a \
         --object throttle-group,id=g",
        "create -f qcow2 -b ./raw -F raw raw",
        "create -f qcow2 -b hard-raw -F raw raw",
        "create -f qcow2 -u -b soft-raw -F raw raw 1M",
        "create -f qcow2 -b top -F qcow2 raw",
        "create -f qcow2 -b c -F qcow2 a",
        "create -f qcow2 -u -b c -F qcow2 a 1M",
        "create -f qcow2 -o data_file=hard-raw -b raw -F raw new",
        "create -f qed -b hard-raw -F raw raw",
        "convert -O qcow2 -f raw -B c -F qcow2 raw b",
    ] {
        let message = refused(path, words, 1);
        assert!(
            message.ends_with("is needed for the new image and would be overwritten"),
            "{words}: {message}"
        );
    }
    for words in [
        "convert -n -U -f raw -O raw raw hard-raw",
        "convert -n -U -O qcow2 c b",
        "convert -n -U -O raw top raw",
        "convert -n -U -O raw split data",
    ] {
        let message = refused(path, words, 1);
        assert_eq!(
            message, "qemu-img: The target is one of the files that are copied",
            "{words}"
        );
    }
    for words in [
        "create -f qcow2 -o data_file=new new 1M",
        "create -f qcow2 -o data_file=hard-raw raw 1M",
    ] {
        let message = refused(path, words, 1);
        assert!(
            message.ends_with("cannot be two files of the new image"),
            "{words}: {message}"
        );
    }
}

#[test]
fn no_image_becomes_its_own_backing_image() {
    let dir = images();
    let path = dir.path();
    for words in [
        "rebase -u -b a -F qcow2 a",
        "rebase -u -b a -F raw a",
        "rebase -u -b b -F qcow2 a",
        "rebase -u -b c -F qcow2 a",
        "rebase -u -b hard-c -F qcow2 a",
        "rebase -u -b ./soft-c -F qcow2 a",
        "rebase -u -b file:c -F qcow2 a",
        "rebase -u -b hard-c -F qcow2 c",
        "rebase -u -b soft-c -F qcow2 c",
        "rebase -u -b json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"c\"}} -F qcow2 a",
    ] {
        let message = refused(path, words, 1);
        assert!(
            message.ends_with("creates an infinite loop"),
            "{words}: {message}"
        );
    }
}

#[test]
fn an_image_that_its_own_header_leads_back_to_is_not_opened() {
    let dir = images();
    let path = dir.path();
    fs::remove_file(path.join("a")).expect("ours");
    fs::hard_link(path.join("c"), path.join("a")).expect("same file system");
    for command in [
        "map c",
        "convert -O raw c new",
        "create -f qcow2 -b c -F qcow2 new",
    ] {
        let message = refused(path, command, 1);
        assert!(
            message.contains("creates an infinite loop"),
            "{command}: {message}"
        );
    }
}

#[test]
fn an_image_is_not_changed_while_it_is_read_as_the_new_backing_image() {
    let dir = images();
    let message = refused(dir.path(), "rebase -U -b c -F qcow2 a", 1);
    assert!(message.ends_with("creates an infinite loop"), "{message}");
}

#[test]
fn a_loop_in_a_chain_is_reported() {
    let dir = images();
    let path = dir.path();
    // Another program may write such images: the backing file of `a` is the image itself, or its overlay.
    for name in ["a", "./a", "c"] {
        succeed(path, "create -q -f qcow2 -u -b x -F qcow2 a 1M");
        let mut image = fs::read(path.join("a")).expect("readable");
        let at = image[..65536]
            .windows(2)
            .rposition(|two| two == b"x\0")
            .expect("its name");
        image[at..at + name.len()].copy_from_slice(name.as_bytes());
        image[19] = u8::try_from(name.len()).expect("short");
        fs::write(path.join("a"), image).expect("written");
        for words in [
            "map a",
            "check a",
            "info --backing-chain a",
            "convert -O raw c new",
            "measure -O raw a",
        ] {
            let message = refused(path, words, 1);
            assert!(
                message.contains("' creates an infinite loop"),
                "{name}, {words}: {message}"
            );
        }
    }
}

/// A name that is not UTF-8, and names of others that look like it: with what is shown in its place, and with the character
/// that the program has for such a byte.
const NAME: &[u8] = b"o\xff";
const DECOYS: [&str; 2] = ["o\u{fffd}", "o\u{10ffff}"];

#[test]
fn a_name_that_is_not_utf8_is_a_name_of_its_own() {
    let template = images();
    for words in [
        "amend -o lazy_refcounts=on NAME",
        "bench -w -c 1 NAME",
        "bitmap --add NAME b",
        "bitmap --merge s -b NAME -F qcow2 a t",
        "check NAME",
        "commit -b NAME over",
        "convert -O raw a NAME",
        "convert -O raw a NAME.raw",
        "convert -n -O qcow2 a NAME",
        "convert -O raw NAME new",
        "convert -O qcow2 -B NAME -F qcow2 a new",
        "convert -O qcow2 -o backing_file=NAME,backing_fmt=qcow2 a new",
        "convert -n --target-image-opts a driver=qcow2,file.filename=NAME",
        "convert -O qcow2 -o data_file=NAME a new",
        "compare a NAME",
        "create -f raw NAME 1M",
        "create -f qcow2 -b NAME -F qcow2 new",
        "create -f qcow2 -o data_file=NAME new 1M",
        "dd if=a of=NAME",
        "dd if=NAME of=new",
        "info NAME",
        "info --image-opts driver=qcow2,file.filename=NAME",
        "info json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"NAME\"}}",
        "info --object secret,id=s,file=NAME a",
        "map NAME",
        "measure -O raw NAME",
        "rebase -u -b NAME -F qcow2 a",
        "rebase -b NAME -F qcow2 over",
        "resize NAME 2M",
        "snapshot -c s NAME",
        "snapshot -c NAME a",
        "-T file=NAME info a",
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path();
        for (name, bytes) in files(template.path()) {
            fs::write(path.join(name), bytes).expect("written");
        }
        succeed(path, "create -q -f qcow2 named 1M");
        if words.starts_with("bitmap --merge") {
            succeed(path, "bitmap --add a t");
            succeed(path, "bitmap --add named s");
        }
        fs::rename(path.join("named"), path.join(OsStr::from_bytes(NAME))).expect("renamed");
        let over = qemu_img(path, &with_name("create -q -f qcow2 -b NAME -F qcow2 over"));
        assert!(over.status.success(), "{over:?}");
        for decoy in DECOYS {
            fs::write(path.join(decoy), "another").expect("written");
        }
        let output = qemu_img(path, &with_name(words));
        assert!(output.status.success(), "{words}: {output:?}");
        let after = files(path);
        for decoy in DECOYS {
            assert_eq!(after[OsStr::new(decoy)], b"another", "{words}");
            let others = after
                .keys()
                .filter(|name| name.as_bytes().starts_with(decoy.as_bytes()));
            assert_eq!(others.count(), 1, "{words}");
        }
    }
    let surrogate = "info json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"o\\udcff\"}}";
    refused(template.path(), surrogate, 1);
}

/// The words with the name that is not UTF-8.
fn with_name(words: &str) -> Vec<u8> {
    let parts: Vec<_> = words.split("NAME").map(str::as_bytes).collect();
    parts.join(NAME)
}

#[test]
fn a_name_in_an_image_that_is_not_utf8_is_no_other_name() {
    for (make, file, is_below) in [
        ("create -q -f qcow2 -u -b ox -F raw image 1M", "image", true),
        ("create -q -f qed -u -b ox -F raw image 1M", "image", true),
        ("create -q -f qcow -u -b ox image 1M -F raw", "image", true),
        (
            "create -q -f vmdk -o subformat=monolithicFlat ox.vmdk 1M",
            "ox.vmdk",
            false,
        ),
        ("create -q -f qcow2 -o data_file=ox image 1M", "image", false),
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path();
        succeed(path, make);
        for decoy in DECOYS {
            for name in [decoy.to_owned(), format!("{decoy}-flat.vmdk")] {
                fs::write(path.join(name), vec![7; 1 << 20]).expect("written");
            }
        }
        let mut bytes = fs::read(path.join(file)).expect("readable");
        let mut places: Vec<_> = (0..bytes.len() - 1)
            .filter(|at| bytes[*at..].starts_with(b"ox"))
            .collect();
        assert!(!places.is_empty(), "{make}");
        for at in places.drain(..) {
            bytes[at..at + NAME.len()].copy_from_slice(NAME);
        }
        fs::write(path.join("image"), bytes).expect("written");
        for words in [
            "map image",
            "convert -O raw image new",
            "bench -w -c 1 image",
            "resize image 2M",
        ] {
            let message = refused(path, words, 1);
            assert!(message.contains(DECOYS[0]), "{make}, {words}: {message}");
            assert!(
                message.ends_with(": No such file or directory"),
                "{make}, {words}: {message}"
            );
        }
        for end in ["", "-flat.vmdk"] {
            let name = [NAME, end.as_bytes()].concat();
            fs::write(path.join(OsStr::from_bytes(&name)), vec![5; 1 << 20]).expect("written");
        }
        for words in [
            "map image",
            "info --backing-chain image",
            "convert -O raw image new",
        ] {
            let output = qemu_img(path, words.as_bytes());
            assert!(output.status.success(), "{make}, {words}: {output:?}");
        }
        if is_below || file == "ox.vmdk" {
            assert!(
                fs::read(path.join("new")).expect("readable") == vec![5; 1 << 20],
                "{make}"
            );
        }
    }
}

/// The name that `info` prints on the line `image: `, or what it says instead.
fn shown_name(dir: &Path, words: &[u8]) -> Vec<u8> {
    let output = qemu_img(dir, words);
    let mut lines = output.stdout.split(|byte| *byte == b'\n');
    let name = lines.find_map(|line| line.strip_prefix(b"image: "));
    name.map_or(output.stderr.clone(), <[u8]>::to_vec)
}

#[test]
fn a_json_name_that_is_printed_leads_to_the_same_file() {
    let dir = images();
    let path = dir.path();
    fs::rename(path.join("raw"), path.join(OsStr::from_bytes(NAME))).expect("renamed");
    let options = b"info --image-opts driver=raw,offset=512,file.filename=";
    let name = shown_name(path, &[options, NAME].concat());
    let (head, tail) = (
        &b"json:{\"offset\": \"512\", \"driver\": \"raw\", \"file\": {\"driver\": \"file\", \"filename\": \""
            [..],
        b"\"}}",
    );
    assert_eq!(name, [head, NAME, tail].concat());
    let output = Command::new(env!("CARGO_BIN_EXE_qemu-img"))
        .args([OsStr::new("map"), OsStr::from_bytes(&name)])
        .current_dir(path)
        .output()
        .expect("it runs");
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn a_name_that_is_what_others_are_shown_as_can_be_used() {
    let dir = images();
    let path = dir.path();
    for decoy in DECOYS {
        fs::copy(path.join("a"), path.join(decoy)).expect("copied");
        succeed(path, &format!("create -q -f qcow2 -b {decoy} -F qcow2 new"));
        succeed(path, "map new");
    }
}

#[test]
fn a_level_of_compression_is_refused_where_nothing_is_compressed() {
    let dir = images();
    let path = dir.path();
    let stored = "compression_level has no effect: It is for writing compressed clusters, and is not stored in the image";
    let without = "compression_level has no effect: Clusters are compressed with -c only";
    let measured =
        "compression_level has no effect: The measured size is that of an image that is not compressed";
    let sparse = "compression_level has no effect: The subformat monolithicSparse is not compressed";
    let range = "Compression level must be between 1 and 9";
    let level = "-o compression_level=3";
    for (words, message) in [
        (
            format!("create -q -f qcow2 {level} new 1M"),
            format!("new: {stored}"),
        ),
        (
            format!("create -q -f qcow {level} new 1M"),
            format!("new: {stored}"),
        ),
        (
            format!("create -q -f vmdk {level},subformat=streamOptimized new 1M"),
            format!("new: {stored}"),
        ),
        (
            format!("create -q -f vmdk {level} new 1M"),
            format!("new: {sparse}"),
        ),
        (
            "create -q -f qcow2 -o compression_level=10 new 1M".to_owned(),
            format!("new: {range}"),
        ),
        (
            "create -q -f qed -o compression_level=1 new 1M".to_owned(),
            "new: Invalid parameter 'compression_level'".to_owned(),
        ),
        (
            format!("convert -f raw -O qcow2 {level} raw new"),
            format!("new: error while converting qcow2: {without}"),
        ),
        (
            format!("convert -c -f raw -O vmdk {level} raw new"),
            format!("new: error while converting vmdk: {sparse}"),
        ),
        (
            "convert -c -f raw -O qcow2 -o compression_level=0 raw new".to_owned(),
            range.to_owned(),
        ),
        (format!("measure -O qcow2 {level} --size 1M"), measured.to_owned()),
        (format!("measure -O qcow {level} --size 1M"), measured.to_owned()),
        (
            format!("measure -O vmdk {level},subformat=streamOptimized --size 1M"),
            measured.to_owned(),
        ),
        (
            format!("amend -f qcow2 {level} a"),
            "Invalid parameter 'compression_level'\nThis option is only supported for image creation"
                .to_owned(),
        ),
    ] {
        assert_eq!(
            refused(path, &words, 1),
            format!("qemu-img: {message}"),
            "{words}"
        );
    }
    let contents = |name: &str| fs::read(path.join(name)).expect("exists");
    let len = |name: &str| contents(name).len();
    let lines = (0..20000_u32).map(|line| {
        let (file, bytes) = (line * line % 977, line * 7919 % 4099);
        format!("line {line} of file {file} has {bytes} bytes\n")
    });
    fs::write(path.join("text"), lines.collect::<String>()).expect("written");
    for (target, options) in [
        ("-c -O qcow2", ""),
        ("-c -O qcow2", ",compression_type=zstd"),
        ("-c -O qcow", ""),
        ("-O vmdk", ",subformat=streamOptimized"),
        ("-c -O vmdk", ",subformat=streamOptimized"),
    ] {
        for level in [1, 9] {
            let words =
                format!("convert -f raw {target} -o compression_level={level}{options} text t{level}");
            succeed(path, &words);
            succeed(path, &format!("compare -f raw text t{level}"));
        }
        assert!(
            len("t1") >= len("t9") && contents("t1") != contents("t9"),
            "{target} {options}: {} and {}",
            len("t1"),
            len("t9")
        );
    }
}
