//! Arbitrary bytes as a Parallels image.
#![no_main]

/// The offset of the cluster size, in sectors, in the header.
const TRACKS: std::ops::Range<usize> = 28..32;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // The file is in memory: this bounds the memory for one new cluster.
    let tracks = bytes.get(TRACKS).and_then(|tracks| tracks.first_chunk());
    if tracks.is_none_or(|tracks| u32::from_le_bytes(*tracks) <= 1 << 13) {
        diskimage_fuzz::exercise(&diskimage_formats::Parallels, bytes);
    }
});
