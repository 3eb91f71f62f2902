//! The runtime options of an image, checked as in qemu-img.
//!
//! The options for cache sizes and for discarding are checked and otherwise ignored: the metadata cache has pages of a
//! fixed size and a memory limit of its own.

use diskimage_core::options::{OptionDef, OptionKind, Options};
use diskimage_core::{Error, NodeOptions, Result};

use crate::layer_kit::metadata_guard::{Kind, Kinds};
use crate::qcow2::header::Geometry;

/// The named sets of checks: none, those that take constant time, those that need no extra reads, and all.
const TEMPLATES: [(&str, Kinds); 4] = [
    ("none", Kinds::NONE),
    (
        "constant",
        Kinds::of(&[
            Kind::Header,
            Kind::ActiveL1,
            Kind::RefcountTable,
            Kind::SnapshotTable,
            Kind::BitmapDirectory,
            Kind::Shared,
        ]),
    ),
    (
        "cached",
        Kinds::of(&[
            Kind::Header,
            Kind::ActiveL1,
            Kind::ActiveL2,
            Kind::RefcountTable,
            Kind::RefcountBlock,
            Kind::SnapshotTable,
            Kind::InactiveL1,
            Kind::BitmapDirectory,
            Kind::Shared,
        ]),
    ),
    ("all", Kinds::of(&Kind::ALL)),
];
/// The template if the option is not given.
const DEFAULT_TEMPLATE: &str = "cached";

/// The options that switch single checks.
const SINGLE: [(&str, Kind); 9] = [
    ("overlap-check.main-header", Kind::Header),
    ("overlap-check.active-l1", Kind::ActiveL1),
    ("overlap-check.active-l2", Kind::ActiveL2),
    ("overlap-check.refcount-table", Kind::RefcountTable),
    ("overlap-check.refcount-block", Kind::RefcountBlock),
    ("overlap-check.snapshot-table", Kind::SnapshotTable),
    ("overlap-check.inactive-l1", Kind::InactiveL1),
    ("overlap-check.inactive-l2", Kind::InactiveL2),
    ("overlap-check.bitmap-directory", Kind::BitmapDirectory),
];

const OPTIONS: &[OptionDef] = &[
    OptionDef::new("lazy-refcounts", OptionKind::Flag, "Postpone refcount updates"),
    OptionDef::new(
        "pass-discard-request",
        OptionKind::Flag,
        "Pass guest discard requests to the layer below",
    ),
    OptionDef::new(
        "pass-discard-snapshot",
        OptionKind::Flag,
        "Discard what deleting a snapshot frees",
    ),
    OptionDef::new(
        "pass-discard-other",
        OptionKind::Flag,
        "Discard other clusters that become free",
    ),
    OptionDef::new(
        "discard-no-unref",
        OptionKind::Flag,
        "Do not give up discarded clusters",
    ),
    OptionDef::new(
        "overlap-check",
        OptionKind::Text,
        "Which overlap checks to perform",
    ),
    OptionDef::new(
        "overlap-check.template",
        OptionKind::Text,
        "Which overlap checks to perform",
    ),
    OptionDef::new(
        "overlap-check.main-header",
        OptionKind::Flag,
        "Check for the header",
    ),
    OptionDef::new(
        "overlap-check.active-l1",
        OptionKind::Flag,
        "Check for the active L1 table",
    ),
    OptionDef::new(
        "overlap-check.active-l2",
        OptionKind::Flag,
        "Check for active L2 tables",
    ),
    OptionDef::new(
        "overlap-check.refcount-table",
        OptionKind::Flag,
        "Check for the refcount table",
    ),
    OptionDef::new(
        "overlap-check.refcount-block",
        OptionKind::Flag,
        "Check for refcount blocks",
    ),
    OptionDef::new(
        "overlap-check.snapshot-table",
        OptionKind::Flag,
        "Check for the snapshot table",
    ),
    OptionDef::new(
        "overlap-check.inactive-l1",
        OptionKind::Flag,
        "Check for L1 tables of snapshots",
    ),
    OptionDef::new(
        "overlap-check.inactive-l2",
        OptionKind::Flag,
        "Check for L2 tables of snapshots",
    ),
    OptionDef::new(
        "overlap-check.bitmap-directory",
        OptionKind::Flag,
        "Check for the bitmap directory",
    ),
    OptionDef::new("cache-size", OptionKind::Size, "Size of both caches"),
    OptionDef::new("l2-cache-size", OptionKind::Size, "Size of the L2 table cache"),
    OptionDef::new(
        "l2-cache-entry-size",
        OptionKind::Size,
        "Size of an entry of that cache",
    ),
    OptionDef::new(
        "refcount-cache-size",
        OptionKind::Size,
        "Size of the refcount block cache",
    ),
    OptionDef::new(
        "cache-clean-interval",
        OptionKind::Number,
        "Seconds after which unused entries go",
    ),
];

/// Takes the options from the node's options. Returns the kinds of metadata that are guarded.
///
/// # Errors
/// Values that an option does not accept, and options that cannot be combined.
pub(in crate::qcow2) fn parse(node: &mut NodeOptions, geometry: Geometry) -> Result<Kinds> {
    let options = node.take_known(OPTIONS)?;
    check_caches(&options, geometry)?;
    let (short, long) = (
        options.text("overlap-check"),
        options.text("overlap-check.template"),
    );
    if let (Some(short), Some(long)) = (short, long)
        && short != long
    {
        return Err(Error::invalid(format!(
            "Conflicting values for qcow2 options 'overlap-check' ('{short}') and 'overlap-check.template' ('{long}')"
        )));
    }
    let name = short.or(long).unwrap_or(DEFAULT_TEMPLATE);
    let template = TEMPLATES.iter().find(|(template, _)| *template == name);
    let Some(&(_, mut kinds)) = template else {
        return Err(Error::invalid(format!(
            "Unsupported value '{name}' for qcow2 option 'overlap-check'. Allowed are any of the following: none, \
             constant, cached, all"
        )));
    };
    for (option, kind) in SINGLE {
        if let Some(on) = options.flag(option) {
            kinds.set(kind, on);
        }
    }
    Ok(kinds)
}

fn check_caches(options: &Options, geometry: Geometry) -> Result<()> {
    let given = |name| options.size(name).filter(|_| options.is_given(name));
    let (both, l2, refcount) = (
        given("cache-size"),
        given("l2-cache-size"),
        given("refcount-cache-size"),
    );
    if let Some(both) = both {
        if l2.is_some() && refcount.is_some() {
            return Err(Error::invalid(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
            ));
        }
        for (name, part) in [("l2-cache-size", l2), ("refcount-cache-size", refcount)] {
            if part.is_some_and(|part| part > both) {
                return Err(Error::invalid(format!("{name} may not exceed cache-size")));
            }
        }
    }
    let cluster = geometry.cluster_size();
    if let Some(entry) = given("l2-cache-entry-size")
        && !(entry.is_power_of_two() && (512..=cluster).contains(&entry))
    {
        return Err(Error::invalid(format!(
            "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster})"
        )));
    }
    Ok(())
}
