//! `vvfat`: a directory of the host as a disk with a FAT file system, which is computed on each read.
//!
//! ```text
//!   sector 0       63                                            (a floppy begins with the boot sector)
//!   ├─────┬────────┼──────┬───────┬───────┬───────────┬────────────────┬────────────────
//!   │ MBR │ zeroes │ boot │ FAT 1 │ FAT 2 │ root      │ cluster 2 ...  │ zeroes
//!   └─────┴────────┴──────┴───────┴───────┴───────────┴────────────────┴────────────────
//! ```
//!
//! Opening reads the directory and its subdirectories, breadth first, and allocates a run of clusters to each directory
//! and file ([`tree`]). The directory entries in the format of the disk, and the start of each run, are kept in memory.
//! Boot sector and FAT are computed and the contents of files read on each read of the disk ([`disk`]). The host
//! directory is never written. Structures are those of Microsoft's FAT specification (fatgen 1.03).

mod disk;
mod entry;
mod geometry;
mod name;
mod tree;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use diskimage_core::name::to_path;
use diskimage_core::options::{OptionDef, OptionKind};
use diskimage_core::{Device, Error, Node, NodeOptions, Note, ReadOnlyView, Result};

use crate::protocol::{Protocol, ProtocolRequest};
use disk::Disk;
use entry::Label;
use geometry::{FatType, Geometry};
use tree::{DirectoryScan, Tree};

/// The driver.
#[derive(Debug)]
pub(crate) struct VvfatDriver;

pub(crate) static VVFAT: VvfatDriver = VvfatDriver;

const OPTIONS: &[OptionDef] = &[
    OptionDef::new("dir", OptionKind::Text, "Host directory to be shown as a disk"),
    OptionDef::new("fat-type", OptionKind::Number, "FAT type: 12, 16 or 32"),
    OptionDef::new("floppy", OptionKind::Flag, "Show a floppy, not a hard disk"),
    OptionDef::new("label", OptionKind::Text, "Volume label"),
    OptionDef::new("rw", OptionKind::Flag, "Make it writable"),
];

impl Protocol for VvfatDriver {
    fn name(&self) -> &'static str {
        "vvfat"
    }

    fn prefixes(&self) -> &'static [&'static str] {
        &["fat"]
    }

    /// As in qemu-img, the keywords before the directory are recognised anywhere in the name.
    fn parse(&self, name: &str) -> Result<NodeOptions> {
        if !name.starts_with("fat:") {
            return Err(Error::invalid("File name string must start with 'fat:'"));
        }
        let has = |word: &str| name.contains(word);
        let fat_type: u32 = match () {
            () if has(":32:") => 32,
            () if has(":16:") => 16,
            () if has(":12:") => 12,
            () => 0,
        };
        let mut options = NodeOptions::new();
        options.set("fat-type", fat_type);
        options.set("floppy", has(":floppy:"));
        options.set("rw", has(":rw:"));
        options.set("dir", directory_of(name));
        Ok(options)
    }

    fn can_hold_image(&self) -> bool {
        false
    }

    fn open(&self, request: ProtocolRequest<'_>) -> Result<Arc<dyn Device>> {
        let given = request.options.clone();
        let options = request.options.take_known(OPTIONS)?;
        let dir = options
            .text("dir")
            .ok_or_else(|| Error::invalid("vvfat block driver requires a 'dir' option"))?;
        let label = Label::parse(options.text("label"))?;
        let floppy = options.flag("floppy") == Some(true);
        let geometry = match options.number("fat-type").unwrap_or(0) {
            0 => Geometry::by_default(floppy),
            12 => Geometry::new(FatType::Fat12, floppy),
            16 => Geometry::new(FatType::Fat16, floppy),
            32 => {
                let text = "FAT32 has not been tested. You are welcome to do so!";
                request.context.tell(&Note::Warning(text.to_owned()));
                Geometry::new(FatType::Fat32, floppy)
            }
            _ => return Err(Error::invalid("Valid FAT types are only 12, 16 and 32")),
        };
        match (options.flag("rw") == Some(true), request.write) {
            (true, false) => {
                return Err(Error::invalid(
                    "Unable to set VVFAT to 'rw' when drive is read-only",
                ));
            }
            (false, true) => return Err(Error::read_only()),
            (true, true) => {
                return Err(Error::unsupported(
                    "Writing to a directory shown as a disk is not supported",
                ));
            }
            (false, false) => {}
        }
        let tree = Tree::read(&DirectoryScan {
            dir: &to_path(dir),
            geometry,
            label: &label,
            context: request.context,
        })?;
        let mut shown = given;
        shown.retain(|name| OPTIONS.iter().any(|option| option.name == name));
        let node = Node {
            driver: self.name(),
            options: shown,
            ..Node::default()
        };
        Ok(Arc::new(ReadOnlyView(Disk::new(
            node,
            label,
            tree,
            request.context.clone(),
        ))))
    }
}

/// The text after the last colon, including a drive letter before that colon, if there is one.
fn directory_of(name: &str) -> &str {
    let Some(colon) = name.rfind(':') else {
        return name;
    };
    let bytes = name.as_bytes();
    let is_drive = colon >= 2 && bytes[colon - 2] == b':' && bytes[colon - 1].is_ascii_alphabetic();
    &name[if is_drive { colon - 1 } else { colon + 1 }..]
}
