//! Words from images in the output of commands: they cannot move the cursor, hide text or look like lines of the program.

use std::fs;
use std::process::Command;

/// A name with everything that must not reach a terminal.
const NAME: &str =
    "a\u{1b}[2Jb\nqemu-img c\r\u{9b}1md\u{61c}\u{ad}\u{200b}\u{202e}e\u{2060}\u{2069}\u{feff}\u{e0041}f";

fn qemu_img(dir: &std::path::Path, words: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_qemu-img"))
        .args(words)
        .current_dir(dir)
        .output()
        .expect("it runs");
    let both = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(both).expect("is UTF-8"))
}

fn assert_harmless(words: &[&str], text: &str) {
    let is_harmful = |c: &char| {
        c.is_control() || "\u{61c}\u{ad}\u{200b}\u{202e}\u{2060}\u{2069}\u{feff}\u{e0041}".contains(*c)
    };
    for line in text.lines() {
        assert_eq!(line.chars().find(is_harmful), None, "{words:?}: {line:?}");
        assert!(line.len() < 4096, "{words:?}: {}", line.len());
        assert!(!line.starts_with("qemu-img c"), "{words:?}: {text}");
    }
}

#[test]
fn names_in_images_and_of_images_are_escaped() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    for words in [
        &["create", "-f", "qcow2", "a.qcow2", "1M"][..],
        &["snapshot", "-c", NAME, "a.qcow2"],
        &["bitmap", "--add", "a.qcow2", NAME],
        &[
            "create", "-u", "-f", "qcow2", "-F", "raw", "-b", NAME, "b.qcow2", "1M",
        ],
        &[
            "create", "-u", "-f", "qed", "-F", "raw", "-b", NAME, "b.qed", "1M",
        ],
        &["create", "-f", "raw", NAME, "1M"],
        &[
            "create",
            "-f",
            "vmdk",
            "-o",
            "subformat=monolithicFlat",
            "d.vmdk",
            "1M",
        ],
    ] {
        let (status, text) = qemu_img(dir, words);
        assert_eq!(status, Some(0), "{words:?}: {text}");
        assert_harmless(words, &text);
    }
    let flat = fs::read_to_string(dir.join("d.vmdk")).expect("a descriptor");
    let evil = flat.replace("d-flat.vmdk", "x\u{1b}[2J\u{202e}y");
    fs::write(dir.join("e.vmdk"), evil).expect("written");
    fs::remove_file(dir.join("d-flat.vmdk")).expect("removed");

    let mut escaped = 0;
    for words in [
        &["info", "a.qcow2"][..],
        &["info", "b.qcow2"],
        &["info", "b.qed"],
        &["info", NAME],
        &["info", "e.vmdk"],
        &["info", "--output=json", "a.qcow2"],
        &["info", "--output=json", "b.qcow2"],
        &["info", "--backing-chain", "b.qcow2"],
        &["snapshot", "-l", "a.qcow2"],
        &["snapshot", "-a", &NAME[1..], "a.qcow2"],
        &["map", "b.qcow2"],
        &["map", NAME],
        &["check", NAME],
        &["commit", "b.qcow2"],
        &["convert", "-O", "raw", "missing\u{1b}\n", "x"],
        &["convert", "-O", "raw", "e.vmdk", "x"],
        &["convert", "-l", &NAME[1..], "-O", "raw", "a.qcow2", "x"],
        &["create", "-f", "qcow2", "-F", "raw", "-b", "missing\u{1b}\n", "x"],
        &["rebase", "-b", "missing\u{202e}\n", "-F", "raw", "a.qcow2"],
        &["compare", NAME, "missing\n"],
        &["measure", "-O", "qcow2", "missing\n"],
        &["bitmap", "--remove", "a.qcow2", &NAME[1..]],
        &["dd", "if=missing\n", "of=x"],
        &["amend", "-o", "a\u{1b}=b\n", "a.qcow2"],
        &["resize", "missing\n", "1M"],
        &["info", "--\u{1b}\n"],
        &["\u{1b}\n"],
    ] {
        let (_, text) = qemu_img(dir, words);
        assert_harmless(words, &text);
        escaped += usize::from(text.contains("\\x1b") || text.contains("\\x0a") || text.contains("\\u"));
    }
    assert!(escaped > 20, "{escaped}");
}

#[test]
fn a_long_line_ends_with_the_reason() {
    let dir = tempfile::tempdir().expect("a directory");
    let long = "\u{65e5}".repeat(2000);
    let (status, text) = qemu_img(dir.path(), &["info", &long]);
    assert_eq!(status, Some(1));
    assert_harmless(&["info"], &text);
    assert!(text.ends_with(": File name too long\n"), "{text}");
}
