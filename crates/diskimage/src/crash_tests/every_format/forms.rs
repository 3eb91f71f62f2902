//! The writable forms of images.

use std::sync::Arc;

use diskimage_core::{Object, Objects, Secret};
use diskimage_formats::format_by_name;

use crate::crash_tests::disks::{Cast, ImagePlan, Role};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// A form of images: a format, and options that make a difference to what is written when.
#[derive(Debug)]
pub(super) struct Form {
    /// The name in the table.
    pub(super) name: &'static str,
    pub(super) format: &'static str,
    /// The creation options.
    pub(super) options: &'static str,
    /// The unit of allocation.
    pub(super) unit: u64,
    /// The node option that names the key of an encrypted image.
    pub(super) key: Option<&'static str>,
    /// What it is amended with.
    pub(super) amend: Option<&'static str>,
}

const fn form(name: &'static str, format: &'static str, options: &'static str, unit: u64) -> Form {
    Form {
        name,
        format,
        options,
        unit,
        key: None,
        amend: None,
    }
}

impl Form {
    const fn amended(self, list: &'static str) -> Self {
        Self {
            amend: Some(list),
            ..self
        }
    }

    const fn encrypted(self, key: &'static str) -> Self {
        Self {
            key: Some(key),
            ..self
        }
    }
}

/// All of them. Not all can do everything.
pub(super) static FORMS: [Form; 22] = [
    form("raw", "raw", "", 4 * KIB),
    form("qcow2", "qcow2", "cluster_size=4k", 4 * KIB).amended("refcount_bits=64"),
    form(
        "qcow2, version 2",
        "qcow2",
        "cluster_size=4k,compat=0.10",
        4 * KIB,
    )
    .amended("compat=1.1"),
    form(
        "qcow2, lazy refcounts",
        "qcow2",
        "cluster_size=4k,lazy_refcounts=on",
        4 * KIB,
    )
    .amended("lazy_refcounts=off"),
    form(
        "qcow2, extended L2",
        "qcow2",
        "cluster_size=16k,extended_l2=on",
        16 * KIB,
    )
    .amended("lazy_refcounts=on"),
    form(
        "qcow2, data file",
        "qcow2",
        "cluster_size=4k,data_file=data",
        4 * KIB,
    )
    .amended("data_file_raw=off,lazy_refcounts=on"),
    form(
        "qcow2, raw data file",
        "qcow2",
        "cluster_size=4k,data_file=data,data_file_raw=on",
        4 * KIB,
    )
    .amended("lazy_refcounts=on"),
    form(
        "qcow2, LUKS",
        "qcow2",
        "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10",
        64 * KIB,
    )
    .encrypted("encrypt.key-secret")
    .amended("encrypt.state=active,encrypt.new-secret=other,encrypt.keyslot=1,encrypt.iter-time=10"),
    form("qcow", "qcow", "", 4 * KIB),
    form("qed", "qed", "cluster_size=4k,table_size=1", 4 * KIB),
    form("vdi", "vdi", "", MIB),
    form("vdi, static", "vdi", "static=on", MIB),
    form("vhdx", "vhdx", "block_size=1M", MIB),
    form("vhdx, fixed", "vhdx", "block_size=1M,subformat=fixed", MIB),
    form("vpc", "vpc", "force_size=on", 2 * MIB),
    form("vpc, fixed", "vpc", "force_size=on,subformat=fixed", 4 * KIB),
    form("vmdk", "vmdk", "", 64 * KIB),
    form("vmdk, flat", "vmdk", "subformat=monolithicFlat", 4 * KIB),
    form(
        "vmdk, 2 GB sparse",
        "vmdk",
        "subformat=twoGbMaxExtentSparse",
        64 * KIB,
    ),
    form("vmdk, stream", "vmdk", STREAM, 64 * KIB),
    form("parallels", "parallels", "cluster_size=16k", 16 * KIB),
    form("luks", "luks", "key-secret=key,iter-time=10", 4 * KIB)
        .encrypted("key-secret")
        .amended("state=active,new-secret=other,keyslot=1,iter-time=10"),
];

const STREAM: &str = "subformat=streamOptimized";

impl Form {
    /// The length of the disk, which is not a multiple of any unit.
    pub(super) fn size(&self) -> u64 {
        (3 * self.unit).max(32 * KIB) + 5 * 512
    }

    /// A new image.
    pub(super) fn plan(&self) -> ImagePlan {
        ImagePlan::new(self.format, self.options, self.size())
    }

    /// A new overlay of "base", which has the format `backing`.
    pub(super) fn overlay(&self, backing: &str) -> ImagePlan {
        let comma = if self.options.is_empty() { "" } else { "," };
        let options = format!("{}{comma}backing_file=base,backing_fmt={backing}", self.options);
        ImagePlan::new(self.format, options, self.size())
    }

    /// Whether it can have a backing image, and be changed.
    pub(super) fn can_be_overlay(&self) -> bool {
        let format = format_by_name(self.format).expect("known");
        // All of a raw data file is the disk.
        let is_raw = self.options.contains("data_file_raw=on");
        format.properties().has_backing && !is_raw && self.can_change()
    }

    /// Whether what is written once can be changed.
    pub(super) fn can_change(&self) -> bool {
        self.options != STREAM
    }

    /// The file of the image called `name`, and its parts.
    fn roles(&self, name: &str, objects: &Arc<Objects>) -> Vec<Role> {
        let mut role = Role::image(name, self.format);
        role.options = self
            .key
            .iter()
            .map(|option| (option.to_string(), "key"))
            .collect();
        let parts = self.plan().parts(name, objects);
        let parts = parts.iter().map(|part| Role::part(part));
        std::iter::once(role).chain(parts).collect()
    }
}

/// The files of images by name, each with its parts. The first one is opened with the keys of all.
pub(super) fn cast(images: &[(&str, &Form)]) -> Arc<Cast> {
    let objects = objects();
    let mut roles: Vec<Role> = Vec::new();
    for (name, form) in images {
        if let (Some(top), Some(key)) = (roles.first_mut().filter(|_| *name == "base"), form.key) {
            top.options.push((format!("backing.{key}"), "key"));
        }
        roles.extend(form.roles(name, &objects));
    }
    Arc::new(Cast { roles, objects })
}

fn objects() -> Arc<Objects> {
    let mut objects = Objects::new();
    for id in ["key", "other"] {
        let secret = Object::Secret(Secret::new(id.as_bytes().to_vec()));
        objects.add(id, secret).expect("a new identifier");
    }
    Arc::new(objects)
}
