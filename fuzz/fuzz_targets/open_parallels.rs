//! Arbitrary bytes as a Parallels image.
#![no_main]

/// Where the header says how many sectors a cluster has.
const TRACKS: std::ops::Range<usize> = 28..32;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // The file is in memory here: one new cluster would take as much of it.
    let tracks = bytes.get(TRACKS).and_then(|tracks| tracks.first_chunk());
    if tracks.is_none_or(|tracks| u32::from_le_bytes(*tracks) <= 1 << 13) {
        diskimage_fuzz::exercise(&diskimage_formats::Parallels, bytes);
    }
});
