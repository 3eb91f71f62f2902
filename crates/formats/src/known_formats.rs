//! The format names that images record.

/// The format names that an image may record for its backing image, whether this crate has the format or not.
pub(crate) const KNOWN_FORMATS: &[&str] = &[
    "bochs",
    "cloop",
    "dmg",
    "luks",
    "nbd",
    "parallels",
    "qcow",
    "qcow2",
    "qed",
    "raw",
    "vdi",
    "vhdx",
    "vmdk",
    "vpc",
    "vvfat",
    "file",
    "host_device",
];
