//! Arbitrary bytes as a cluster that is compressed, stored in a qcow2 image and read back. The first byte is the size of
//! clusters.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Some((size, bytes)) = bytes.split_first() {
        diskimage_fuzz::encode_cluster(9 + u32::from(size % 13), bytes);
    }
});
