//! Arbitrary bytes as a qcow2 image.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    diskimage_fuzz::exercise(&diskimage_formats::Qcow2Format, bytes);
});
