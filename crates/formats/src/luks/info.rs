//! The facts about a volume that `info` prints.

use crate::encryption::IvAlg;
use diskimage_core::{Detail, DetailValue};

use super::header::{STRIPES, Slot};
use super::volume::Volume;

impl Volume {
    /// The facts in the order in which `info` prints them.
    pub(crate) fn details(&self) -> Vec<Detail> {
        let header = self.header();
        let spec = header.spec;
        let mut details = vec![
            Detail::text("ivgen-alg", spec.iv.name()),
            Detail::flag("detached-header", self.is_detached()),
            Detail::text("hash-alg", header.hash.name()),
            Detail::text("cipher-alg", spec.cipher.name()),
            Detail::text("uuid", header.uuid.clone()),
        ];
        if let (IvAlg::Essiv, Some(hash)) = (spec.iv, spec.iv_hash) {
            details.push(Detail::text("ivgen-hash-alg", hash.name()));
        }
        details.push(Detail::text("cipher-mode", spec.mode.name()));
        details.push(Detail {
            name: "slots",
            value: DetailValue::List(header.slots.iter().map(slot_details).collect()),
        });
        details.push(Detail::number("payload-offset", header.payload_offset));
        details.push(Detail::number(
            "master-key-iters",
            u64::from(header.digest_iterations),
        ));
        details
    }
}

fn slot_details(slot: &Slot) -> DetailValue {
    let mut details = vec![Detail::flag("active", slot.active)];
    if slot.active {
        details.push(Detail::number("iters", u64::from(slot.iterations)));
    }
    details.push(Detail::number("key-offset", slot.material));
    if slot.active {
        details.push(Detail::number("stripes", u64::from(STRIPES)));
    }
    DetailValue::Group(details)
}
