//! Arbitrary bytes as a DMG image, opened with the passphrase "abc" if they are an encrypted container.
#![no_main]

use std::sync::Arc;

use diskimage_core::{NodeOptions, Object, Objects, Secret};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if !bytes.starts_with(b"encrcdsa") {
        return diskimage_fuzz::exercise(&diskimage_formats::Dmg, bytes);
    }
    let mut bytes = bytes.to_vec();
    // A key may ask for seconds of key derivation: iterations are limited to 4095, in entries at multiples of 32 bytes.
    for entry in bytes.chunks_mut(32).skip(3) {
        if let [_, _, _, 103, 0, 0, 0, 0, first, second, third, ..] = entry {
            (*first, *second) = (0, 0);
            *third &= 0x0f;
        }
    }
    let mut objects = Objects::new();
    let secret = Object::Secret(Secret::new(b"abc".to_vec()));
    objects.add("s", secret).expect("the only one");
    let mut options = NodeOptions::new();
    options.set("key-secret", "s");
    diskimage_fuzz::exercise_with(&diskimage_formats::Dmg, &bytes, &options, &Arc::new(objects));
});
