//! The creation options: their table, and their checked values.

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{Error, Preallocation, Result};

use super::encrypt::Encryption;
use super::header::{Compression, Geometry, limit};
use crate::encryption::legacy_aes;
use crate::known_formats::KNOWN_FORMATS;
use crate::luks::options as luks;

// The options that can be changed later, too.
pub(super) const COMPAT: OptionDef = OptionDef::new(
    "compat",
    OptionKind::Text,
    "Compatibility level (v2 [0.10] or v3 [1.1])",
);
pub(super) const DATA_FILE: OptionDef = OptionDef::new(
    "data_file",
    OptionKind::Text,
    "File name of an external data file",
);
pub(super) const DATA_FILE_RAW: OptionDef = OptionDef::new(
    "data_file_raw",
    OptionKind::Flag,
    "The external data file must stay valid as a raw image",
);
pub(super) const LAZY_REFCOUNTS: OptionDef =
    OptionDef::new("lazy_refcounts", OptionKind::Flag, "Postpone refcount updates");
pub(super) const REFCOUNT_BITS: OptionDef = OptionDef::new(
    "refcount_bits",
    OptionKind::Number,
    "Width of a reference count entry in bits",
);

/// The options of `create`, in the order in which qemu-img prints their values.
pub(super) const CREATE: &[OptionDef] = &[
    legacy_aes::ENCRYPTION,
    OptionDef::new(
        "encrypt.format",
        OptionKind::Text,
        "Encrypt the image, format choices: 'aes', 'luks'",
    ),
    OptionDef::new(
        "encrypt.key-secret",
        OptionKind::Text,
        "ID of secret providing qcow AES key or LUKS passphrase",
    ),
    luks::CIPHER_ALG.named("encrypt.cipher-alg"),
    luks::CIPHER_MODE.named("encrypt.cipher-mode"),
    luks::IVGEN_ALG.named("encrypt.ivgen-alg"),
    luks::IVGEN_HASH_ALG.named("encrypt.ivgen-hash-alg"),
    luks::HASH_ALG.named("encrypt.hash-alg"),
    luks::ITER_TIME.named("encrypt.iter-time"),
    OptionDef::new("cluster_size", OptionKind::Size, "qcow2 cluster size").or("65536"),
    OptionDef::new("extended_l2", OptionKind::Flag, "Extended L2 tables").or("off"),
    OptionDef::new(
        "preallocation",
        OptionKind::Text,
        "Preallocation mode (allowed values: off, metadata, falloc, full)",
    ),
    OptionDef::new(
        "compression_type",
        OptionKind::Text,
        "Compression method used for image cluster compression",
    )
    .or("zlib"),
    OptionDef::COMPRESSION_LEVEL,
    OptionDef::SIZE,
    COMPAT,
    OptionDef::BACKING_FILE,
    OptionDef::BACKING_FMT,
    DATA_FILE,
    DATA_FILE_RAW,
    LAZY_REFCOUNTS.or("off"),
    REFCOUNT_BITS.or("16"),
];

/// Which of qemu-img's messages are used for an invalid value: qemu-img checks the options of `create` as parameters of
/// its command `blockdev-create`, those of `measure` as options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wording {
    Parameters,
    Options,
}

impl Wording {
    fn not_accepted(self, parameter: &str, value: &str) -> Error {
        Error::invalid(match (self, parameter) {
            (Self::Options, "version") => format!("Invalid compatibility level: '{value}'"),
            (Self::Options, "preallocation") => format!("invalid parameter value: {value}"),
            _ => format!("Parameter '{parameter}' does not accept value '{value}'"),
        })
    }

    fn version_3(self) -> &'static str {
        match self {
            Self::Parameters => "version=v3",
            Self::Options => "compat=1.1",
        }
    }
}

/// Checked values of the creation options.
#[derive(Clone, Debug)]
pub(super) struct CreateOptions {
    pub(super) version: u32,
    pub(super) geometry: Geometry,
    pub(super) compression: Compression,
    pub(super) lazy_refcounts: bool,
    pub(super) preallocation: Preallocation,
    pub(super) backing_file: Option<String>,
    pub(super) backing_format: Option<String>,
    pub(super) data_file: Option<String>,
    pub(super) data_file_raw: bool,
    pub(super) encryption: Option<Encryption>,
}

impl CreateOptions {
    /// Checks the options against each other, with qemu-img's messages and in its order.
    ///
    /// # Errors
    /// The first option that does not fit.
    pub(super) fn parse(options: &Options, wording: Wording) -> Result<Self> {
        // `measure` handles the options of encryption by itself.
        let is_created = wording == Wording::Parameters;
        let encryption_format = if is_created {
            legacy_aes::wanted_format(options)?
        } else {
            None
        };
        let version = match options.text("compat") {
            Some("0.10" | "v2") => 2,
            None | Some("1.1" | "v3") => 3,
            Some(other) => return Err(wording.not_accepted("version", other)),
        };
        let encryption = if is_created {
            Encryption::read(encryption_format, options)?
        } else {
            None
        };
        let preallocation = match options.text("preallocation") {
            None => Preallocation::Off,
            Some(name) => {
                Preallocation::from_name(name).ok_or_else(|| wording.not_accepted("preallocation", name))?
            }
        };
        let compression = match options.text("compression_type") {
            None | Some("zlib") => Compression::Zlib,
            Some("zstd") => Compression::Zstd,
            Some(other) => return Err(wording.not_accepted("compression-type", other)),
        };
        let (cluster_bits, extended_l2) = parse_clusters(options, version, is_created)?;
        let backing_format = options.text("backing_fmt");
        if let Some(name) = backing_format.filter(|name| is_created && !KNOWN_FORMATS.contains(name)) {
            return Err(wording.not_accepted("backing-fmt", name));
        }
        let checked = Self {
            version,
            geometry: Geometry {
                cluster_bits,
                refcount_order: refcount_order(options, version, wording)?,
                extended_l2,
            },
            compression,
            lazy_refcounts: options.flag("lazy_refcounts").unwrap_or(false),
            preallocation,
            backing_file: options
                .text("backing_file")
                .filter(|name| !name.is_empty())
                .map(str::to_owned),
            backing_format: backing_format.map(str::to_owned),
            data_file: options.text("data_file").map(str::to_owned),
            data_file_raw: options.flag("data_file_raw").unwrap_or(false),
            encryption,
        };
        // As in qemu-img, `measure` does not check options against each other.
        if is_created {
            checked.check_together()?;
        }
        Ok(checked)
    }

    fn check_together(&self) -> Result<()> {
        if self.preallocation != Preallocation::Off
            && self.backing_file.is_some()
            && !self.geometry.extended_l2
        {
            return Err(Error::invalid(
                "Backing file and preallocation can only be used at the same time if extended_l2 is on",
            ));
        }
        if self.lazy_refcounts && self.version < 3 {
            return Err(Error::invalid(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            ));
        }
        if self.data_file.is_some() && self.version < 3 {
            require_v3(self.version, "External data files are")?;
        }
        if self.data_file_raw && self.data_file.is_none() {
            return Err(Error::invalid("data-file-raw requires data-file"));
        }
        if self.data_file_raw && self.backing_file.is_some() {
            return Err(Error::invalid(
                "Backing file and data-file-raw cannot be used at the same time",
            ));
        }
        if self.backing_format.is_some() && self.backing_file.is_none() {
            return Err(Error::invalid(
                "Backing format cannot be used without backing file",
            ));
        }
        if self.compression != Compression::Zlib {
            require_v3(self.version, "Non-zlib compression type is")?;
        }
        Ok(())
    }
}

/// The size of clusters, as a power of two, and whether L2 entries are extended.
fn parse_clusters(options: &Options, version: u32, is_created: bool) -> Result<(u32, bool)> {
    let extended_l2 = options.flag("extended_l2").unwrap_or(false);
    let cluster_size = options.size("cluster_size").unwrap_or(65536);
    let cluster_bits = cluster_size.trailing_zeros();
    let in_range = (limit::MIN_CLUSTER_BITS..=limit::MAX_CLUSTER_BITS).contains(&cluster_bits);
    if !cluster_size.is_power_of_two() || !in_range {
        return Err(Error::invalid(
            "Cluster size must be a power of two between 512 and 2048k",
        ));
    }
    if extended_l2 {
        if is_created {
            require_v3(version, "Extended L2 entries are")?;
        }
        if cluster_size < limit::EXTENDED_L2_CLUSTER {
            return Err(Error::invalid(format!(
                "Extended L2 entries are only supported with cluster sizes of at least {} bytes",
                limit::EXTENDED_L2_CLUSTER
            )));
        }
    }
    Ok((cluster_bits, extended_l2))
}

fn refcount_order(options: &Options, version: u32, wording: Wording) -> Result<u32> {
    let bits = options.number("refcount_bits").unwrap_or(16);
    if !bits.is_power_of_two() || bits > 64 {
        return Err(Error::invalid(
            "Refcount width must be a power of two and may not exceed 64 bits",
        ));
    }
    if version < 3 && bits != 16 {
        return Err(Error::invalid(format!(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use {} or greater)",
            wording.version_3()
        )));
    }
    Ok(bits.trailing_zeros())
}

fn require_v3(version: u32, what: &str) -> Result<()> {
    if version >= 3 {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{what} only supported with compatibility level 1.1 and above (use version=v3 or greater)"
    )))
}
