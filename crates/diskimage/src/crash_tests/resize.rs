//! `resize`: the range that is added is zero, and the rest of the guest data is kept.

use diskimage_core::{Preallocation, Result};

use super::disks::{Disks, Files, ImagePlan, make};
use super::{Command, Least, try_all};
use crate::{OpenOptions, ShrinkPolicy};

const KIB: u64 = 1024;

/// The command.
pub(super) fn resize(len: u64, preallocation: Preallocation) -> impl Fn(&Disks) -> Result<()> {
    move |disks| {
        let image = disks.open("top", OpenOptions::new().write(true).resize(true))?;
        crate::Resize::new(len)
            .preallocation(preallocation)
            .policy(ShrinkPolicy::Allow)
            .run(&image)
    }
}

fn files(options: &'static str) -> Files {
    make(&[ImagePlan::qcow2(options, 62 * KIB)
        .data(0, 20_000, 1)
        .data(40_000, 23_000, 2)])
}

/// An overlay that is shorter than its backing image.
fn overlay(options: &'static str) -> Files {
    make(&[
        ImagePlan::qcow2(options, 62 * KIB).data(0, 20_000, 1),
        ImagePlan::qcow2("cluster_size=4k", 128 * KIB).data(0, 128 * KIB, 5),
    ])
}

#[test]
fn a_disk_has_the_old_size_or_the_new_one() {
    let (plain, small) = ("cluster_size=4k", "cluster_size=512");
    let backed = "cluster_size=4k,backing_file=base,backing_fmt=qcow2";
    let backed_small = "cluster_size=512,backing_file=base,backing_fmt=qcow2";
    let backed_sub = "cluster_size=32k,extended_l2=on,backing_file=base,backing_fmt=qcow2";
    let backed_old = "cluster_size=4k,compat=0.10,backing_file=base,backing_fmt=qcow2";
    let raw = || make(&[ImagePlan::raw(62 * KIB).data(0, 62 * KIB, 1)]);
    let snapshot = make(&[ImagePlan::qcow2(plain, 62 * KIB)
        .data(0, 60_000, 1)
        .snapshot("old")]);
    let (off, large) = (Preallocation::Off, 120 * KIB);
    let commands = [
        Command::new("grow", files(plain), resize(large, off)),
        Command::new("grow small clusters", files(small), resize(300 * KIB, off)),
        Command::new(
            "grow with tables",
            files(small),
            resize(large, Preallocation::Metadata),
        ),
        Command::new(
            "grow with storage",
            files(plain),
            resize(large, Preallocation::Falloc),
        ),
        Command::new(
            "grow with zeroes",
            files(plain),
            resize(large, Preallocation::Full),
        ),
        Command::new("grow above another", overlay(backed), resize(large, off)),
        Command::new(
            "grow small clusters above another",
            overlay(backed_small),
            resize(large, off),
        ),
        Command::new(
            "grow with tables above another",
            overlay(backed),
            resize(large, Preallocation::Metadata),
        ),
        Command::new(
            "grow with zeroes above another",
            overlay(backed),
            resize(large, Preallocation::Full),
        ),
        Command::new(
            "grow subclusters above another",
            overlay(backed_sub),
            resize(large, off),
        ),
        Command::new(
            "grow subclusters with storage above another",
            overlay(backed_sub),
            resize(large, Preallocation::Falloc),
        ),
        Command::new(
            "grow version 2 above another",
            overlay(backed_old),
            resize(large, off),
        ),
        Command::new(
            "grow version 2 with tables above another",
            overlay(backed_old),
            resize(large, Preallocation::Metadata),
        ),
        Command::new("grow raw", raw(), resize(large, off)),
        Command::new("shrink", files(plain), resize(30 * KIB, off)),
        Command::new("shrink small clusters", files(small), resize(512, off)),
        Command::new("shrink above another", overlay(backed), resize(30 * KIB, off)),
        Command::new("shrink above a snapshot", snapshot, resize(30 * KIB, off)),
        Command::new("shrink raw", raw(), resize(30 * KIB, off)),
    ];
    let least = Least {
        crashes: 700,
        faults: 900,
    };
    try_all("resize", &commands, &least);
}
