//! `commit`: the guest data of the topmost image is the same after every crash.

use diskimage_core::{Device, Progress, Result};

use super::disks::{Disks, ImagePlan, make};
use super::{Command, Least, try_all};
use crate::{Commit, OpenOptions};

const KIB: u64 = 1024;

/// The command: commits to the backing image at `depth`, and empties the topmost image unless `keep` is set.
pub(super) fn commit(depth: usize, keep: bool) -> impl Fn(&Disks) -> Result<()> {
    move |disks| {
        let options = OpenOptions::new().write(true).resize(true).write_below(depth);
        let top = disks.open("top", options)?;
        Commit {
            top: &top,
            depth,
            rate: None,
            progress: Progress::none(),
        }
        .run()?;
        if !keep {
            top.make_empty()?;
            top.flush()?;
        }
        Ok(())
    }
}

/// An image with data, zeroes and unallocated clusters.
fn top(options: &'static str, len: u64) -> ImagePlan {
    ImagePlan::qcow2(options, len)
        .data(3000, 6000, 2)
        .data(50_000, 10_000, 3)
        .zeroes(16 * KIB, 16 * KIB)
        .data(90_000, 5000, 4)
}

#[test]
fn committed_data_is_in_the_top_or_in_the_base() {
    let qcow2 = "cluster_size=4k,backing_file=base,backing_fmt=qcow2";
    let small = "cluster_size=512,backing_file=base,backing_fmt=qcow2";
    let subclusters = "cluster_size=16k,extended_l2=on,backing_file=base,backing_fmt=qcow2";
    let raw = "cluster_size=4k,backing_file=base,backing_fmt=raw";
    let base = |options| ImagePlan::qcow2(options, 96 * KIB).data(0, 60_000, 1);
    let on_new = "cluster_size=4k,backing_file=new,backing_fmt=qcow2";
    let chain = || {
        let middle = ImagePlan::qcow2(on_new, 80 * KIB)
            .data(20_000, 20_000, 5)
            .zeroes(0, 4096);
        [top(qcow2, 96 * KIB), middle, base("cluster_size=4k")]
    };
    let pair = |options, base| make(&[top(options, 96 * KIB), base]);
    let shorter = ImagePlan::qcow2("cluster_size=4k", 50 * KIB).data(0, 50 * KIB, 1);
    let snapshots = base("cluster_size=4k").snapshot("old");
    let command = |name, files| Command::new(name, files, commit(1, false)).gradual();
    let commands = [
        command("into qcow2", pair(qcow2, base("cluster_size=4k"))),
        command("into small clusters", pair(qcow2, base("cluster_size=512"))),
        command("from small clusters", pair(small, base("cluster_size=16k"))),
        command(
            "from subclusters",
            pair(subclusters, base("cluster_size=4k,compat=0.10")),
        ),
        command(
            "into a base with lazy refcounts",
            pair(qcow2, base("cluster_size=4k,lazy_refcounts=on")),
        ),
        command("into a base with a snapshot", pair(qcow2, snapshots)),
        command("into raw", pair(raw, ImagePlan::raw(96 * KIB).data(0, 60_000, 1))),
        command(
            "into a shorter raw",
            pair(raw, ImagePlan::raw(50 * KIB).data(0, 50 * KIB, 1)),
        ),
        command("into a shorter base", pair(qcow2, shorter)),
        Command::new("and keep", pair(qcow2, base("cluster_size=4k")), commit(1, true)).gradual(),
        command("into the middle", make(&chain())),
        Command::new("into the bottom", make(&chain()), commit(2, true)).gradual(),
    ];
    let least = Least {
        crashes: 900,
        faults: 1000,
    };
    try_all("commit", &commands.map(Command::guest_data_unchanged), &least);
}
