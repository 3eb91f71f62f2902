//! Disk image formats: the drivers that map guest offsets to host offsets in the files of an image.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

mod bochs;
mod cloop;
mod codec;
#[cfg(test)]
mod cut_off;
#[cfg(test)]
mod damage;
mod dmg;
mod encryption;
mod known_formats;
mod layer_kit;
mod luks;
mod parallels;
mod qcow;
mod qcow2;
mod qed;
mod raw;
#[cfg(test)]
mod testing;
mod vdi;
mod vhdx;
mod vmdk;
mod vpc;

use diskimage_core::Format;

pub use bochs::Bochs;
pub use cloop::Cloop;
pub use dmg::Dmg;
pub use encryption::{Zeroizing, decrypt_secret};
pub use luks::Luks;
pub use parallels::Parallels;
pub use qcow::QcowFormat;
pub use qcow2::Qcow2Format;
pub use qed::QedFormat;
pub use raw::{Raw, bare_layer, window_layer};
pub use vdi::Vdi;
pub use vhdx::Vhdx;
pub use vmdk::Vmdk;
pub use vpc::Vpc;

/// Every format, in the order in which they are probed and listed. As in qemu-img, of two formats with the same score
/// the first one wins: VDI's magic is at offset 64, so a file that begins with another format's magic may have it too.
pub static FORMATS: &[&dyn Format] = &[
    &Raw,
    &Parallels,
    &QedFormat,
    &Vhdx,
    &Vmdk,
    &Vpc,
    &Vdi,
    &Qcow2Format,
    &QcowFormat,
    &Luks,
    &Bochs,
    &Cloop,
    &Dmg,
];

/// The format called `name`.
pub fn format_by_name(name: &str) -> Option<&'static dyn Format> {
    FORMATS.iter().copied().find(|format| format.name() == name)
}
