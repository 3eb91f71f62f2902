//! Arbitrary bytes as what an NBD server says up to the choice of the export.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    diskimage_protocols::fuzzing::negotiate(bytes);
});
