//! Arbitrary bytes as a VMDK image, and as the one extent of an image, of each kind.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    diskimage_fuzz::exercise(&diskimage_formats::Vmdk, bytes);
    for (create_type, kind) in [("vmfsSparse", "VMFSSPARSE"), ("seSparse", "SESPARSE"), ("twoGbMaxExtentSparse", "SPARSE")] {
        let descriptor = format!(
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"{create_type}\"\n\
             RW 1024 {kind} \"part\"\n"
        );
        diskimage_fuzz::exercise_in_parts(&diskimage_formats::Vmdk, descriptor.as_bytes(), bytes);
    }
});
