//! `snapshot`: snapshots are taken, applied and deleted atomically.

use std::time::UNIX_EPOCH;

use super::disks::{Disks, Files, ImagePlan, make};
use super::{Command, Least, try_all};
use crate::{OpenOptions, apply_snapshot, create_snapshot, delete_snapshot};

const KIB: u64 = 1024;

fn files(options: &'static str) -> Files {
    make(&[ImagePlan::qcow2(options, 96 * KIB)
        .data(0, 40_000, 1)
        .snapshot("old")
        .data(20_000, 40_000, 2)
        .zeroes(0, 8192)])
}

pub(super) fn create(disks: &Disks) -> diskimage_core::Result<()> {
    let image = disks.open("top", OpenOptions::new().write(true))?;
    create_snapshot(&image, "another", UNIX_EPOCH)
}

pub(super) fn apply(disks: &Disks) -> diskimage_core::Result<()> {
    apply_snapshot(&*disks.open("top", OpenOptions::new().write(true))?, "old")
}

pub(super) fn delete(disks: &Disks) -> diskimage_core::Result<()> {
    delete_snapshot(&*disks.open("top", OpenOptions::new().write(true))?, "old")
}

#[test]
fn snapshots_change_atomically() {
    let small = "cluster_size=512";
    let resized = || {
        make(&[ImagePlan::qcow2(small, 48 * KIB)
            .data(0, 40_000, 1)
            .snapshot("old")
            .resize(96 * KIB)
            .data(20_000, 70_000, 2)])
    };
    let commands = [
        Command::new("create", files("cluster_size=4k"), create),
        Command::new("create in small clusters", files(small), create),
        Command::new(
            "create in subclusters",
            files("cluster_size=16k,extended_l2=on"),
            create,
        ),
        Command::new(
            "create with lazy refcounts",
            files("cluster_size=4k,lazy_refcounts=on"),
            create,
        ),
        Command::new("apply", files("cluster_size=4k"), apply),
        Command::new("apply in version 2", files("cluster_size=4k,compat=0.10"), apply),
        Command::new("apply a smaller disk", resized(), apply),
        Command::new("delete", files("cluster_size=4k"), delete),
        Command::new("delete in small clusters", files(small), delete),
        Command::new("delete of a smaller disk", resized(), delete),
    ];
    let least = Least {
        crashes: 500,
        faults: 900,
    };
    try_all("snapshot", &commands, &least);
}
