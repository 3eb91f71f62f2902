//! The details that `info` prints.

use diskimage_core::{Detail, DetailValue, FileRole, Info, NamedFile};

use super::VmdkLayer;
use super::descriptor::Access;
use super::extent::Extent;

impl VmdkLayer {
    /// The details of the image, in the order in which `info` prints them.
    pub(super) fn collect_info(&self) -> Info {
        let create_type = self.descriptor.create_type.clone().unwrap_or_default();
        let all = self.extents();
        let separate = all.iter().filter(|extent| extent.has_part());
        let extents = all.iter().map(|extent| DetailValue::Group(details(extent)));
        Info {
            cluster_size: (self.grain > 1).then_some(self.grain),
            specific: Some(vec![
                Detail::number("cid", self.lock().cid.into()),
                Detail::number("parent-cid", self.descriptor.parent_cid.into()),
                Detail::text("create-type", create_type),
                Detail {
                    name: "extents",
                    value: DetailValue::List(extents.collect()),
                },
            ]),
            other_files: separate
                .map(|extent| NamedFile::new(FileRole::Extent, extent.name.as_str()))
                .collect(),
            ..Info::default()
        }
    }
}

fn details(extent: &Extent) -> Vec<Detail> {
    let mut details = Vec::new();
    let geometry = extent.geometry();
    if geometry.is_some_and(|geometry| geometry.compressed) {
        details.push(Detail::flag("compressed", true));
    }
    details.push(Detail::number("virtual-size", extent.len));
    details.push(Detail::text("filename", extent.name.as_str()));
    if let Some(geometry) = geometry {
        details.push(Detail::number("cluster-size", geometry.grain));
    }
    details.push(Detail::text("format", extent.kind.map_or("", |kind| kind.name())));
    if extent.access != Access::ReadWrite {
        details.push(Detail::text("access", extent.access.name()));
    }
    details
}
