//! Arbitrary bytes as a raw image.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    diskimage_fuzz::exercise(&diskimage_formats::Raw, bytes);
});
