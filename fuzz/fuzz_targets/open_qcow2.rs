//! Arbitrary bytes as a qcow2 image.
#![no_main]

use std::sync::Arc;

use diskimage_core::{NodeOptions, Object, Objects, Secret};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut objects = Objects::new();
    let secret = Object::Secret(Secret::new(b"abc".to_vec()));
    objects.add("s", secret).expect("the only one");
    let mut options = NodeOptions::new();
    // Images with the legacy encryption get a key. LUKS would take minutes to derive one.
    if bytes.get(32..36) == Some(&[0, 0, 0, 1]) {
        options.set("encrypt.key-secret", "s");
    }
    diskimage_fuzz::exercise_with(
        &diskimage_formats::Qcow2Format,
        bytes,
        &options,
        &Arc::new(objects),
    );
});
