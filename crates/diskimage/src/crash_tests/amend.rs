//! `amend`: the guest data is the same in another version of the format.

use diskimage_core::options::Options;
use diskimage_core::{AmendRequest, Progress, Result};
use diskimage_formats::format_by_name;

use super::disks::{Disks, ImagePlan, make};
use super::{Command, Least, try_all};
use crate::OpenOptions;

const KIB: u64 = 1024;

/// The command with the options `list`.
pub(super) fn amend(list: &'static str) -> impl Fn(&Disks) -> Result<()> {
    move |disks| {
        let image = disks.open("top", OpenOptions::new().write(true))?;
        let format = format_by_name(image.layer().format()).expect("known");
        let mut options = Options::new(format.properties().amend_options.expect("can be amended"));
        options.parse(list).expect("valid");
        image.amend(&AmendRequest::new(
            &options,
            &disks.cast.objects,
            &Progress::none(),
        ))
    }
}

fn plan(options: &'static str) -> ImagePlan {
    ImagePlan::qcow2(options, 96 * KIB)
        .data(0, 40_000, 1)
        .zeroes(8192, 4096)
}

#[test]
fn amending_keeps_the_guest_data() {
    let command = |name, options, list| Command::new(name, make(&[plan(options)]), amend(list));
    let overlay = || {
        make(&[
            plan("cluster_size=4k,backing_file=base,backing_fmt=qcow2"),
            ImagePlan::qcow2("cluster_size=4k", 128 * KIB).data(0, 128 * KIB, 5),
        ])
    };
    let end_inside_a_cluster = make(&[
        ImagePlan::qcow2("cluster_size=4k,backing_file=base,backing_fmt=qcow2", 62 * KIB).data(0, 10_000, 1),
        ImagePlan::qcow2("cluster_size=4k", 128 * KIB).data(0, 128 * KIB, 5),
    ]);
    let snapshot = || make(&[plan("cluster_size=4k").snapshot("old").data(30_000, 20_000, 2)]);
    let same_disk = [
        command("down", "cluster_size=4k", "compat=0.10"),
        command("down in small clusters", "cluster_size=512", "compat=0.10"),
        command(
            "down with lazy refcounts",
            "cluster_size=4k,lazy_refcounts=on",
            "compat=0.10",
        ),
        Command::new("down above another", overlay(), amend("compat=0.10")),
        Command::new("down with a snapshot", snapshot(), amend("compat=0.10")),
        command("up", "cluster_size=4k,compat=0.10", "compat=1.1"),
        command(
            "up and lazy",
            "cluster_size=4k,compat=0.10",
            "compat=1.1,lazy_refcounts=on",
        ),
        command("wider counts", "cluster_size=512", "refcount_bits=64"),
        command("narrower counts", "cluster_size=4k", "refcount_bits=1"),
        Command::new(
            "narrower counts with a snapshot",
            snapshot(),
            amend("refcount_bits=2"),
        ),
        command(
            "up and wider counts",
            "cluster_size=4k,compat=0.10",
            "compat=1.1,refcount_bits=32",
        ),
        command("lazy refcounts", "cluster_size=4k", "lazy_refcounts=on"),
        command(
            "no lazy refcounts",
            "cluster_size=4k,lazy_refcounts=on",
            "lazy_refcounts=off",
        ),
    ]
    .map(Command::guest_data_unchanged);
    let resized = [
        command("larger", "cluster_size=512", "size=160k"),
        Command::new("larger above another", end_inside_a_cluster, amend("size=160k")),
        command("smaller", "cluster_size=512", "size=24k"),
        command(
            "everything",
            "cluster_size=512,compat=0.10",
            "compat=1.1,refcount_bits=8,size=160k",
        ),
    ];
    let commands: Vec<_> = same_disk.into_iter().chain(resized).collect();
    let least = Least {
        crashes: 500,
        faults: 1000,
    };
    try_all("amend", &commands, &least);
}
