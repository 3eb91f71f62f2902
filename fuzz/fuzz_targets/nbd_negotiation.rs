//! Arbitrary bytes as the messages of an NBD server up to the end of the negotiation.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    diskimage_protocols::fuzzing::negotiate(bytes);
});
