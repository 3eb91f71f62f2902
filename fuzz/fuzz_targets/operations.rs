//! Operations on a new image of each format, against an array of bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| diskimage_fuzz::operations::run(bytes));
