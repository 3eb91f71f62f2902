//! Arbitrary bytes as a VMDK image, as a descriptor, and as an extent of an image, of each kind.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    diskimage_fuzz::exercise(&diskimage_formats::Vmdk, bytes);
    diskimage_fuzz::exercise_in_parts(&diskimage_formats::Vmdk, bytes, &[7; 1 << 16]);
    for (create_type, kind) in [
        ("vmfsSparse", "VMFSSPARSE"),
        ("seSparse", "SESPARSE"),
        ("twoGbMaxExtentSparse", "SPARSE"),
        ("vmfsRawDeviceMap", "VMFSRDM"),
    ] {
        let descriptor = format!(
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"{create_type}\"\n\
             RDONLY 63 ZERO\nRW 1024 {kind} \"part\"\nNOACCESS 8 FLAT \"other\" 0\n"
        );
        diskimage_fuzz::exercise_in_parts(&diskimage_formats::Vmdk, descriptor.as_bytes(), bytes);
    }
});
