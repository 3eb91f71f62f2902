//! Arbitrary bytes as a VHD image, with correct checksums: no mutation would find them.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut bytes = bytes.to_vec();
    let len = bytes.len();
    for start in [0, len.saturating_sub(512)] {
        let Some(footer) = bytes.get_mut(start..start + 512) else {
            continue;
        };
        footer[64..68].fill(0);
        let sum: u32 = footer.iter().map(|byte| u32::from(*byte)).sum();
        footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
    }
    diskimage_fuzz::exercise(&diskimage_formats::Vpc, &bytes);
});
