//! The options for the growth of the file.

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{Error, Preallocation, Result};

/// The options of opening an image.
pub(super) const OPTIONS: &[OptionDef] = &[
    OptionDef::new(
        "prealloc-size",
        OptionKind::Size,
        "Preallocation size on image expansion",
    ),
    OptionDef::new(
        "prealloc-mode",
        OptionKind::Text,
        "Preallocation mode on image expansion",
    ),
];

/// The options for preallocation; `None` if the file is to grow by what is needed only.
pub(super) fn growth(options: &Options) -> Result<Option<(Preallocation, u64)>> {
    if !options.is_given("prealloc-mode") && !options.is_given("prealloc-size") {
        return Ok(None);
    }
    let mode = match options.text("prealloc-mode").unwrap_or("falloc") {
        "falloc" => Preallocation::Falloc,
        "truncate" => Preallocation::Off,
        other => return Err(Error::invalid(format!("invalid parameter value: {other}"))),
    };
    Ok(Some((
        mode,
        options.size("prealloc-size").unwrap_or(DEFAULT_GROWTH),
    )))
}

/// The default of `prealloc-size`, as in qemu-img.
const DEFAULT_GROWTH: u64 = 128 << 20;
