//! `commit`: the disk on top reads the same at every moment.

use diskimage_core::{Device, Progress, Result};

use super::disks::{Disks, Plan, make};
use super::{Command, try_all};
use crate::{Commit, OpenOptions};

const KIB: u64 = 1024;

/// The whole command: into the image `depth` below, and without what is committed afterwards unless it is kept.
fn commit(depth: usize, keep: bool) -> impl Fn(&Disks) -> Result<()> {
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

/// An image with a bit of everything over all of the disk.
fn top(options: &'static str, len: u64) -> Plan {
    Plan::qcow2(options, len)
        .data(3000, 6000, 2)
        .data(50_000, 10_000, 3)
        .zeroes(16 * KIB, 16 * KIB)
        .data(90_000, 5000, 4)
}

#[test]
fn what_is_committed_is_on_top_or_below() {
    let qcow2 = "cluster_size=4k,backing_file=base,backing_fmt=qcow2";
    let small = "cluster_size=512,backing_file=base,backing_fmt=qcow2";
    let subclusters = "cluster_size=16k,extended_l2=on,backing_file=base,backing_fmt=qcow2";
    let raw = "cluster_size=4k,backing_file=base,backing_fmt=raw";
    let base = |options| Plan::qcow2(options, 96 * KIB).data(0, 60_000, 1);
    let below = "cluster_size=4k,backing_file=new,backing_fmt=qcow2";
    let chain = || {
        let middle = Plan::qcow2(below, 80 * KIB)
            .data(20_000, 20_000, 5)
            .zeroes(0, 4096);
        [top(qcow2, 96 * KIB), middle, base("cluster_size=4k")]
    };
    let pair = |options, below| make(&[top(options, 96 * KIB), below]);
    let shorter = Plan::qcow2("cluster_size=4k", 50 * KIB).data(0, 50 * KIB, 1);
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
        command("into raw", pair(raw, Plan::raw(96 * KIB).data(0, 60_000, 1))),
        command(
            "into a shorter raw",
            pair(raw, Plan::raw(50 * KIB).data(0, 50 * KIB, 1)),
        ),
        command("into a shorter base", pair(qcow2, shorter)),
        Command::new("and keep", pair(qcow2, base("cluster_size=4k")), commit(1, true)).gradual(),
        command("into the middle", make(&chain())),
        Command::new("into the bottom", make(&chain()), commit(2, true)).gradual(),
    ];
    try_all(
        "commit",
        &commands.map(Command::guest_data_unchanged),
        (900, 1000),
    );
}
