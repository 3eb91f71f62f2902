//! Arbitrary bytes as a DMG image.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    diskimage_fuzz::exercise(&diskimage_formats::Dmg, bytes);
});
