//! Arbitrary bytes as a VHDX image.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| diskimage_fuzz::exercise(&diskimage_formats::Vhdx, bytes));
