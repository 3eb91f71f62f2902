//! Arbitrary bytes as a file of pre-shared keys.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    diskimage_protocols::fuzzing::keys(bytes);
});
