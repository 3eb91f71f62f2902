//! Arbitrary bytes as a qcow image (version 1), opened with the passphrase "abc" if it is encrypted.
#![no_main]

use std::sync::Arc;

use diskimage_core::{NodeOptions, Object, Objects, Secret};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut objects = Objects::new();
    let secret = Object::Secret(Secret::new(b"abc".to_vec()));
    objects.add("s", secret).expect("the only one");
    let mut options = NodeOptions::new();
    options.set("encrypt.key-secret", "s");
    diskimage_fuzz::exercise_with(
        &diskimage_formats::QcowFormat,
        bytes,
        &options,
        &Arc::new(objects),
    );
});
