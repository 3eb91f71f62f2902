//! `rebase`: the guest data is the same on the old chain and on the new one.

use diskimage_core::{Backing, Progress, Result};

use super::disks::{Disks, Files, ImagePlan, make};
use super::{Command, Least, try_all};
use crate::{OpenOptions, Rebase, check_backing, set_backing};

const KIB: u64 = 1024;
const NEW: Option<(&str, &str)> = Some(("new", "qcow2"));

fn named((name, format): (&str, &str)) -> Backing {
    Backing {
        name: name.into(),
        format: Some(format.to_owned()),
    }
}

/// The command, with the name and the format of the new backing image.
pub(super) fn rebase(
    new: Option<(&'static str, &'static str)>,
    compress: bool,
) -> impl Fn(&Disks) -> Result<()> {
    move |disks| {
        let image = disks.open("top", OpenOptions::new().write(true))?;
        let new_backing = new
            .map(|(name, _)| disks.open(name, OpenOptions::new()))
            .transpose()?;
        let backing = new.map(named);
        check_backing(&image, backing.as_ref(), &OpenOptions::new())?;
        Rebase {
            image: &image,
            new: new_backing.as_ref(),
            compress,
            steps: false,
            progress: Progress::none(),
        }
        .run()?;
        set_backing(&image, backing.as_ref(), &OpenOptions::new())
    }
}

/// The command with `-u`.
pub(super) fn rename(new: Option<(&'static str, &'static str)>) -> impl Fn(&Disks) -> Result<()> {
    move |disks| {
        let options = OpenOptions::new().write(true).no_backing(true);
        set_backing(
            &*disks.open("top", options)?,
            new.map(named).as_ref(),
            &OpenOptions::new(),
        )
    }
}

fn files(options: &'static str) -> Files {
    make(&[
        ImagePlan::qcow2(options, 96 * KIB)
            .data(3000, 6000, 2)
            .zeroes(16 * KIB, 8 * KIB),
        ImagePlan::qcow2("cluster_size=4k", 96 * KIB)
            .data(0, 50_000, 1)
            .data(80_000, 512, 4),
        ImagePlan::qcow2("cluster_size=4k", 64 * KIB)
            .data(0, 30_000, 1)
            .data(40_000, 20_000, 3),
    ])
}

#[test]
fn rebasing_keeps_the_guest_data() {
    let plain = "cluster_size=4k,backing_file=base,backing_fmt=qcow2";
    let small = "cluster_size=512,backing_file=base,backing_fmt=qcow2";
    let subclusters = "cluster_size=16k,extended_l2=on,backing_file=base,backing_fmt=qcow2";
    let old = "cluster_size=4k,compat=0.10,backing_file=base,backing_fmt=qcow2";
    let same_disk = [
        Command::new("onto another", files(plain), rebase(NEW, false)),
        Command::new("onto another, small clusters", files(small), rebase(NEW, false)),
        Command::new(
            "onto another, subclusters",
            files(subclusters),
            rebase(NEW, false),
        ),
        Command::new("onto another, version 2", files(old), rebase(NEW, false)),
        Command::new("onto another, compressed", files(plain), rebase(NEW, true)),
        Command::new("onto nothing", files(plain), rebase(None, false)),
        Command::new("onto nothing, compressed", files(small), rebase(None, true)),
    ]
    .map(Command::guest_data_unchanged);
    let renamed = [
        Command::new("another name", files(plain), rename(NEW)),
        Command::new("another name, small clusters", files(small), rename(NEW)),
        Command::new("no name", files(plain), rename(None)),
    ];
    let commands: Vec<_> = same_disk.into_iter().chain(renamed).collect();
    let least = Least {
        crashes: 500,
        faults: 900,
    };
    try_all("rebase", &commands, &least);
}
