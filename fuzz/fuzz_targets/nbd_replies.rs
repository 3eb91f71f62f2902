//! Arbitrary bytes as the replies of an NBD server.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    diskimage_protocols::fuzzing::replies(bytes);
});
