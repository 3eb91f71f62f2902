//! Arbitrary bytes as a LUKS image, opened with the passphrase "abc".
#![no_main]

use std::sync::Arc;

use diskimage_core::{NodeOptions, Object, Objects, Secret};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut bytes = bytes.to_vec();
    for at in ITERATIONS {
        // A header may ask for hours of key derivation: iterations are limited to 4095.
        if let Some([first, second, third, _]) = bytes.get_mut(at..at + 4) {
            (*first, *second) = (0, 0);
            *third &= 0x0f;
        }
    }
    let mut objects = Objects::new();
    let secret = Object::Secret(Secret::new(b"abc".to_vec()));
    objects.add("s", secret).expect("the only one");
    let mut options = NodeOptions::new();
    options.set("key-secret", "s");
    diskimage_fuzz::exercise_with(&diskimage_formats::Luks, &bytes, &options, &Arc::new(objects));
});

/// The offsets of the iteration counts in a header: of the digest and of the eight key slots.
const ITERATIONS: [usize; 9] = [164, 212, 260, 308, 356, 404, 452, 500, 548];
