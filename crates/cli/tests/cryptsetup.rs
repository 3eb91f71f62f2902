//! LUKS images that this program writes, checked with `cryptsetup`. Testing a passphrase needs neither a device nor
//! privileges.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output};

/// Runs `cryptsetup`; `None` if it is not installed.
fn cryptsetup(dir: &Path, words: &str) -> Option<Output> {
    let output = Command::new("cryptsetup")
        .args(words.split(' '))
        .current_dir(dir)
        .env(
            "PATH",
            "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin",
        )
        .output();
    let required = std::env::var_os("REQUIRE_STOCK_TOOLS").is_some_and(|value| value == "1");
    assert!(
        output.is_ok() || !required,
        "cryptsetup is required (REQUIRE_STOCK_TOOLS=1) and not installed"
    );
    output.ok()
}

/// Prints that the test is skipped, directly to standard error: the test harness captures `eprintln!`.
fn skip() {
    let _ = writeln!(std::io::stderr(), "skipped: cryptsetup is not installed");
}

fn qemu_img(dir: &Path, words: &str) {
    let output = Command::new(env!("CARGO_BIN_EXE_qemu-img"))
        .args(words.split(' '))
        .current_dir(dir)
        .output()
        .expect("runs");
    assert!(output.status.success(), "{words}: {output:?}");
}

/// A directory with the passphrases `key`, `second` and `wrong`.
fn keys() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    for name in ["key", "second", "wrong"] {
        fs::write(dir.path().join(name), format!("the {name} passphrase")).expect("written");
    }
    dir
}

/// Whether a passphrase opens the image. Panics if `cryptsetup` fails for another reason.
fn opens(dir: &Path, key: &str) -> Option<bool> {
    let words = format!("open --type luks1 --test-passphrase --key-file {key} image");
    let output = cryptsetup(dir, &words)?;
    match output.status.code() {
        Some(0) => Some(true),
        // "No permission (bad passphrase)" in the manual page.
        Some(2) => Some(false),
        _ => panic!("{words}: {output:?}"),
    }
}

/// The value of a line of `luksDump`.
fn dumped(dir: &Path, field: &str) -> Option<String> {
    let output = cryptsetup(dir, "luksDump image")?;
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("text");
    let value = text.lines().find_map(|line| line.strip_prefix(field));
    Some(value.expect("a field").trim().to_owned())
}

// The ciphers are those that cryptsetup implements without the kernel.
#[test]
fn only_its_passphrase_opens_an_image() {
    let dir = keys();
    let dir = dir.path();
    for (options, mode, hash) in [
        ("", "xts-plain64", "sha256"),
        (",cipher-alg=aes-128,ivgen-alg=plain", "xts-plain", "sha256"),
        (
            ",cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha1",
            "cbc-essiv:sha256",
            "sha1",
        ),
        (",hash-alg=sha512", "xts-plain64", "sha512"),
    ] {
        let create = "create -q -f luks --object secret,id=s,file=key -o key-secret=s,iter-time=10";
        qemu_img(dir, &format!("{create}{options} image 1M"));
        let Some(right) = opens(dir, "key") else {
            return skip();
        };
        assert!(right, "{options}");
        assert_eq!(opens(dir, "wrong"), Some(false), "{options}");
        assert_eq!(dumped(dir, "Cipher mode:").as_deref(), Some(mode));
        assert_eq!(dumped(dir, "Hash spec:").as_deref(), Some(hash));
    }
}

#[test]
fn cryptsetup_sees_added_and_erased_key_slots() {
    let dir = keys();
    let dir = dir.path();
    qemu_img(
        dir,
        "create -q -f luks --object secret,id=s,file=key -o key-secret=s,iter-time=10 image 1M",
    );
    let amend = "amend --object secret,id=s,file=key --object secret,id=t,file=second -o";
    let image = "--image-opts driver=luks,key-secret=s,file.filename=image";
    qemu_img(
        dir,
        &format!("{amend} state=active,new-secret=t,iter-time=10 {image}"),
    );
    let Some(first) = opens(dir, "key") else {
        return skip();
    };
    assert!(first);
    assert_eq!(opens(dir, "second"), Some(true));
    qemu_img(dir, &format!("{amend} state=inactive,old-secret=t {image}"));
    assert_eq!(opens(dir, "key"), Some(true));
    assert_eq!(opens(dir, "second"), Some(false));
}
